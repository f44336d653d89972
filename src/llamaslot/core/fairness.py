"""Whose turn it is when slots are short: deficit round robin over users, in estimated seconds of a slot.

What a slot is given away for is owed in equal parts to all who are here: that is their *deficit*, what they have
received less than their share. Next is the user with the largest one; among equals, who was served longest ago. So a
user with twenty requests gets a slot as often as one with a single question, one with long prompts less often than one
with short ones, and what a user takes while nobody else waits costs nothing later.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

_AT_ONCE_S = 1e-3
_LIMIT_S = (
    300.0  # of a deficit, and of what is owed: an estimate may be far off, and nobody pays for that for ever
)


@dataclass(frozen=True, slots=True)
class Fairness:
    """The settings; see ``queue`` in the configuration. ``None`` is no limit.

    ``max_running``, ``max_waiting``: of one user, unless the key says otherwise. ``max_passed_s``: for how long side
    requests may pass somebody who has come before them. ``spare_s``: how long after its last request a user is expected
    back, so that others leave a slot alone.
    """

    max_running: int | None = None
    max_waiting: int | None = None
    max_passed_s: float = 10.0
    spare_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Ask:
    """A request that waits. ``cost_s``: how long it will have a slot, as far as can be told. ``is_side``: it needs next
    to nothing (a title, a summary). ``passed_s``: for how long side requests that came later have passed it."""

    user: str
    cost_s: float
    is_side: bool = False
    passed_s: float = 0.0


class Shares:
    """What each user has received less than its share, in seconds of a slot: nothing, for one that is not known."""

    def __init__(self) -> None:
        self._deficits: dict[str, float] = {}
        self._served: dict[str, int] = {}  # the serial number of the last slot that it got
        self._n_served = 0

    def deficit_s(self, user: str) -> float:
        return self._deficits.get(user, 0.0)

    def order(self, asks: Sequence[Ask], max_passed_s: float) -> list[int]:
        """Positions in ``asks`` (first come first) in the order in which they are next."""
        is_one = len({ask.user for ask in asks}) <= 1
        fair = list(range(len(asks))) if is_one else self._fair(asks)
        return _sides_first(asks, fair, max_passed_s)

    def _fair(self, asks: Sequence[Ask]) -> list[int]:
        """As if each got its slot in turn."""
        queues: dict[str, deque[int]] = {}
        for i, ask in enumerate(asks):
            queues.setdefault(ask.user, deque()).append(i)
        heads = [
            (-self.deficit_s(user), self._served.get(user, -1), queue[0], user)
            for user, queue in queues.items()
        ]
        heapq.heapify(heads)
        order, n_served = list[int](), self._n_served
        while heads:
            received_s, _, i, user = heads[0]
            order.append(queues[user].popleft())
            n_served += 1
            if queues[user]:
                after = (received_s + asks[i].cost_s, n_served, queues[user][0], user)
                heapq.heapreplace(heads, after)
            else:
                heapq.heappop(heads)
        return order

    def granted(self, user: str, cost_s: float, sharing: Collection[str]) -> None:
        """``user`` has got a slot for about ``cost_s``, of which all of ``sharing``, itself among them, have a part."""
        self._charge(user, cost_s, sharing)
        self._n_served += 1
        self._served[user] = self._n_served

    def took(self, user: str, more_s: float, sharing: Collection[str]) -> None:
        """It had it for so much longer than was estimated (or shorter, if negative); those who are still known get
        their part."""
        self._charge(user, more_s, [other for other in sharing if other in self._deficits])

    def _charge(self, user: str, seconds: float, sharing: Collection[str]) -> None:
        for other in sharing:
            self._add(other, seconds / len(sharing))
        if user in sharing:
            self._add(user, -seconds)

    def _add(self, user: str, seconds: float) -> None:
        self._deficits[user] = min(max(self.deficit_s(user) + seconds, -_LIMIT_S), _LIMIT_S)

    def keep(self, present: Collection[str], remembered: Collection[str]) -> None:
        """Only who is ``present`` (waits, or has a slot) is owed anything; what others have had too much is remembered
        of ``remembered`` alone."""
        for user in [user for user in self._deficits if user not in present]:
            if user in remembered and self._deficits[user] < 0:
                continue
            del self._deficits[user]
            self._served.pop(user, None)


def _sides_first(asks: Sequence[Ask], order: Sequence[int], max_passed_s: float) -> list[int]:
    """Side requests go ahead of all that have not been passed for long enough."""
    result: list[int] = []
    front = 0  # what is before it stays there
    for i in order:
        if asks[i].is_side:
            result.insert(front, i)
            front += 1
        else:
            result.append(i)
            if asks[i].passed_s >= max_passed_s:
                front = len(result)
    return result


def may_take_another(
    n_held: int, n_slots: int, n_idle: int, n_users: int, pauses_s: Sequence[float], cost_s: float
) -> bool:
    """Whether a user that holds ``n_held`` of ``n_slots`` may have one of the ``n_idle`` ones for about ``cost_s``.

    ``n_users`` were here lately. Those of them who hold none and wait for none may come back at any moment, and would
    have to wait for somebody's whole answer: ``pauses_s`` is how long each of them stays away as a rule. So who has
    more than an equal share leaves as many slots alone as are likely to be asked for meanwhile, and one in any case.
    """
    if n_held == 0 or not pauses_s or (n_held + 1) * n_users <= n_slots:
        return True
    return n_idle > max(round(returns(pauses_s, cost_s)), 1)


def returns(pauses_s: Iterable[float], seconds: float) -> float:
    """How many of those who have just gone, and stay away for ``pauses_s`` on average, are back after ``seconds``: as
    if each came back at any moment with equal chances."""
    return sum(-math.expm1(-seconds / max(pause_s, _AT_ONCE_S)) for pause_s in pauses_s)


class Pauses:
    """How long each user stays away between an answer and the next request, as a rule.

    ``longest_s``: a longer pause counts as that (after it nobody is expected back), and so does one that is not known.
    """

    _GAIN = 0.3

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._means: dict[str, float] = {}

    def observe(self, user: str, seconds: float) -> None:
        mean_s = self.mean_s(user)
        self._means[user] = mean_s + self._GAIN * (min(seconds, self._longest_s) - mean_s)

    def mean_s(self, user: str) -> float:
        return self._means.get(user, self._longest_s)

    def forget(self, user: str) -> None:
        self._means.pop(user, None)
