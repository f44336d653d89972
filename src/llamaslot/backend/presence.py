"""Knows whether the llama-server process of a backend runs and is awake. It does not if llama-server has unloaded
its model by itself (``--sleep-idle-seconds``), if llamaslot has stopped it until the next request needs it, or if the
backend is one of a router's models, and that is not loaded.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from llamaslot.backend.leases import Leases
from llamaslot.cache.content import NOTHING
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.slots import SlotEvent
from llamaslot.tasks import ChangeEvent

log = logging.getLogger(__name__)


class ModelLoader(Protocol):
    """The interface of what starts and stops backends on demand, by their names."""

    def use_if_loaded(self, name: str) -> bool:
        """True if the model of backend ``name`` is loaded. Then the call counts as a use: the model stays loaded for a
        while.
        """
        ...

    async def serving(self, name: str) -> None:
        """Wait until the model of backend ``name`` is loaded. Raises BackendDown. Canceling is safe."""
        ...


class Presence:
    """Knows whether the llama-server process of one backend runs. ``on_demand`` starts and stops this process; None if
    it runs all the time. ``changes`` is notified when the backend's health has changed.
    """

    def __init__(self, backend: str) -> None:
        self._backend, self.changes = backend, ChangeEvent()
        self.on_demand: ModelLoader | None = None
        self.is_replaced = False  # it is a router, and backends for its models have taken its place
        self._is_awake = asyncio.Event()
        self._is_awake.set()

    def use_if_loaded(self) -> bool:
        """True if the model is loaded, as it always is without ``on_demand``. Then this call counts as a use of the
        model.
        """
        return self.on_demand is None or self.on_demand.use_if_loaded(self._backend)

    async def serving(self) -> None:
        """Wait until the model is loaded. Returns at once without ``on_demand``. Raises BackendDown. Canceling is
        safe.
        """
        if self.on_demand is not None:
            await self.on_demand.serving(self._backend)

    @property
    def is_coming(self) -> bool:
        """True if the model is loaded on demand, and is loaded or being loaded now."""
        return self.on_demand is not None and self.is_awake

    @property
    def is_awake(self) -> bool:
        """True if there is a llama-server process to connect to."""
        return self._is_awake.is_set()

    def set(self, *, is_awake: bool) -> None:
        """Record whether there is a llama-server process to connect to."""
        if is_awake:
            self._is_awake.set()
        else:
            self._is_awake.clear()

    async def awake(self) -> None:
        """Wait until there is a llama-server process to connect to. Canceling is safe."""
        await self._is_awake.wait()


def note_sleep(leases: Leases, is_asleep: bool, now: float) -> None:
    """Record whether llama-server sleeps. A sleeping llama-server has unloaded its model, so its idle slots are marked
    empty (measured).
    """
    leases.is_asleep = is_asleep
    table = leases.table
    if not is_asleep or table is None or not (filled := table.filled()):
        return
    log.info(
        "%s: llama-server has unloaded its model (--sleep-idle-seconds), so its slots are empty; the next request loads"
        " the model again",
        leases.backend,
    )
    for slot in filled:
        table.take(slot, Request("sleep"), now)
        table.give_back(slot, SlotEvent.EMPTY, NOTHING, now)
    leases.dispatch()
