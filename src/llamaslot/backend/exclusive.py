"""The exclusive section: for requests for which llama-server chooses the slots.

With ``n`` > 1 llama-server takes the lowest idle slots for the children, and clears these slots at the end. A request
on a route without ``id_slot`` may run in any idle slot. So before such a request is sent, no other request may be
between two steps. Every slot that llama-server may choose is leased, and saved if that is worth it. Once the request
runs, the slots that llama-server has not chosen are released.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator

from llamaslot.backend.executor import PlanExecutor
from llamaslot.backend.lease import Lease
from llamaslot.backend.lease_states import LeaseState, RetryPlacement
from llamaslot.backend.leases import Leases
from llamaslot.backend.long_prompt import Report
from llamaslot.cache.content import NOTHING, Content
from llamaslot.cache.ids import common
from llamaslot.cache.namespaces import SHARED
from llamaslot.errors import BackendRestarted, LlamaslotError, SlotNotEmptied, UpstreamError
from llamaslot.formats.comments import Comment
from llamaslot.llama.answers import SlotInfo
from llamaslot.llama.client import LlamaServer
from llamaslot.scheduling.plan import PrefillStats
from llamaslot.scheduling.request import Placement, Request
from llamaslot.scheduling.slots import Slot
from llamaslot.tasks import TaskOwner

# With more frequent polls llama-server would not notice that clients have left (as for abandoned slots).
_CONFIRM_EVERY_S = 1.5
# For so long an exclusive request waits for long prefills and foreign answers while other requests are admitted. While
# the gate is shut, all other requests wait.
_TIMEOUT_S = 60.0
_SHUT_S = 15.0  # for so long the gate is shut the first time, if foreign answers do not end
_LANDING_POLLS_S = (0.05, 0.2, 0.5, 1.5)

_NOT_EMPTIED = (
    "could not erase another user's slot that llama-server might select; the request was not sent. Try again;"
    " llamaslot's log has llama-server's answer"
)

_NOT_PREPARED = (
    "could not prefill a slot for this prompt, and without one llama-server might select another user's slot; the"
    " request was not sent. Try again; llamaslot's log has llama-server's answer"
)


class UnpinnedRequest:
    """A request for which llama-server chooses the slots, and the leases of all slots that it may choose (``others``).
    ``settle`` finds out which slots it has chosen.
    """

    def __init__(
        self,
        api: LlamaServer,
        leases: Leases,
        lease: Lease,
        others: list[Lease],
        before: dict[int, SlotInfo],
        left: Content | None,
    ) -> None:
        self._api, self._leases = api, leases
        self._lease, self._others, self._before = lease, others, before
        self._left = left
        self._settled = False

    async def watch_landing(self) -> None:
        """Poll ``/slots`` until llama-server works on the request, then admit other requests again. Canceling
        is safe.
        """
        for wait_s in itertools.chain(_LANDING_POLLS_S, itertools.repeat(_CONFIRM_EVERY_S)):
            await asyncio.sleep(wait_s)
            try:
                infos = await self._api.slots()
            except LlamaslotError:
                continue
            if self.has_landed(infos):
                return

    def has_landed(self, infos: list[SlotInfo]) -> bool:
        """True if llama-server works on the request, as ``infos`` shows. Then the slots that it has not chosen are
        released, and other requests are admitted again.
        """
        others = self._look_up(infos)
        if sum(info.is_processing for _, info in others) < (self._lease.request.n_children or 1):
            return False
        for lease, info in others:
            if info.is_processing:
                lease.land(is_confirmed=True)
            elif self._is_untouched(info):
                lease.release()
        self._lease.mark_processing()
        self._leases.end_exclusive(self._lease)
        return True

    def _look_up(self, infos: list[SlotInfo]) -> list[tuple[Lease, SlotInfo]]:
        """Return each leased slot that the request may have got, with its entry in ``infos``. First, slots of other
        requests that have ended since the request was sent are leased too, before any other request can get them.
        """
        leases = self._leases
        if leases.table is self._lease.table and leases.has_exclusive(self._lease):
            self._others += leases.lease_idle(self._lease.request)
        by_id = {info.id: info for info in infos}
        held = [lease for lease in self._others if not lease.is_released]
        return [(lease, by_id[lease.slot_id]) for lease in held if lease.slot_id in by_id]

    async def settle(self) -> None:
        """The request has ended: find out what its slots hold now, and release them. If llama-server does not answer,
        ``abort`` must release them.
        """
        if self._settled:
            return
        try:
            infos = await self._api.slots()
        except LlamaslotError:
            return  # nothing is known of the slots: ``abort`` releases them
        self._settled = True  # only after the await: if that is cancelled, ``abort`` releases the slots
        held = self._look_up(infos)
        taken = [info for _, info in held if not info.is_processing and not self._is_untouched(info)]
        for lease, info in held:
            if info.is_processing:
                lease.land(is_confirmed=True)
            elif self._is_untouched(info):
                lease.finish(lease.content)
            else:
                lease.finish(NOTHING if not info.n_tokens else self._left if len(taken) == 1 else None)
            lease.release()
        self._leases.end_exclusive(self._lease)

    def abort(self) -> None:
        """Release the slots without knowing what they hold. The client has left, perhaps before its request began, so
        each slot is abandoned until llama-server has reported what it holds. No effect after ``settle``.
        """
        if self._settled:
            return
        self._settled = True
        self._look_up([])
        for lease in self._others:
            if lease.state is LeaseState.PREPARING:
                lease.land(is_confirmed=False)
            lease.release()

    def _is_untouched(self, info: SlotInfo) -> bool:
        before = self._before.get(info.id)
        if before is None or info.is_processing or (info.id_task or 0) > (before.id_task or 0):
            return False  # task ids are ascending
        return before.is_processing or before.n_tokens == info.n_tokens


class ExclusiveSection:
    """Runs the exclusive sections of one backend, one at a time."""

    def __init__(self, api: LlamaServer, leases: Leases, steps: PlanExecutor, tasks: TaskOwner) -> None:
        self._api, self._leases, self._executor, self._tasks = api, leases, steps, tasks
        self._clearing: dict[Lease, None] = {}  # in the order of their calls

    @contextlib.asynccontextmanager
    async def section(
        self, lease: Lease, report: Report, left: Content | None = None
    ) -> AsyncIterator[UnpinnedRequest]:
        """Wait until no other request is between two steps, then lease and save the slots that llama-server may choose
        for the request. The request is sent in the block.

        ``lease``: the lease of the parent (``n`` > 1), or a lease without a slot. ``left``: the content of the
        request's only slot at its end, as far as known. Canceling is safe: all leases are released. Raises
        BackendRestarted. Raises SlotNotEmptied if another user's slot cannot be erased.
        """
        report(Comment.WAITING_FOR_TURN)
        others: list[Lease] = []
        unpinned: UnpinnedRequest | None = None
        lease.begin_wait()
        try:
            try:
                await self._until_quiet(lease)
            finally:
                self._leases.has_waited(lease)
            if self._leases.table is not lease.table:
                raise BackendRestarted
            await self._take_idle(lease.request, others)
            before = {info.id: info for info in await self._api.slots()}
            lease.check_current()  # after a restart the request would run in slots that the new table has as idle
            lease.end_wait()
            if lease.slot is None:
                lease.begin_request()
            unpinned = UnpinnedRequest(self._api, self._leases, lease, others, before, left)
            watcher = self._tasks.spawn(unpinned.watch_landing(), f"{lease.request.id} lands")
            try:
                yield unpinned
            except UpstreamError:
                await unpinned.settle()  # refused; but llama-server may have used slots
                raise
            finally:
                watcher.cancel()
            await unpinned.settle()
        finally:
            if unpinned is not None:
                unpinned.abort()
            else:
                for other in others:
                    other.release()
            self._leases.end_exclusive(lease)

    async def _take_idle(self, request: Request, others: list[Lease]) -> None:
        """Lease the idle slots that llama-server may choose for ``request``, and add the leases to ``others``. Each
        slot is saved if that is worth it, and erased if the request must not use its content.
        """
        fresh = self._leases.lease_idle(request, request.n_children or None)
        while fresh:
            others += fresh
            for other in fresh:
                await self._save_if_worth(other)
                if request.placement is Placement.SERVER_CHOSEN and not _may_land_in(other, request):
                    await self._empty(other, request)
            fresh = self._leases.lease_idle(request)  # slots that have become idle meanwhile

    async def _until_quiet(self, lease: Lease) -> None:
        """Wait until no other request is between two steps and no foreign request runs. Then the gate is shut: no
        other request begins. A foreign request is one whose content the request of ``lease`` must not use.

        As long as a foreign request runs, the gate stays open, so that other requests go on. With many requests there
        may never be a moment without one. Then the gate is shut for ``_SHUT_S``, next time for twice as long, and
        stays open for at least as long in between.
        """
        leases, shut_s = self._leases, _SHUT_S
        while True:
            await self._until_likely(lease, max(_TIMEOUT_S, shut_s))
            leases.request_exclusive(lease)
            leases.pause_admission(lease)
            if await self._is_quiet_within(lease, shut_s):
                return
            leases.resume_admission(lease)
            shut_s *= 2

    async def _until_likely(self, lease: Lease, wait_s: float) -> None:
        """Wait for foreign answers and long prefills while other requests are admitted, for at most ``wait_s``. Long
        prefills are asked to make room.
        """
        leases = self._leases
        until = leases.now() + wait_s
        while leases.now() < until:
            if not self._takes_long(lease):
                leases.request_exclusive(lease)
                if not leases.is_prefilling(lease):
                    return
            await leases.changes.wait(_CONFIRM_EVERY_S)

    async def _is_quiet_within(self, lease: Lease, shut_s: float) -> bool:
        """Wait until no request is between two steps and no foreign answer runs. Returns False if a foreign answer
        runs for longer than ``shut_s``. Steps are awaited to their end.
        """
        leases = self._leases
        asked_at = leases.now()
        until = asked_at + shut_s
        while not _is_quiet(leases, lease):
            if leases.now() >= until and self._takes_long(lease):
                return False
            await leases.changes.wait(_CONFIRM_EVERY_S)
            if leases.now() >= asked_at + _CONFIRM_EVERY_S:
                asked_at = leases.now()
                await self._confirm_running()
        return True

    def _takes_long(self, lease: Lease) -> bool:
        """True if the section of ``lease`` must wait for the end of an answer. Either a slot runs a request whose
        content the request of ``lease`` must not use, or a steered request waits in ``evict_competitors``, perhaps for
        such an answer.
        """
        is_waited_for = any(not other.is_released for other in self._clearing)
        return is_waited_for or self._leases.is_other_namespace_at_work(lease)

    async def evict_competitors(self, lease: Lease, here: PrefillStats | None) -> None:
        """Wait until llama-server would choose the slot of ``lease`` for the request's prompt: among the idle slots it
        chooses the one with the longest common prefix. Other slots that share as much are saved if that is worth it,
        and erased. If such a slot is between two steps, this waits for its end. If a slot cannot be erased but the
        request may use its content, that is accepted, because landing there only costs time. Canceling is safe.

        Raises RetryPlacement with ``here`` if two requests would wait for each other; then the slot has been released,
        and the other request has ended. Raises BackendRestarted. Raises SlotNotEmptied if a slot cannot be erased
        whose content the request must not use, or if the prompt is not in the slot of ``lease``, because then any slot
        may share more.
        """
        if not _is_prepared(lease):
            raise SlotNotEmptied(_NOT_PREPARED)
        self._clearing[lease] = None
        lease.begin_wait()
        try:
            while competing_slots := self._competitors(lease):
                if not lease.table.can_erase:  # the content of these slots stays there
                    if any(lease.table.is_other_namespace(slot, lease.request) for slot in competing_slots):
                        raise SlotNotEmptied(_NOT_EMPTIED)
                    return
                if (first := self._first(lease, {slot.id for slot in competing_slots})) is not None:
                    lease.release()
                    while first in self._clearing or (
                        not first.is_released and self._leases.has_exclusive(first)
                    ):
                        await self._leases.changes.wait(_CONFIRM_EVERY_S)
                    raise RetryPlacement(here)
                for slot in competing_slots:
                    if (competitor := self._leases.lease_competitor(slot, lease)) is not None:
                        with competitor:
                            await self._save_if_worth(competitor)
                            if not await self._empty(competitor, lease.request):
                                return
                        break
                else:
                    await self._leases.changes.wait(_CONFIRM_EVERY_S)
                lease.check_current()
        finally:
            del self._clearing[lease]
            lease.end_wait()
            self._leases.changes.notify()

    def _competitors(self, lease: Lease) -> list[Slot]:
        """Return the other slots that llama-server could choose, because they share as many tokens with the prompt as
        the slot of ``lease``. A slot is left out if it surely runs a request whose content the request of ``lease``
        may use: llama-server skips busy slots, and if that request ends just then, landing there only costs time.
        """
        table, request = lease.table, lease.request
        at_work = {
            other.slot.id for other in self._leases.leases if other.slot is not None and other.is_running
        }
        competing_slots = table.competing_slots(request, lease.slot_id)
        return [
            slot
            for slot in competing_slots
            if slot.id not in at_work or table.is_other_namespace(slot, request)
        ]

    def _first(self, lease: Lease, competing_slots: set[int]) -> Lease | None:
        """Return a lease that holds one of the ``competing_slots`` and has precedence over ``lease``: it waits for
        ``lease``, and ``lease`` waits for it. So ``lease`` must give up its slot. None if there is no such lease.
        """
        earlier = itertools.takewhile(lambda other: other is not lease, self._clearing)
        turns = (other for other in self._leases.leases if self._leases.has_exclusive(other))
        every = itertools.chain(earlier, turns)
        return next(
            (o for o in every if o.slot is not None and o.slot.id in competing_slots and not o.is_released),
            None,
        )

    async def _empty(self, other: Lease, request: Request) -> bool:
        """Erase the slot of ``other``, which llama-server may choose for ``request``. Returns True if it is erased,
        and False if it is not but the request may use its content. Raises SlotNotEmptied if the request must not use
        it; then nothing may be sent.
        """
        if other.table.can_erase and await self._executor.erase_now(other):
            return True
        other.check_current()
        if other.slot is None or other.table.is_other_namespace(other.slot, request):
            raise SlotNotEmptied(_NOT_EMPTIED)
        return False

    async def _save_if_worth(self, lease: Lease) -> None:
        if lease.slot is not None and lease.table.worth.is_worth_saving(lease.slot):
            try:
                await self._executor.save_now(lease)
            except LlamaslotError as error:
                self._executor.saving.say_failed(lease, error)

    async def _confirm_running(self) -> None:
        """Ask llama-server which of the sent requests have begun. Unstreamed answers have no headers before their end
        that would tell it.
        """
        waiting = [
            lease
            for lease in self._leases.leases
            if lease.state is LeaseState.SENT and lease.slot is not None
        ]
        if not waiting:
            return
        try:
            busy = {info.id for info in await self._api.slots() if info.is_processing}
        except LlamaslotError:
            return
        for lease in waiting:
            if lease.state is LeaseState.SENT and lease.slot_id in busy:
                lease.mark_processing()


def _may_land_in(lease: Lease, request: Request) -> bool:
    """True if ``request`` may use the content of the slot of ``lease``, if llama-server chooses that slot."""
    return lease.content is not None and request.may_use(lease.content)


def _is_prepared(lease: Lease) -> bool:
    """True if the slot of ``lease`` has all tokens of the request but the last, so that llama-server chooses it: it
    takes the slot with the longest common prefix.

    Also true if llama-server has refused the prefill, but the request is in a shared namespace and may use what the
    slot holds: then another slot only costs time.
    """
    request, content = lease.request, lease.content
    n_needed = request.n_tokens - 1
    if (
        content is not None
        and request.may_use(content)
        and common(content.tokens, request.tokens) >= n_needed
    ):
        return True
    return SHARED in request.reads and (lease.slot is None or request.may_use(lease.slot.content))


def _is_quiet(leases: Leases, lease: Lease) -> bool:
    """True if the request of ``lease`` can be sent now. Then each slot is in one of three states: idle and not leased,
    leased for this request, or confirmed to run another request whose content this request may use. Also true after a
    restart of llama-server, because then there is nothing to wait for.
    """
    table, request = lease.table, lease.request
    if leases.table is not table:
        return True  # there is nothing to wait for any more
    others = [other for other in leases.leases if other.table is table and other.request is not request]
    # The slots of its children run with it.
    started = {id(other.request) for other in others if other.is_running}
    if leases.is_other_namespace_at_work(lease) or any(id(other.request) not in started for other in others):
        return False
    return not table.is_anything_on_its_way and table.n_idle >= max(
        request.n_children, int(request.placement is Placement.SERVER_CHOSEN)
    )
