"""Which prefills give up their slots for waiting users with fewer slots."""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import chain

from llamaslot.backend.lease import Lease
from llamaslot.backend.leases import Leases
from llamaslot.backend.slot_table import DRAIN_S
from llamaslot.fleet.queue import Queue, answer_s
from llamaslot.scheduling.preemption import Claim, Stoppable, chosen

MOST_TIMES = 2  # preemptions per request


class Preemptions:
    """Tells leases that their slots are needed, and that they may go on after all."""

    def __init__(self) -> None:
        self._told: set[Lease] = set()

    def choose(self, backends: Collection[Leases], queue: Queue, now: Callable[[], float]) -> None:
        """Tell the leases whose slots are needed now, and those that were told before but may go on.

        Leases that cannot stop now are not told, nor those where no request may begin afterwards. The caller notifies
        the waiters.
        """
        stops = _needed(backends, queue, now()) if len(queue) else set[Lease]()
        for lease in self._told - stops:
            lease.preempt(is_wanted=False)
        for lease in stops:
            lease.preempt(is_wanted=True)
        self._told = stops


def _needed(backends: Collection[Leases], queue: Queue, now: float) -> set[Lease]:
    here = [leases for leases in backends if leases.table is not None]
    tables = [leases.table for leases in here if leases.table is not None]
    if any(table.n_idle for table in tables):
        return set()
    open_ = [leases for leases in here if not (leases.is_gate_shut or leases.is_exclusive_wanted)]
    stoppable = [
        lease for leases in open_ for lease in leases.held() if lease.can_stop and _may_stop(lease, now)
    ]
    if not stoppable:
        return set()
    n_slots = sum(len(table.slots) for table in tables)
    # Only as many as are looked at: with 250 waiting, all of them took a millisecond at each change.
    claims = (
        Claim(waiting.request.user.id, queue.deficit_s(waiting.request.user.id))
        for waiting in queue.ordered()
        if waiting.request.user.id  # not for llamaslot itself
        and waiting.wants_any(now)
        and queue.may_run(waiting, n_slots, 0, now)
    )
    first = next(claims, None)
    n_most = max(queue.n_held.get(lease.request.user.id, 0) for lease in stoppable)
    if first is None or n_most < queue.n_held.get(first.user, 0) + 2:
        return set()  # it would have more slots than the user that gives one up
    prompts = [_stoppable(lease, queue, now) for lease in stoppable]
    held = [lease for leases in here for lease in leases.held()]
    waits_s = [left_s(lease, now) for lease in held]
    waits_s += [DRAIN_S] * (n_slots - len(held))  # slots of clients that have left
    return {stoppable[i] for i in chosen(chain([first], claims), prompts, queue.n_held, waits_s)}


def _may_stop(lease: Lease, now: float) -> bool:
    """Not if it was preempted often, nor if it came long ago: it is to be served at last."""
    is_late = now - lease.came_at >= lease.table.rules.sharing.starvation_s
    return lease.n_preempted < MOST_TIMES and not (is_late or lease.is_released)


def left_s(lease: Lease, now: float) -> float:
    """Estimated seconds until its slot is free: the rest of its prefill, if there is any, and of its answer."""
    n = min(lease.n_done, lease.request.n_tokens)
    prompt_s = 0.0 if lease.is_decoding else lease.table.rates.prefill.seconds(n, lease.request.n_tokens)
    running_s = now - lease.sent_at if lease.is_decoding else 0.0
    return prompt_s + answer_s(lease.table, lease.request, running_s)


def _stoppable(lease: Lease, queue: Queue, now: float) -> Stoppable:
    user, n, rates = lease.request.user.id, lease.n_done, lease.table.rates
    assert lease.plan is not None, "only what a client has asked for"
    loss_s = rates.prefill.seconds(min(lease.plan.n_reused, n), n)
    if lease.table.can_save and not lease.request.no_cache:
        loss_s = min(loss_s, rates.save_s(n) + rates.restore_s(n))
    if lease.restored is not None:
        loss_s += rates.restore_s(lease.plan.n_reused)
    if lease.is_at_work:
        loss_s += rates.interruption.seconds
    is_chosen = lease.is_preempted
    return Stoppable(user, queue.deficit_s(user), loss_s, left_s(lease, now), is_chosen=is_chosen)
