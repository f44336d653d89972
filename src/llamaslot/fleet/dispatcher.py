"""Decides which request gets which slot, and when. Has the queue, the leases, and the exclusive sections in which
llama-server chooses the slots.

All of this runs on the event loop, without an await between a decision and its lease. ``scheduling.placement``
decides; the task that gets the lease performs the steps in its slot."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from functools import partial

from msgspec import Struct, field

from llamaslot.backend.lease import Lease
from llamaslot.backend.lease_states import Preempted
from llamaslot.backend.leases import Leases
from llamaslot.backend.slot_table import SlotTable
from llamaslot.backend.unassisted_slots import UnassistedSlots
from llamaslot.errors import BackendDown, QueueFull
from llamaslot.fleet.open_backends import OpenBackends, PoolBackends
from llamaslot.fleet.pool_index import PoolIndex
from llamaslot.fleet.preemption import Preemptions
from llamaslot.fleet.prefix_sharing import PrefixWait, ask_for_trunk, prefix_due_s
from llamaslot.fleet.queue import Queue, Waiting, answer_s, estimate
from llamaslot.observe.journal import DecisionRecorder, Journal
from llamaslot.scheduling.fairness import Charge
from llamaslot.scheduling.placement import is_long, place
from llamaslot.scheduling.plan import Place, Plan, Source, Wait
from llamaslot.scheduling.request import Placement, Request
from llamaslot.scheduling.settings import QueueLimits, SchedulingSettings
from llamaslot.scheduling.slots import SlotKey

log = logging.getLogger(__name__)

MIN_LOOK_AGAIN_S = 0.25
_MOST_BEHIND = 8  # long prompts placed in a pass while they leave the last idle slot; 250 take a second


class _Pass(Struct):
    """One pass over all waiting requests. It keeps what is found out for one request for the requests after it."""

    n_slots: int
    # By slot that requests wait for: the seconds for which these requests will use it.
    reserved: dict[SlotKey, float] = field(default_factory=dict)
    again_s: list[float] = field(default_factory=list)  # seconds until the next dispatch
    n_behind: int = 0  # long prompts that leave the last idle slot to other requests
    is_short: bool = False  # an earlier request would take any slot, and got none
    is_spared: bool = False  # fairness has denied an idle slot to a request


class Dispatcher:
    """Leases the slots of a pool's backends to requests, so that all users get their share."""

    def __init__(self, settings: SchedulingSettings, limits: QueueLimits, now: Callable[[], float]) -> None:
        self.settings, self.now = settings, now
        self.queue, self.journal, self.backends = Queue(limits), Journal(), PoolBackends()
        self.on_prefix_wait: Callable[[float], None] = lambda seconds: None
        self._n_changes = 0
        self._look_again: asyncio.TimerHandle | None = None
        self._preemptions, self._index = Preemptions(), PoolIndex()

    # -- questions -----------------------------------------------------------------------------------------------

    @property
    def tables(self) -> list[SlotTable]:
        return [*self.backends.connected.tables.values()]

    @property
    def leases(self) -> list[Lease]:
        return [lease for leases in self.backends.values() for lease in leases.leases]

    @property
    def n_waiting(self) -> int:
        return len(self.queue)

    def position(self, request: Request) -> int:
        """Return the place of ``request`` in the queue: 1 if it is next, 0 if it no longer waits."""
        return next((i for i, waiting in enumerate(self.queue.ordered(), 1) if waiting.request is request), 0)

    @property
    def idle_s(self) -> float:
        """The seconds since a client last used any of the backends."""
        return min((leases.idle_s for leases in self.backends.values()), default=0.0)

    def recorder(self, request: Request) -> DecisionRecorder:
        """Return a recorder for the journal entry of ``request``."""
        return DecisionRecorder(self.journal, request, self.now)

    # -- the backends --------------------------------------------------------------------------------------------

    def add(self, backend: str) -> Leases:
        """Add a new backend of this name to the pool. Returns its leases."""
        self.backends[backend] = Leases(backend, self, self.now)
        self.backends.changed()
        return self.backends[backend]

    def join(self, leases: Leases) -> None:
        """Add a backend that comes from another pool, and is not connected. It leaves the other pool later."""
        leases.move(self)
        self.backends[leases.backend] = leases
        self.backends.changed()

    def remove(self, backend: str) -> None:
        """Remove a backend that is not connected. If it was the last one, waiting requests get BackendRestarted."""
        del self.backends[backend]
        self.backends.changed()
        self.dispatch()  # what its requests were charged has been paid

    def attach(self, table: SlotTable) -> None:
        """Record that the backend named in ``table`` is connected, with these slots."""
        self._index.attach(table)
        table.worth.on_change.append(partial(self.backends.idle_changed, table))
        self.backends[table.backend].attach(table)

    def detach(self, backend: str, error: BackendDown | None = None) -> None:
        """Record that the slots of ``backend`` no longer exist. Requests wait for its next slots, or for slots of
        other backends. With ``error`` it is down; if all backends are, queued and new requests get this error."""
        self._index.detach(backend)
        self.backends[backend].detach(error)
        self.dispatch(backend)  # requests that would rather have run there go elsewhere

    def _fail_if_none_serves(self) -> None:
        if (error := self.backends.why_none(is_queued=True)) is not None:
            for waiting in self.queue:
                if not waiting.granted.done():
                    waiting.granted.set_exception(error)

    # -- leasing -------------------------------------------------------------------------------------------------

    async def lease(
        self, request: Request, *, is_back: bool = False, preempted: Preempted | None = None
    ) -> Lease:
        """Wait for a slot, and return its lease. ``is_back``: the request had a slot before, and comes first in the
        queue. ``preempted``: it gave its slot to another user, and comes first among its user's requests.

        Raises QueueFull (too many requests, or too long a wait), TooManyRequests (too many of this user) and
        BackendDown. Canceling is safe: the request leaves the queue, and no slot is held."""
        had_a_place = is_back or preempted is not None
        if (error := self.backends.why_none(is_queued=had_a_place)) is not None:
            raise error
        if not (len(self.queue) or had_a_place) and (lease := self._at_once(request)) is not None:
            return lease
        waiting = self._newcomer(request, is_back, preempted)
        self.queue.add(waiting, self.now())
        lease, was_admitted = None, False
        try:
            self.dispatch(is_arrival=True)
            if not waiting.granted.done():
                self.queue.make_room(waiting)
            was_admitted = True
            self.queue.admitted(waiting, self.now())
            if not waiting.granted.done():
                async with asyncio.timeout(self.queue.limits.max_wait_s):
                    await waiting.granted
            lease = waiting.granted.result()
            return lease
        except TimeoutError:
            raise QueueFull(
                f"no slot became free within {self.queue.limits.max_wait_s:g} s; try again later",
                self.queue.limits.retry_after_s,
            ) from None
        finally:
            if lease is None and _is_served(waiting.granted):
                waiting.granted.result().release()  # granted and cancelled at the same moment
            waiting.granted.cancel()
            waiting.recorder.ended()
            if waiting in self.queue:
                self.queue.remove(waiting)
                # Other requests may take the slot that it waited for. After a refusal nothing has changed for them.
                self.dispatch(is_arrival=not was_admitted)

    def _newcomer(self, request: Request, is_back: bool, preempted: Preempted | None) -> Waiting:
        granted, now = asyncio.get_running_loop().create_future(), self.now()
        tables = self._index.worth_a_look(self.backends.connected, request, now)
        cost_s, is_small = estimate(tables, request, self.settings)
        waiting = Waiting(
            request.user.id, cost_s, is_small, request=request, granted=granted, recorder=self.recorder(request),
            came_at=now, is_back=is_back,
        )  # fmt: skip
        if preempted is not None:
            waiting.came_at, waiting.n_preempted = preempted.came_at, preempted.n_times
            waiting.is_small = False  # little is left, but it must not overtake the request that got its slot
        return waiting

    def _at_once(self, request: Request) -> Lease | None:
        """Return a lease without the queue, if no request waits and several slots are idle. The slot is the one that
        the queue would give, in two thirds of the time. Returns None if the request needs any of the queue's rules."""
        # No await from here to the end: slots are leased as they were seen.
        open_, now = self.backends.open_to(request), self.now()
        is_special = request.is_exclusive or open_.is_any_exclusive or not open_.is_assisted
        if is_special or open_.n_idle < 2 or not self.queue.may_run_at_once(request.user, now):
            return None
        tables = self._index.worth_a_look(open_, request, now)
        if any(self.backends[table.backend].long for table in tables):
            return None
        views = [table.view(request, now, {}) for table in tables]
        plan = place(request, views, self.settings)
        if isinstance(plan, Wait):
            return None
        leases, recorder = self.backends[plan.slot.backend], self.recorder(request)
        table = open_.tables[plan.slot.backend]
        try:
            lease = leases.grant(table.slots[plan.slot.id], request, plan, recorder=recorder, came_at=now)
        except KeyError:  # the catalog has dropped the snapshot meanwhile
            return None
        recorder.record_plan(plan)
        cost_s = plan.cost.steps_s + answer_s(table, request)
        leases.charge(lease, self.queue.granted_at_once(request, cost_s, now))
        self._n_changes += 1
        self.backends.note_changes(plan.slot.backend)
        self.backends.tell()
        return lease

    def snapshots_in_demand(self) -> set[str]:
        """Return the ids of the snapshots that queued requests would resume from, and that should be evicted last.

        Looked up once for each request, and again if its snapshot is gone, because usually a newer one has replaced
        it.
        """
        tables = [group[0] for group in self.backends.connected.libraries]
        for waiting in self.queue:
            if waiting.wants is None or not any(table.has_snapshot(waiting.wants) for table in tables):
                found = (table.best_snapshot(waiting.request) for table in tables)
                waiting.wants = next((snapshot for snapshot in found if snapshot is not None), None)
        return {waiting.wants for waiting in self.queue if waiting.wants}

    def dispatch(self, backend: str | None = None, *, is_arrival: bool = False) -> None:
        """Lease slots to waiting requests, in order. Called after every change. ``backend``: the only backend on which
        something has changed; None for any.

        ``is_arrival``: the only change is one more waiting request. Then requests that wait for a certain slot or
        snapshot are not placed again. Placing 250 again that waited for the same prefix took 15 s."""
        if not is_arrival:
            self._n_changes += 1
            self._fail_if_none_serves()
        # No await from here to the end: slots are leased as they were seen.
        if self._look_again is not None:
            self._look_again.cancel()
            self._look_again = None
        if len(self.queue):
            self._serve_queue()
        self.backends.note_changes(
            backend, *self._preemptions.choose(self.backends.open, self.queue, self.now)
        )
        self.backends.note_queue(has_waiting=len(self.queue) > 0)
        self.backends.tell()  # last: a request that has just got a slot may have priority over a prefill

    def _serve_queue(self) -> None:
        open_ = self.backends.open
        pass_ = _Pass(self.backends.connected.n_slots)
        if not open_ or (open_.is_assisted and not open_.n_idle and not self.queue.n_unpinned):
            return  # the order does not matter: with 1,000 waiting, each arrival would compute it
        for waiting in self.queue.ordered():
            if open_.is_assisted and pass_.is_short and not self.backends.open.n_idle:
                break  # none behind a request that waits for any slot at all gets one
            here = self.backends.open_to(waiting.request)
            if here and not waiting.granted.done():
                self._serve(here, waiting, pass_)
        is_any_idle = self.backends.open.n_idle > 0
        if pass_.is_spared and is_any_idle and (spared_s := self.queue.look_again_s(self.now())) is not None:
            pass_.again_s.append(spared_s)
        if pass_.again_s:
            self._look_again = asyncio.get_running_loop().call_later(min(pass_.again_s), self.dispatch)

    def _serve(self, here: OpenBackends, waiting: Waiting, pass_: _Pass) -> None:
        """Give a waiting request a slot on one of the backends ``here``, or record what it waits for."""
        request, n_idle = waiting.request, self.backends.open.n_idle
        if not self.queue.may_run(waiting, max(pass_.n_slots, n_idle), n_idle, self.now()):
            pass_.is_spared = True
        elif not here.is_assisted:
            self._let_through(here, waiting, pass_)
        elif request.placement is Placement.SERVER_CHOSEN:
            if not pass_.is_short:
                self._give(waiting, self.backends[here.most_idle.backend].grant(None, request))
        elif not n_idle:
            pass_.is_short = True  # not placed: placing 250 waiting requests took a second for each burst
        elif n_idle == 1 and self._is_still_behind(here.first, waiting, pass_):
            self._leaves_slot(waiting, pass_)
        else:
            self._serve_by_cost(here, waiting, pass_)

    def _serve_by_cost(self, here: OpenBackends, waiting: Waiting, pass_: _Pass) -> None:
        """Give a waiting request the slot that costs least, or record what it waits for."""
        waiting.behind = None
        now, decision = self.now(), self._decision(here, waiting, dict(pass_.reserved))
        if isinstance(decision, Wait):
            nearest = self._table_of(decision.place) or here.first
            waiting.recorder.record_wait(decision, prefix_due_s(nearest, decision, now))
            if decision.slot is not None:
                steps_s = decision.place.cost.steps_s if decision.place is not None else 0.0
                it_uses_s = steps_s + answer_s(nearest, waiting.request)
                pass_.reserved[decision.slot] = pass_.reserved.get(decision.slot, 0.0) + it_uses_s
            if decision.for_s is None:
                pass_.is_short = True
            else:
                pass_.again_s.append(max(waiting.look_at - now, 0.0))
            return
        leases = self.backends[decision.slot.backend]
        table = self._table_of(decision)
        assert table is not None, "what was placed is up"
        if leases.is_exclusive_wanted and is_long(decision, table.long_s):
            return  # an exclusive request waits until no long prefill runs, so none may begin
        if self.backends.open.n_idle == 1 and (ahead := self._ahead_of(table, waiting, decision)) is not None:
            waiting.behind = ahead
            self._leaves_slot(waiting, pass_)
        else:
            self._place(table, waiting, decision, pass_)

    def _table_of(self, place: Place | Plan | None) -> SlotTable | None:
        return self.backends[place.slot.backend].table if place is not None else None

    def _let_through(self, here: OpenBackends, waiting: Waiting, pass_: _Pass) -> None:
        """Send a request to a backend at which llama-server chooses the slot. Only the number of requests there is
        limited."""
        table = here.most_idle
        if isinstance(table, UnassistedSlots) and (slot := table.any_idle()) is not None:
            self._place(table, waiting, Plan(slot.key, (), Source.SERVER, 0), pass_)
        else:
            pass_.is_short = True

    def _ahead_of(self, table: SlotTable, waiting: Waiting, plan: Plan) -> Lease | None:
        """Return the lease of another request of the same user that waits in its slot for its first turn, with a
        prompt that takes no longer. None if there is none.

        One long prompt is computed at a time, so a second one gains nothing from the last idle slot. It stays in the
        queue until the first one has its turn, and leaves the slot to small requests."""
        if not is_long(plan, table.long_s) or waiting.had_a_place or self.now() >= self._late_at(waiting):
            return None
        seconds, request = table.rates.prefill.seconds, waiting.request
        own_s = seconds(plan.n_reused, request.n_tokens) + table.rates.interruption.seconds
        for lease in self.backends[table.backend].leases:
            if lease.is_in_line and lease.table is table and lease.request.user == request.user:
                assert lease.plan is not None, "only what a client has asked for"
                if seconds(lease.plan.n_reused, lease.request.n_tokens) <= own_s:
                    return lease
        return None

    def _is_still_behind(self, table: SlotTable, waiting: Waiting, pass_: _Pass) -> bool:
        """True if this long prompt must leave the last idle slot to others without being placed again. Either the
        lease in ``waiting.behind`` still waits for its turn, or ``_MOST_BEHIND`` requests have left the slot in this
        pass already.
        """
        if waiting.had_a_place or self.now() >= self._late_at(waiting):
            return False
        prompt_s = waiting.cost_s - answer_s(table, waiting.request)
        return waiting.is_behind or (pass_.n_behind >= _MOST_BEHIND and prompt_s > table.long_s)

    def _leaves_slot(self, waiting: Waiting, pass_: _Pass) -> None:
        pass_.n_behind += 1
        if (late_at := self._late_at(waiting)) < math.inf:
            pass_.again_s.append(max(late_at - self.now(), MIN_LOOK_AGAIN_S))

    def _late_at(self, waiting: Waiting) -> float:
        """Return the time from which the waiting request takes any slot. From then on no shorter prompt is computed
        before it."""
        max_wait_s = self.queue.limits.max_wait_s or math.inf
        return waiting.came_at + min(self.settings.prefill.starvation_s, max_wait_s / 2)

    def _place(self, table: SlotTable, waiting: Waiting, plan: Plan, pass_: _Pass) -> None:
        try:
            lease = self.backends[plan.slot.backend].grant(
                table.slots[plan.slot.id], waiting.request, plan,
                recorder=waiting.recorder, came_at=waiting.came_at, n_preempted=waiting.n_preempted,
            )  # fmt: skip
        except KeyError:  # the catalog has dropped the snapshot meanwhile
            assert plan.snapshot is not None
            table.drop_snapshot(plan.snapshot)
            pass_.again_s.append(0.0)
            return
        if waiting.prefix_wait is not None:
            self.on_prefix_wait(self.now() - waiting.prefix_wait.since)
        lease.recorder.record_plan(plan)
        self._give(waiting, lease)
        self._n_changes += 1

    def _decision(
        self, here: OpenBackends, waiting: Waiting, reserved: Mapping[SlotKey, float]
    ) -> Plan | Wait:
        """Return the last decision for a waiting request, if only other requests have arrived since then; else a new
        one."""
        now = self.now()
        if waiting.wait is not None and waiting.n_seen == self._n_changes and now < waiting.look_at:
            return waiting.wait
        decision = self._decide(here, waiting, reserved)
        waiting.n_seen, waiting.wait = self._n_changes, None
        if isinstance(decision, Wait):
            waiting.wait = decision
            waiting.look_at = now + max(decision.for_s or math.inf, MIN_LOOK_AGAIN_S)
        return decision

    def _decide(self, here: OpenBackends, waiting: Waiting, reserved: Mapping[SlotKey, float]) -> Plan | Wait:
        """Decide where a request runs, or what it waits for. If another request computes a prefix of its prompt, ask
        that one to save the prefix."""
        request, now = waiting.request, self.now()
        tables = self._index.worth_a_look(here, request, now, reserved)
        longs = [lease for table in tables for lease in self.backends[table.backend].long]
        makers = [lease for lease in longs if lease.table is here.tables[lease.table.backend]]
        is_patient = waiting.prefix_wait is None or waiting.prefix_wait.lasts(request, now)
        views = {table.backend: table.view(request, now, reserved, is_patient=is_patient) for table in tables}
        if is_patient and ask_for_trunk(request, views, makers, now):
            self.backends.note_changes(*views)
            views = {table.backend: table.view(request, now, reserved) for table in tables}
        decision = place(request, views.values(), self.settings)
        if isinstance(decision, Wait) and (place_ := decision.place) is not None:
            leases = self.backends[place_.slot.backend]
            trunk = leases.table.expected_trunk(place_.snapshot) if leases.table is not None else None
            if trunk is not None:
                trunk.users.update({request.user.id} - {""})  # not llamaslot itself
                self.backends.note_changes(trunk.backend)
                at_last = waiting.came_at + (self.queue.limits.max_wait_s or math.inf) / 2
                waiting.prefix_wait = waiting.prefix_wait or PrefixWait.of(
                    leases, trunk, decision, now, at_last
                )
        return decision

    def _give(self, waiting: Waiting, lease: Lease) -> None:
        steps_s = lease.plan.cost.steps_s if lease.plan is not None else 0.0
        charge = self.queue.granted(waiting, steps_s + answer_s(lease.table, lease.request), self.now())
        self.backends[lease.table.backend].charge(lease, charge)
        self.backends.note_changes(lease.table.backend)
        waiting.granted.set_result(lease)

    def backends_changed(self) -> None:
        """Take notice that a backend of the pool has opened or closed."""
        self.backends.changed()

    def paid(self, charge: Charge | None) -> None:
        """End ``charge``: the user's slots that it counts are free. The caller dispatches afterwards."""
        if charge is not None:
            self.queue.released(charge, self.now())

    # -- invariants ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise AssertionError naming the first invariant that does not hold, of leases, queue or pool index."""
        self.backends.check()
        self.queue.check()
        self._index.check()
        served = [waiting for waiting in self.queue if _is_served(waiting.granted)]
        assert not served, f"a served request has left the queue: {served}"


def _is_served(granted: asyncio.Future[Lease]) -> bool:
    """True if a waiting request has got its lease. Requests that were cancelled or refused leave the queue themselves
    a moment later."""
    return granted.done() and not granted.cancelled() and granted.exception() is None
