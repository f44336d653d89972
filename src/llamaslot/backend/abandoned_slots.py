"""Slots whose client has left while llama-server was at work in them. Each is given back once llama-server reports
that it is idle.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from msgspec import Struct
from msgspec.structs import replace

from llamaslot.backend.lease import Lease
from llamaslot.backend.leases import Leases
from llamaslot.backend.slot_table import SlotTable
from llamaslot.cache.content import Content
from llamaslot.errors import LlamaslotError
from llamaslot.llama.answers import SlotInfo
from llamaslot.llama.client import LlamaServer
from llamaslot.scheduling.fairness import Charge
from llamaslot.scheduling.slots import Slot, SlotEvent, SlotState

log = logging.getLogger(__name__)

FIRST_POLL_S = 0.2
# llama-server checks for clients that have left after a full second without any result, and each answer to GET /slots
# is a result. With a poll every 0.3 s an abandoned answer went on for 11.5 s. With a poll every 1.25 s there is a full
# second between two polls, and llama-server notices within 2 s that a client has left.
POLL_S = 1.25
# A request whose start was not confirmed may still be in the server's HTTP thread, which tokenizes it (7 ms per 1,000
# tokens on a slow machine) before the slot shows anything.
UNCONFIRMED_S_PER_TOKEN = 2e-5


class _Abandoned(Struct, eq=False):
    """A slot that was released while llama-server may work in it. ``content``: the most that the slot may hold.
    ``not_before``: until this time the request may not have begun yet, so an idle slot proves nothing.
    """

    table: SlotTable
    slot: Slot
    content: Content
    not_before: float
    id_task: int | None = None  # llama-server's task in the slot, once a poll has shown it
    charge: Charge | None = None  # the account of the request that was left running


class AbandonedSlots:
    """The abandoned slots of one backend. ``run`` is the task of the backend that polls ``/slots`` for them."""

    def __init__(self, api: LlamaServer, leases: Leases, now: Callable[[], float]) -> None:
        self._api, self._leases, self._now = api, leases, now
        self._abandoned: list[_Abandoned] = []
        self._added = asyncio.Event()
        self.on_failure: Callable[[], None] = lambda: None

    def add(self, lease: Lease, charge: Charge | None) -> None:
        """Take over the slot of ``lease``, whose client has left while llama-server was at work. ``charge`` is the
        account of its user, which is charged until the slot is idle.
        """
        assert lease.slot is not None
        delay = FIRST_POLL_S
        if not lease.is_confirmed:
            delay += lease.request.n_tokens * UNCONFIRMED_S_PER_TOKEN
        self.add_slot(lease.table, lease.slot, lease.slot.content, delay, charge)

    def add_slot(
        self,
        table: SlotTable,
        slot: Slot,
        content: Content,
        delay_s: float = 0.0,
        charge: Charge | None = None,
    ) -> None:
        self._abandoned.append(_Abandoned(table, slot, content, self._now() + delay_s, charge=charge))
        self._added.set()

    def end_gone(self) -> bool:
        """Forget the slots of llama-server processes that no longer exist. Returns True if there were any; then the
        caller must dispatch.
        """
        gone = [entry for entry in self._abandoned if not entry.table.is_current]
        for entry in gone:
            self._ended(entry)
        return bool(gone)

    async def run(self) -> None:
        """Poll ``/slots`` while there are abandoned slots. Runs until cancelled."""
        polled_at = -POLL_S
        while True:
            if self.end_gone():
                self._leases.dispatch()
            if not self._abandoned:
                self._added.clear()
                await self._added.wait()
            due = max(polled_at + POLL_S, min(entry.not_before for entry in self._abandoned))
            if (wait_s := due - self._now()) > 0:
                await asyncio.sleep(wait_s)
            asked_at = self._now()
            try:
                infos = {info.id: info for info in await self._api.slots()}
            except LlamaslotError as error:
                log.debug("%s: a poll of llama-server's /slots failed: %s", self._leases.backend, error)
                self.on_failure()
                infos = {}
            polled_at = self._now()
            for entry in list(self._abandoned):
                info = infos.get(entry.slot.id)
                if info is None:
                    continue
                if info.is_processing:
                    self._at_work(entry, info)
                elif asked_at >= entry.not_before:  # else the request may arrive later
                    self._ended(entry)
                    self._settle(entry, info)
                    self._leases.dispatch()

    def _ended(self, entry: _Abandoned) -> None:
        self._abandoned.remove(entry)
        self._leases.paid(entry.charge)

    def _at_work(self, entry: _Abandoned, info: SlotInfo) -> None:
        """Record that the abandoned request runs in its slot. From now on an exclusive request does not wait for it."""
        if entry.id_task is None and entry.table.is_current:
            entry.id_task = info.id_task
            entry.table.seen_at_work(entry.slot)
            self._leases.dispatch()

    def _settle(self, entry: _Abandoned, info: SlotInfo) -> None:
        """Give back a slot in which llama-server has finished the abandoned request. The slot keeps the first
        ``info.n_tokens`` tokens of what was sent, and is FREE if it has none. It is SUSPECT if another task has run in
        it meanwhile, or nothing is known of what was sent.
        """
        if not entry.table.is_current or entry.slot.state is not SlotState.ABANDONED:
            return
        n = info.n_tokens or 0
        content = entry.content
        if n == 0:
            event = SlotEvent.EMPTY
        elif content.n_tokens == 0 or (entry.id_task is not None and (info.id_task or 0) > entry.id_task):
            event = SlotEvent.FAIL  # a higher id_task: llama-server has run another request there since
        else:
            event = SlotEvent.KEEP
            # If the slot has no more tokens than were sent, the prefill has stopped early, and no answer follows.
            is_exact, n_more = n <= content.n_tokens, max(n - content.n_tokens, 0)
            if content.has_media:
                n_more = 0  # llama-server counts media as tokens too, so ``n`` does not tell where a prompt resumes
            content = replace(content.head(n), is_exact=is_exact, n_more=n_more)
        entry.table.give_back(entry.slot, event, content, self._now())
