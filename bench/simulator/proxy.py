"""llamaslot's engine around the simulated server: the real scheduler, slot table, leases, steps and idle save."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from msgspec.structs import replace

from bench.simulator.disk import FINGERPRINT, Disk
from bench.simulator.machine import Machine, Streamed
from bench.simulator.server import N_CTX, Answer, SimulatedServer
from bench.simulator.users import LONG_S, SentRequest
from llamaslot.backend.executor import PlanExecutor
from llamaslot.backend.feedback import ReportedCounts
from llamaslot.backend.idle_save import IdleSave
from llamaslot.backend.lease import Lease
from llamaslot.backend.lease_states import EarlierPlaces, RetryPlacement
from llamaslot.backend.save import Saving
from llamaslot.backend.slot_content import is_far_off
from llamaslot.backend.slot_table import SlotTable
from llamaslot.cache.content import NOTHING, Content
from llamaslot.cache.ids import count
from llamaslot.fleet.dispatcher import Dispatcher
from llamaslot.llama.client import LlamaServer
from llamaslot.observe.metrics import Metrics
from llamaslot.scheduling.plan import PrefillStats
from llamaslot.scheduling.rates import Rates
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.settings import QueueLimits, SchedulingSettings
from llamaslot.store import Catalog, Snapshot
from llamaslot.tasks import TaskOwner

IDLE_SAVE_S = 2.0  # the default of store.idle_save_s
PATIENT = QueueLimits(max_waiting=1_000_000, max_wait_s=1e8)


@dataclass(slots=True)
class Beside:
    """What streams get while long prompts are computed, or wait for that in their slots: entered for each of these."""

    machine: Machine
    n_tokens: int = 0
    seconds: float = 0.0  # summed up over streams
    _n_long: int = 0
    _since: Streamed = field(default_factory=Streamed)

    def __enter__(self) -> None:
        self._n_long += 1
        if self._n_long == 1:
            self._since = self.machine.tally()

    def __exit__(self, *_: object) -> None:
        self._n_long -= 1
        if self._n_long == 0:
            now = self.machine.tally()
            self.n_tokens += now.n_tokens - self._since.n_tokens
            self.seconds += now.seconds - self._since.seconds


class Proxy:
    """What ``backend.backend`` makes of these parts, without a network. ``ask`` is what ``http.completion`` does.

    With ``saves_each`` every answer is saved as soon as it is complete, before its slot is given back. ``first``: of a
    pool of several, the one that was made before the others; they share its queue and its snapshots.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        server: SimulatedServer,
        disk: Disk,
        *,
        settings: SchedulingSettings | None = None,
        saves_each: bool = False,
        first: Proxy | None = None,
        dispatcher: Callable[[SchedulingSettings, QueueLimits, Callable[[], float]], Dispatcher] = Dispatcher,
    ) -> None:
        self.server, self.disk, self.saves_each = server, disk, saves_each
        self.beside = Beside(server.machine)
        self._metrics: Metrics = first._metrics if first is not None else Metrics()
        self.rates, self.metrics, self.tasks = Rates(), self._metrics.of_backend(server.url), TaskOwner()
        settings = settings or SchedulingSettings()
        self.dispatcher: Dispatcher = (
            first.dispatcher if first is not None else dispatcher(settings, PATIENT, loop.time)
        )
        self.pool: dict[str, Proxy] = first.pool if first is not None else {}
        self.pool[server.url] = self
        self.leases = self.dispatcher.add(server.url)
        self.leases.pin = disk.pin
        self.dispatcher.on_prefix_wait = self._metrics.prefix_wait_s.observe
        api, catalog = cast(LlamaServer, server), cast(Catalog, disk)
        self.executor = PlanExecutor(Saving(api, catalog, self.rates, self.metrics, self.tasks, self.leases))
        self.idle_save = IdleSave(self.leases, self.executor, IDLE_SAVE_S)
        self.table = SlotTable(server.url, server.n_slots, N_CTX, settings=settings, rates=self.rates)
        self.table.fingerprint, self.table.boot_id = FINGERPRINT, "simulated"
        self.table.can_save = self.table.can_erase = True
        if first is not None:
            self.table.use_snapshots(first.table.model_snapshots)
        self._loop = loop
        self._meet()
        self.dispatcher.attach(self.table)

    def sample(self, name: str) -> float:
        """A metric of the backend, 0 where nothing was counted."""
        found = self._metrics.registry.get_sample_value(
            f"llamaslot_{name}", {"backend": "simulated", "model": ""}
        )
        return found or 0.0

    def _meet(self) -> None:
        """What the handshake learns: how large files are, from two small ones."""
        for n in (64, 256):
            self.rates.size.observe(n, n * self.server.hardware.bytes_per_token)

    def dropped(self, snapshot: Snapshot) -> None:
        self.table.drop_snapshot(snapshot.id)

    async def run(self) -> None:
        """What goes on besmall requests. Runs until cancelled."""
        await self.idle_save.run()

    # -- a request: http.completion and http.completion_stream ---------------------------------------------------

    async def ask(self, asked: SentRequest) -> None:
        """One request, until a place was what it was taken for."""
        request = Request(
            f"{asked.origin.conversation}.{asked.origin.index}", asked.prompt, n_system=asked.n_system
        )
        earlier = EarlierPlaces()
        while True:
            try:
                return await self._ask_at_a_place(asked, request, earlier)
            except RetryPlacement as again:
                earlier.lost(again.prefill_stats)

    async def _ask_at_a_place(self, asked: SentRequest, request: Request, earlier: EarlierPlaces) -> None:
        """Raises RetryPlacement."""
        served, before, may_replan = asked.served, earlier.prefill_stats, earlier.may_replan
        with contextlib.ExitStack() as stack:
            lease = stack.enter_context(await self.dispatcher.lease(request, is_back=earlier.is_back))
            its = self.pool[lease.table.backend]
            if not earlier.is_back:
                served.queued_s = self._loop.time() - asked.sent_at
            until_first = stack.enter_context(contextlib.ExitStack())
            assert lease.plan is not None
            if its.server.hardware.prefill_s(lease.plan.n_reused, request.n_tokens) > LONG_S:
                until_first.enter_context(its.beside)
            here = await its.executor.prepare(lease, _say_nothing, may_replan=may_replan)
            done = here
            if before is not None:  # without a prefill here: what it finds of its own work was not reused
                done = before.then(
                    here or PrefillStats(lease.forecast.n_expected, lease.forecast.n_expected, 0.0)
                )
            answered = await its._answer(asked, lease, here, until_first, may_replan=may_replan)
            served.n_reused = min(done.n_reused, answered.n_cache) if done is not None else answered.n_cache
            served.answer_s = answered.predicted_s
            n_computed, n_answer = answered.n_prompt - answered.n_cache, count(asked.answer)
            told = ReportedCounts(
                answered.n_cache, None, n_computed, answered.prompt_s, n_answer, answered.predicted_s
            )
            its.executor.settle(lease, told, here, request.tokens)
            if self.saves_each:
                its.tasks.spawn(its._save(lease), f"{request.id} is saved")
                stack.pop_all()

    async def _answer(
        self,
        asked: SentRequest,
        lease: Lease,
        here: PrefillStats | None,
        until_first: contextlib.ExitStack,
        *,
        may_replan: bool,
    ) -> Answer:
        """The client's own request. Raises RetryPlacement when the slot does not hold what was expected."""
        no_cache = here is None and lease.content is None
        lease.begin_request()
        async with self.server.run(
            lease.slot_id, asked.prompt, asked.answer, asked.origin, no_cache=no_cache
        ) as answered:
            lease.mark_processing()
            n_expected = here.n_tokens if here is not None else lease.forecast.n_expected
            is_misplaced = is_far_off(lease, n_expected, answered.n_cache)
            if not (may_replan and is_misplaced):
                before = lease.content or NOTHING
                lease.confirm(replace(before, tokens=asked.prompt, is_exact=False, is_dirty=True))
                await self.server.first(answered)
                asked.served.ttft_s = self._loop.time() - asked.sent_at
                until_first.close()
                lease.mark_decoding()
                await self.server.finish(answered)
                return answered
        await self.executor.stopped(lease, answered.n_cache)
        n_done = lease.content.n_tokens if lease.content is not None else 0
        own = PrefillStats(min(answered.n_cache, n_done), n_done, 0.0)
        raise RetryPlacement(own if here is None else here.then(own))

    async def _save(self, lease: Lease) -> None:
        with lease:
            await self.executor.save_now(lease)

    async def close(self) -> None:
        while len(self.tasks):
            await self.tasks.all_ended()

    def check(self) -> None:
        """Raise AssertionError with the name of the invariant that does not hold after the last request."""
        self.dispatcher.check()
        self.disk.check()
        assert not self.dispatcher.leases, f"no lease: {self.dispatcher.leases}"
        assert not self.dispatcher.n_waiting, "no request waits"
        assert not len(self.tasks), "no task"
        for slot in self.table.slots:
            content: Content = slot.content
            held = self.server.tokens(slot.id)
            assert held.startswith(content.tokens), f"a belief is the beginning of the truth: {slot}"


def _say_nothing(_: object) -> None:
    pass
