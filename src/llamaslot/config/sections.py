"""The sections of config.yaml, each a frozen model. docs/configuration.md says more about each key."""

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
    number,
    origin,
    read_key,
    server_url,
    strong_key,
)
from llamaslot.errors import ConfigError
from llamaslot.llama.managed.process import EMBEDDED_MODEL, ManagedConfig
from llamaslot.llama.routes import Gate
from llamaslot.scheduling.fairness import Fairness
from llamaslot.scheduling.placement import SIMILARITY_MIN, SMALL_PROMPT_TOKENS
from llamaslot.scheduling.prefill_policy import PrefillSharing
from llamaslot.sizes import GIB, MIB

_SHARING = PrefillSharing()  # the defaults of ``prefill``
_FAIRNESS = Fairness()  # the defaults of ``queue``


def _managed(value: object, info: ValidationInfo) -> object:
    """``managed`` in its full form: ``command`` and ``args`` may be one line, as typed in a shell, and contain
    numbers; paths become absolute.
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


#: Values of ``listen.host`` that stand for every address, and where to ask then on this machine.
EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class ListenConfig(Section):
    # Address to listen on; one that other machines reach requires keys or auth.allow_anonymous.
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Port = 8081
    # Bytes of an unpacked request body; a larger one is answered 413.
    max_body: Annotated[Size, Field(gt=0)] = 64 * MIB
    # Seconds for the header to arrive, and again for the body, which gets one more per 4 KiB; then 408.
    read_timeout_s: Annotated[Seconds, Field(gt=0)] = 30.0
    # Connections of clients; one more is answered 503. None: the limit of open files, less 2048, or half of it.
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
    """Which clients may use llamaslot, and which may use its own pages."""

    # The clients' keys, written by ``llamaslot keys``; with it requests need one.
    keys_file: Annotated[FilePath, AfterValidator(_keys_file)] | None = None
    # Serve requests without a key, even from other machines.
    allow_anonymous: bool = False
    # A key for ``/llamaslot/…`` that no other route accepts.
    admin_key: Annotated[SecretStr, AfterValidator(_strong_secret)] | None = None
    # A file with that key alone on one line.
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


ModelName = Annotated[str, Field(min_length=1, max_length=256)]


class BackendConfig(Section):
    """One llama-server: its address (``url``) or how to run it (``managed``)."""

    # The backend's name in log, metrics and headers; of several each has its own.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] = "llama"
    # Root of a running llama-server, without /v1.
    url: Annotated[str, AfterValidator(server_url)] | None = None
    # llama-server's --slot-save-path as seen from llamaslot; None: nothing is saved.
    slot_save_path: FilePath | None = None
    # llama-server's --api-key.
    api_key: Annotated[SecretStr, Field(min_length=1)] | None = None
    # A file with that key alone on one line.
    api_key_file: Annotated[FilePath, AfterValidator(key_file)] | None = None
    # A llama-server that llamaslot starts and stops.
    managed: Annotated[ManagedConfig, BeforeValidator(_managed)] | None = None

    def resolve_api_key(self) -> str | None:
        """The key that llama-server requires, read from its file at each call; None if it requires none.

        Raises ConfigError if the file, readable at the start, is not readable any more.
        """
        return _resolved(self.api_key, self.api_key_file, "api_key_file")


class ManagedModelsConfig(Section):
    """Settings of all managed llama-servers together. With neither key all run from the start."""

    # Models that are loaded at a time, each by the first request for it. None: all.
    max_loaded: Annotated[Count, Field(gt=0)] | None = None
    # A model is unloaded, its slots saved first, after so many seconds without a request. None: never.
    idle_unload_s: Annotated[Seconds, Field(gt=0)] | None = None


def default_meta_dir() -> Path:
    """The default of ``store.meta_dir``: systemd's StateDirectory if there is one, else /var/lib/llamaslot for root,
    else the XDG state directory.
    """
    if given := os.environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib/llamaslot")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "llamaslot"


class StoreConfig(Section):
    # Bytes of snapshots; beyond, the least valuable are evicted. 0: save nothing.
    quota: Size = 20 * GIB
    # Most snapshots; beyond, the least valuable are evicted.
    max_files: Annotated[Count, Field(gt=0)] = 10_000
    # Where snapshots are kept. None: in each slot_save_path; else that is only where llama-server writes and reads.
    directory: FilePath | None = None
    # Bytes of slot files that stay in slot_save_path for the next restore, if ``directory`` is elsewhere.
    landing_quota: Size = 0
    # Bytes to leave free on the snapshots' file system; with less, some are evicted. 0: none go before it is full.
    min_free: Size = 1 * GIB
    # Directory of llamaslot's own files.
    meta_dir: FilePath = Field(default_factory=default_meta_dir)
    # Unsaved slots are saved after so many seconds without a request.
    idle_save_s: Seconds = 2.0


class RoutingConfig(Section):
    # Least fraction of a slot's tokens that a request must share to continue there; less is another conversation.
    similarity_min: Annotated[float, BeforeValidator(number), Field(gt=0, le=1)] = SIMILARITY_MIN
    # A shorter prompt evicts no context of at least this many tokens while another slot is idle.
    small_prompt_tokens: Count = SMALL_PROMPT_TOKENS


class CacheConfig(Section):
    # Whether a request may reuse what another user has computed.
    isolation: Literal["shared", "per_user"] = "shared"


class PrefillConfig(Section):
    # A prefill that takes longer is computed in chunks. None: 20 times what a request costs, at most 1 s.
    chunk_threshold_s: Seconds | None = None
    # Fraction of time for running streams beside a long prompt.
    decode_share: Annotated[float, BeforeValidator(number), Field(ge=0, le=0.9)] = _SHARING.decode_share
    # Duration of a chunk; between two, other requests get their turn.
    chunk_s: Annotated[Seconds, Field(gt=0)] = _SHARING.chunk_s
    # Longest delay of a long prompt's next chunk by requests with a short prefill.
    max_yield_s: Seconds = _SHARING.max_yield_s
    # A long prompt that has waited this long is not overtaken by later ones.
    starvation_s: Seconds = _SHARING.starvation_s


class QueueConfig(Section):
    # Requests that may wait for a slot; one more is answered 503.
    max_waiting: Count = 256
    # Longest wait for a slot, then 503. None: no limit.
    max_wait_s: Annotated[Seconds, Field(gt=0)] | None = 600.0
    # Requests of one user that may wait; one more is answered 429. A key's own limit wins.
    user_max_waiting: Annotated[Count, Field(gt=0)] | None = None
    # Slots of one user at a time. None: as many as no other user needs. A key's own limit wins.
    user_max_running: Annotated[Count, Field(gt=0)] | None = None
    # Slot time by which small requests may overtake a waiting request in all; 0: never.
    small_request_max_overtake_s: Seconds = _FAIRNESS.max_overtake_s
    # So long after its last answer a user is expected back, and a slot is left idle for it.
    return_grace_s: Seconds = _FAIRNESS.return_grace_s


class ModelConfig(Section):
    """The settings that are different for one model."""

    # Instead of the top-level ``prewarm``; None: as there.
    prewarm: tuple[Annotated[FilePath, AfterValidator(chat_file)], ...] | None = None
    # As the section of that name, whose values hold for what is left out here.
    queue: QueueConfig = QueueConfig.model_construct()


class ModelsConfig(Section):
    """Names of models in addition to those that the servers tell."""

    # Names that clients may use, each with a model's name as its server tells it, or the name of a backend.
    aliases: dict[ModelName, ModelName] = Field(default_factory=dict)
    # The model for requests that name none, or an unknown one: a name as in ``aliases``. None: answered 404.
    default: ModelName | None = None
    # By a model's name, as in ``aliases``: its own limits and ``prewarm``.
    each: dict[ModelName, ModelConfig] = Field(default_factory=dict)


class TimeoutsConfig(Section):
    # Seconds from arrival to the first token, then 504. None: no limit.
    first_token_s: Annotated[Seconds, Field(gt=0)] | None = None
    # Seconds from arrival to the end of the answer, then 504. None: no limit.
    total_s: Annotated[Seconds, Field(gt=0)] | None = None
    # A slot without progress for so long is stuck: its request ends, and it is erased.
    watchdog_s: Annotated[Seconds, Field(gt=0)] | None = 300.0


class StreamConfig(Section):
    # Seconds between two comments to a waiting stream.
    keepalive_s: Annotated[Seconds, Field(gt=0)] = 10.0
    # False: none, for clients that cannot read SSE comments.
    comments: bool = True


class PassthroughConfig(Section):
    # Routes that change llama-server or reach out from it; others are answered 403.
    allow: tuple[Gate, ...] = ()


class ShutdownConfig(Section):
    # Seconds to save unsaved slots, after draining.
    save_s: Seconds = 60.0
    # Seconds for running answers to end after SIGTERM, and again to close their connections.
    drain_s: Seconds = 30.0


def _can_trace(endpoint: str) -> str:
    """Check that the extra that sends traces is installed. Raises ValueError."""
    from importlib.util import find_spec

    try:
        is_there = find_spec("opentelemetry.exporter.otlp") is not None
    except ModuleNotFoundError:
        is_there = False
    if not is_there:
        raise ValueError("OpenTelemetry is not installed: pip install 'llamaslot[otel]'")
    return endpoint


class LogConfig(Section):
    # Least level that is logged, on stderr.
    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value),
    ] = "info"
    # auto: text for a terminal and for systemd's journal, else JSON lines.
    format: Literal["auto", "text", "json"] = "auto"
    # Cache misses in log and journal quote 80 characters before and after the difference: users' texts.
    prompts: bool = False
    # Where traces go, by OpenTelemetry (llamaslot[otel]): http://127.0.0.1:4318/v1/traces. None: nowhere.
    otlp_endpoint: Annotated[str, Field(pattern=r"^https?://"), AfterValidator(_can_trace)] | None = None
