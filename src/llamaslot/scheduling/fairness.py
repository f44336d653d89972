"""Which user is served next when slots are short: deficit round robin over users, in estimated seconds of a slot.

When a slot is granted, its time is owed in equal parts to all users that are present. A user's *deficit* is what it
has received less than its share. The user with the largest deficit is next; among equals, the one served longest ago.
So a user with twenty requests gets a slot as often as one with a single question, and one with long prompts less
often than one with short ones. A user that does not wait is owed one request's time at most, so it cannot claim hours
after a pause.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

from msgspec import Struct, field

_AT_ONCE_S = 1e-3
# The limit of a deficit, and of what is owed: an estimate may be wrong, and its effect must end.
_LIMIT_S = 300.0
# Seconds that the users who return are expected to wait, all together; below it no slot is left free for them.
_HARDLY_A_WAIT_S = 0.15


class Fairness(Struct, frozen=True):
    """The settings; see ``queue`` in the configuration. ``None`` is no limit.

    ``max_running``, ``max_waiting``: per user, unless its key sets others. ``max_overtake_s``: for how long side
    requests may overtake a request that came before them. ``return_grace_s``: how long after its last request a user is
    expected back, so that other users leave a slot free.
    """

    max_running: int | None = None
    max_waiting: int | None = None
    max_overtake_s: float = 10.0
    return_grace_s: float = 10.0


class Ask(Struct, frozen=True):
    """A waiting request. ``cost_s``: estimated seconds in a slot. ``is_small``: it needs very little (a title, a
    summary). ``overtaken_s``: for how long later small requests have overtaken it; ``passed_by``: the same for each
    user of such requests.
    """

    user: str
    cost_s: float
    is_small: bool = False
    overtaken_s: float = 0.0
    passed_by: Mapping[str, float] = field(default_factory=dict)


class Asking(Protocol):
    """A request waiting in the queue of its user. ``serial`` ascends in the order in which requests would be served
    if all users were one.
    """

    serial: int
    cost_s: float


class _Numbered(Struct):
    """An ``Asking`` whose ``serial`` is its index in a list."""

    serial: int
    cost_s: float


A = TypeVar("A", bound=Asking)


class Booked(Struct, frozen=True):
    """The changes of deficits made when ``user`` was granted a slot: ``own_s`` of the user, and ``changes_s`` of
    each of ``others``, of whom the first ``n_waiting`` waited.

    Each running request has one; sets and dictionaries instead of tuple and array took 80 kB with 1,000 users.
    """

    user: str
    others: tuple[str, ...]
    n_waiting: int
    changes_s: array[float]
    own_s: float


class Charge(Struct, frozen=True):
    """A running request's account: since ``at`` its user has held ``n_slots`` slots for it."""

    booked: Booked
    n_slots: int
    at: float


class Shares:
    """The deficit of each user: what it has received less than its share, in seconds of a slot; 0 for
    an unknown user.
    """

    def __init__(self) -> None:
        self._deficits: dict[str, float] = {}
        self._served: dict[str, int] = {}  # serial number of its last slot
        self._n_served = 0

    def deficit_s(self, user: str) -> float:
        return self._deficits.get(user, 0.0)

    def in_turn(self, queues: Mapping[str, Sequence[A]]) -> Iterator[A]:
        """The waiting requests in the order in which they are served, without priority for small requests.

        ``queues``: by user, each oldest first. The cost grows with the number of users, then only with the number
        of requests that are taken from the iterator. Requests already taken may leave their queue meanwhile.
        """
        if len(queues) == 1:
            yield from [*next(iter(queues.values()))]
            return
        heads = [
            (-self.deficit_s(user), self._served.get(user, -1), queue[0].serial, user)
            for user, queue in queues.items()
        ]
        heapq.heapify(heads)
        rest, n_served = dict[str, Iterator[A]](), self._n_served
        ahead = dict[str, A]()  # the first of each user that had one before
        while heads:
            received_s, _, _, user = heads[0]
            if user not in rest:
                rest[user] = iter([*queues[user]])
                ahead[user] = next(rest[user])
            request = ahead[user]
            n_served += 1
            if (behind := next(rest[user], None)) is None:
                heapq.heappop(heads)
            else:
                ahead[user] = behind
                heapq.heapreplace(heads, (received_s + request.cost_s, n_served, behind.serial, user))
            yield request

    def order(self, asks: Sequence[Ask], max_overtake_s: float) -> list[int]:
        """Indices of ``asks`` (oldest first) in the order in which they are served."""
        queues: dict[str, list[_Numbered]] = {}
        for i, ask in enumerate(asks):
            queues.setdefault(ask.user, []).append(_Numbered(i, ask.cost_s))
        fair = [one.serial for one in self.in_turn(queues)]
        return _sides_first(asks, fair, max_overtake_s)

    def granted(self, user: str, cost_s: float, waiting: Collection[str], idle: Collection[str]) -> Booked:
        """Book a slot of about ``cost_s`` for ``user``. The time is owed to all users that are present: those
        ``waiting`` for a slot, and those ``idle`` with one slot or none.
        """
        self._n_served += 1
        self._served[user] = self._n_served
        first = tuple(set(waiting).difference((user,)))
        others = (*first, *set(idle).difference(waiting, (user,)))
        return Booked(user, others, len(first), *self._book(user, cost_s, others, len(first)))

    def took(self, booked: Booked, seconds: float) -> None:
        """Replace the estimate in ``booked`` by the actual ``seconds``, for the users that are still known."""
        deficits, n_waiting, known = self._deficits, 0, list[str]()
        for n, (other, change_s) in enumerate(zip(booked.others, booked.changes_s, strict=True)):
            if other in deficits:
                deficits[other] -= change_s
                known.append(other)
                n_waiting += n < booked.n_waiting
        if booked.user in deficits:
            deficits[booked.user] -= booked.own_s
        self._book(booked.user, seconds, known, n_waiting)

    def _book(
        self, user: str, seconds: float, others: Sequence[str], n_waiting: int
    ) -> tuple[array[float], float]:
        """Apply the changes of deficits for a slot used by ``user`` for ``seconds``, and return them: those of
        ``others``, and that of ``user``. A plain loop, as it runs twice for each request: with 1,000 users each
        call took 2 ms.
        """
        deficits, changes_s = self._deficits, array("d")
        if not others:
            deficits.setdefault(user, 0.0)
            return changes_s, 0.0
        each_s, known_s, add = seconds / (len(others) + 1), deficits.get, changes_s.append
        parts = (_LIMIT_S, others[:n_waiting]), (min(seconds, _LIMIT_S), others[n_waiting:])
        for most_s, part in parts:
            for other in part:
                deficit_s = known_s(other, 0.0)
                room_s = most_s - deficit_s
                change_s = each_s if each_s < room_s else room_s if room_s > 0.0 else 0.0
                add(change_s)
                deficits[other] = deficit_s + change_s
        had_s = known_s(user, 0.0)
        own_s = -min(sum(changes_s), max(_LIMIT_S + had_s, 0.0))
        deficits[user] = had_s + own_s
        return changes_s, own_s

    def keep(self, present: Collection[str], remembered: Collection[str]) -> None:
        """Forget all users that are not ``present`` (waiting, or with a slot), except for the negative deficit of a
        user in ``remembered``.
        """
        for user in self._deficits.keys() - present:
            if user in remembered and self._deficits[user] < 0:
                continue
            del self._deficits[user]
            self._served.pop(user, None)


def _sides_first(asks: Sequence[Ask], order: Sequence[int], max_overtake_s: float) -> list[int]:
    """``order`` with small requests moved ahead of requests that have not been overtaken for too long yet. The
    small requests of one user may use an equal part of that time.
    """
    result: list[int] = []
    fronts = {ask.user: 0 for ask in asks if ask.is_small}  # by user: where its next small request goes
    each_s = max_overtake_s / max(len({ask.user for ask in asks}), 1)
    for i in order:
        ask = asks[i]
        if ask.is_small:
            at = fronts[ask.user]
            result.insert(at, i)
            for user, front in fronts.items():
                fronts[user] = front + (front >= at)
        else:
            result.append(i)
            for user in fronts:
                is_enough = user != ask.user and ask.passed_by.get(user, 0.0) >= each_s
                if is_enough or ask.overtaken_s >= max_overtake_s:
                    fronts[user] = len(result)
    return result


def may_take_another(
    n_held: int, n_slots: int, n_idle: int, n_users: int, pauses_s: Sequence[float], cost_s: float
) -> bool:
    """Whether a user with ``n_held`` of ``n_slots`` may take one of the ``n_idle`` slots for about ``cost_s``.

    ``n_users`` were present lately. Those without a slot and without a waiting request may return at any moment, and
    would have to wait for a whole answer; ``pauses_s`` has the usual pause of each. So a user with more than an equal
    share leaves as many slots free as are likely to be needed in ``cost_s``. It leaves at least one, unless the wait
    that a return before its end would cause is hardly noticed, or a return is that unlikely. Eight requests of 0.2 s
    took 1.3 to 1.5 times as long in three of four slots, beside four users who were back every two seconds.
    """
    if n_held == 0 or not pauses_s or (n_held + 1) * n_users <= n_slots:
        return True
    n_back = returns(pauses_s, cost_s)
    return n_back * cost_s < _HARDLY_A_WAIT_S or n_idle > max(round(n_back), 1)


def returns(pauses_s: Iterable[float], seconds: float) -> float:
    """The expected number of users that return within ``seconds``, if each has just left and its mean pause is in
    ``pauses_s`` (a constant probability per second).
    """
    return sum(-math.expm1(-seconds / pause_s) for pause_s in pauses_s)


class Pauses:
    """The usual pause of each user between an answer and its next request: a mean of logarithms, because most pauses
    of an agent are short and some are those of a human reader.
    """

    UNKNOWN_S = 60.0  # a user seen once may stay away for long
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
