"""Which running prefills give up their slots for waiting requests of users with fewer slots.

A prefill can stop at any time and resume later, in this slot or another: the tokens computed so far stay there. An
answer that has begun is never stopped. So a user that took all slots while it was alone gives up those above its share
as soon as other users send requests. ``chosen`` decides, without side effects; ``Preemptions`` tells the leases.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain

from msgspec import Struct

from llamaslot.backend.lease import Lease
from llamaslot.backend.leases import Leases
from llamaslot.backend.slot_table import DRAIN_S
from llamaslot.fleet.queue import Queue, answer_s

MOST_TIMES = 2  # preemptions per request


class Claim(Struct, frozen=True):
    """A waiting request that may take any slot. ``deficit_s``: the seconds that its user has received less than its
    share.
    """

    user: str
    deficit_s: float


class Stoppable(Struct, frozen=True):
    """A prompt that is being computed in a slot, or waits in its slot for its turn.

    ``loss_s``: seconds lost by stopping it: the computed tokens must be saved and restored, or computed again.
    ``left_s``: seconds until its slot would be free anyway, its answer included. ``is_chosen``: it was told to stop
    already.
    """

    user: str
    deficit_s: float
    loss_s: float
    left_s: float
    is_chosen: bool = False


def chosen(
    claims: Iterable[Claim],
    prompts: Sequence[Stoppable],
    n_held: Mapping[str, int],
    waits_s: Collection[float],
) -> list[int]:
    """Indices of the ``prompts`` to stop, one for each of the first ``claims``. ``claims`` are in the order of
    service.

    ``n_held``: slots of each user; ``waits_s``: for every slot, seconds until it would be free anyway. A user that
    gives up a slot has at least as many afterwards as the other, so two users never take the same slot from each
    other. A user with slots takes another one only from users that are owed no more than itself. No prompt is stopped
    for a claim that gets a slot as soon without it: the k-th claim gets the k-th slot that becomes free.
    """
    n_each, left, result = dict(n_held), set(range(len(prompts))), list[int]()
    n_kept = dict(n_held)  # less the slots taken here: no user takes a slot while it gives up its last one
    for idle_in_s, claim in zip(sorted(waits_s), claims, strict=False):
        n_own = n_each.get(claim.user, 0)
        may_stop = [
            i
            for i in left
            if n_each.get(prompts[i].user, 0) >= n_own + 2
            and n_kept.get(prompts[i].user, 0) > 1
            and (n_own == 0 or prompts[i].deficit_s <= claim.deficit_s)
        ]
        if not may_stop:
            break  # the claims behind it must not overtake it
        best = min(may_stop, key=lambda i: _key(prompts[i], i))
        n_each[claim.user] = n_own + 1
        if prompts[best].loss_s < idle_in_s:
            left.remove(best)
            result.append(best)
            n_each[prompts[best].user] -= 1
            n_kept[prompts[best].user] -= 1
    return result


def _key(prompt: Stoppable, number: int) -> tuple[bool, float, float, int]:
    """The sort key of a prompt that may be stopped: first one that was told so already, then the smallest loss, the
    longest remaining time, the latest one.
    """
    return not prompt.is_chosen, prompt.loss_s, -prompt.left_s, -number


class Preemptions:
    """Tells leases that their slots are needed, and that they may go on after all."""

    def __init__(self) -> None:
        self._told: set[Lease] = set()

    def choose(self, backends: Collection[Leases], queue: Queue, now: Callable[[], float]) -> Iterator[str]:
        """Tell the leases whose slots are needed now, and those that were told before but may go on. Returns their
        backends: the caller notifies the waiters.

        Leases that cannot stop now are not told, nor those where no request may begin afterwards.
        """
        stops = _needed(backends, queue, now()) if len(queue) else set[Lease]()
        for lease in self._told - stops:
            lease.preempt(is_wanted=False)
        for lease in stops:
            lease.preempt(is_wanted=True)
        before, self._told = self._told, stops
        return (lease.table.backend for lease in before | stops)


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
    """Whether a lease may be stopped: not if it was preempted often, nor if its request came long ago and must be
    served at last.
    """
    is_late = now - lease.came_at >= lease.table.rules.sharing.starvation_s
    return lease.n_preempted < MOST_TIMES and not (is_late or lease.is_released)


def left_s(lease: Lease, now: float) -> float:
    """Estimated seconds until the slot of ``lease`` is free: the rest of the prefill, if any, and of the answer."""
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
