"""config.yaml: the settings as one frozen model, and every fault at once with its path in the file.

Settings are composed here; a room that has settings of its own keeps its model beside the code that uses it.
Relative paths in the file start at the file's own directory. docs/configuration.md describes each key.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SecretStr,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import InitErrorDetails

from llamaslot.errors import ConfigError, LlamaslotError
from llamaslot.faults import Loc, fault_lines, read_yaml
from llamaslot.llama.chat_file import read_chat_file
from llamaslot.llama.process import EMBEDDED_MODEL, ManagedConfig, smollm2_path
from llamaslot.llama.routes import KNOWN_GATES, Gate

KIB, MIB, GIB = 1024, 1024**2, 1024**3
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": 1024**4}

#: What `passthrough.allow` may name: routes that change llama-server or reach out from it.
GUARDED_ROUTES = KNOWN_GATES

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def parse_size(value: object) -> int:
    """Bytes from ``64MiB``, ``1.5 GB`` or a plain whole number. Raises ValueError that says what would be right."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    found = (
        re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]i?B|B)?", value.strip(), re.I)
        if isinstance(value, str)
        else None
    )
    if found is None or (found[2] is None and "." in found[1]):
        raise ValueError(f"should be a size such as 64MiB or 200GiB, or a number of bytes; not {value!r}")
    return int(float(found[1]) * _UNITS[found[2].upper()]) if found[2] else int(found[1])


def _number(value: object) -> object:
    """YAML's ``on`` and ``yes`` are True, which Python would take for the number 1."""
    if isinstance(value, bool):
        raise ValueError(f"should be a number, not {'on' if value else 'off'}")
    return value


def _anchored(path: Path, info: ValidationInfo) -> Path:
    """``~`` expanded; a relative path starts at the directory of the config file."""
    if str(path) == ".":
        raise ValueError("should be a path, and is empty")
    try:
        path = path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: there is no such home directory") from error
    directory: Path = (info.context or {}).get("directory") or Path.cwd()
    return directory / path


def _server_url(url: str) -> str:
    """``scheme://host:port[/prefix]`` without a slash at its end. Raises ValueError."""
    if "://" not in url:
        raise ValueError(f"should begin with http:// or https://; did you mean http://{url}?")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"is not a URL that can be used ({error}); one is http://127.0.0.1:8080") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"should begin with http:// or https://, not {parts.scheme}://")
    if not parts.hostname or port == 0:
        raise ValueError(f"should name a host and a port, such as http://127.0.0.1:8080; not {url!r}")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError(
            "should be an address only, without user, query or fragment; a key goes into api_key"
        )
    path = parts.path.rstrip("/")
    if path.endswith("/v1"):
        raise ValueError("should be llama-server's root, without the /v1 at its end")
    return f"{parts.scheme}://{parts.netloc}{path}"


def _read_key(path: Path) -> str:
    """The key in a file of one line. Raises ValueError that says what is wrong with the file."""
    try:
        key = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise ValueError(f"{path} can not be read: {why}") from error
    if not key or "\n" in key:
        raise ValueError(
            f"{path} should hold the key alone, on one line; it {'has more' if key else 'is empty'}"
        )
    return key


def _key_file(path: Path) -> Path:
    _read_key(path)
    return path


def _chat_file(path: Path) -> Path:
    read_chat_file(path)
    return path


Size = Annotated[int, BeforeValidator(parse_size), Field(ge=0)]
Count = Annotated[int, BeforeValidator(_number), Field(ge=0)]
Port = Annotated[int, BeforeValidator(_number), Field(ge=1, le=65535)]
Seconds = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
FilePath = Annotated[Path, AfterValidator(_anchored)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


def _managed(value: object, info: ValidationInfo) -> object:
    """``command`` and ``args`` may be one line, as typed in a shell, and have numbers in them; paths are anchored."""
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
        value["model"] = str(_anchored(Path(model), info))
    return value


def _first_word(command: object) -> str | None:
    """The program in a command of either form; None where the command has a fault of its own."""
    words = command.split() if isinstance(command, str) else command
    return words[0] if isinstance(words, list) and words and isinstance(words[0], str) else None


def _split(line: str, key: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise ValueError(f"{key} can not be split into words ({error}); write a list instead") from error


class ListenConfig(Section):
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Port = 8081
    max_body: Annotated[Size, Field(gt=0)] = 64 * MIB


class BackendConfig(Section):
    """One llama-server: either where it runs (``url``) or how to run it (``managed``)."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] = "llama"
    url: Annotated[str, AfterValidator(_server_url)] | None = None
    slot_save_path: FilePath | None = None
    api_key: Annotated[SecretStr, Field(min_length=1)] | None = None
    api_key_file: Annotated[FilePath, AfterValidator(_key_file)] | None = None
    managed: Annotated[ManagedConfig, BeforeValidator(_managed)] | None = None

    def resolve_api_key(self) -> str | None:
        """The key that llama-server wants, read from its file at each call; None where it wants none.

        Raises ConfigError when the file, readable at the start, is not any more.
        """
        if self.api_key is not None:
            return self.api_key.get_secret_value()
        if self.api_key_file is None:
            return None
        try:
            return _read_key(self.api_key_file)
        except ValueError as error:
            raise ConfigError(str(self.api_key_file), [f"api_key_file: {error}"]) from error


def default_meta_dir() -> Path:
    """systemd's StateDirectory where there is one, else /var/lib/llamaslot for root, else the XDG state directory."""
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
    similarity_min: Annotated[float, BeforeValidator(_number), Field(gt=0, le=1)] = 0.85
    small_prompt_tokens: Count = 1024


class PrefillConfig(Section):
    own_above_s: Seconds = 1.0
    decode_share: Annotated[float, BeforeValidator(_number), Field(ge=0, le=0.9)] = 0.1
    stretch_s: Annotated[Seconds, Field(gt=0)] = 0.5
    max_held_s: Seconds = 2.0
    max_passed_s: Seconds = 120.0


class QueueConfig(Section):
    max_waiting: Count = 256
    max_wait_s: Annotated[Seconds, Field(gt=0)] = 600.0


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


class Config(Section):
    """The whole file. ``backends`` has exactly one entry; several are for a later version."""

    listen: ListenConfig = ListenConfig()
    backends: tuple[BackendConfig, ...]
    store: StoreConfig = Field(default_factory=StoreConfig)
    routing: RoutingConfig = RoutingConfig()
    prefill: PrefillConfig = PrefillConfig()
    queue: QueueConfig = QueueConfig()
    stream: StreamConfig = StreamConfig()
    passthrough: PassthroughConfig = PassthroughConfig()
    shutdown: ShutdownConfig = ShutdownConfig()
    log: LogConfig = LogConfig()
    prewarm: tuple[Annotated[FilePath, AfterValidator(_chat_file)], ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> Config:
        """Read and check the file. Raises ConfigError with all faults that it has."""
        path = Path(path)
        raw = read_yaml(path)
        try:
            return cls.model_validate(raw, context={"directory": path.resolve().parent})
        except ValidationError as error:
            raise ConfigError(str(path), fault_lines(error, cls)) from None

    @property
    def backend(self) -> BackendConfig:
        return self.backends[0]

    @model_validator(mode="wrap")
    @classmethod
    def _whole(cls, raw: Any, handler: ModelWrapValidatorHandler[Config], info: ValidationInfo) -> Config:
        """What is wrong together is reported beside what is wrong by itself, not only once the latter is mended."""
        if isinstance(raw, dict):  # a section whose keys are all commented out is None in YAML
            raw = {key: {} if value is None and key != "backends" else value for key, value in raw.items()}
        faults = [
            InitErrorDetails(type="value_error", loc=loc, input=None, ctx={"error": ValueError(message)})
            for loc, message in _wrong_together(raw, info)
        ]
        try:
            config = handler(raw)
        except ValidationError as error:
            alone = [
                InitErrorDetails(type=e["type"], loc=e["loc"], input=e["input"], ctx=e.get("ctx", {}))
                for e in error.errors(include_url=False)
            ]
            raise ValidationError.from_exception_data(cls.__name__, alone + faults) from None
        if faults:
            raise ValidationError.from_exception_data(cls.__name__, faults)
        return config

    @model_validator(mode="after")
    def _slot_files_of_a_managed_server(self) -> Config:
        """Nobody need say where a server of our own saves: ``<store.meta_dir>/kv``."""
        backend = self.backends[0]
        if backend.managed is not None and backend.slot_save_path is None:
            backend = backend.model_copy(update={"slot_save_path": self.store.meta_dir / "kv"})
            object.__setattr__(
                self, "backends", (backend,)
            )  # frozen for everybody else, not while it is made
        return self


def _wrong_together(raw: Any, info: ValidationInfo) -> Iterator[tuple[Loc, str]]:
    """Faults that no value has by itself. Reads raw data of any shape: what is wrong with that is found elsewhere."""
    if not isinstance(raw, dict) or not isinstance(backends := raw.get("backends"), list | tuple):
        return
    if not backends:
        yield ("backends",), "is empty: one backend is needed, with url or managed"
    if len(backends) > 1:
        yield ("backends",), f"one backend for now, not {len(backends)}"
    listen = raw.get("listen")
    own_port = listen.get("port", 8081) if isinstance(listen, dict) else 8081
    for i, backend in enumerate(backends):
        if isinstance(backend, dict):
            if raw.get("prewarm") and not backend.get("managed") and backend.get("slot_save_path") is None:
                yield (
                    ("prewarm",),
                    f"needs backends[{i}].slot_save_path: what is computed ahead is kept there",
                )
            for key, message in _wrong_in_backend(backend, own_port, info):
                yield ("backends", i, *key), message


def _wrong_in_backend(
    backend: dict[str, Any], own_port: object, info: ValidationInfo
) -> Iterator[tuple[Loc, str]]:
    url, managed = backend.get("url"), backend.get("managed")
    if url is not None and managed is not None:
        yield (
            ("managed",),
            "not together with url: llamaslot starts a llama-server (managed) or finds one (url)",
        )
    if url is None and managed is None:
        yield (), "needs url (where a llama-server runs) or managed (how to run one)"
    if backend.get("api_key") is not None and backend.get("api_key_file") is not None:
        yield ("api_key_file",), "not together with api_key; the file keeps the key out of this one"
    if isinstance(url, str) and url.rstrip("/").endswith(tuple(f"//{host}:{own_port}" for host in _LOOPBACK)):
        yield (
            ("url",),
            f"is llamaslot's own address: llama-server needs another port than listen.port {own_port}",
        )
    if isinstance(managed, dict):
        for key, message in _wrong_in_managed(managed, own_port, info):
            yield ("managed", key), message


def _wrong_in_managed(
    managed: dict[str, Any], own_port: object, info: ValidationInfo
) -> Iterator[tuple[str, str]]:
    if managed.get("port") is not None and managed["port"] == own_port:
        yield "port", "is listen.port too; without it a free one is taken"
    command, model = managed.get("command"), managed.get("model")
    if command is None:
        if importlib.util.find_spec("xllamacpp") is None:
            yield (
                "command",
                "is missing, and the embedded engine is not installed: pip install 'llamaslot[embedded]'",
            )
        # With a command the model may lie where only that command sees it (a container).
        if (
            isinstance(model, str)
            and model not in ("", EMBEDDED_MODEL)
            and not _anchored(Path(model), info).is_file()
        ):
            yield "model", f"there is no such file: {_anchored(Path(model), info)}"
    elif (program := _first_word(command)) and shutil.which(program) is None:
        yield "command", f"there is no program {program} (in PATH, if it has no slash)"
    if model == EMBEDDED_MODEL:
        try:
            smollm2_path()
        except LlamaslotError as error:
            yield "model", str(error)
