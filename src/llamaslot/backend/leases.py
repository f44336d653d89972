"""The leases of one backend, and its exclusive section. In an exclusive section llama-server chooses the slots of one
request, while no other request is between two steps.

Bookkeeping only, without an await. The pool of the backend decides which request gets a slot next.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from msgspec.structs import replace

from llamaslot.backend.lease import Lease
from llamaslot.backend.lease_states import LeaseState
from llamaslot.backend.slot_table import SlotTable
from llamaslot.errors import BackendDown, BackendRestarted
from llamaslot.observe.journal import DecisionRecorder
from llamaslot.scheduling.fairness import Charge
from llamaslot.scheduling.plan import Plan
from llamaslot.scheduling.request import Placement, Request
from llamaslot.scheduling.slots import Slot, SlotState
from llamaslot.store.snapshot_table import Pin
from llamaslot.tasks import ChangeEvent

T = TypeVar("T")


class Admission(Protocol):
    """The interface of a pool for the backends in it."""

    @property
    def n_waiting(self) -> int:
        """The number of requests in the pool's queue."""
        ...

    def dispatch(self, backend: str | None = None) -> None:
        """Give slots to waiting requests where possible, because something has changed on ``backend`` (None:
        on any).
        """
        ...

    def backends_changed(self) -> None:
        """Take notice that a backend of the pool has opened or closed."""
        ...

    def snapshots_in_demand(self) -> set[str]:
        """The ids of the snapshots that queued requests would resume from."""
        ...

    def recorder(self, request: Request) -> DecisionRecorder:
        """Return a recorder for the journal entry of ``request``."""
        ...

    def paid(self, charge: Charge | None) -> None:
        """End ``charge``: the user's slots that it counts are free. The caller dispatches afterwards."""
        ...


class _Told(Generic[T]):
    """An attribute of ``Leases``. Whether requests may begin depends on it, so the pool is told when it is set."""

    def __set_name__(self, owner: type[Leases], name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, leases: Leases, owner: type[Leases]) -> T:
        value: T = leases.__dict__[self._name]
        return value

    def __set__(self, leases: Leases, value: T) -> None:
        leases.__dict__[self._name] = value
        leases.admission.backends_changed()


class Leases:
    """The leases of one backend. ``table`` has the slots of the connected llama-server process; None while not
    connected.
    """

    table = _Told[SlotTable | None]()
    exclusive = _Told[Request | None]()  # the one exclusive request, if any
    is_gate_shut = _Told[bool]()  # no other request may begin its first step
    down = _Told[BackendDown | None]()  # the reason, while llama-server is down
    is_drained = _Told[bool]()  # the operator drains the backend: no request begins here
    is_removed = _Told[bool]()  # drained because the configuration has it no longer: no request waits for it
    is_leaving = _Told[bool]()  # its model is being unloaded: requests wait until it is loaded again
    is_suspect = _Told[bool]()  # llama-server may hang: requests go to other backends if there are any

    def __init__(self, backend: str, admission: Admission, now: Callable[[], float]) -> None:
        """``admission`` is the pool to which the backend belongs at first; ``move`` changes it."""
        self.backend, self.admission, self.now = backend, admission, now
        self.table = self.exclusive = self.down = None
        self.is_gate_shut = self.is_drained = self.is_removed = self.is_leaving = self.is_suspect = False
        self.is_exclusive_wanted = False  # the exclusive request waits for others to finish
        self.leases: dict[Lease, None] = {}  # ordered: among equals the first one is chosen
        self.long: dict[Lease, None] = {}  # those with a long prefill, for each placement looks at them
        self.changes = ChangeEvent()  # notified when a lease or the exclusive section has changed
        self._charges: dict[Lease, Charge] = {}  # the accounts of users for the slots that they have now
        self.on_abandoned: Callable[[Lease, Charge | None], None] = lambda lease, charge: None
        self.pin: Callable[[str], Pin] | None = None  # pins a snapshot
        self.is_on_demand = False  # ``changes`` also tells when requests begin or cease to wait for slots
        self.is_asleep = False  # llama-server has unloaded its model by itself: any use loads it again
        self._used_at, self._worked_at = now(), -math.inf
        self._n_prefilling, self._prefilling_since, self._prefilled_s = 0, 0.0, 0.0

    def __repr__(self) -> str:
        return f"<Leases {self.backend} {list(self.leases)}>"

    # -- questions -----------------------------------------------------------------------------------------------

    @property
    def n_waiting(self) -> int:
        return self.admission.n_waiting

    def held(self) -> Iterator[Lease]:
        """The leases whose slots belong to the connected llama-server process."""
        return (lease for lease in self.leases if lease.table is self.table and lease.slot is not None)

    @property
    def idle_s(self) -> float:
        """The seconds since a client last used this backend; 0 while a client uses it or a request waits."""
        is_wanted = self.n_waiting or any(not lease.is_own for lease in self.leases)
        return 0.0 if is_wanted else self.now() - self._used_at

    @property
    def unused_s(self) -> float:
        """The seconds since llama-server last worked on a client's request; 0 while it does."""
        return 0.0 if any(lease.is_running for lease in self.leases) else self.now() - self._worked_at

    @property
    def is_at_work(self) -> bool:
        """True if a client's request has a lease, or llama-server may still compute for a client that has left."""
        slots = self.table.slots if self.table is not None else []
        is_leased = any(not lease.is_own for lease in self.leases)
        return is_leased or any(slot.state is SlotState.ABANDONED for slot in slots)

    @property
    def prefilled_s(self) -> float:
        """The total seconds, since the start, in which llama-server has computed prompts ahead of the clients'
        requests.
        """
        return self._prefilled_s + (self.now() - self._prefilling_since if self._n_prefilling else 0.0)

    @property
    def is_open(self) -> bool:
        """True if a request may begin its first step on this backend: it is connected, not drained or being unloaded,
        and no exclusive request shuts the gate.
        """
        return self.table is not None and not (self.is_gate_shut or self.is_drained or self.is_leaving)

    @property
    def is_coming(self) -> bool:
        """True if llamaslot is connecting to llama-server, so that requests may begin soon."""
        return self.table is None and self.down is None and not self.is_drained

    @property
    def why_not(self) -> str | None:
        """The reason why no request can begin on this backend; None if one can, now or soon."""
        if self.is_removed:
            return f"{self.backend} is no longer in the configuration"
        if self.is_drained:
            return f"{self.backend} is drained, so no request begins there until 'llamaslot undrain {self.backend}'"
        return str(self.down) if self.down is not None else None

    def dispatch(self) -> None:
        self.admission.dispatch(self.backend)

    def snapshots_in_demand(self) -> set[str]:
        return self.admission.snapshots_in_demand()

    def recorder(self, request: Request) -> DecisionRecorder:
        return self.admission.recorder(request)

    def paid(self, charge: Charge | None) -> None:
        self.admission.paid(charge)

    # -- life of the table ---------------------------------------------------------------------------------------

    def attach(self, table: SlotTable) -> None:
        """Record that llama-server is connected and has the slots in ``table``."""
        self.table, self.down, self.is_suspect, self.is_asleep = table, None, False, False
        self.dispatch()

    def detach(self, error: BackendDown | None = None) -> None:
        """Record that the slots of llama-server no longer exist. Their leases end later, and that has no effect on the
        next table. With ``error`` the backend is down.
        """
        self.down = error
        if self.table is not None:
            self.table.is_current = False
            self.table.model_snapshots.pending.end_of(self.backend)
        self.table = None

    def move(self, admission: Admission) -> None:
        """Move the backend to the pool of ``admission``. What users are charged for leases of an earlier table is
        settled with the old pool.
        """
        assert self.table is None, "only between two processes, or two models"
        if admission is not self.admission:
            for charge in self._charges.values():
                self.admission.paid(charge)
            self._charges.clear()
            self.admission = admission

    # -- leasing -------------------------------------------------------------------------------------------------

    def grant(
        self,
        slot: Slot | None,
        request: Request,
        plan: Plan | None = None,
        *,
        recorder: DecisionRecorder | None = None,
        came_at: float | None = None,
        n_preempted: int = 0,
    ) -> Lease:
        """Lease ``slot`` to ``request`` and return the lease. ``slot`` is None for an exclusive request whose slot
        llama-server will choose. ``recorder`` writes the request's journal entry; None makes a new one. Raises
        KeyError, and leases nothing, if the plan's snapshot is gone.
        """
        assert self.table is not None, "only what is attached has slots"
        source = plan.snapshot if plan is not None else None
        pin = self.pin(source) if self.pin is not None and source is not None else None
        lease = Lease(
            self, self.table, slot, request, plan,
            now=self.now, recorder=recorder or self.recorder(request), pin=pin,
            came_at=came_at, n_preempted=n_preempted,
        )  # fmt: skip
        if request.is_exclusive and (plan is not None or slot is None):
            self.exclusive = request
        self.leases[lease] = None
        self.on_long(lease)
        return lease

    def try_lease(self, slot: Slot, request: Request) -> Lease | None:
        """Lease an idle slot for work of llamaslot's own (a save, a probe). Returns None if the slot is not idle, if
        an exclusive request keeps others out, or if a request waits for a slot and the backend is neither drained nor
        being unloaded.
        """
        if self.table is None or self.is_gate_shut or not slot.is_idle:
            return None
        if self.n_waiting and not (self.is_drained or self.is_leaving):
            return None
        return self.grant(slot, request)

    def lease_competitor(self, slot: Slot, lease: Lease) -> Lease | None:
        """Lease an idle slot to erase it, so that llama-server chooses the slot of ``lease`` instead. Allowed during
        an exclusive section too, because that section waits for the request of ``lease``. Returns None if the slot is
        not idle.
        """
        if self.table is not lease.table or not slot.is_idle:
            return None
        return self.grant(slot, Request(f"{lease.request.id} clears its way", slot.content.tokens))

    def lease_idle(self, request: Request, n: int | None = None) -> list[Lease]:
        """Lease the ``n`` idle slots with the lowest numbers (None: all) for the exclusive request. Raises
        BackendRestarted.
        """
        assert self.exclusive is request, "only the exclusive request"
        if self.table is None:
            raise BackendRestarted
        idle = [slot for slot in self.table.slots if slot.is_idle][:n]
        return [self.grant(slot, request) for slot in idle]

    def charge(self, lease: Lease, charge: Charge | None) -> None:
        """Charge the slot time of ``lease`` to its user, until the lease has ended and its slot is idle."""
        if charge is not None:
            self._charges[lease] = charge

    def prefill_began(self) -> None:
        """Record that llama-server computes one more chunk of a prompt."""
        if not self._n_prefilling:
            self._prefilling_since = self.now()
        self._n_prefilling += 1

    def prefill_ended(self) -> None:
        """Record that llama-server has finished one chunk of a prompt."""
        self._prefilled_s, self._prefilling_since = self.prefilled_s, self.now()
        self._n_prefilling -= 1

    # -- called by a lease, as its ``Owner`` ---------------------------------------------------------------------

    def on_change(self, lease: Lease) -> None:
        self.changes.notify()

    def on_long(self, lease: Lease) -> None:
        if lease.is_long and lease in self.leases:
            self.long[lease] = None
        else:
            self.long.pop(lease, None)

    def on_look_again(self, lease: Lease) -> None:
        if self.n_waiting:  # a moment later, because the lease may be about to send something
            asyncio.get_running_loop().call_soon(self.dispatch)

    def on_end(self, lease: Lease) -> None:
        self.leases.pop(lease, None)
        self.long.pop(lease, None)
        charge = self._charges.pop(lease, None)
        if lease.state is LeaseState.ABANDONED:
            self.on_abandoned(lease, charge)
        else:
            self.paid(charge)
        if not lease.is_own:
            self._used_at = self.now()
            self._worked_at = self._used_at if lease.is_confirmed else self._worked_at
        self.end_exclusive(lease)
        self.dispatch()

    # -- the exclusive section -----------------------------------------------------------------------------------

    def end_exclusive(self, lease: Lease) -> None:
        """End the exclusive section of the request of ``lease``, if it has one. Idempotent."""
        if self.exclusive is lease.request and (lease.plan is not None or lease.slot is None):
            self.exclusive, self.is_gate_shut, self.is_exclusive_wanted = None, False, False
            self.dispatch()

    def has_exclusive(self, lease: Lease) -> bool:
        return self.exclusive is lease.request

    def is_exclusive_waiting(self, lease: Lease) -> bool:
        """True if an exclusive request, other than that of ``lease``, waits for other requests to finish."""
        return self.is_exclusive_wanted and self.exclusive is not lease.request

    def is_prefilling(self, lease: Lease) -> bool:
        """True if another lease has a long prefill that runs or waits for its turn."""
        if self.table is not lease.table:
            return False  # there is nothing to wait for any more
        return any(other.table is self.table and other is not lease for other in self.long)

    def request_exclusive(self, lease: Lease) -> None:
        """From now on long prefills make room for the exclusive request of ``lease``, and no long prefill begins."""
        assert self.exclusive is lease.request, "only the exclusive request"
        if not self.is_exclusive_wanted:
            self.is_exclusive_wanted = True
            self.changes.notify()

    def pause_admission(self, lease: Lease) -> None:
        """From now on no other request begins its first step on this backend."""
        assert self.exclusive is lease.request, "only the exclusive request"
        self.is_gate_shut = True

    def resume_admission(self, lease: Lease) -> None:
        """Let other requests begin again, as before ``request_exclusive``. The exclusive request still waits."""
        assert self.exclusive is lease.request, "only the exclusive request"
        self.is_gate_shut = self.is_exclusive_wanted = False
        self.dispatch()

    def has_waited(self, lease: Lease) -> None:
        """Record that the request of ``lease`` has waited until now. If it has no slot yet, its user is not charged
        for the wait.
        """
        if lease.slot is None and lease in self._charges:
            self._charges[lease] = replace(self._charges[lease], at=self.now())

    def is_other_namespace_at_work(self, lease: Lease) -> bool:
        """True if llama-server may choose any slot for the request of ``lease``, and a slot runs a request whose
        content this request must not use.
        """
        table, request = lease.table, lease.request
        if self.table is not table or request.placement is not Placement.SERVER_CHOSEN:
            return False
        return any(not slot.is_idle and table.is_other_namespace(slot, request) for slot in table.slots)

    # -- invariants ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise AssertionError naming the first invariant that does not hold, of the leases or of their slot table."""
        long = {lease for lease in self.leases if lease.is_long}
        assert self.long.keys() == long, "leases with a long prefill are listed"
        if self.table is None:
            return
        self.table.check()
        current = [lease for lease in self.leases if lease.table is self.table and lease.slot is not None]
        slots = [lease.slot for lease in current]
        assert len(slots) == len(set(map(id, slots))), "a slot has one lease"
        for lease in current:
            assert lease.slot is not None
            assert lease.slot.state is SlotState.LEASED, f"a lease holds a leased slot: {lease}"
        leased = sum(slot.state is SlotState.LEASED for slot in self.table.slots)
        assert leased == len(slots), "a leased slot has a lease"
        assert not self.is_gate_shut or self.exclusive is not None, (
            "only an exclusive request closes the gate"
        )
