"""Whose turn it is when slots are short: deficit round robin over users, in estimated seconds of a slot.

What a slot is given away for is owed in equal parts to all who are here: that is their *deficit*, what they have
received less than their share. Next is the user with the largest one; among equals, who was served longest ago. So a
user with twenty requests gets a slot as often as one with a single question, and one with long prompts less often than
one with short ones. Who does not wait is owed one request's time at most: whoever works while others read does not
wait for hours of theirs afterwards.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

_AT_ONCE_S = 1e-3
# Of a deficit, and of what is owed: an estimate may be far off, and nobody pays for that for ever.
_LIMIT_S = 300.0
_HARDLY_ANYBODY = 0.02  # of one user: no slot is kept for so little


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
    to nothing (a title, a summary). ``passed_s``: for how long side requests that came later have passed it;
    ``passed_by``: of that, by those of each user."""

    user: str
    cost_s: float
    is_side: bool = False
    passed_s: float = 0.0
    passed_by: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Booked:
    """What a slot that ``user`` has got has changed of each one's deficit. ``waiting``, ``idle``: who was here."""

    user: str
    waiting: frozenset[str]
    idle: frozenset[str]
    changes_s: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Charge:
    """What a user has got ``n_slots`` for since ``at``."""

    booked: Booked
    n_slots: int
    at: float


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

    def granted(self, user: str, cost_s: float, waiting: Collection[str], idle: Collection[str]) -> Booked:
        """``user`` has got a slot for about ``cost_s``, of which all who are here have a part: ``waiting`` for a slot,
        or ``idle``, with one or none."""
        self._n_served += 1
        self._served[user] = self._n_served
        return self._book(user, cost_s, frozenset(waiting), frozenset(idle))

    def took(self, booked: Booked, seconds: float) -> None:
        """It had it for so long. What was booked for the estimate is taken back; those who are still known get their
        part of the truth."""
        known = self._deficits.keys()
        for other, change_s in booked.changes_s.items():
            if other in known:
                self._deficits[other] -= change_s
        self._book(booked.user, seconds, booked.waiting & known, booked.idle & known)

    def _book(self, user: str, seconds: float, waiting: frozenset[str], idle: frozenset[str]) -> Booked:
        others = (waiting | idle) - {user}
        changes_s = dict[str, float]()
        for other in others:
            most_s = _LIMIT_S if other in waiting else min(seconds, _LIMIT_S)
            changes_s[other] = min(seconds / (len(others) + 1), max(most_s - self.deficit_s(other), 0.0))
        changes_s[user] = -min(sum(changes_s.values()), max(_LIMIT_S + self.deficit_s(user), 0.0))
        for other, change_s in changes_s.items():
            self._deficits[other] = self.deficit_s(other) + change_s
        return Booked(user, waiting, idle, changes_s)

    def keep(self, present: Collection[str], remembered: Collection[str]) -> None:
        """Only who is ``present`` (waits, or has a slot) is owed anything; what others have had too much is remembered
        of ``remembered`` alone."""
        for user in [user for user in self._deficits if user not in present]:
            if user in remembered and self._deficits[user] < 0:
                continue
            del self._deficits[user]
            self._served.pop(user, None)


def _sides_first(asks: Sequence[Ask], order: Sequence[int], max_passed_s: float) -> list[int]:
    """Side requests go ahead of all that have not been passed for long enough, by those of one user for its equal part
    of that."""
    result: list[int] = []
    fronts = {ask.user: 0 for ask in asks if ask.is_side}  # for each user what is before it stays there
    each_s = max_passed_s / max(len({ask.user for ask in asks}), 1)
    for i in order:
        ask = asks[i]
        if ask.is_side:
            at = fronts[ask.user]
            result.insert(at, i)
            for user, front in fronts.items():
                fronts[user] = front + (front >= at)
        else:
            result.append(i)
            for user in fronts:
                is_enough = user != ask.user and ask.passed_by.get(user, 0.0) >= each_s
                if is_enough or ask.passed_s >= max_passed_s:
                    fronts[user] = len(result)
    return result


def may_take_another(
    n_held: int, n_slots: int, n_idle: int, n_users: int, pauses_s: Sequence[float], cost_s: float
) -> bool:
    """Whether a user that holds ``n_held`` of ``n_slots`` may have one of the ``n_idle`` ones for about ``cost_s``.

    ``n_users`` were here lately. Those of them who hold none and wait for none may come back at any moment, and would
    have to wait for somebody's whole answer: ``pauses_s`` is how long each of them stays away as a rule. So who has
    more than an equal share leaves as many slots alone as are likely to be asked for meanwhile, and one unless it is
    through with it so soon (a title) that hardly anybody can be back before.
    """
    if n_held == 0 or not pauses_s or (n_held + 1) * n_users <= n_slots:
        return True
    n_back = returns(pauses_s, cost_s)
    return n_back < _HARDLY_ANYBODY or n_idle > max(round(n_back), 1)


def returns(pauses_s: Iterable[float], seconds: float) -> float:
    """How many of those who have just gone, and stay away for ``pauses_s`` on average, are back after ``seconds``: as
    if each came back at any moment with equal chances."""
    return sum(-math.expm1(-seconds / pause_s) for pause_s in pauses_s)


class Pauses:
    """How long each user stays away between an answer and the next request, as a rule: a mean of logarithms, for most
    pauses of an agent are short and some are of its user, who reads."""

    UNKNOWN_S = 60.0  # one who was here once may as well not come back for long
    _GAIN = 0.3

    def __init__(self) -> None:
        self._logs: dict[str, float] = {}

    def observe(self, user: str, seconds: float) -> None:
        log_s = math.log(max(seconds, _AT_ONCE_S))
        known = self._logs.get(user, log_s)
        self._logs[user] = known + self._GAIN * (log_s - known)

    def usual_s(self, user: str) -> float:
        return math.exp(self._logs[user]) if user in self._logs else self.UNKNOWN_S

    def forget(self, user: str) -> None:
        self._logs.pop(user, None)
