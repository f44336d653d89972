"""Which prompts under way give their slots up for users who wait and have fewer.

Pure. A prompt that is being computed can stop at any time and go on later, in this slot or another: what is there stays
there. An answer that has begun is never stopped. So a user that took all slots while it was alone is to others, from
their first request on, as if it had only its share.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Claim:
    """A request that waits for any slot. ``deficit_s``: what its user has received less than its share."""

    user: str
    deficit_s: float


@dataclass(frozen=True, slots=True)
class Stoppable:
    """A prompt that is computed in a slot, or waits there for its turn.

    ``loss_s``: what stopping it costs: what is computed must be saved and restored, or computed again. ``left_s``:
    until its slot would be free anyway, its answer included. ``is_chosen``: it has been told to stop already.
    """

    user: str
    deficit_s: float
    loss_s: float
    left_s: float
    is_chosen: bool = False


def chosen(
    claims: Sequence[Claim],
    prompts: Sequence[Stoppable],
    n_held: Mapping[str, int],
    waits_s: Collection[float],
) -> list[int]:
    """Indices of the ``prompts`` to stop, one for each of the first ``claims``, which are in the order in which they
    are served.

    ``n_held``: slots of each user; ``waits_s``: of every slot, until it would be free anyway. Whoever gives up a slot
    has as many as the other afterwards, or more: so that no two users take the same slot from each other. One that has
    slots already takes another only from those who are owed no more than itself. No prompt is stopped for a claim that
    has its slot as soon without: the k-th claim gets the slot that is free at k-th.
    """
    n_each, left, result = dict(n_held), set(range(len(prompts))), list[int]()
    n_kept = dict(
        n_held
    )  # without what is taken here: no user takes a slot and gives up its last one for another
    for claim, idle_in_s in zip(claims, sorted(waits_s), strict=False):
        n_own = n_each.get(claim.user, 0)
        may_stop = [
            i
            for i in left
            if n_each.get(prompts[i].user, 0) >= n_own + 2
            and n_kept.get(prompts[i].user, 0) > 1
            and (n_own == 0 or prompts[i].deficit_s <= claim.deficit_s)
        ]
        if not may_stop:
            break  # whoever comes behind it in the queue does not get ahead of it
        best = min(may_stop, key=lambda i: _key(prompts[i], i))
        n_each[claim.user] = n_own + 1
        if prompts[best].loss_s < idle_in_s:
            left.remove(best)
            result.append(best)
            n_each[prompts[best].user] -= 1
            n_kept[prompts[best].user] -= 1
    return result


def _key(prompt: Stoppable, number: int) -> tuple[bool, float, float, int]:
    """Who stops first: who was told so already, who loses least by it, who would have had its slot longest, and who has
    got it last."""
    return not prompt.is_chosen, prompt.loss_s, -prompt.left_s, -number
