"""llamaslot's engine around the simulated server: the real scheduler, pool, leases, steps and writeback."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import cast

from llamaslot.bench.simulator.disk import FINGERPRINT, Disk
from llamaslot.bench.simulator.server import N_CTX, SimulatedServer
from llamaslot.bench.simulator.users import Asked
from llamaslot.core.cost import Rates
from llamaslot.core.policy import Rules
from llamaslot.core.slots import NOTHING, Content, Job
from llamaslot.core.tokens import count
from llamaslot.engine.lease import Lease
from llamaslot.engine.pool import Pool
from llamaslot.engine.scheduler import QueueLimits, Scheduler
from llamaslot.engine.steps import Steps
from llamaslot.engine.writeback import Writeback
from llamaslot.llama.api import LlamaServer
from llamaslot.observe.metrics import Metrics
from llamaslot.store import Catalog, Snapshot
from llamaslot.tasks import TaskOwner

IDLE_SAVE_S = 2.0  # the default of store.idle_save_s
PATIENT = QueueLimits(max_waiting=1_000_000, max_wait_s=1e8)


class Proxy:
    """What ``engine.backend`` makes of these parts, without a network. ``ask`` is what ``web.completions`` does.

    With ``saves_each`` every answer is saved as soon as it is complete, before its slot is given back.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        server: SimulatedServer,
        disk: Disk,
        *,
        saves_each: bool = False,
    ) -> None:
        self.server, self.disk, self.saves_each = server, disk, saves_each
        self.rates, self.metrics, self.tasks = Rates(), Metrics(), TaskOwner()
        rules = Rules()
        self.scheduler = Scheduler(rules, PATIENT, loop.time)
        self.scheduler.pin = disk.pin
        api, catalog = cast(LlamaServer, server), cast(Catalog, disk)
        self.steps = Steps(api, catalog, self.rates, self.metrics, self.tasks, loop.time)
        self.steps.fingerprint, self.steps.boot_id = FINGERPRINT, "simulated"
        self.writeback = Writeback(self.scheduler, self.steps, IDLE_SAVE_S)
        self.pool = Pool("simulated", server.n_slots, N_CTX, rules=rules, rates=self.rates)
        self.pool.can_save = self.pool.can_erase = True
        self._loop = loop
        self._meet()
        self.scheduler.attach(self.pool)

    def _meet(self) -> None:
        """What the handshake learns: how large files are, from two small ones."""
        for n in (64, 256):
            self.rates.size.observe(n, n * self.server.hardware.bytes_per_token)

    def dropped(self, snapshot: Snapshot) -> None:
        self.pool.drop_snapshot(snapshot.id)

    async def run(self) -> None:
        """What goes on beside requests. Runs until cancelled."""
        await self.writeback.run()

    async def ask(self, asked: Asked) -> None:
        """One request."""
        served, origin = asked.served, asked.origin
        job = Job(f"{origin.conversation}.{origin.index}", asked.prompt, n_system=asked.n_system)
        with contextlib.ExitStack() as stack:
            lease = stack.enter_context(await self.scheduler.lease(job))
            served.queued_s = self._loop.time() - asked.sent_at
            earlier = await self.steps.prepare(lease, _say_nothing)
            lease.sent()
            is_cold = earlier is None and lease.content is None
            async with self.server.run(
                lease.slot_id, asked.prompt, asked.answer, origin, is_cold=is_cold
            ) as answered:
                served.ttft_s = self._loop.time() - asked.sent_at
                lease.started()
                lease.talks()
                before = lease.content or NOTHING
                lease.begun(replace(before, tokens=asked.prompt, is_exact=False, is_dirty=True))
                await self.server.finish(lease.slot_id, answered)
            served.n_reused = earlier.n_reused if earlier is not None else answered.n_cache
            n_answer = count(asked.answer)
            self.steps.settle(lease, answered.n_cache, earlier, job.tokens, n_answer)
            if earlier is None and answered.n_prompt - answered.n_cache > 1:
                self.rates.prefill.observe(answered.n_cache, answered.n_prompt, answered.prompt_s)
            self.rates.answer.observe(n_answer, answered.predicted_s)
            if self.saves_each:
                self.tasks.spawn(self._save(lease), f"{job.id} is saved")
                stack.pop_all()

    async def _save(self, lease: Lease) -> None:
        with lease:
            await self.steps.save_now(lease)

    async def close(self) -> None:
        while len(self.tasks):
            await self.tasks.drain()

    def check(self) -> None:
        """Raise AssertionError naming what does not hold when nobody asks any more."""
        self.scheduler.check()
        self.disk.check()
        assert not self.scheduler.leases, f"no lease: {self.scheduler.leases}"
        assert not self.scheduler.n_waiting, "nobody waits"
        assert not len(self.tasks), "no task"
        for slot in self.pool.slots:
            content: Content = slot.content
            held = self.server.tokens(slot.id)
            assert held.startswith(content.tokens), f"a belief is the beginning of the truth: {slot}"


def _say_nothing(_: object) -> None:
    pass
