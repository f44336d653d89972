"""Saves dirty slots while no request waits, so that their contexts are not lost when slots are overwritten or
llama-server crashes.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable

from llamaslot.backend.executor import PlanExecutor
from llamaslot.backend.lease import Lease
from llamaslot.backend.leases import Leases
from llamaslot.backend.save import never
from llamaslot.errors import LlamaslotError
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.slots import Slot, SlotState
from llamaslot.store import Snapshot

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5


class IdleSave:
    """Saves the idle slots of one backend, while no client has used the backend for ``idle_save_s`` seconds. It leases
    a slot only for the time of its save.
    """

    def __init__(self, leases: Leases, executor: PlanExecutor, idle_save_s: float) -> None:
        self._leases, self._executor, self.idle_save_s = leases, executor, idle_save_s
        self._serial = itertools.count(1)
        # Slots that could not be saved, with their tokens. A slot is tried again once its tokens have changed.
        self._failed: dict[Slot, bytes] = {}

    async def run(self) -> None:
        """Save one slot after the other until cancelled. A save that is running then is completed."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            if self._leases.idle_s >= self.idle_save_s:
                slot = self._next()
                if slot is not None and (lease := self._lease(slot)) is not None:
                    await self._save(lease, self._has_requests)

    async def save_all(self) -> int:
        """Save every idle slot that is worth saving, for a clean stop; also slots that could not be saved before.
        Returns the number of saved slots.
        """
        table, n_saved = self._leases.table, 0
        self._failed.clear()
        for _ in table.slots if table is not None else ():  # each slot is tried once
            slot = self._next()
            if slot is None or (lease := self._lease(slot)) is None:
                break
            n_saved += await self._save(lease) is not None
        await self._executor.saving.settle()
        return n_saved

    async def save_before_stop(self, save_s: float) -> None:
        """Save every idle slot that is worth saving, as ``save_all``, for at most ``save_s`` seconds. A warning tells
        if slots are not saved by then.
        """
        try:
            async with asyncio.timeout(save_s):
                n_saved = await self.save_all()
            log.info(
                "%s: %d slots saved to disk before llama-server stops or unloads the model",
                self._leases.backend, n_saved,
            )  # fmt: skip
        except TimeoutError:
            log.warning(
                "%s: not every slot was saved within %g s: the contexts of the unsaved slots are lost when llama-server"
                " stops",
                self._leases.backend, save_s,
            )  # fmt: skip

    def _lease(self, slot: Slot) -> Lease | None:
        request = Request(f"idle-save-{next(self._serial)}", slot.content.tokens)
        return self._leases.try_lease(slot, request)

    async def _save(self, lease: Lease, must_give_way: Callable[[], bool] = never) -> Snapshot | None:
        """Save the slot, which is given back before the commit has ended. Returns the snapshot, None without one.
        Unless the save gave way to a request, a slot that could not be saved is not tried again until its tokens have
        changed.
        """
        assert lease.slot is not None
        has_given_way = False

        def gives_way() -> bool:
            nonlocal has_given_way
            has_given_way = has_given_way or must_give_way()
            return has_given_way

        with lease:
            slot, before = lease.slot, lease.slot.content.tokens
            try:
                commit = await self._executor.save_now(lease, gives_way)
            except LlamaslotError as error:
                self._executor.saving.say_failed(lease, error)
                commit = None
            gave_way = commit is None and gives_way()  # true also if the request to which it gave way is gone
        snapshot = await asyncio.shield(commit) if commit is not None else None
        if snapshot is None and not gave_way:
            self._failed[slot] = before if commit is None else slot.content.tokens
        else:
            self._failed.pop(slot, None)
        return snapshot

    def _has_requests(self) -> bool:
        """True if a request has come while room was being reserved. The save then gives way, so that neither this
        request nor its stream waits for it.
        """
        return self._leases.idle_s == 0

    def _next(self) -> Slot | None:
        """Return the slot to save next, the one with most tokens. None if no slot is worth saving, or all that are
        could not be saved.
        """
        table = self._leases.table
        if table is None:
            return None
        self._failed = {slot: tokens for slot, tokens in self._failed.items() if slot in table.slots}
        worth = [slot for slot in self.worth_saving() if self._failed.get(slot) != slot.content.tokens]
        return max(worth, key=lambda slot: slot.content.n_tokens, default=None)

    def worth_saving(self) -> list[Slot]:
        """Return the idle slots whose content is not on disk and is worth a save."""
        table = self._leases.table
        slots = table.slots if table is not None else []
        return [
            slot
            for slot in slots
            if slot.state is SlotState.HOT and table is not None and table.worth.is_worth_saving(slot)
        ]
