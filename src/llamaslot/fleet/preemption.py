"""Decides which running prefills give up their slots for waiting requests of users with fewer slots.

A prefill can be stopped at any time and resume later, in this slot or another one; the computed tokens stay in the
slot. An answer that has begun is never stopped. So a user that took all slots while it was alone gives up those above
its share when other users send requests. ``chosen`` decides, without side effects. ``Preemptions`` tells the leases.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain

from msgspec import Struct

from llamaslot.backend.lease import Lease
from llamaslot.backend.slot_table import ABANDONED_S
from llamaslot.fleet.open_backends import OpenBackends
from llamaslot.fleet.queue import Queue, answer_s

MOST_TIMES = 2  # preemptions per request


class Claim(Struct, frozen=True):
    """A waiting request that would take any slot. ``deficit_s``: the seconds that its user has received less than its
    share.
    """

    user: str
    deficit_s: float


class Stoppable(Struct, frozen=True):
    """A prompt that is being computed in a slot, or waits in its slot for its turn.

    ``deficit_s``: as in ``Claim``. ``loss_s``: the seconds lost by stopping it, because the computed tokens must be
    saved and restored, or computed again. ``left_s``: the seconds until its slot would be idle anyway, after its
    answer. ``is_chosen``: it has been told to stop already.
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
    """Return the indices of the ``prompts`` to stop, one for each of the first ``claims``. ``claims`` are in the order
    in which they are served.

    ``n_held``: the number of slots of each user. ``waits_s``: for each slot the seconds until it would be idle anyway.
    A user that gives up a slot has at least as many slots afterwards as the user that gets it, so they never take the
    same slot from each other again and again. A user that has slots already takes a further one only from users with
    no larger deficit. The k-th claim would get the k-th slot that becomes idle; no prompt is stopped if that costs
    more time than waiting for this slot.
    """
    n_each, left, result = dict(n_held), set(range(len(prompts))), list[int]()
    n_kept = dict(n_held)  # without slots taken here: no user gives up its last slot and takes another one
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
            break  # later claims must not overtake this one
        best = min(may_stop, key=lambda i: _key(prompts[i], i))
        n_each[claim.user] = n_own + 1
        if prompts[best].loss_s < idle_in_s:
            left.remove(best)
            result.append(best)
            n_each[prompts[best].user] -= 1
            n_kept[prompts[best].user] -= 1
    return result


def _key(prompt: Stoppable, number: int) -> tuple[bool, float, float, int]:
    """Return the sort key of a prompt that may be stopped; the first one is stopped. Prompts that were told to stop
    already come first, then those with the smallest loss, then those with the longest remaining time, then later ones.
    """
    return not prompt.is_chosen, prompt.loss_s, -prompt.left_s, -number


class Preemptions:
    """Tells leases that their slots are wanted for other users, and later that they are not wanted after all."""

    def __init__(self) -> None:
        self._told: set[Lease] = set()

    def choose(self, backends: OpenBackends, queue: Queue, now: Callable[[], float]) -> Iterator[str]:
        """Tell the leases whose slots are wanted now, and those that were told before but may keep them. Returns the
        names of their backends; the caller notifies the tasks that wait for changes there.

        Leases that cannot stop now are not told, nor leases on backends where no request may begin afterwards.
        """
        stops = set[Lease]() if backends.n_idle or not len(queue) else _needed(backends, queue, now())
        for lease in self._told - stops:
            lease.preempt(is_wanted=False)
        for lease in stops:
            lease.preempt(is_wanted=True)
        before, self._told = self._told, stops
        return (lease.table.backend for lease in before | stops)


def _needed(backends: OpenBackends, queue: Queue, now: float) -> set[Lease]:
    if (n_most := max(queue.n_held.values(), default=0)) < 2:
        return set()  # no user gives up its only slot
    open_ = [leases for leases in backends.leases if not leases.is_exclusive_wanted]
    stoppable = [
        lease for leases in open_ for lease in leases.held() if lease.can_stop and _may_stop(lease, now)
    ]
    if not stoppable:
        return set()
    # A generator, because few claims are looked at: with 250 waiting, making all took a millisecond at each change.
    claims = (
        Claim(waiting.user, queue.deficit_s(waiting.user))
        for waiting in queue.ordered()
        if waiting.user  # not for llamaslot itself
        and waiting.wants_any(now)
        and queue.may_run(waiting, backends.n_slots, 0, now)
    )
    if (first := next(claims, None)) is None or n_most < queue.n_held.get(first.user, 0) + 2:
        return set()  # it would have more slots than the user that gives one up
    prompts = [_stoppable(lease, queue, now) for lease in stoppable]
    held = [lease for leases in backends.leases for lease in leases.held()]
    waits_s = [left_s(lease, now) for lease in held]
    waits_s += [ABANDONED_S] * (backends.n_slots - len(held))  # slots of clients that have left
    return {stoppable[i] for i in chosen(chain([first], claims), prompts, queue.n_held, waits_s)}


def _may_stop(lease: Lease, now: float) -> bool:
    """True if a lease may be stopped. False if it was preempted often, or its request has waited so long that it must
    be served now.
    """
    is_late = now - lease.came_at >= lease.table.settings.prefill.starvation_s
    return lease.n_preempted < MOST_TIMES and not (is_late or lease.is_released)


def left_s(lease: Lease, now: float) -> float:
    """Return the estimated seconds until the slot of ``lease`` is idle: the rest of its prefill and of its answer."""
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
