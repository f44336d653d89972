"""Which running prefills give up their slots for waiting requests of users with fewer slots.

Pure. A prefill can stop at any time and resume later, in this slot or another: the tokens computed so far stay there.
An answer that has begun is never stopped. So a user that took all slots while it was alone gives up those above its
share as soon as other users send requests.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from msgspec import Struct


class Claim(Struct, frozen=True):
    """A request that waits for any slot. ``deficit_s``: what its user has received less than its share."""

    user: str
    deficit_s: float


class Stoppable(Struct, frozen=True):
    """A prompt that is being computed in a slot, or waits in its slot for its turn.

    ``loss_s``: seconds lost by stopping it: the computed tokens must be saved and restored, or computed again.
    ``left_s``: seconds until its slot would be free anyway, its answer included. ``is_chosen``: it has been told to
    stop already.
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
    """The order of stopping: first a prompt told so already, then the smallest loss, the longest remaining time, the
    latest one.
    """
    return not prompt.is_chosen, prompt.loss_s, -prompt.left_s, -number
