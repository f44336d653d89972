"""Which prefills give up their slots for waiting users with fewer slots."""

from __future__ import annotations

from collections.abc import Iterable

from llamaslot.backend.lease import Lease
from llamaslot.backend.leases import Leases
from llamaslot.backend.slot_table import DRAIN_S
from llamaslot.fleet.queue import Queue, Waiting, answer_s
from llamaslot.scheduling.preemption import Claim, Stoppable, chosen

MOST_TIMES = 2  # preemptions per request


def choose(backends: Iterable[Leases], ordered: Iterable[Waiting], queue: Queue, now: float) -> None:
    """Tell the leases whose slots are needed, and those that were told before but may go on.

    ``ordered``: all waiting requests, in order. Leases that cannot stop now are not told, nor those where no request
    may begin afterwards. The caller notifies the waiters.
    """
    here = [leases for leases in backends if leases.table is not None]
    tables = [leases.table for leases in here if leases.table is not None]
    n_slots = sum(len(table.slots) for table in tables)
    held = [
        its for leases in here for its in leases.leases if its.table is leases.table and its.slot is not None
    ]
    closed = [leases.backend for leases in here if leases.is_gate_shut or leases.is_turn_wanted]
    stoppable = [lease for lease in held if _may_stop(lease, now) and lease.table.backend not in closed]
    stops = set[Lease]()
    if stoppable and not any(table.n_idle for table in tables):
        claims = [
            Claim(waiting.request.user.id, queue.deficit_s(waiting.request.user.id))
            for waiting in ordered
            if waiting.request.user.id  # not for llamaslot itself
            and waiting.wants_any(now)
            and queue.may_run(waiting, n_slots, 0, now)
        ]
        prompts = [_stoppable(lease, queue, now) for lease in stoppable]
        waits_s = [left_s(lease, now) for lease in held]
        waits_s += [DRAIN_S] * (n_slots - len(held))  # slots of clients that have left
        stops = {stoppable[i] for i in chosen(claims, prompts, queue.n_held, waits_s)}
    for lease in held:
        lease.preempt(is_wanted=lease in stops)


def _may_stop(lease: Lease, now: float) -> bool:
    """Not if it was preempted often, nor if it came long ago: it is to be served at last."""
    is_late = now - lease.came_at >= lease.table.rules.sharing.starvation_s
    return lease.can_stop and lease.n_preempted < MOST_TIMES and not (is_late or lease.is_released)


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
