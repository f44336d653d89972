"""Who holds which slot of one backend, and the exclusive section: one request at a time for which llama-server chooses
slots, while no other may be between two steps.

All of it is bookkeeping without an await. Who gets a slot next is decided by the pool that the backend is in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Protocol

from llamaslot.backend.lease import Lease
from llamaslot.backend.lease_states import State as LeaseState
from llamaslot.backend.slot_table import Pool
from llamaslot.errors import BackendRestarted
from llamaslot.observe.journal import Note
from llamaslot.scheduling.fairness import Charge
from llamaslot.scheduling.plan import Plan
from llamaslot.scheduling.request import Job, Placement
from llamaslot.scheduling.slots import Slot, State
from llamaslot.tasks import Bell


class Admission(Protocol):
    """What a backend asks of the pool that it is in, and tells it."""

    @property
    def n_waiting(self) -> int:
        """Requests in the queue."""
        ...

    def dispatch(self) -> None:
        """Something has changed: give slots to those that wait."""
        ...

    def wanted(self) -> set[str]:
        """The snapshots that requests in the queue would go on from."""
        ...

    def note(self, job: Job) -> Note:
        """A place in the journal for what becomes of ``job``."""
        ...

    def paid(self, charge: Charge | None) -> None:
        """The slots that a user had are free. The caller dispatches."""
        ...


class Leases:
    """The leases of one backend. ``table``: the slots of the llama-server process at hand, None without one."""

    def __init__(self, backend: str, admission: Admission, now: Callable[[], float]) -> None:
        self.backend, self.admission, self.now = backend, admission, now
        self.table: Pool | None = None
        self.leases: dict[Lease, None] = {}  # in their order, which decides between makers of equal use
        self.bell = Bell()  # rings when anything has changed
        self._charges: dict[Lease, Charge] = {}  # to users, while they have slots
        self.on_drain: Callable[[Lease, Charge | None], None] = lambda lease, charge: None
        self.pin: Callable[[str], AbstractContextManager[object]] = lambda snapshot: nullcontext()
        self.turn: Job | None = None  # the one exclusive job that is under way
        self.is_gate_shut = False  # no other job may take a first step
        self.is_turn_wanted = False  # the exclusive job waits for others to be through
        self._used_at = now()

    def __repr__(self) -> str:
        return f"<Leases {self.backend} {list(self.leases)}>"

    # -- questions -----------------------------------------------------------------------------------------------

    @property
    def n_waiting(self) -> int:
        return self.admission.n_waiting

    @property
    def idle_s(self) -> float:
        """For how many seconds no client has wanted anything of this backend."""
        is_wanted = self.n_waiting or any(not lease.is_own for lease in self.leases)
        return 0.0 if is_wanted else self.now() - self._used_at

    @property
    def is_open(self) -> bool:
        """Whether a job may take its first step here."""
        return self.table is not None and not self.is_gate_shut

    def dispatch(self) -> None:
        self.admission.dispatch()

    def wanted(self) -> set[str]:
        return self.admission.wanted()

    def note(self, job: Job) -> Note:
        return self.admission.note(job)

    def paid(self, charge: Charge | None) -> None:
        self.admission.paid(charge)

    # -- life of the table ---------------------------------------------------------------------------------------

    def attach(self, table: Pool) -> None:
        """llama-server is up, with these slots."""
        self.table = table
        self.dispatch()

    def detach(self) -> None:
        """The slots are gone. Their leases end by themselves, without effect."""
        if self.table is not None:
            self.table.is_current = False
        self.table = None

    # -- leasing -------------------------------------------------------------------------------------------------

    def grant(
        self,
        slot: Slot | None,
        job: Job,
        plan: Plan | None = None,
        *,
        note: Note | None = None,
        came_at: float | None = None,
        n_preempted: int = 0,
    ) -> Lease:
        """Lease ``slot``; None for the turn of a job for which llama-server will choose the slot. ``note``: its record
        in the journal, else a new one. Raises KeyError, and takes nothing, when the plan's snapshot is gone."""
        assert self.table is not None, "only what is attached has slots"
        pin = self.pin(plan.snapshot) if plan is not None and plan.snapshot is not None else None
        lease = Lease(
            self, self.table, slot, job, plan,
            now=self.now, note=note or self.note(job), pin=pin, came_at=came_at, n_preempted=n_preempted,
        )  # fmt: skip
        if job.is_exclusive and (plan is not None or slot is None):
            self.turn = job
        self.leases[lease] = None
        return lease

    def try_lease(self, slot: Slot, job: Job) -> Lease | None:
        """Lease an idle slot for work of our own (a save, a probe), if no request is waiting for one."""
        if not self.is_open or self.n_waiting or not slot.is_idle:
            return None
        return self.grant(slot, job)

    def lease_rival(self, slot: Slot, lease: Lease) -> Lease | None:
        """Lease an idle slot to make way for the job of ``lease``. Also while a turn keeps others from a first step: it
        waits for that job, too."""
        if self.table is not lease.pool or not slot.is_idle:
            return None
        return self.grant(slot, Job(f"{lease.job.id} clears its way", slot.content.tokens))

    def lease_idle(self, job: Job, n: int | None = None) -> list[Lease]:
        """Lease the ``n`` lowest idle slots, or all of them, for the job whose turn it is. Raises BackendRestarted."""
        assert self.turn is job, "only the job whose turn it is"
        if self.table is None:
            raise BackendRestarted
        idle = [slot for slot in self.table.slots if slot.is_idle][:n]
        return [self.grant(slot, job) for slot in idle]

    def charge(self, lease: Lease, charge: Charge | None) -> None:
        """Its user pays for it until it ends, or until its slot has drained."""
        if charge is not None:
            self._charges[lease] = charge

    # -- told by a lease, as its ``Owner`` -----------------------------------------------------------------------

    def on_change(self, lease: Lease) -> None:
        self.bell.ring()

    def on_look_again(self, lease: Lease) -> None:
        if self.n_waiting:  # not at once: it may be about to send something
            asyncio.get_running_loop().call_soon(self.dispatch)

    def on_end(self, lease: Lease) -> None:
        self.leases.pop(lease, None)
        charge = self._charges.pop(lease, None)
        if lease.state is LeaseState.DRAINING:
            self.on_drain(lease, charge)
        else:
            self.paid(charge)
        if not lease.is_own:
            self._used_at = self.now()
        self.end_turn(lease)
        self.dispatch()

    # -- the exclusive section -----------------------------------------------------------------------------------

    def end_turn(self, lease: Lease) -> None:
        """The job is through with what only it may do. Idempotent."""
        if self.turn is lease.job and (lease.plan is not None or lease.slot is None):
            self.turn, self.is_gate_shut, self.is_turn_wanted = None, False, False
            self.dispatch()

    def has_turn(self, lease: Lease) -> bool:
        return self.turn is lease.job

    def is_turn_waiting(self, lease: Lease) -> bool:
        """Whether another request for which llama-server chooses slots waits for others to be through."""
        return self.is_turn_wanted and self.turn is not lease.job

    def is_prefilling(self, lease: Lease) -> bool:
        """Whether a long prefill of another request is under way or waits for its turn."""
        if self.table is not lease.pool:
            return False  # there is nothing to wait for any more
        return any(other.is_long for other in self.leases if other.pool is self.table and other is not lease)

    def wait_for_turn(self, lease: Lease) -> None:
        """From now on long prefills make room for the job whose turn it is, and none is begun."""
        assert self.turn is lease.job, "only the job whose turn it is"
        if not self.is_turn_wanted:
            self.is_turn_wanted = True
            self.bell.ring()

    def shut_gate(self, lease: Lease) -> None:
        """From now on no other job takes a first step."""
        assert self.turn is lease.job, "only the job whose turn it is"
        self.is_gate_shut = True

    def open_gate(self, lease: Lease) -> None:
        """Others go on, as before ``wait_for_turn``; the job still waits."""
        assert self.turn is lease.job, "only the job whose turn it is"
        self.is_gate_shut = self.is_turn_wanted = False
        self.dispatch()

    def has_waited(self, lease: Lease) -> None:
        """A job that has no slot of its own has had none while it waited: its user is not charged for that."""
        if lease.slot is None and lease in self._charges:
            self._charges[lease] = replace(self._charges[lease], at=self.now())

    def is_foreign_at_work(self, lease: Lease) -> bool:
        """Whether a slot is at work on what the job must not go on from, if llama-server may choose that slot."""
        table, job = lease.pool, lease.job
        if self.table is not table or job.placement is not Placement.SERVER_CHOSEN:
            return False
        return any(not slot.is_idle and table.is_foreign(slot, job) for slot in table.slots)

    # -- invariants ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise AssertionError naming the invariant that does not hold."""
        if self.table is None:
            return
        self.table.check()
        current = [lease for lease in self.leases if lease.pool is self.table and lease.slot is not None]
        slots = [lease.slot for lease in current]
        assert len(slots) == len(set(map(id, slots))), "a slot has one lease"
        for lease in current:
            assert lease.slot is not None
            assert lease.slot.state is State.LEASED, f"a lease holds a leased slot: {lease}"
        leased = sum(slot.state is State.LEASED for slot in self.table.slots)
        assert leased == len(slots), "a leased slot has a lease"
        assert not self.is_gate_shut or self.turn is not None, "only a turn closes the gate"
