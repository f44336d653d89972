"""Finds the pool that serves a request, by the ``model`` in its body. Lists the models and their states."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llamaslot.backend.backend import Backend
from llamaslot.backend.connect import ServerSession
from llamaslot.backend.health import Health
from llamaslot.config.sections import ModelsConfig
from llamaslot.errors import BackendDown, BadRequest, ModelNotFound, shortened
from llamaslot.fleet.pool import Pool, PoolModel

log = logging.getLogger(__name__)


class Router:
    """Knows models by the names that their llama-servers tell, and by the configured aliases.

    A model keeps its names while its backends are down. ``pools`` and ``backends`` are those of the registry.
    """

    def __init__(self, pools: Sequence[Pool], backends: Mapping[str, Backend]) -> None:
        self._pools, self._backends = pools, backends
        self._settings = ModelsConfig()
        self._warned = set[str]()
        self._told: dict[str, PoolModel] = {}  # by name: the last model for which a server has told this name
        # Names that backends will tell once their models are loaded, each with its backend.
        self.expected: dict[str, str] = {}
        self.is_on_demand = False  # True if any model is loaded on demand
        self.has_router = False  # True if any llama-server is a router

    def configure(self, settings: ModelsConfig) -> None:
        self._settings = settings

    @property
    def are_several(self) -> bool:
        """True if there may be several models, because there are several backends or a router."""
        return len(self._backends) > 1 or self.has_router

    async def pool_for(self, model: object = None, *, is_named: bool = True, loads: bool = False) -> Pool:
        """Return the pool that serves ``model``, the name in a request. With one model any name is accepted, as in
        llama-server. ``is_named``: False for routes whose requests have no ``model``. ``loads``: a model that is
        loaded on demand may be loaded for this request.

        Waits for backends that are being connected to, if the model may be theirs. Raises ModelNotFound, BadRequest if
        a model must be named, and BackendDown. Canceling is safe.
        """
        if not self.are_several:
            return self._pools[0]
        names = [name for name in (model, self._settings.default) if isinstance(name, str) and name]
        for name in names:
            if (pool := await self._pool_named(name, loads)) is not None:
                return pool
        known = self._known()
        always = [backend for backend in self._backends.values() if backend.presence.on_demand is None]
        if not known and always:  # no backend has been up yet
            await min(always, key=lambda backend: backend.health is not Health.CONNECTING).ready()
            return await self.pool_for(model, is_named=is_named)
        if not is_named:
            if known:
                return known[0]
            raise BackendDown("no model is loaded: the first request for one loads it")
        is_only = len(known) == 1 and not self._was_another(model, known[0])
        unseen = self._maybe_of_another(known[0]) if is_only and model else []
        if is_only and not unseen:
            return known[0]
        there_are = ", ".join(sorted(self.names()))
        if is_only and all(backend.presence.on_demand is None for backend in unseen):
            raise BackendDown(
                f"{' and '.join(backend.name for backend in unseen)} is not up, and its model is not known yet:"
                f" name one of {there_are} in 'model', or set models.default in the configuration for all other names"
            )
        if not isinstance(model, str) or not model:
            raise BadRequest(f"'model' is required, as there are several: {there_are}")
        raise ModelNotFound(f"the model '{shortened(model)}' does not exist here; known: {there_are}")

    def unloaded_pool(self, model: object) -> Pool | None:
        """Return the pool of a model that must be loaded for this request. None if the model is loaded, or is never
        loaded on demand.
        """
        if not self.is_on_demand:
            return None
        name = self._settings.aliases.get(model, model) if isinstance(model, str) else self._settings.default
        names = (pool for pool in self._known() if name in _names(pool))
        backends = list(pool.backends.values()) if (pool := next(names, None)) is not None else []
        if not backends and isinstance(name, str):
            named = self._backends.get(self.expected.get(name, name))
            backends = [named] if named is not None else []
        unloaded = [backend for backend in backends if backend.is_unloaded]
        if not unloaded or len(unloaded) < len(backends):
            return None
        return next(pool for pool in self._pools if unloaded[0].name in pool.backends)

    async def _pool_named(self, name: str, loads: bool) -> Pool | None:
        """Return the pool whose model has this name; None if there is none. If a backend has it that was never
        connected, waits for its connection. Raises BackendDown if it is down, or must be loaded and ``loads`` is
        False.
        """
        while True:
            target = self._settings.aliases.get(name, name)
            if (pool := next((pool for pool in self._known() if target in _names(pool)), None)) is not None:
                return pool
            if (backend := self._backends.get(self.expected.get(target, target))) is not None:
                if backend.last_session is None and backend.presence.on_demand is not None and not loads:
                    raise BackendDown(f"{name} is not loaded: the first request for it loads it")
                await self._connected(backend)
                return next(pool for pool in self._pools if backend.name in pool.backends)
            unknown = [backend for backend in self._backends.values() if backend.last_session is None]
            connecting = [backend for backend in unknown if backend.health is Health.CONNECTING]
            if not connecting:
                return None
            await connecting[0].settled()

    async def _connected(self, backend: Backend) -> None:
        if backend.last_session is None:
            await backend.ready()

    def _was_another(self, name: object, pool: Pool) -> bool:
        """True if ``name`` was the name of another model, which is gone. The only model that is left must not answer
        for it.
        """
        told = self._told.get(name) if isinstance(name, str) else None
        return told is not None and pool.model is not None and not told.is_same(pool.model)

    def _maybe_of_another(self, pool: Pool) -> list[Backend]:
        """Return the backends that have not been connected yet, and may have another model than ``pool``. The rates on
        disk tell which model a backend had before llamaslot was started.
        """
        own = pool.model.identity if pool.model is not None else None
        unseen = [backend for backend in self._backends.values() if backend.last_session is None]
        return [backend for backend in unseen if own is None or not own.is_same_as(backend.rates.model)]

    def _known(self) -> list[Pool]:
        """Return the pools whose models are known. Proved models come first, then the order of their backends in the
        configuration counts. If two have the same name, a request goes to the first one.
        """
        order = {name: i for i, name in enumerate(self._backends)}
        known = [pool for pool in self._pools if pool.model is not None]
        return sorted(
            known, key=lambda pool: (_is_unproved(pool), min(order[name] for name in pool.backends))
        )

    def names(self) -> Iterator[str]:
        """Yield the names of all models, then expected names and aliases."""
        seen = dict.fromkeys(name for pool in self._known() for name in _names(pool))
        yield from seen
        yield from (name for name in self.expected if name not in seen)
        yield from (alias for alias in self._settings.aliases if alias not in seen)

    def note_names(self, backend: Backend, session: ServerSession, pool: Pool) -> None:
        """Record the names of a model. If another model has the same name, warn once."""
        for name in session.names:
            self._told[name] = PoolModel.of(session)
            others = [other for other in self._known() if other is not pool and name in _names(other)]
            if others and name not in self._warned:
                self._warned.add(name)
                log.warning(
                    "%s: its model is called %s, like the model of %s, but is another one (weights, number of slots or"
                    " chat template differ): requests for %s go to the backend that is configured first. Start one of"
                    " these llama-servers with another --alias, or all of them with the same flags",
                    backend.name, name, " and ".join(others[0].backends), name,
                )  # fmt: skip

    def listed(self) -> list[dict[str, Any]]:
        """Return the models and their states, in the form of ``/v1/models``."""
        known = self._known()
        entries: dict[str, dict[str, Any]] = {}
        for pool in known:
            for name, entry in _entries(pool):
                entries.setdefault(name, entry)
        first = dict[str, str]()  # by backend: the first of its expected names, which is no alias
        for name, backend in self.expected.items():
            first.setdefault(backend, name)
        for backend, name in first.items():
            if (member := self._backends[backend]).last_session is None:
                entries.setdefault(name, {**_unknown(), "id": name, "status": {"value": _state([member])}})
        for alias, target in self._settings.aliases.items():
            if alias in entries:
                continue
            found = entries.get(target)
            if found is None and target in self._backends:
                told = [entry for pool in known if target in pool.backends for _, entry in _entries(pool)]
                found = told[0] if told else None
            entries[alias] = {**(found or _unknown()), "id": alias}
        return list(entries.values())


def _names(pool: Pool) -> set[str]:
    return {name for session in pool.sessions for name in session.names}


def _is_unproved(pool: Pool) -> bool:
    return pool.model is None or pool.model.identity is None


def _unknown() -> dict[str, Any]:
    return {"object": "model", "owned_by": "llamacpp", "status": {"value": "unavailable"}}


def _entries(pool: Pool) -> Iterator[tuple[str, dict[str, Any]]]:
    state = _state(pool.once_connected)
    for session in pool.sessions:
        if session.names:
            yield session.names[0], {**session.entry, "status": {"value": state}}


def _state(backends: Sequence[Backend]) -> str:
    """Return the state of a model with these backends, in the words of llama-server's router mode."""
    backends = [backend for backend in backends if not backend.leases.is_drained]
    states = {backend.health for backend in backends}
    if Health.UP in states:
        return "loaded"
    is_loaded = any(backend.health is Health.DOWN and backend.presence.is_coming for backend in backends)
    if Health.CONNECTING in states or is_loaded:
        return "loading"
    return "unloaded" if Health.ASLEEP in states else "unavailable"
