"""config.yaml: the settings as one frozen model, and all faults at once with their paths in the file.

Settings are composed here; a module with settings of its own has its model beside the code that uses it. Relative
paths in the file are relative to the file's directory. docs/configuration.md describes each key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from llamaslot.config.cross_checks import wrong_together
from llamaslot.config.faults import fault_lines, read_yaml
from llamaslot.config.sections import (
    AuthConfig,
    BackendConfig,
    CacheConfig,
    ListenConfig,
    LogConfig,
    ManagedModelsConfig,
    ModelsConfig,
    PassthroughConfig,
    PrefillConfig,
    QueueConfig,
    RoutingConfig,
    ShutdownConfig,
    StoreConfig,
    StreamConfig,
    TimeoutsConfig,
)
from llamaslot.config.values import FilePath, Section, chat_file
from llamaslot.errors import ConfigError
from llamaslot.formats.rewrite_rules import RewriteRule, distinct, in_force, is_ready, ready

# Lists, where all others are mappings.
_NOTHING: dict[str, Any] = {"prewarm": (), "rewrite": (), "rewrite_off": ()}
_NO_PATH = "path_type", "no path"


class Config(Section):
    """The whole configuration file."""

    listen: ListenConfig = ListenConfig.model_construct()
    backends: tuple[BackendConfig, ...]
    models: ModelsConfig = ModelsConfig.model_construct()
    managed: ManagedModelsConfig = ManagedModelsConfig.model_construct()
    store: StoreConfig = Field(default_factory=StoreConfig.model_construct)
    routing: RoutingConfig = RoutingConfig.model_construct()
    cache: CacheConfig = CacheConfig.model_construct()
    prefill: PrefillConfig = PrefillConfig.model_construct()
    queue: QueueConfig = QueueConfig.model_construct()
    timeouts: TimeoutsConfig = TimeoutsConfig.model_construct()
    stream: StreamConfig = StreamConfig.model_construct()
    passthrough: PassthroughConfig = PassthroughConfig.model_construct()
    auth: AuthConfig = AuthConfig.model_construct()
    shutdown: ShutdownConfig = ShutdownConfig.model_construct()
    log: LogConfig = LogConfig.model_construct()
    prewarm: tuple[Annotated[FilePath, AfterValidator(chat_file)], ...] = ()
    rewrite: Annotated[
        tuple[Annotated[RewriteRule, BeforeValidator(ready)], ...], AfterValidator(distinct)
    ] = ()
    rewrite_off: tuple[Annotated[str, AfterValidator(is_ready)], ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> Config:
        """Read and check a configuration file. Raises ConfigError with all its faults."""
        path = Path(path)
        return cls.of(read_yaml(path), str(path), path.resolve().parent)

    @classmethod
    def of(cls, settings: Any, source: str, directory: Path) -> Config:
        """Check ``settings``, what a configuration file has, and return them. ``source`` names them in errors; relative
        paths begin at ``directory``. Raises ConfigError with all faults.
        """
        try:
            return cls.model_validate(settings, context={"directory": directory})
        except ValidationError as error:
            raise ConfigError(source, fault_lines(error, cls)) from None

    @property
    def backend(self) -> BackendConfig:
        return self.backends[0]

    def directory_of(self, backend: BackendConfig) -> Path | None:
        """Return the directory that keeps the snapshots of ``backend``; None if it has no ``slot_save_path``."""
        return (
            (self.store.directory or backend.slot_save_path) if backend.slot_save_path is not None else None
        )

    @property
    def rules(self) -> tuple[RewriteRule, ...]:
        """All rules that rewrite system prompts: the ready ones that are on, then those of ``rewrite``."""
        return in_force(self.rewrite, self.rewrite_off)

    @model_validator(mode="wrap")
    @classmethod
    def _whole(cls, raw: Any, handler: ModelWrapValidatorHandler[Config], info: ValidationInfo) -> Config:
        """Check the whole file, so that faults of settings together are reported beside faults of single settings."""
        if isinstance(raw, dict):  # a section whose keys are all commented out is None in YAML
            raw = {
                key: _NOTHING.get(key, {}) if value is None and key != "backends" else value
                for key, value in raw.items()
            }
        faults = [
            InitErrorDetails(type="value_error", loc=loc, input=None, ctx={"error": ValueError(message)})
            for loc, message in wrong_together(raw, info)
        ]
        try:
            config = handler(raw)
        except ValidationError as error:
            # That a value is no path is told by a type that pydantic-core does not know by name.
            alone = [
                InitErrorDetails(
                    type=PydanticCustomError(*_NO_PATH) if e["type"] == _NO_PATH[0] else e["type"],
                    loc=e["loc"],
                    input=e["input"],
                    ctx=e.get("ctx", {}),
                )
                for e in error.errors(include_url=False)
            ]
            raise ValidationError.from_exception_data(cls.__name__, alone + faults) from None
        if faults:
            raise ValidationError.from_exception_data(cls.__name__, faults)
        return config

    @model_validator(mode="after")
    def _slot_files_of_a_managed_server(self) -> Config:
        """Set ``slot_save_path`` of managed servers without one to ``store.directory``, else to
        ``<store.meta_dir>/kv``.
        """
        default = {"slot_save_path": self.store.directory or self.store.meta_dir / "kv"}
        backends = tuple(
            backend.model_copy(update=default)
            if backend.managed is not None and backend.slot_save_path is None
            else backend
            for backend in self.backends
        )
        # The model is frozen once it is made, not before.
        object.__setattr__(self, "backends", backends)
        return self
