"""Saves dirty slots while no request waits, so that their contexts are not lost when slots are overwritten or
llama-server crashes; and drains a backend, whose slots are saved when no request runs any more.
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
from llamaslot.tasks import TaskOwner

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
        """Save every idle slot that is worth saving, as ``save_all``, for at most ``save_s`` seconds. Logs a
        warning if slots are not saved by then.
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


class Drain:
    """The switch that takes one backend out of service without losing contexts: no request begins, running answers end,
    then slots are saved. It stays as it is when llama-server restarts. A restart of llamaslot ends it.
    """

    def __init__(self, backend: str, leases: Leases, idle_save: IdleSave, tasks: TaskOwner) -> None:
        self._backend, self._leases, self._idle_save, self._tasks = backend, leases, idle_save, tasks
        self._running: asyncio.Task[None] | None = None
        self._is_saved = False

    @property
    def unsaved(self) -> list[int]:
        """The numbers of the slots that could not be saved; empty while ``state`` is not ``drained``."""
        return [slot.id for slot in self._idle_save.worth_saving()] if self.state == "drained" else []

    @property
    def state(self) -> str | None:
        """``draining`` while requests run or slots are being saved, then ``drained``; None in normal service."""
        if not self._leases.is_drained:
            return None
        return "drained" if self._is_saved else "draining"

    def begin(self, *, is_removed: bool = False) -> None:
        """Let no request begin at this backend, and save its slots once the running requests have ended. If that has
        been done already, try again to save the slots that could not be saved. ``is_removed``: the configuration has
        the backend no longer, so requests that wait for it alone end with an error.
        """
        if is_removed:
            self._leases.is_removed = True
            self._leases.dispatch()
        if self._leases.is_drained and not self.unsaved:
            return
        log.info(
            "%s: draining: running requests go on, and no request begins at this backend until 'llamaslot undrain %s'",
            self._backend, self._backend,
        )  # fmt: skip
        self._leases.is_drained, self._is_saved = True, False
        self._running = self._tasks.spawn(self._run(), f"{self._backend}: drain")
        self._leases.dispatch()

    def end(self) -> None:
        """Let requests begin at this backend again. Idempotent."""
        if not self._leases.is_drained:
            return
        log.info("%s: undrained: requests may begin at this backend again", self._backend)
        if self._running is not None:
            self._running.cancel()
        self._leases.is_drained = self._leases.is_removed = self._is_saved = False
        self._leases.dispatch()

    async def _run(self) -> None:
        while self._leases.is_at_work:
            await self._leases.changes.wait()
        n_saved = await self._idle_save.save_all()
        self._is_saved = True
        log.info(
            "%s: drained: no request runs at this backend, and %d slots were saved to disk",
            self._backend, n_saved,
        )  # fmt: skip
        if unsaved := self.unsaved:
            log.warning(
                "%s: drained, but some slots could not be saved: %s; their contexts are lost when llama-server stops;"
                " 'llamaslot drain %s' tries to save them again",
                self._backend, unsaved, self._backend,
            )  # fmt: skip
