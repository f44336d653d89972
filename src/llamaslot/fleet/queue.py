"""The requests that wait for a slot, their order, and the slots and limits of each user."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from msgspec import Struct, field

from llamaslot.backend.lease import Lease
from llamaslot.backend.slot_table import SlotTable
from llamaslot.errors import QueueFull, TooManyRequests
from llamaslot.fleet.prefix_sharing import PrefixWait
from llamaslot.formats.comments import Comment
from llamaslot.observe.journal import DecisionRecorder
from llamaslot.scheduling.fairness import Ask, Charge, Pauses, Shares, is_above_limit, may_take_another
from llamaslot.scheduling.plan import Wait
from llamaslot.scheduling.request import Placement, Request, User
from llamaslot.scheduling.settings import QueueLimits, SchedulingSettings

_REMEMBER_S = 60.0  # a user is forgotten after so many seconds of absence, and with it a negative deficit

_FORGET_AT_ONCE = 8  # at most so many users are forgotten at each arrival or departure

_SHORT_ANSWER = 64  # tokens: a title, a label

_LITTLE = 0.1  # a prefill of this part of a usual answer's time hardly delays other requests


class Waiting(Ask, eq=False, kw_only=True):
    """A waiting request. ``granted`` gets its lease."""

    request: Request
    granted: asyncio.Future[Lease]
    recorder: DecisionRecorder
    came_at: float
    is_back: bool = False  # it had a slot before, and comes first
    n_preempted: int = 0  # slots that it gave to other users; then it is its user's first request
    wants: str | None = None  # the snapshot that it would resume from
    prefix_wait: PrefixWait | None = None  # its time limit while another request computes its prefix
    behind: Lease | None = None  # it leaves the last idle slot to others until this lease has its turn
    wait: Wait | None = None  # the last decision; it stays valid while only new requests arrive
    n_seen: int = -1  # the dispatcher's number of changes at the last decision
    look_at: float = 0.0  # it is placed again at this time in any case
    pause_s: float | None = None  # how long its user was away before

    @property
    def n_slots(self) -> int:
        return 1 + self.request.n_children

    @property
    def had_a_place(self) -> bool:
        return self.is_back or self.n_preempted > 0

    @property
    def is_behind(self) -> bool:
        return self.behind is not None and self.behind.is_in_line

    def wants_any(self, now: float) -> bool:
        """True if the request would take any slot. False if llama-server chooses its slot, if it waits for a certain
        slot or snapshot, or for the turn of another request."""
        is_particular = self.wait is not None and self.wait.for_s is not None and now < self.look_at
        return not (
            self.granted.done()
            or self.request.placement is Placement.SERVER_CHOSEN
            or is_particular
            or self.is_behind
        )

    def passed(self, user: str, seconds: float) -> None:
        """Record that a later small request of ``user`` has got a slot for ``seconds``."""
        self.overtaken_s += seconds
        self.passed_by[user] = self.passed_by.get(user, 0.0) + seconds


class QueuePosition(Struct, frozen=True):
    """A text such as ``queued 2``, with the request's position at the time when the text is formatted. ``position``
    returns 1 for the request that is next, and 0 if it no longer waits."""

    position: Callable[[], int]

    def __str__(self) -> str:
        return Comment.QUEUED.format(position=self.position())


class _Moment(Struct):
    """The users that are present, kept for one dispatch. ``n_here``: their number. ``pauses_s``: the usual pause of
    each that has no slot and waits for none. ``answers``: by user and number of idle slots, True if the user may have
    another slot."""

    n_here: int
    pauses_s: list[float]
    answers: dict[tuple[str, int], bool] = field(default_factory=dict)


class UserLoad(Struct, frozen=True):
    """The requests of a user and its deficit against its fair share, for the status page."""

    id: str
    n_running: int
    n_waiting: int
    deficit_s: float


class Queue:
    """The waiting requests, oldest first. ``ordered`` has the order in which they are served."""

    def __init__(self, limits: QueueLimits) -> None:
        self.limits = limits
        self._waiting: list[Waiting] = []
        # The same requests by user, without those with ``is_back``.
        self._of_user: dict[str, list[Waiting]] = {}
        self._serials, self._n_ahead = itertools.count(), 0
        self.n_unpinned = 0  # waiting requests for which llama-server chooses the slot
        self._n_small = self._n_overtaken = 0
        self._shares = Shares()
        # By user, without zeros. Kept, because counting 250 waiting requests at each dispatch takes a second in all.
        self._n_waiting: Counter[str] = Counter()
        self._n_running: Counter[str] = Counter()
        # For each user the time of its last request or of the end of its last answer, oldest first.
        self._seen_at: dict[str, float] = {}
        # The users in ``_seen_at`` that were seen within ``_lately_s``, the grace time for which they were found.
        self._lately, self._lately_s = dict[str, float](), limits.return_grace_s
        self._pauses = Pauses()
        self._moment: _Moment | None = None  # until the next change

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._waiting)

    def ordered(self) -> Iterator[Waiting]:
        """Yield the waiting requests in the order in which they are served; those with ``is_back`` come first. The
        caller may remove requests from the queue once it has taken them.

        The cost grows with the number of users once, then with the number of requests taken, unless a large request
        was overtaken. So granting a slot costs the same with 10 and with 1,000 waiting requests."""
        back = [w for w in itertools.takewhile(lambda w: w.had_a_place, self._waiting) if w.is_back]
        max_overtake_s = self.limits.small_request_max_overtake_s
        if self._n_overtaken or max_overtake_s <= 0:
            yield from back + self._shares.order(self._of_user, max_overtake_s)
            return
        n_small = self._n_small - sum(waiting.is_small for waiting in back)
        in_turn = self._shares.in_turn(self._of_user) if self._of_user else iter(())
        yield from back
        overtaken = list[Waiting]()  # no large request was overtaken yet, so all small ones come first
        while n_small:
            waiting = next(in_turn)
            if waiting.is_small:
                n_small -= 1
                yield waiting
            else:
                overtaken.append(waiting)
        yield from overtaken
        yield from in_turn

    # -- arrivals and departures ---------------------------------------------------------------------------------

    def add(self, waiting: Waiting, now: float) -> None:
        user = waiting.user
        if user in self._seen_at and user not in self._n_waiting and user not in self._n_running:
            waiting.pause_s = now - self._seen_at[user]
        of_user = self._of_user.setdefault(user, []) if not waiting.is_back else []
        if waiting.had_a_place:
            self._n_ahead -= 1
            waiting.serial = self._n_ahead
            self._waiting.insert(0, waiting)
            of_user.insert(0, waiting)
        else:
            waiting.serial = next(self._serials)
            self._waiting.append(waiting)
            of_user.append(waiting)
        self._count(waiting, 1)
        self._n_waiting[user] += 1
        self._moment = None

    def _count(self, waiting: Waiting, n: int) -> None:
        self._n_small += n * waiting.is_small
        self._n_overtaken += n * (waiting.overtaken_s > 0)
        self.n_unpinned += n * (waiting.request.placement is Placement.SERVER_CHOSEN)

    def admitted(self, waiting: Waiting, now: float) -> None:
        """Record that a request was accepted, so its user is present."""
        user = waiting.user
        if waiting.pause_s is not None:
            self._pauses.observe(user, waiting.pause_s)
        self._saw(user, now)

    def remove(self, waiting: Waiting) -> None:
        user = waiting.user
        self._waiting.remove(waiting)
        if not waiting.is_back:
            self._of_user[user].remove(waiting)
            if not self._of_user[user]:
                del self._of_user[user]
        self._count(waiting, -1)
        _less(self._n_waiting, user)
        self._moment = None

    def _saw(self, user: str, now: float) -> None:
        """Record that a user was present at ``now``, and forget users that have been absent for long."""
        if not user:
            return  # llamaslot itself
        self._seen_at.pop(user, None)
        self._lately.pop(user, None)
        self._seen_at[user] = self._lately[user] = now
        for other, at in list(itertools.islice(self._seen_at.items(), _FORGET_AT_ONCE)):
            if now - at <= _REMEMBER_S:
                break
            del self._seen_at[other]
            self._lately.pop(other, None)
            if other in self._n_waiting or other in self._n_running:
                self._seen_at[other] = self._lately[other] = now
            else:
                self._pauses.forget(other)

    def make_room(self, newcomer: Waiting) -> None:
        """Raise TooManyRequests if the user of ``newcomer`` has too many waiting requests. Raise QueueFull if too many
        requests wait in all; but if another user has more waiting requests, the last one of that user is refused
        instead."""
        if newcomer.had_a_place:
            return
        user, n_waiting = newcomer.request.user, self._n_waiting
        n_max = self._max_waiting(user)
        if n_max is not None and n_waiting[user.id] > n_max:
            raise TooManyRequests(
                f"{n_max} of your requests are waiting for a slot already; try again later",
                self.limits.retry_after_s,
            )
        if len(self._waiting) <= self.limits.max_waiting:
            return
        error = QueueFull(
            f"{len(self._waiting) - 1} requests are waiting for a slot already; try again later",
            self.limits.retry_after_s,
        )
        most, n_most = n_waiting.most_common(1)[0]
        victims = [w for w in self._waiting if w.user == most and not (w.had_a_place or w.granted.done())]
        if n_most <= n_waiting[user.id] or not victims:
            raise error
        victims[-1].granted.set_exception(error)

    def _max_waiting(self, user: User) -> int | None:
        return self.limits.user_max_waiting if user.max_waiting is None else user.max_waiting

    def _max_running(self, user: User) -> int | None:
        return self.limits.user_max_running if user.max_running is None else user.max_running

    # -- slots ---------------------------------------------------------------------------------------------------

    def may_run(self, waiting: Waiting, n_slots: int, n_idle: int, now: float) -> bool:
        """True if the user of ``waiting`` may have one of the ``n_idle`` slots now, by its limits and by fairness."""
        user = waiting.request.user
        n_held = self._n_running[user.id]
        if is_above_limit(n_held, waiting.n_slots, self._max_running(user)):
            return False
        if n_held == 0 or n_idle == 0:
            return True
        here = self._who_is_here(now)
        key = (user.id, n_idle)
        if key not in here.answers:  # one answer for all requests of a user: their costs are similar
            here.answers[key] = may_take_another(
                n_held, n_slots, n_idle, here.n_here, here.pauses_s, waiting.cost_s
            )
        return here.answers[key]

    def may_run_at_once(self, user: User, now: float) -> bool:
        """True if a request of ``user`` may certainly have an idle slot; False if users must be compared first."""
        if not (n_held := self._n_running[user.id]):
            return True
        if is_above_limit(n_held, 1, self._max_running(user)):
            return False
        return not self._who_is_here(now).pauses_s

    @property
    def n_held(self) -> Mapping[str, int]:
        """The number of slots of each user that has any."""
        return self._n_running

    def deficit_s(self, user: str) -> float:
        """Return the seconds of slot time that ``user`` has received less than its share."""
        return self._shares.deficit_s(user)

    def _who_is_here(self, now: float) -> _Moment:
        if self._moment is None:
            here, present = self._here(now), self._present
            pauses_s = [self._pauses.usual_s(other) for other in here if other not in present]
            self._moment = _Moment(len(here), pauses_s)
        return self._moment

    def look_again_s(self, now: float) -> float | None:
        """Return the seconds until the next of the users seen lately is no longer expected back; None if there is
        none."""
        self._moment = None  # valid at most until such a user is no longer expected
        return_grace_s = self.limits.return_grace_s
        left = (
            at + return_grace_s - now for user, at in self._seen_at.items() if user not in self._n_running
        )
        return min((seconds for seconds in left if seconds > 0), default=None)

    @property
    def _present(self) -> set[str]:
        """The users that wait or have a slot."""
        return self._n_waiting.keys() | self._n_running.keys()

    def _here(self, now: float) -> set[str]:
        """Return the users that wait, have a slot, or are expected back."""
        return_grace_s = self.limits.return_grace_s
        if return_grace_s != self._lately_s:
            self._lately_s, self._lately = return_grace_s, dict(self._seen_at)
        # The oldest come first, so of 1,000 users usually only one is looked at.
        gone = itertools.takewhile(lambda seen: now - seen[1] >= return_grace_s, self._lately.items())
        for user, _ in list(gone):
            del self._lately[user]
        return self._present | self._lately.keys()

    def granted(self, waiting: Waiting, cost_s: float, now: float) -> Charge | None:
        """Remove a request from the queue that has got its slots, for about ``cost_s``. Returns the charge of its
        user; None for llamaslot's own work."""
        self.remove(waiting)
        user = waiting.user
        if waiting.is_small and self._n_small < len(self._waiting):
            for other in self._waiting:
                if not other.is_small and other.came_at <= waiting.came_at:
                    self._n_overtaken += other.overtaken_s <= 0 < cost_s
                    other.passed(user, cost_s)
        return self._charge(user, waiting.n_slots, cost_s, now)

    def granted_at_once(self, request: Request, cost_s: float, now: float) -> Charge | None:
        """Record that a request has got a slot without waiting, for about ``cost_s``. Returns as ``granted`` does."""
        user = request.user.id
        if user in self._seen_at and user not in self._n_waiting and user not in self._n_running:
            self._pauses.observe(user, now - self._seen_at[user])
        self._saw(user, now)
        self._moment = None
        return self._charge(user, 1, cost_s, now)

    def _charge(self, user: str, n_slots: int, cost_s: float, now: float) -> Charge | None:
        if not user:
            return None
        idle = self._here(now) - self._n_waiting.keys() - {""}
        booked = self._shares.granted(user, cost_s * n_slots, _users(self._n_waiting), idle)
        self._n_running[user] += n_slots
        return Charge(booked, n_slots, now)

    def released(self, charge: Charge, now: float) -> None:
        """End a charge, because its slots are free: replace the estimated time by the real one."""
        user = charge.booked.user
        _less(self._n_running, user, charge.n_slots)
        self._shares.took(charge.booked, (now - charge.at) * charge.n_slots)
        self._saw(user, now)
        self._moment = None
        self._shares.keep(self._here(now), self._seen_at.keys())

    def loads(self, now: float) -> list[UserLoad]:
        """Return the load of each user that was present in the last minute."""
        lately = {user for user, at in self._seen_at.items() if now - at <= _REMEMBER_S}
        return [
            UserLoad(id_, self._n_running[id_], self._n_waiting[id_], self._shares.deficit_s(id_))
            for id_ in sorted(_users(lately | self._present))
        ]

    def check(self) -> None:
        """Raise AssertionError naming the first invariant of the queue that does not hold."""
        assert all(n > 0 for n in self._n_running.values()), "no user gives back more than it had"
        counted = Counter(waiting.user for waiting in self._waiting)
        assert self._n_waiting == counted, "who waits is counted"
        n_each = self._n_small, self._n_overtaken, self.n_unpinned
        for waiting in self._waiting:
            self._count(waiting, -1)
        assert (self._n_small, self._n_overtaken, self.n_unpinned) == (0, 0, 0), (
            "requests of a kind are counted"
        )
        self._n_small, self._n_overtaken, self.n_unpinned = n_each
        assert sorted(map(id, self.ordered())) == sorted(map(id, self._waiting)), (
            "an order leaves no request out"
        )
        served = [waiting.serial for waiting in self._waiting]
        assert served == sorted(served), "serial numbers ascend"


def _less(counts: Counter[str], user: str, n: int = 1) -> None:
    counts[user] -= n
    if not counts[user]:
        del counts[user]


def _users(ids: Iterable[str]) -> set[str]:
    """Return ``ids`` without llamaslot itself, whose user is ""."""
    return {id_ for id_ in ids if id_}


def answer_s(table: SlotTable, request: Request, running_s: float = 0.0) -> float:
    """Return the seconds that the request's answer will still take on that backend, if it has been running for
    ``running_s``."""
    return table.rates.answer.seconds_left(running_s, request.max_tokens)


def estimate(
    tables: Sequence[SlotTable], request: Request, settings: SchedulingSettings
) -> tuple[float, bool]:
    """Return the seconds for which the request needs a slot, on the backend that has most of its prompt, and True if
    the request is small. It is small if its prompt is, or if its answer and its prefill are short. Without ``tables``
    the seconds are 0, because no speeds are known."""
    prefill_s = little_s = its_answer_s = 0.0
    if tables:
        table = min(tables, key=lambda table: table.missing_s(request)) if len(tables) > 1 else tables[0]
        prefill_s, its_answer_s = table.missing_s(request), answer_s(table, request)
        little_s = max(table.long_s, _LITTLE * table.rates.answer.seconds_left(0.0))
    has_small_prompt = 0 < request.n_tokens < settings.small_prompt_tokens
    is_short = request.max_tokens is not None and request.max_tokens <= _SHORT_ANSWER
    return prefill_s + its_answer_s, has_small_prompt or (is_short and prefill_s <= little_s)
