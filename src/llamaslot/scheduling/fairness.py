"""Decides which user is served next when slots are short, and how many slots a user may have at a time. The order is a
deficit round robin over users, in estimated seconds of a slot.

When a request gets a slot, equal parts of its time are owed to all other users that are present. A user's *deficit* is
the number of seconds that it has received less than its share. The user with the largest deficit is next; among
equals, the user that got its last slot longest ago. So a user with twenty requests gets a slot as often as a user with
one, and a user with long prompts less often than a user with short ones. A user that waits for nothing is owed the
time of one request at most, so that it cannot claim hours after a pause.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from msgspec import Struct, field

_AT_ONCE_S = 1e-3
# No deficit is above this or below its negative. An estimate may be wrong, and its effect must end.
_LIMIT_S = 300.0
# No slot is left free for returning users if all of them together are expected to wait less than this.
_HARDLY_A_WAIT_S = 0.15


class Ask(Struct, eq=False):
    """A waiting request of ``user``. ``cost_s``: the estimated seconds of a slot that it needs. ``is_small``: it needs
    next to no computing (a title, a summary). ``overtaken_s``: the slot time of later small requests that have
    overtaken it. ``passed_by``: the part of this that each user's small requests took. ``serial``: ascends in the order
    in which requests would be served if all users were one user.
    """

    user: str
    cost_s: float
    is_small: bool = False
    overtaken_s: float = 0.0
    passed_by: dict[str, float] = field(default_factory=dict)
    serial: int = 0


A = TypeVar("A", bound=Ask)


class Booked(Struct, frozen=True):
    """How deficits changed when ``user`` was granted a slot: by ``own_s`` for ``user``, and by ``changes_s`` for each
    of ``others``. The first ``n_waiting`` of ``others`` waited for a slot.

    There is one such object for each running request. A set and a dictionary in place of the tuple and the array took
    80 kB with 1,000 users.
    """

    user: str
    others: tuple[str, ...]
    n_waiting: int
    changes_s: array[float]
    own_s: float


class Charge(Struct, frozen=True):
    """The account of a running request: its user has had ``n_slots`` slots for it since ``at``."""

    booked: Booked
    n_slots: int
    at: float


class Shares:
    """The deficit of each user: by how many seconds of a slot it has received less than its share. The deficit of an
    unknown user is 0.
    """

    def __init__(self) -> None:
        self._deficits: dict[str, float] = {}
        self._served: dict[str, int] = {}  # serial number of its last slot
        self._n_served = 0

    def deficit_s(self, user: str) -> float:
        return self._deficits.get(user, 0.0)

    def in_turn(self, queues: Mapping[str, Sequence[A]]) -> Iterator[A]:
        """Yield the waiting requests in the order in which users are served. Small requests have no priority here.

        ``queues`` has the requests of each user, oldest first. The cost grows with the number of users once, then with
        the number of requests that the caller takes from the iterator. The caller may remove requests from their queue
        once it has taken them.
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
        ahead = dict[str, A]()  # by user with an earlier request in this order: its next request
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

    def order(self, queues: Mapping[str, Sequence[A]], max_overtake_s: float) -> list[A]:
        """Return the waiting requests in the order in which they are served: as ``in_turn``, but small requests are
        moved ahead of other requests. They move ahead of a request until it has been overtaken for ``max_overtake_s``
        in total. The small requests of one other user may use only an equal part of this time.
        """
        result: list[A] = []
        # By user: where its next small request goes.
        fronts = {ask.user: 0 for queue in queues.values() for ask in queue if ask.is_small}
        each_s = max_overtake_s / max(len(queues), 1)
        for ask in self.in_turn(queues):
            if ask.is_small:
                at = fronts[ask.user]
                result.insert(at, ask)
                for user, front in fronts.items():
                    fronts[user] = front + (front >= at)
            else:
                result.append(ask)
                for user in fronts:
                    is_enough = user != ask.user and ask.passed_by.get(user, 0.0) >= each_s
                    if is_enough or ask.overtaken_s >= max_overtake_s:
                        fronts[user] = len(result)
        return result

    def granted(self, user: str, cost_s: float, waiting: Collection[str], idle: Collection[str]) -> Booked:
        """Book a slot for ``user``, for about ``cost_s`` seconds. Equal parts of the time are owed to the other users
        in ``waiting`` (they wait for a slot) and in ``idle`` (they are present, but do not wait). Pass the result to
        ``took`` at the end.
        """
        self._n_served += 1
        self._served[user] = self._n_served
        first = tuple(set(waiting).difference((user,)))
        others = (*first, *set(idle).difference(waiting, (user,)))
        return Booked(user, others, len(first), *self._book(user, cost_s, others, len(first)))

    def took(self, booked: Booked, seconds: float) -> None:
        """Replace the estimated seconds in ``booked`` by the actual ``seconds``. Users that were forgotten meanwhile
        are skipped.
        """
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
        """Change the deficits for ``seconds`` of a slot that ``user`` has used. Returns the changes of ``others``, and
        the change of ``user``. The first ``n_waiting`` of ``others`` wait for a slot. A plain loop, because with 1,000
        users each call took 2 ms, and each request makes two.
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
        """Forget all users that are not in ``present`` (they wait or have a slot). Of a user in ``remembered`` a
        negative deficit is kept.
        """
        for user in self._deficits.keys() - present:
            if user in remembered and self._deficits[user] < 0:
                continue
            del self._deficits[user]
            self._served.pop(user, None)


def is_above_limit(n_held: int, n_more: int, max_running: int | None) -> bool:
    """True if a user that has ``n_held`` slots may not have ``n_more``, because of its limit of parallel requests:
    ``max_running`` slots (``queue.user_max_running``, or the limit of its API key); None is no limit. A user without a
    slot may always have ``n_more``: otherwise a request with a higher ``n`` than the limit would wait for ever.
    """
    return max_running is not None and n_held > 0 and n_held + n_more > max_running


def may_take_another(
    n_held: int, n_slots: int, n_idle: int, n_users: int, pauses_s: Sequence[float], cost_s: float
) -> bool:
    """True if a user that has ``n_held`` of ``n_slots`` slots may take one of the ``n_idle`` slots for about
    ``cost_s``.

    ``n_users`` users were present lately. ``pauses_s`` has the mean pause of each other user that neither has a slot
    nor waits: it may return at any moment, and would then wait for a whole answer. So a user above its equal share
    leaves idle as many slots as returning users are expected to need within ``cost_s``, and at least one. It need not
    if the expected wait of all returning users together is below ``_HARDLY_A_WAIT_S``. The price: beside four users
    who were back every two seconds, eight requests of 0.2 s took 1.3 to 1.5 times as long in three of four slots.
    """
    if n_held == 0 or not pauses_s or (n_held + 1) * n_users <= n_slots:
        return True
    n_back = returns(pauses_s, cost_s)
    return n_back * cost_s < _HARDLY_A_WAIT_S or n_idle > max(round(n_back), 1)


def returns(pauses_s: Iterable[float], seconds: float) -> float:
    """Return the expected number of users that come back within ``seconds``. Each has just left, and comes back with a
    constant probability per second. ``pauses_s`` has the mean pause of each.
    """
    return sum(-math.expm1(-seconds / pause_s) for pause_s in pauses_s)


class Pauses:
    """The usual pause of each user between an answer and its next request. It is a mean of logarithms, because most
    pauses of an agent are short and a few are those of a human reader.
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
