"""The sections of config.yaml, each a frozen model with its keys. docs/configuration.md says more about each key."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationInfo

from llamaslot.config.keys import read_keys
from llamaslot.config.tls import TlsConfig
from llamaslot.config.values import (
    Count,
    FilePath,
    Port,
    Seconds,
    Section,
    Size,
    anchored,
    chat_file,
    key_file,
    origin,
    read_key,
    server_url,
    strong_key,
)
from llamaslot.errors import ConfigError, how_to_add
from llamaslot.llama.managed.process import EMBEDDED_MODEL, ManagedConfig
from llamaslot.llama.routes import Gate
from llamaslot.scheduling.settings import PrefillSettings, QueueLimits, SchedulingSettings
from llamaslot.sizes import GIB, MIB, number

_ROUTING = SchedulingSettings()  # the defaults of ``routing``
_PREFILL = PrefillSettings()  # the defaults of ``prefill``
_QUEUE = QueueLimits()  # the defaults of ``queue``


def _managed(value: object, info: ValidationInfo) -> object:
    """Return the section ``managed`` with ``command`` and ``args`` as lists of strings: in the file each may be one
    line, as typed in a shell, and a list may have numbers. A relative path of ``model`` becomes absolute. A value that
    is no mapping is returned unchanged, for the check that follows.
    """
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


#: Values of ``listen.host`` that stand for all addresses of this machine, each with the address to connect to locally.
EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class ListenConfig(Section):
    # Address to listen on. If other machines can reach it, auth.keys_file or auth.allow_anonymous is required.
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Port = 8081
    # Most bytes of a request body, unpacked; a larger one is answered 413.
    max_body: Annotated[Size, Field(gt=0)] = 64 * MIB
    # Seconds in which a header must arrive; the same time and one second more per 4 KiB for a body. Else 408.
    read_timeout_s: Annotated[Seconds, Field(gt=0)] = 30.0
    # Most client connections; one more is answered 503. None: the limit of open files, less 2048, or half of it.
    max_connections: Annotated[Count, Field(gt=0)] | None = None
    tls: TlsConfig | None = None
    # Origins whose web pages may call llamaslot from a browser; "*": all.
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
    """The keys of clients, and the key for llamaslot's own pages."""

    # File of the client keys, written by ``llamaslot keys``. If it is set, each request needs a key.
    keys_file: Annotated[FilePath, AfterValidator(_keys_file)] | None = None
    # True: serve requests without a key, even from other machines.
    allow_anonymous: bool = False
    # The key for llamaslot's own pages, ``/llamaslot/…``; other routes do not accept it.
    admin_key: Annotated[SecretStr, AfterValidator(_strong_secret)] | None = None
    # Instead: a file with the admin key alone, on one line.
    admin_key_file: Annotated[FilePath, AfterValidator(_strong_key_file)] | None = None

    def resolve_admin_key(self) -> str | None:
        """Return the admin key: ``admin_key``, else that in ``admin_key_file``; None if neither is set. Raises
        ConfigError if the file cannot be read.
        """
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


ModelName = Annotated[str, Field(min_length=1, max_length=256)]


class BackendConfig(Section):
    """One llama-server: its address (``url``), or how llamaslot runs it (``managed``)."""

    # The backend's name in log, metrics and headers. No two backends may have the same.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] = "llama"
    # Base URL of a running llama-server, without /v1.
    url: Annotated[str, AfterValidator(server_url)] | None = None
    # llama-server's --slot-save-path, as llamaslot sees that directory. None: nothing is saved to disk.
    slot_save_path: FilePath | None = None
    # The key that llama-server requires (--api-key).
    api_key: Annotated[SecretStr, Field(min_length=1)] | None = None
    # Instead: a file with this key alone, on one line.
    api_key_file: Annotated[FilePath, AfterValidator(key_file)] | None = None
    # A llama-server that llamaslot starts, restarts when it dies, and stops.
    managed: Annotated[ManagedConfig, BeforeValidator(_managed)] | None = None

    def resolve_api_key(self) -> str | None:
        """Return llama-server's API key: ``api_key``, else that in ``api_key_file``, which is read at each call. None
        if neither is set. Raises ConfigError if the file cannot be read.
        """
        return _resolved(self.api_key, self.api_key_file, "api_key_file")


class ManagedModelsConfig(Section):
    """Settings of all managed llama-servers together. If neither key is set, all start with llamaslot; else each starts
    when a request needs its model.
    """

    # Most models loaded at a time; for one more, the least recently used is unloaded. None: all.
    max_loaded: Annotated[Count, Field(gt=0)] | None = None
    # A model without requests for this many seconds is unloaded, after its slots are saved. None: never.
    idle_unload_s: Annotated[Seconds, Field(gt=0)] | None = None


def default_meta_dir() -> Path:
    """Return the default of ``store.meta_dir``: the first directory in ``$STATE_DIRECTORY`` (set by systemd), else
    ``/var/lib/llamaslot`` for root, else ``llamaslot`` below ``$XDG_STATE_HOME`` or ``~/.local/state``.
    """
    if given := os.environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib/llamaslot")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "llamaslot"


class StoreConfig(Section):
    # Most bytes of all snapshots together; beyond it the least valuable are evicted. 0: nothing is saved.
    quota: Size = 20 * GIB
    # Most snapshots; beyond it the least valuable are evicted.
    max_files: Annotated[Count, Field(gt=0)] = 10_000
    # Where snapshots are kept. None: in each slot_save_path. If set, slot_save_path is only where llama-server writes
    # and reads slot files.
    directory: FilePath | None = None
    # With ``directory``: bytes of slot files that stay in slot_save_path, ready for the next restore.
    landing_quota: Size = 0
    # Bytes to keep free on the snapshots' file system: snapshots are evicted for it. 0: only when it is full.
    min_free: Size = 1 * GIB
    # Directory of llamaslot's own files.
    meta_dir: FilePath = Field(default_factory=default_meta_dir)
    # When a backend has been idle for this many seconds, its unsaved slots are saved.
    idle_save_s: Seconds = 2.0


class RoutingConfig(Section):
    # A request continues an occupied slot if it begins with at least this fraction of the slot's tokens.
    similarity_min: Annotated[float, BeforeValidator(number), Field(gt=0, le=1)] = _ROUTING.similarity_min
    # A prompt with fewer tokens evicts no context of at least this many tokens while an idle slot holds less.
    small_prompt_tokens: Count = _ROUTING.small_prompt_tokens


class CacheConfig(Section):
    # shared: a request may reuse what another user's request computed. per_user: it may not.
    isolation: Literal["shared", "per_user"] = "shared"


class PrefillConfig(Section):
    # A prompt whose prefill is estimated to take longer is computed in chunks. None: 20 times what one more request
    # costs this server, at most 1 s.
    chunk_threshold_s: Seconds | None = None
    # While a long prompt is computed, running streams get this fraction of the time.
    decode_share: Annotated[float, BeforeValidator(number), Field(ge=0, le=0.9)] = _PREFILL.decode_share
    # Duration of a chunk. Other requests wait about as long for their turn.
    chunk_s: Annotated[Seconds, Field(gt=0)] = _PREFILL.chunk_s
    # Longest time for which requests with a short prefill delay the next chunk of a long prompt.
    max_yield_s: Seconds = _PREFILL.max_yield_s
    # A long prompt that has waited this long is overtaken by no later one.
    starvation_s: Seconds = _PREFILL.starvation_s


class QueueConfig(Section):
    # Most requests that may wait for a slot. When one more comes, the latest of the user with most is answered 503.
    max_waiting: Count = 256
    # A request that has waited this long for a slot is answered 503. None: no limit.
    max_wait_s: Annotated[Seconds, Field(gt=0)] | None = 600.0
    # Most waiting requests of one user; one more is answered 429. None: no limit. A key's own limit wins.
    user_max_waiting: Annotated[Count, Field(gt=0)] | None = None
    # Most slots of one user at a time. None: as many as no other user needs. A key's own limit wins.
    user_max_running: Annotated[Count, Field(gt=0)] | None = None
    # Small requests overtake a waiting request until they have used this much slot time together. 0: never.
    small_request_max_overtake_s: Seconds = _QUEUE.small_request_max_overtake_s
    # For this long after its last answer a user is expected back: users above their share leave a slot idle for it.
    return_grace_s: Seconds = _QUEUE.return_grace_s


class ModelConfig(Section):
    """Settings of one model, in place of the top-level ones of the same names."""

    # Used for this model instead of the top-level ``prewarm``. None: the top-level one is used.
    prewarm: tuple[Annotated[FilePath, AfterValidator(chat_file)], ...] | None = None
    # Keys of the top-level ``queue`` that this model has other values for.
    queue: QueueConfig = QueueConfig.model_construct()


class ModelsConfig(Section):
    """Names of models beside those that the llama-servers report, and settings of single models."""

    # More names for models. Each value is a name that a llama-server reports, or the name of a backend.
    aliases: dict[ModelName, ModelName] = Field(default_factory=dict)
    # The model for requests that name none, or an unknown one: a name like a value of ``aliases``. None: if there are
    # several models, these requests get 400 and 404.
    default: ModelName | None = None
    # Settings of one model, under the name that its server reports.
    each: dict[ModelName, ModelConfig] = Field(default_factory=dict)


class TimeoutsConfig(Section):
    # A request without a first token this many seconds after its arrival is answered 504. None: no limit.
    first_token_s: Annotated[Seconds, Field(gt=0)] | None = None
    # A request whose answer has not ended this many seconds after its arrival is answered 504. None: no limit.
    total_s: Annotated[Seconds, Field(gt=0)] | None = None
    # If a slot makes no progress for this many seconds, its request ends with 504, and the slot is erased. None: never.
    watchdog_s: Annotated[Seconds, Field(gt=0)] | None = 300.0


class StreamConfig(Section):
    # Seconds between two SSE comments to a waiting stream.
    keepalive_s: Annotated[Seconds, Field(gt=0)] = 10.0
    # False: no comments are sent, for clients that cannot read them.
    comments: bool = True


class PassthroughConfig(Section):
    # Routes that change llama-server or reach out from it. Each is answered 403 unless it is listed here.
    allow: tuple[Gate, ...] = ()


class ShutdownConfig(Section):
    # After ``drain_s`` unsaved slots are saved, for at most this many seconds.
    save_s: Seconds = 60.0
    # After SIGTERM running answers get this many seconds to end, then their connections as many to close.
    drain_s: Seconds = 30.0


def _can_trace(endpoint: str) -> str:
    """Return ``endpoint``. Raises ValueError if OpenTelemetry, which sends traces, is not installed."""
    from importlib.util import find_spec

    try:
        is_there = find_spec("opentelemetry.exporter.otlp") is not None
    except ModuleNotFoundError:
        is_there = False
    if not is_there:
        packages = "opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
        raise ValueError(f"OpenTelemetry is not installed: {how_to_add(packages)}")
    return endpoint


class LogConfig(Section):
    # Least level that is logged, on stderr.
    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value),
    ] = "info"
    # auto: text for a terminal and for systemd's journal, else JSON lines.
    format: Literal["auto", "text", "json"] = "auto"
    # True: log and journal quote 80 characters before and after a difference that caused a cache miss (users' texts).
    prompts: bool = False
    # URL that gets a trace of each completion, such as http://127.0.0.1:4318/v1/traces; needs OpenTelemetry.
    otlp_endpoint: Annotated[str, Field(pattern=r"^https?://"), AfterValidator(_can_trace)] | None = None
