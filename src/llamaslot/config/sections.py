"""The sections of config.yaml, each a frozen model. docs/configuration.md describes each key."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationInfo

from llamaslot.config.keys import read_keys
from llamaslot.config.tls import TlsConfig
from llamaslot.config.values import (
    GIB,
    MIB,
    Count,
    FilePath,
    Port,
    Seconds,
    Section,
    Size,
    anchored,
    key_file,
    number,
    origin,
    read_key,
    server_url,
    strong_key,
)
from llamaslot.errors import ConfigError
from llamaslot.llama.managed.process import EMBEDDED_MODEL, ManagedConfig
from llamaslot.llama.routes import Gate


def _managed(value: object, info: ValidationInfo) -> object:
    """``command`` and ``args`` may be one line, as typed in a shell, and contain numbers; paths become absolute."""
    if not isinstance(value, dict):
        return value
    value = dict(value)
    for key in ("command", "args"):
        words = value.get(key)
        if isinstance(words, str):
            value[key] = _split(words, key)
        elif isinstance(words, list):
            value[key] = [str(word) if type(word) in (int, float) else word for word in words]
    if isinstance(model := value.get("model"), str) and model not in ("", EMBEDDED_MODEL):
        value["model"] = str(anchored(Path(model), info))
    return value


def _split(line: str, key: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise ValueError(f"{key} cannot be split into words ({error}); write a list instead") from error


class ListenConfig(Section):
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Port = 8081
    max_body: Annotated[Size, Field(gt=0)] = 64 * MIB
    read_timeout_s: Annotated[Seconds, Field(gt=0)] = 30.0
    max_connections: Annotated[Count, Field(gt=0)] | None = None
    tls: TlsConfig | None = None
    cors: tuple[Annotated[str, AfterValidator(origin)], ...] = ()


def _keys_file(path: Path) -> Path:
    try:
        read_keys(path)
    except ConfigError as error:
        raise ValueError(f"{path}: {'; '.join(error.faults)}") from None
    return path


def _strong_key_file(path: Path) -> Path:
    strong_key(read_key(path))
    return path


def _strong_secret(key: SecretStr) -> SecretStr:
    strong_key(key.get_secret_value())
    return key


class AuthConfig(Section):
    """Who may use llamaslot, and who may use its own pages."""

    keys_file: Annotated[FilePath, AfterValidator(_keys_file)] | None = None
    allow_anonymous: bool = False
    admin_key: Annotated[SecretStr, AfterValidator(_strong_secret)] | None = None
    admin_key_file: Annotated[FilePath, AfterValidator(_strong_key_file)] | None = None

    def resolve_admin_key(self) -> str | None:
        """The admin key. Raises ConfigError if the file, readable at the start, is not readable any more."""
        return _resolved(self.admin_key, self.admin_key_file, "auth.admin_key_file")


def _resolved(key: SecretStr | None, path: Path | None, name: str) -> str | None:
    if key is not None:
        return key.get_secret_value()
    if path is None:
        return None
    try:
        return read_key(path)
    except ValueError as error:
        raise ConfigError(str(path), [f"{name}: {error}"]) from error


class BackendConfig(Section):
    """One llama-server: its address (``url``) or how to run it (``managed``)."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] = "llama"
    url: Annotated[str, AfterValidator(server_url)] | None = None
    slot_save_path: FilePath | None = None
    api_key: Annotated[SecretStr, Field(min_length=1)] | None = None
    api_key_file: Annotated[FilePath, AfterValidator(key_file)] | None = None
    managed: Annotated[ManagedConfig, BeforeValidator(_managed)] | None = None

    def resolve_api_key(self) -> str | None:
        """The key that llama-server requires, read from its file at each call; None if it requires none.

        Raises ConfigError if the file, readable at the start, is not readable any more.
        """
        return _resolved(self.api_key, self.api_key_file, "api_key_file")


def default_meta_dir() -> Path:
    """systemd's StateDirectory if there is one, else /var/lib/llamaslot for root, else the XDG state directory."""
    if given := os.environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib/llamaslot")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "llamaslot"


class StoreConfig(Section):
    quota: Size = 20 * GIB
    max_files: Annotated[Count, Field(gt=0)] = 10_000
    min_free: Size = 1 * GIB
    meta_dir: FilePath = Field(default_factory=default_meta_dir)
    idle_save_s: Seconds = 2.0


class RoutingConfig(Section):
    similarity_min: Annotated[float, BeforeValidator(number), Field(gt=0, le=1)] = 0.85
    small_prompt_tokens: Count = 1024


class CacheConfig(Section):
    isolation: Literal["shared", "per_user"] = "shared"


class PrefillConfig(Section):
    chunk_threshold_s: Seconds | None = None
    decode_share: Annotated[float, BeforeValidator(number), Field(ge=0, le=0.9)] = 0.1
    chunk_s: Annotated[Seconds, Field(gt=0)] = 0.5
    max_yield_s: Seconds = 2.0
    starvation_s: Seconds = 120.0


class QueueConfig(Section):
    max_waiting: Count = 256
    max_wait_s: Annotated[Seconds, Field(gt=0)] | None = 600.0
    user_max_waiting: Annotated[Count, Field(gt=0)] | None = None
    user_max_running: Annotated[Count, Field(gt=0)] | None = None
    small_request_max_overtake_s: Seconds = 10.0
    return_grace_s: Seconds = 10.0


class TimeoutsConfig(Section):
    first_token_s: Annotated[Seconds, Field(gt=0)] | None = None
    total_s: Annotated[Seconds, Field(gt=0)] | None = None
    watchdog_s: Annotated[Seconds, Field(gt=0)] | None = 300.0


class StreamConfig(Section):
    keepalive_s: Annotated[Seconds, Field(gt=0)] = 10.0
    comments: bool = True


class PassthroughConfig(Section):
    allow: tuple[Gate, ...] = ()


class ShutdownConfig(Section):
    save_s: Seconds = 60.0
    drain_s: Seconds = 30.0


class LogConfig(Section):
    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value),
    ] = "info"
    prompts: bool = False
