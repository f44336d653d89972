"""One backend's scheduler, slot table, leases, steps, turns, abandoned slots and idle save, with a stub as
llama-server, and its clients.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, cast

from msgspec.structs import replace

from bench.virtual import VirtualLoop
from llamaslot.backend.abandoned_slots import AbandonedSlots
from llamaslot.backend.exclusive import ExclusiveSection, UnpinnedRequest
from llamaslot.backend.executor import PlanExecutor
from llamaslot.backend.feedback import ReportedCounts
from llamaslot.backend.idle_save import IdleSave
from llamaslot.backend.lease import Lease
from llamaslot.backend.lease_states import EarlierPlaces, LeaseState, Preempted, RetryPlacement
from llamaslot.backend.save import Saving
from llamaslot.backend.slot_content import is_far_off
from llamaslot.backend.slot_table import SlotTable
from llamaslot.cache.content import NOTHING
from llamaslot.cache.ids import pack
from llamaslot.errors import BackendDown, LlamaslotError
from llamaslot.fleet.dispatcher import Dispatcher
from llamaslot.llama.client import LlamaServer
from llamaslot.observe.metrics import Metrics
from llamaslot.scheduling.plan import PrefillStats
from llamaslot.scheduling.rates import Rates
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.settings import QueueLimits, SchedulingSettings
from llamaslot.scheduling.slots import SlotEvent, SlotState
from llamaslot.store import Catalog, Snapshot
from llamaslot.tasks import TaskOwner
from tests.support.stub import MODEL, StubCatalog, StubServer


def tokens_of(first: int, n: int) -> bytes:
    """``n`` tokens in a row: contexts that begin 1,000 tokens apart share nothing."""
    return pack(range(first, first + n))


def outcome(task: asyncio.Task[Any]) -> BaseException | None:
    """The error that the client ended with; None if it was served."""
    assert task.done(), task
    return task.exception()


def outcome_of(task: asyncio.Task[Any]) -> Any:
    """What the client got."""
    assert outcome(task) is None
    return task.result()


SETTINGS = SchedulingSettings(similarity_min=0.85, small_prompt_tokens=50, chunk_threshold_s=0.2)


class _Misplaced(Exception):
    """The slot holds much less than expected: ``n_found`` tokens."""

    def __init__(self, n_found: int) -> None:
        super().__init__(n_found)
        self.n_found = n_found


class House:
    """All of it, around a ``VirtualLoop``. It listens to the log until ``close``."""

    def __init__(
        self,
        loop: VirtualLoop,
        server: StubServer,
        *,
        room: int = 1000,
        settings: SchedulingSettings = SETTINGS,
        limits: QueueLimits | None = None,
    ) -> None:
        self.loop, self.server, self.settings = loop, server, settings
        self.catalog = StubCatalog(server, room, on_drop=self._dropped)
        self.rates, self.metrics, self.tasks = Rates(), Metrics().of_backend("stub"), TaskOwner()
        self.dispatcher = Dispatcher(settings, limits or QueueLimits(), loop.time)
        self.leases = self.dispatcher.add("stub")
        api, catalog = cast(LlamaServer, server), cast(Catalog, self.catalog)
        self.executor = PlanExecutor(Saving(api, catalog, self.rates, self.metrics, self.tasks, self.leases))
        self.exclusive = ExclusiveSection(api, self.leases, self.executor, self.tasks)
        self.idle_save = IdleSave(self.leases, self.executor, 2.0)
        self.abandoned_slots = AbandonedSlots(api, self.leases, loop.time)
        self.leases.on_abandoned = self.abandoned_slots.add
        self.leases.pin = self.catalog.pin
        self.saved_tokens = b""  # what ``keep_one_on_disk`` has put there
        self.clients: dict[asyncio.Task[Any], str] = {}
        self.first_s: dict[str, float] = {}  # from each job's question to the first token of its answer
        self.slots: dict[str, int] = {}  # where each job was last
        self.preempted: list[str] = []  # the jobs that gave their slots up, in their order
        self.faults: list[str] = []
        self.cache_kind = server.cache_kind  # what llamaslot takes the model for
        self.is_unnoticed = False  # the server is another process than the one that the table describes
        server.guard, server.guard_landing = self._guard, self._guard_landing
        server.asker = self._asker
        self._log = _Collector(self.faults)
        logging.getLogger("llamaslot.tasks").addHandler(self._log)
        loop.set_exception_handler(lambda _, context: self.faults.append(repr(context)))
        self._poller = loop.create_task(self.abandoned_slots.run(), name="abandoned slots")
        loop.run_until_complete(self.meet())

    def close(self) -> None:
        logging.getLogger("llamaslot.tasks").removeHandler(self._log)
        running = asyncio.all_tasks(self.loop)
        for task in running:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*running, return_exceptions=True))
        self.loop.close()

    # -- the server's life ---------------------------------------------------------------------------------------

    async def meet(self) -> None:
        """Connect: an idle slot is emptied, a slot at work is abandoned, and snapshots are offered."""
        n = len(self.server.slots_)
        table = SlotTable("stub", n, 10_000, settings=self.settings, rates=self.rates)
        table.can_save = table.can_erase = True
        table.cache_kind, table.rewind_model.window = self.cache_kind, self.server.window
        table.fingerprint, table.boot_id = MODEL, (await self.server.props()).boot_id
        for snapshot in self.catalog.snapshots.values():
            table.add_snapshot(snapshot)
        for slot, real in zip(table.slots, self.server.slots_, strict=True):
            if real.is_working:
                table.take(slot, Request("left over"), self.loop.time())
                table.give_back(slot, SlotEvent.LEAVE, NOTHING, self.loop.time())
                self.abandoned_slots.add_slot(table, slot, NOTHING)
            else:
                real.tokens = b""
        self.is_unnoticed = False
        self.dispatcher.attach(table)

    def restart(self) -> None:
        """Replace the server by another process. llamaslot has not noticed yet."""
        self.server.restart()
        self.is_unnoticed = True

    def notice(self, *, is_down: bool) -> None:
        """Let llamaslot notice the restart, so that it forgets the slots. With ``is_down`` waiting requests get an
        error.
        """
        for op in list(
            self.server.pending
        ):  # what was on its way to the new process is not there before it is met
            if op.kind == "send":
                self.server.fail(op, BackendDown("gone"))
        error = BackendDown("gone") if is_down else None
        self.loop.call(lambda: self.dispatcher.detach("stub", error))

    def _dropped(self, snapshot: Snapshot) -> None:
        if self.leases.table is not None:
            self.leases.table.drop_snapshot(snapshot.id)

    def _guard(self, slot_id: int) -> None:
        """Called by the stub for each call to a slot. Raises if the call is one that must not be sent."""
        table = self.leases.table
        if self.is_unnoticed or table is None:
            return
        if table.slots[slot_id].state is not SlotState.LEASED:
            self.server.violation(f"something was sent to {table.slots[slot_id]!r}")

    def _asker(self, slot_id: int) -> Request | None:
        """The request whose prompt is computed in a slot; None if the slot is only prepared for a save."""
        leases = self.dispatcher.leases
        mine = [lease for lease in leases if lease.slot is not None and lease.slot_id == slot_id]
        acting = (LeaseState.ACTING, LeaseState.RELEASE_PENDING)
        clients = [lease for lease in mine if lease.plan is not None and lease.state not in acting]
        return clients[0].request if clients and not self.is_unnoticed else None

    def _guard_landing(self, slot_id: int) -> None:
        """Check the slot that the server has chosen. It may be one whose answer has just ended, but not one whose
        request is between two steps.
        """
        table, turn = self.leases.table, self.leases.exclusive
        if self.is_unnoticed or table is None:
            return
        holders = [lease for lease in self.dispatcher.leases if lease.slot is table.slots[slot_id]]
        if any(lease.request is not turn and not lease.is_running for lease in holders):
            self.server.violation(f"a stranger landed in {table.slots[slot_id]!r}")

    # -- clients -------------------------------------------------------------------------------------------------

    def start(self, client: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        task = self.loop.create_task(client, name=name)
        self.clients[task] = name
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        del self.clients[task]
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and not isinstance(error, LlamaslotError):
            self.faults.append(f"{task.get_name()}: {error!r}")

    async def ask(self, job: Request, answer: bytes = b"") -> int:
        """Serve one request as ``http`` does. Returns how many tokens were reused for it."""
        return await _Asking(self, job, answer, self.loop.time()).run()

    async def ask_unpinned(self, job: Request, tokens: bytes) -> None:
        """Serve a request whose slot the server chooses, as ``http`` does."""
        with await self.dispatcher.lease(job) as lease:
            async with self.exclusive.section(lease, _say_nothing) as turn:
                async with self.server.run_unpinned(tokens, job):
                    pass
                await turn.settle()

    async def keep_one_on_disk(self) -> None:
        """Make a context that is only on disk: it is saved, and then another one overwrites it in the same slot."""
        await self.idle_save.save_all()
        assert self.leases.table is not None
        slot = min(self.leases.table.slots, key=lambda slot: slot.used_at)
        self.saved_tokens = slot.content.tokens
        n = len(self.leases.table.slots)
        await asyncio.gather(
            *(
                self.ask(Request(f"over {i}", pack(range(90_000 + 1000 * i, 90_600 + 1000 * i))))
                for i in range(n)
            )
        )

    # -- invariants ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise AssertionError naming what does not hold."""
        assert not self.faults, self.faults
        assert not self.server.violations, self.server.violations
        self.dispatcher.check()
        self._check_prefills()
        table = self.leases.table
        if table is None:
            return
        table.check()
        for slot in table.slots:
            content = slot.content
            if slot.state is not SlotState.HOT:
                continue
            if not content.is_dirty:
                assert content.snapshot in self.catalog.snapshots, f"what is not dirty is on disk: {slot}"
            if not self.is_unnoticed and not self.leases.is_gate_shut:
                truth = self.server.slots_[slot.id]
                assert not truth.is_working, f"a slot that is idle for us is idle for the server: {slot}"
                if truth.is_lost:
                    continue
                assert truth.tokens.startswith(content.tokens), (
                    f"a belief is the beginning of the truth: {slot}"
                )
                if content.is_exact:
                    assert truth.tokens == content.tokens, f"nothing follows what is known exactly: {slot}"

    def _check_prefills(self) -> None:
        chunked_prefill = self.executor.chunked_prefill
        longs = [long for long in chunked_prefill._longs if long.lease.table is self.leases.table]
        assert all(long.lease in self.dispatcher.leases for long in longs), "who prefills holds a slot"
        assert all(long.lease.is_long for long in longs), "who prefills is known to do so"
        current = chunked_prefill._current
        assert current is None or current in chunked_prefill._longs, "what is computed belongs to a request"
        working = [long for long in longs if long.lease.is_at_work]
        assert len(working) <= 1, f"one long prefill at a time: {working}"
        assert all(long.chunk is None or long is current for long in longs), "one chunk at a time"
        for long in longs:
            assert long.lease.request.n_tokens >= long.last >= long.at >= 0, (
                f"it is within its prompt: {long}"
            )

    def finish(self) -> None:
        """Let all clients get to their end."""
        for _ in range(3000):  # some hundreds of batches may be left, one at a time
            self.loop.settle()
            for op in list(self.server.pending):
                self.server.serve(op)
            self.loop.settle()
            self.check()
            is_busy = self.server.pending or self.clients or len(self.tasks)
            if not is_busy and all(slot.is_idle for slot in self._slots()):
                return
            self.loop.pass_time(0.7)

    def _slots(self) -> list[Any]:
        return self.leases.table.slots if self.leases.table else []

    def check_nothing_is_left(self) -> None:
        """Raise AssertionError that names what was not given back."""
        dispatcher, table = self.dispatcher, self.leases.table
        assert not self.clients, (
            f"no request waits for ever: {list(self.clients.values())}, {self.server.pending}"
        )
        assert not dispatcher.leases, f"no lease: {dispatcher.leases}"
        assert not dispatcher.n_waiting, "no request in the queue"
        assert self.leases.exclusive is None, "no turn"
        assert not self.leases.is_gate_shut, "the gate is open"
        assert not len(self.tasks), f"no task: {self.tasks._tasks}"
        assert not self.executor.chunked_prefill._longs, "no prefill"
        assert self.executor.chunked_prefill._current is None, "no chunk"
        assert not self.leases.changes._waiting, "no task listens"
        assert not self.leases.changes._calls, "no function is called"
        assert not self.catalog.reservations, "no reservation"
        assert not +self.catalog.pins, f"no pin: {self.catalog.pins}"
        assert not self.catalog.pending_delete, "no file of a snapshot that is gone"
        assert not [name for name in self.server.files if name.endswith(".part")], "no part file"
        assert table is not None
        assert not len(table._pending), "nothing is leaving"
        assert not table._busy, "no slot is busy"
        assert all(slot.is_idle for slot in table.slots), f"every slot is idle: {table.slots}"
        assert not any(slot.is_working for slot in self.server.slots_), "the server rests"
        self.check()


@dataclass(slots=True)
class _Asking:
    """One request, served again until its slot was as expected."""

    house: House
    request: Request
    answer: bytes
    asked_at: float
    prefill_stats: PrefillStats | None = None

    async def run(self) -> int:
        earlier = EarlierPlaces()
        while True:
            try:
                with await self.house.dispatcher.lease(
                    self.request, is_back=earlier.is_back, preempted=earlier.preempted
                ) as lease:
                    self.house.slots[self.request.id] = lease.slot_id
                    return await self._at(lease, earlier.prefill_stats, may_replan=earlier.may_replan)
            except Preempted as preempted:
                earlier.lost(preempted.prefill_stats, preempted)
                self.house.preempted.append(self.request.id)
            except RetryPlacement as again:
                earlier.lost(again.prefill_stats)

    async def _at(self, lease: Lease, before: PrefillStats | None, *, may_replan: bool) -> int:
        steps, turns = self.house.executor, self.house.exclusive
        prefill_stats = await steps.prepare(lease, _say_nothing, may_replan=may_replan, can_stop=True)
        if prefill_stats is not None and before is not None:
            prefill_stats = before.then(prefill_stats)
        self.prefill_stats = prefill_stats
        if self.request.n_children:
            async with turns.section(lease, _say_nothing) as turn:
                return await self._answer(lease, turn, may_replan=False)
        try:
            return await self._answer(lease, None, may_replan=may_replan)
        except _Misplaced as error:
            await steps.stopped(lease, error.n_found)
            raise RetryPlacement(None) from None

    async def _answer(self, lease: Lease, turn: UnpinnedRequest | None, *, may_replan: bool) -> int:
        house, job, prefill_stats = self.house, self.request, self.prefill_stats
        n_expected = prefill_stats.n_tokens if prefill_stats is not None else lease.forecast.n_expected

        def look_at(n_found: int) -> None:
            if may_replan and is_far_off(lease, n_expected, n_found):
                raise _Misplaced(n_found)

        no_cache = prefill_stats is None and (job.no_cache or lease.content is None)
        lease.begin_request()
        async with house.server.run(
            lease.slot_id,
            job.tokens,
            self.answer,
            n_children=job.n_children,
            no_cache=no_cache,
            on_found=look_at,
        ) as upstream:
            lease.mark_processing()
            lease.mark_decoding()
            house.first_s[job.id] = house.loop.time() - self.asked_at
            before = lease.content or NOTHING
            lease.confirm(replace(before, tokens=job.tokens, is_exact=False, is_dirty=True))
            await upstream.rest()
        if turn is not None:
            await turn.settle()
        house.executor.settle(lease, ReportedCounts(upstream.n_cache), prefill_stats, job.tokens)
        lease.release()
        return prefill_stats.n_reused if prefill_stats is not None else upstream.n_cache


def _say_nothing(_: object) -> None:
    pass


class _Collector(logging.Handler):
    """Collects tasks that ended with an exception that no code has caught."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._faults = faults

    def emit(self, record: logging.LogRecord) -> None:
        self._faults.append(record.getMessage())
