"""A llama-server that is not there all the time: it unloads its model by itself (``--sleep-idle-seconds``), or
llamaslot stops it and starts it again when a request comes for its model.
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


class OnDemand(Protocol):
    """What starts and stops backends, by their names."""

    def use_if_loaded(self, name: str) -> bool:
        """Use the model for a request, if it is loaded: True, and it stays so for a while."""
        ...

    async def serving(self, name: str) -> None:
        """Wait until the model is loaded. Raises BackendDown. Canceling is safe."""
        ...


class Presence:
    """``on_demand``: what starts and stops this backend; None if it is always there. ``changes`` rings when its health
    has changed.
    """

    def __init__(self, backend: str) -> None:
        self._backend, self.changes = backend, ChangeEvent()
        self.on_demand: OnDemand | None = None
        self._is_awake = asyncio.Event()
        self._is_awake.set()

    def use_if_loaded(self) -> bool:
        """As ``OnDemand.use_if_loaded``."""
        return self.on_demand is None or self.on_demand.use_if_loaded(self._backend)

    async def serving(self) -> None:
        """As ``OnDemand.serving``."""
        if self.on_demand is not None:
            await self.on_demand.serving(self._backend)

    def set(self, *, is_awake: bool) -> None:
        """Whether there is a process to connect to."""
        if is_awake:
            self._is_awake.set()
        else:
            self._is_awake.clear()

    async def awake(self) -> None:
        """Wait until there is a process to connect to. Canceling is safe."""
        await self._is_awake.wait()


def forget_slots(leases: Leases, now: float) -> None:
    """llama-server sleeps: it has unloaded its model, and the content of its idle slots is gone (measured)."""
    table = leases.table
    if table is None or not (filled := table.filled()):
        return
    log.info(
        "%s: llama-server has unloaded its model (--sleep-idle-seconds): its slots are empty", leases.backend
    )
    for slot in filled:
        table.take(slot, Request("sleep"), now, has_answer=False)
        table.give_back(slot, SlotEvent.EMPTY, NOTHING, now)
    leases.dispatch()
