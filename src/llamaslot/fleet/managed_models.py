"""The llama-servers that llamaslot runs. Either all run from the start, or each is started by a request for
its model.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from llamaslot.backend.backend import Backend
from llamaslot.errors import BackendDown
from llamaslot.fleet.on_demand import OnDemand
from llamaslot.llama.managed.process import ManagedServer
from llamaslot.tasks import ChangeEvent, TaskOwner

log = logging.getLogger(__name__)

_CONNECTS = 5  # a model is given up if llamaslot cannot connect to it so often: others may wait for its place


class ServedOnDemand:
    """The part of ``on_demand.Loadable`` that is the same for all backends whose llama-server does not always run.
    ``save_s``: the longest time in seconds for saving its slots.
    """

    def __init__(self, backend: Backend, save_s: float) -> None:
        self.name, self._backend, self._save_s = backend.name, backend, save_s
        backend.leases.is_on_demand = True

    @property
    def changes(self) -> ChangeEvent:
        return self._backend.leases.changes

    @property
    def is_at_work(self) -> bool:
        return self._backend.leases.is_at_work

    @property
    def n_waiting(self) -> int:
        # Before its first connection the backend is in the pool of another model.
        return self._backend.leases.n_waiting if self._backend.last_session is not None else 0

    async def _connected(self, why_gone: Callable[[], str | None]) -> None:
        """Wait until llamaslot is connected to the model. Raises BackendDown if that failed several times, or if
        ``why_gone()``, called after each change, returns why the process is gone. Canceling is safe.
        """
        backend = self._backend
        while backend.session is None:
            if (why := why_gone()) is not None:
                raise BackendDown(f"{self.name}: {why}")
            if backend.n_failed_connects >= _CONNECTS:
                raise BackendDown(f"{self.name}: was not loaded: {backend.why_down}")
            await backend.presence.changes.wait()
        log.info("%s: llamaslot has loaded this model, because a request needs it", self.name)


class ManagedModel(ServedOnDemand):
    """A model that llamaslot loads by starting a llama-server, and unloads by stopping it."""

    is_loaded = None

    def __init__(self, backend: Backend, server: ManagedServer, save_s: float) -> None:
        super().__init__(backend, save_s)
        self._server = server
        self._tasks = TaskOwner()

    async def load(self) -> None:
        """Start the llama-server and wait until it serves. Raises BackendDown if it ends before that. Canceling stops
        it.
        """
        deaths = list[str]()

        def died(how: str) -> None:
            deaths.append(how)
            self._backend.presence.changes.notify()

        def why_gone() -> str | None:
            return f"its llama-server {deaths[0]} while it was loading; its log says why" if deaths else None

        self._server.on_death = died
        running = self._tasks.spawn(self._server.run(), f"{self.name}: managed llama-server")
        running.add_done_callback(lambda _: died("could not be run"))  # a mistake of llamaslot's
        self._backend.wake()
        try:
            await self._connected(why_gone)
        except BaseException:
            await self._stop()
            raise
        finally:
            self._server.on_death = lambda how: None

    async def unload(self) -> None:
        """Save the slots and stop the llama-server. Canceling is safe: the llama-server is stopped all the same."""
        self._backend.leases.is_leaving = True
        try:
            await self._backend.save_all(self._save_s)
        finally:
            await self._stop()
            self._backend.leases.is_leaving = False
        log.info(
            "%s: llamaslot has unloaded this model, because it was idle or another model needs its place",
            self.name,
        )

    async def _stop(self) -> None:
        self._backend.sleep()
        await self._tasks.close()

    async def close(self) -> None:
        """Stop the llama-server. Its slots have been saved before."""
        await self._tasks.close()


class ManagedModels:
    """All llama-servers that llamaslot runs. ``servers``: by the names of their backends. If both ``max_loaded`` and
    ``idle_unload_s`` are None, all run from the start; else each is started on demand.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        servers: Mapping[str, ManagedServer],
        max_loaded: int | None,
        idle_unload_s: float | None,
        save_s: float,
    ) -> None:
        self._servers, self._tasks = servers, TaskOwner()
        self._models: list[ManagedModel] = []
        self.on_demand: OnDemand | None = None
        if max_loaded is None and idle_unload_s is None:
            return
        managed = [backend for backend in backends if backend.name in servers]
        self._models = [ManagedModel(backend, servers[backend.name], save_s) for backend in managed]
        self.on_demand = OnDemand(self._models, max_loaded, idle_unload_s)
        for backend in managed:
            backend.presence.on_demand = self.on_demand
            backend.sleep()

    def start(self) -> None:
        if self.on_demand is not None:
            self._tasks.spawn(self.on_demand.run(), "load on demand")
            return
        for name, server in self._servers.items():
            self._tasks.spawn(server.run(), f"{name}: managed llama-server")

    async def stop_loading(self) -> None:
        """From now on load and unload no model. Waits for models that are being unloaded."""
        if self.on_demand is not None:
            await self._tasks.close()
            await self.on_demand.close()

    async def close(self) -> None:
        """Stop all llama-servers. Their slots have been saved before."""
        await self._tasks.close()
        await asyncio.gather(*(model.close() for model in self._models))
