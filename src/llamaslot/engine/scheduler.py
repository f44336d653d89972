"""Who gets which slot, and when: the queue, the leases, and turns in which llama-server chooses slots by itself.

Everything here runs on the event loop without awaiting between looking and leasing. What is decided is decided by
``core.policy``; what is done in a slot is done by whoever holds its lease.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from llamaslot.core.policy import Rules, is_long, place
from llamaslot.core.slots import Job, Plan, Slot, State, Wait
from llamaslot.engine.lease import Lease
from llamaslot.engine.notes import Note
from llamaslot.engine.pool import Pool
from llamaslot.engine.queue import Charge, Queue, QueueLimits, Waiting
from llamaslot.engine.together import Patience, ask_for_trunk, prefix_due_s
from llamaslot.errors import BackendDown, BackendRestarted, QueueFull
from llamaslot.observe.journal import Journal
from llamaslot.tasks import Bell

log = logging.getLogger(__name__)

MIN_LOOK_AGAIN_S = 0.25
_SHORT_ANSWER = 64  # tokens: a title, a label


class Scheduler:
    """Leases the slots of one backend, to users in turn."""

    def __init__(self, rules: Rules, limits: QueueLimits, now: Callable[[], float]) -> None:
        self.rules, self.now = rules, now
        self.queue = Queue(limits)
        self.journal = Journal()
        self.pool: Pool | None = None
        self.leases: dict[Lease, None] = {}  # in their order, which decides between makers of equal use
        self.on_drain: Callable[[Lease], None] = lambda lease: None
        self.on_prefix_wait: Callable[[float], None] = lambda seconds: None
        self.pin: Callable[[str], AbstractContextManager[object]] = lambda snapshot: nullcontext()
        self._down: BackendDown | None = None  # told to whoever asks
        self._turn: Job | None = None  # the one exclusive job that is under way
        self._is_closed = False  # nobody else may take a first step
        self._is_turn_waiting = False  # for others to be through
        self._n_changes = 0
        self.bell = Bell()  # rings when anything has changed
        self._look_again: asyncio.TimerHandle | None = None
        self._used_at = now()

    # -- questions -----------------------------------------------------------------------------------------------

    @property
    def n_waiting(self) -> int:
        return len(self.queue)

    def position(self, job: Job) -> int:
        """1 for the job that is next; 0 for one that waits no longer."""
        return next((i for i, waiting in enumerate(self.queue.ordered(), 1) if waiting.job is job), 0)

    @property
    def idle_s(self) -> float:
        """For how long nobody has wanted anything."""
        is_wanted = len(self.queue) or any(not lease.is_own for lease in self.leases)
        return 0.0 if is_wanted else self.now() - self._used_at

    def note(self, job: Job) -> Note:
        """A place in the journal for what becomes of ``job``."""
        return Note(self.journal, job, self.now)

    def is_wanted_besides(self, job: Job) -> bool:
        """Whether anybody but ``job`` wants something now."""
        leased = (lease.job for lease in self.leases if not lease.is_own)
        return any(other is not job for other in (*leased, *(waiting.job for waiting in self.queue)))

    # -- life of the pool ----------------------------------------------------------------------------------------

    def attach(self, pool: Pool) -> None:
        self.pool, self._down = pool, None
        self.dispatch()

    def detach(self, error: BackendDown | None = None) -> None:
        """The slots are gone. With ``error`` all who ask are told; without they wait for the next pool."""
        if self.pool is not None:
            self.pool.is_current = False
        self.pool, self._down = None, error
        if error is not None:
            for waiting in self.queue:
                if not waiting.granted.done():
                    waiting.granted.set_exception(error)

    # -- leasing -------------------------------------------------------------------------------------------------

    async def lease(self, job: Job, *, is_back: bool = False) -> Lease:
        """Wait for a slot. Raises QueueFull and TooManyRequests (limits in number and time) and BackendDown.
        ``is_back``: it had one before, and is the first in the queue.

        Cancelling is safe: the job leaves the queue, no slot is held.
        """
        if self._down is not None:
            raise type(self._down)(str(self._down))  # a new one: each raise adds its frames to an exception
        granted = asyncio.get_running_loop().create_future()
        waiting = Waiting(job, granted, self.note(job), self.now(), *self._estimate(job), is_back)
        self.queue.add(waiting, self.now())
        was_admitted = False
        try:
            self.dispatch(is_arrival=True)
            if not waiting.granted.done():
                self.queue.make_room(waiting)
            was_admitted = True
            self.queue.admitted(waiting, self.now())
            async with asyncio.timeout(self.queue.limits.max_wait_s):
                return await waiting.granted
        except BaseException as error:
            if waiting.granted.done() and not waiting.granted.cancelled() and not waiting.granted.exception():
                waiting.granted.result().release()  # granted and cancelled in the same breath
            if isinstance(error, TimeoutError):
                raise QueueFull(
                    f"no slot became free within {self.queue.limits.max_wait_s:g} s; try again later",
                    self.queue.limits.retry_after_s,
                ) from None
            raise
        finally:
            waiting.granted.cancel()
            waiting.note.ended()
            if waiting in self.queue:
                self.queue.remove(waiting)
                # What it had reserved is free for others; of one that was sent away at once nobody has taken note.
                self.dispatch(is_arrival=not was_admitted)

    def wanted(self) -> set[str]:
        """The snapshots that those who wait would go on from: the last that should be evicted now.

        Looked up once for each, and again when it is gone, for a newer one has replaced it as a rule.
        """
        if self.pool is None:
            return set()
        for waiting in self.queue:
            if waiting.wants is None or not self.pool.has_snapshot(waiting.wants):
                waiting.wants = self.pool.wanted(waiting.job)
        return {waiting.wants for waiting in self.queue if waiting.wants}

    def _estimate(self, job: Job) -> tuple[float, bool]:
        """For how long the job will have a slot, and whether it is a side request: a small prompt, or a short answer to
        one of which little is missing."""
        prefill_s = self.pool.missing_s(job) if self.pool is not None else 0.0
        is_small = 0 < job.n_tokens < self.rules.small_prompt_tokens
        is_short = job.max_tokens is not None and job.max_tokens <= _SHORT_ANSWER
        return prefill_s + self._answer_s(job), is_small or (is_short and prefill_s <= self.rules.own_above_s)

    def _answer_s(self, job: Job) -> float:
        if self.pool is None:
            return 0.0
        answer = self.pool.rates.answer
        at_most_s = math.inf if job.max_tokens is None else job.max_tokens / answer.tokens_per_s
        return min(answer.seconds_left(0.0), at_most_s)

    def try_lease(self, slot: Slot, job: Job) -> Lease | None:
        """Lease an idle slot for work of our own (a save, a probe), if nobody is waiting for one."""
        if self.pool is None or self._is_closed or len(self.queue) or not slot.is_idle:
            return None
        return self._grant(slot, job)

    def lease_rival(self, slot: Slot, lease: Lease) -> Lease | None:
        """Lease an idle slot to make way for the job of ``lease``. Also while a turn keeps others from a first step: it
        waits for that job, too."""
        if self.pool is not lease.pool or not slot.is_idle:
            return None
        return self._grant(slot, Job(f"{lease.job.id} clears its way", slot.content.tokens))

    def lease_idle(self, job: Job, n: int | None = None) -> list[Lease]:
        """Lease the ``n`` lowest idle slots, or all of them, for the job whose turn it is. Raises BackendRestarted."""
        assert self._turn is job, "only the job whose turn it is"
        if self.pool is None:
            raise BackendRestarted("llama-server has restarted")
        idle = [slot for slot in self.pool.slots if slot.is_idle][:n]
        return [self._grant(slot, job) for slot in idle]

    def _grant(self, slot: Slot, job: Job) -> Lease:
        assert self.pool is not None
        lease = Lease(self, self.pool, slot, job, None)
        self.leases[lease] = None
        return lease

    def dispatch(self, *, is_arrival: bool = False) -> None:
        """Give slots to those who wait, as they are next. Called whenever something has changed.

        ``is_arrival``: that is only one more who waits. Others that wait for something in particular are not looked at
        again then: of 250 who wait for the same prefix that took 15 s.
        """
        self._n_changes += not is_arrival
        # From here to the end nothing awaits: what was looked at is what is leased.
        if self._look_again is not None:
            self._look_again.cancel()
            self._look_again = None
        reserved: set[int] = set()
        looks_s: list[float] = []  # when it is worth to look again, though nothing happens
        is_short = False  # somebody earlier waits for any slot at all
        is_spared = False  # somebody may not have one that is idle
        # Asked again only when a slot has been given away: 250 who wait for 64 slots are 16,000 looks otherwise.
        n_idle = self._n_idle()
        for waiting in self.queue.ordered():
            if self.pool is None or self._is_closed:
                break
            job = waiting.job
            if waiting.granted.done() or (job.is_exclusive and self._turn is not None):
                continue
            if not self.queue.may_run(waiting, len(self.pool.slots), n_idle, self.now()):
                is_spared = True
                continue
            if job.is_unpinned:
                if not is_short:
                    self._turn = job
                    self._give(waiting, Lease.turn(self, self.pool, job))
                continue
            if not n_idle:
                is_short = True  # no need to look closer: with 250 waiting that took a second for each burst
                continue
            now = self.now()
            decision: Plan | Wait
            if waiting.wait is None or waiting.n_seen != self._n_changes or now >= waiting.look_at:
                decision = self._decide(waiting, frozenset(reserved))
                waiting.n_seen = self._n_changes
                waiting.wait = decision if isinstance(decision, Wait) else None
                if isinstance(decision, Wait):
                    waiting.look_at = now + max(decision.for_s or math.inf, MIN_LOOK_AGAIN_S)
            else:
                decision = waiting.wait
            if isinstance(decision, Wait):
                waiting.note.waits(decision, prefix_due_s(self.pool, decision, self.now()))
                if decision.slot is not None:
                    reserved.add(decision.slot)
                if decision.for_s is None:
                    is_short = True
                else:
                    looks_s.append(max(waiting.look_at - now, 0.0))
                continue
            if self._is_turn_waiting and is_long(decision, self.rules):
                continue  # somebody waits for those that are under way to be through already
            try:
                lease = Lease(self, self.pool, self.pool.slots[decision.slot], job, decision)
            except KeyError:  # a snapshot that the catalog has given up unnoticed
                assert decision.snapshot is not None
                self.pool.drop_snapshot(decision.snapshot)
                looks_s.append(0.0)
                continue
            if waiting.patience is not None:
                self.on_prefix_wait(self.now() - waiting.patience.since)
            lease.note = waiting.note
            lease.note.placed(decision)
            if job.is_exclusive:
                self._turn = job
            self.leases[lease] = None
            self._give(waiting, lease)
            self._n_changes += 1
            n_idle = self._n_idle()
        if is_spared and n_idle and (spared_s := self.queue.look_again_s(self.now())) is not None:
            looks_s.append(spared_s)
        if looks_s:
            self._look_again = asyncio.get_running_loop().call_later(min(looks_s), self.dispatch)
        self.bell.ring()  # last: who has just got a slot may come before a prefill

    def _decide(self, waiting: Waiting, reserved: frozenset[int]) -> Plan | Wait:
        """Where to, or what to wait for. Whoever is just computing what the job begins with is asked to keep it."""
        assert self.pool is not None
        job, now = waiting.job, self.now()
        makers = [lease for lease in self.leases if lease.pool is self.pool and lease.is_long]
        is_patient = waiting.patience is None or waiting.patience.lasts(self.pool, job, now)
        view = self.pool.view(job, now, reserved, is_patient=is_patient)
        if is_patient and ask_for_trunk(self.pool, job, view, makers, now):
            view = self.pool.view(job, now, reserved)
        decision = place(job, view, self.rules)
        if isinstance(decision, Wait) and waiting.patience is None:
            at_last = waiting.came_at + (self.queue.limits.max_wait_s or math.inf) / 2
            waiting.patience = Patience.of(self.pool, decision, makers, now, at_last)
        return decision

    def _n_idle(self) -> int:
        return sum(slot.is_idle for slot in self.pool.slots) if self.pool is not None else 0

    def _give(self, waiting: Waiting, lease: Lease) -> None:
        steps_s = lease.plan.cost.steps_s if lease.plan is not None else 0.0
        lease.charge = self.queue.granted(waiting, steps_s + self._answer_s(lease.job), self.now())
        waiting.granted.set_result(lease)

    def released(self, lease: Lease) -> None:
        """Called by the lease itself, once its slot is given back or drains."""
        self.leases.pop(lease, None)
        if not lease.is_own:
            self._used_at = self.now()
        self.paid(lease.charge)
        self.end_turn(lease)
        self.dispatch()

    def paid(self, charge: Charge | None) -> None:
        """The slots that a user had are nobody's any more. Whoever calls this dispatches."""
        if charge is not None:
            self.queue.released(charge, self.now())

    # -- turns ---------------------------------------------------------------------------------------------------

    def end_turn(self, lease: Lease) -> None:
        """The job is through with what only it may do. Idempotent."""
        if self._turn is lease.job and (lease.plan is not None or lease.slot is None):
            self._turn, self._is_closed, self._is_turn_waiting = None, False, False
            self.dispatch()

    def has_turn(self, lease: Lease) -> bool:
        return self._turn is lease.job

    def is_turn_waiting(self, lease: Lease) -> bool:
        """Whether somebody else's request for which llama-server chooses slots waits for others to be through."""
        return self._is_turn_waiting and self._turn is not lease.job

    def is_prefilling(self, lease: Lease) -> bool:
        """Whether a long prefill of somebody else's is under way or waits for its turn."""
        if self.pool is not lease.pool:
            return False  # there is nothing to wait for any more
        return any(other.is_long for other in self.leases if other.pool is self.pool and other is not lease)

    def wait_for_turn(self, lease: Lease) -> None:
        """From now on long prefills make room for the job whose turn it is, and none is begun."""
        assert self._turn is lease.job, "only the job whose turn it is"
        if not self._is_turn_waiting:
            self._is_turn_waiting = True
            self.bell.ring()

    def close(self, lease: Lease) -> None:
        """From now on nobody else takes a first step."""
        assert self._turn is lease.job, "only the job whose turn it is"
        self._is_closed = True

    def open(self, lease: Lease) -> None:
        """Others go on, as before ``wait_for_turn``; the job still waits."""
        assert self._turn is lease.job, "only the job whose turn it is"
        self._is_closed = self._is_turn_waiting = False
        self.dispatch()

    def has_waited(self, lease: Lease) -> None:
        """A job that has no slot of its own has had none while it waited: its user is not charged for that."""
        if lease.slot is None and lease.charge is not None:
            lease.charge = replace(lease.charge, at=self.now())

    def is_foreign_at_work(self, lease: Lease) -> bool:
        """Whether a slot is at work on what the job must not go on from, if llama-server may choose that slot."""
        pool, job = lease.pool, lease.job
        if self.pool is not pool or not job.is_unpinned:
            return False
        return any(not slot.is_idle and pool.is_foreign(slot, job) for slot in pool.slots)

    def is_quiet(self, lease: Lease) -> bool:
        """Whether every slot is either idle and nobody's, or the turn's own, or at work for sure: on what the job may
        go on from, if llama-server may choose that slot, for its answer may end at any moment."""
        if self.pool is not lease.pool:
            return True  # there is nothing to wait for any more
        others = [other for other in self.leases if other.pool is self.pool and other.job is not lease.job]
        started = {
            id(other.job) for other in others if other.is_started
        }  # its children's slots are at work with it
        is_stepping = any(id(other.job) not in started for other in others)
        n_idle = sum(slot.is_idle for slot in self.pool.slots)
        if self.is_foreign_at_work(lease):
            return False
        return (
            not is_stepping
            and not self.pool.is_anything_on_its_way
            and n_idle >= (lease.job.n_children or lease.job.is_unpinned)
        )

    # -- invariants ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise AssertionError naming the invariant that does not hold."""
        if self.pool is None:
            return
        self.pool.check()
        current = [lease for lease in self.leases if lease.pool is self.pool and lease.slot is not None]
        slots = [lease.slot for lease in current]
        assert len(slots) == len(set(map(id, slots))), "a slot has one lease"
        for lease in current:
            assert lease.slot is not None
            assert lease.slot.state is State.LEASED, f"a lease holds a leased slot: {lease}"
        leased = sum(slot.state is State.LEASED for slot in self.pool.slots)
        assert leased == len(slots), "a leased slot has a lease"
        assert not self._is_closed or self._turn is not None, "only a turn closes the gate"
        self.queue.check()
        served = [waiting for waiting in self.queue if _is_served(waiting.granted)]
        assert not served, f"whoever was served has left the queue: {served}"


def _is_served(granted: asyncio.Future[Lease]) -> bool:
    """Cancelled and refused ones leave the queue by themselves, a moment later."""
    return granted.done() and not granted.cancelled() and granted.exception() is None
