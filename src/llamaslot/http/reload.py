"""Reads the configuration again while llamaslot serves: at SIGHUP (``serve.handle_signals``), or when
``llamaslot reload`` sends ``POST /llamaslot/reload``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from llamaslot.config.load import Config
from llamaslot.config.sections import BackendConfig
from llamaslot.config.values import Section
from llamaslot.errors import ConfigError, LlamaslotError, NotReloaded
from llamaslot.fleet.registry import Registry
from llamaslot.http.service_manager import ServiceManager

log = logging.getLogger(__name__)
S = TypeVar("S", bound=Section)

#: Sections and keys whose new values are in force at once; all others need a restart.
_AT_ONCE = (
    "auth.", "queue.", "rewrite", "rewrite_off", "passthrough.allow", "listen.cors", "log.level",
    "store.quota", "store.max_files", "store.min_free",
)  # fmt: skip


class Reload:
    """Holds the configuration in force, and replaces it by another one. ``apply`` puts a configuration in force in the
    web application, which sets this function.
    """

    def __init__(
        self,
        path: Path | None,
        config: Config,
        registry: Registry,
        manager: ServiceManager,
        check_open: Callable[[Config], None] = lambda _: None,
    ) -> None:
        """``path``: the configuration file; None if llamaslot was started without one. ``check_open(config)`` raises
        ConfigError if other machines can reach llamaslot, as it listens now, and ``config`` requires no keys.
        """
        self.config, self._path, self._registry, self._manager = config, path, registry, manager
        self._check_open = check_open
        self.apply: Callable[[Config], None] = lambda _: None
        self._drained: dict[
            str, BackendConfig
        ] = {}  # backends that the file has no longer, with their settings
        self._one_at_a_time = asyncio.Lock()

    async def run(self) -> dict[str, Any]:
        """Read the configuration file, and put in force what needs no restart. Returns the changed keys in two lists:
        ``in_force``, and ``needs_restart``.

        Raises NotReloaded with the faults of the file; then the old configuration stays. Canceling is safe.
        """
        async with self._one_at_a_time:
            self._manager.reloading()
            try:
                return await self._run()
            except NotReloaded as error:
                log.error("reload failed: %s", error)
                raise
            finally:
                self._manager.ready()

    async def on_signal(self) -> None:
        """As ``run``, for the handler of SIGHUP. A fault is only logged."""
        with contextlib.suppress(NotReloaded):
            await self.run()

    async def _run(self) -> dict[str, Any]:
        if self._path is None:
            raise NotReloaded(
                "this llamaslot was started without a configuration file: nothing to read again"
            )
        try:
            new = await asyncio.to_thread(Config.load, self._path)
            changed = list(_changed(self.config, new))
            added, removed, other = _backends(self.config, new)
            # Backends for its models have replaced a router.
            routers = [name for name in removed if self._registry.backend_named(name) is None]
            removed = [name for name in removed if name not in routers]
            at_once = [key for key in changed if key.startswith(_AT_ONCE)]
            restart = [key for key in changed if not key.startswith(_AT_ONCE)]
            self._check_open(new)  # ``listen`` in the file may be narrower than the addresses in use
            self.apply(new)  # before all else: it raises ConfigError if a file of keys has just gone
        except ConfigError as error:
            raise NotReloaded(f"{error}; the old configuration stays in force") from None
        logging.getLogger().setLevel(new.log.level.upper())
        in_force = _merged(self.config, new)
        self._registry.apply(in_force)
        restart += [*other, *(f"backends: {name}" for name in routers)]
        self._drained |= {
            backend.name: backend for backend in self.config.backends if backend.name in removed
        }
        for name in removed:
            if (backend := self._registry.backend_named(name)) is not None:
                backend.drain.begin(is_removed=True)
        settings, failed = {backend.name: backend for backend in new.backends}, set[str]()
        for name in added:
            try:
                if self._drained.get(name, settings[name]) != settings[name]:
                    raise LlamaslotError("it drains with other settings: a new one needs a name of its own")
                await self._registry.add_later(new, name)
                at_once.append(f"backends: {name} added")
            except LlamaslotError as error:  # its directory belongs to another llamaslot, for example
                failed.add(name)
                restart.append(f"backends: {name} ({error})")
        at_once += [f"backends: {name} drains" for name in removed]
        backends = [backend for backend in in_force.backends if backend.name not in failed]
        backends += [backend for backend in self.config.backends if backend.name in routers]
        self.config = in_force.model_copy(update={"backends": tuple(backends)})
        log.info(
            "reload: changes in force now: %s; changes that need a restart: %s",
            ", ".join(at_once) or "nothing new", ", ".join(restart) or "nothing",
        )  # fmt: skip
        return {"in_force": at_once, "needs_restart": restart}


def _changed(old: Section, new: Section, above: str = "") -> Iterator[str]:
    """Yield the keys whose values differ between two configurations, except those of backends. ``above``: the keys that
    lead to these sections.
    """
    for name in type(old).model_fields:
        before, after = getattr(old, name), getattr(new, name)
        if before == after or (not above and name == "backends"):
            continue
        if isinstance(before, Section) and isinstance(after, Section):
            yield from _changed(before, after, f"{above}{name}.")
        else:
            yield above + name


def _backends(old: Config, new: Config) -> tuple[list[str], list[str], list[str]]:
    """Return the names of backends to add, the names of backends to drain, and the changes that need a restart: those
    of a changed backend, or of a managed one.
    """
    before, after = ({backend.name: backend for backend in config.backends} for config in (old, new))
    added = [name for name in after if name not in before]
    removed = [name for name in before if name not in after]
    other = [f"backends: {name}" for name in after if name in before and after[name] != before[name]]
    managed = [name for name in added if after[name].managed] + [
        name for name in removed if before[name].managed
    ]
    other += [f"backends: {name}" for name in managed]
    return (
        [name for name in added if name not in managed],
        [name for name in removed if name not in managed],
        other,
    )


def _merged(old: Config, new: Config) -> Config:
    """Return the configuration in force after a reload: settings that need no restart are those of ``new``, all others
    those of ``old``. So the next reload reports again what still needs a restart.
    """
    before = {backend.name: backend for backend in old.backends}
    kept = [
        before.get(backend.name, backend)
        for backend in new.backends
        if backend.name in before or backend.managed is None
    ]
    kept += [backend for backend in old.backends if backend.managed is not None and backend not in kept]
    return _with_new(old, new).model_copy(update={"backends": tuple(kept)})


def _with_new(old: S, new: S, above: str = "") -> S:
    """Return ``old`` with those values of ``new`` that can be in force at once."""
    update = dict[str, Any]()
    for name in type(old).model_fields:
        before, after = getattr(old, name), getattr(new, name)
        if before == after:
            continue
        if f"{above}{name}.".startswith(_AT_ONCE):
            update[name] = after
        elif isinstance(before, Section) and isinstance(after, Section):
            update[name] = _with_new(before, after, f"{above}{name}.")
    return old.model_copy(update=update)
