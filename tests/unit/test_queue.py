"""Users in the queue: in turn, within their limits, and without one that pushes all others out."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.virtual import VirtualLoop
from llamaslot.errors import QueueFull, TooManyRequests
from llamaslot.fleet.queue import Queue
from llamaslot.fleet.registry import Registry
from llamaslot.scheduling.fairness import Charge
from llamaslot.scheduling.request import SYSTEM_USER, Placement, Request, User
from llamaslot.scheduling.settings import QueueLimits, SchedulingSettings
from tests.support.house import House, outcome, tokens_of
from tests.support.inprocess import with_one_backend
from tests.support.stub import StubServer

GREEDY, ANNA, BERT = User("key:greedy"), User("key:anna"), User("key:bert")
N_SLOTS = 4


class Desk:
    """Leases, taken and given back by hand: whose are they, and whose is the next?"""

    def __init__(self, **more: Any) -> None:
        limits = QueueLimits(**{"max_waiting": 8, "return_grace_s": 0.0, **more})
        scheduling = SchedulingSettings(small_prompt_tokens=100)
        self.house = House(VirtualLoop(), StubServer(N_SLOTS), limits=limits, settings=scheduling)
        self.held: dict[asyncio.Task[None], tuple[str, asyncio.Event]] = {}
        self.order: list[str] = []
        self._n = 0

    def come(self, user: User, n: int = 1, *, n_tokens: int = 200, **more: Any) -> list[asyncio.Task[None]]:
        """Requests of ``user``, each of which keeps its slot until it is told to go."""
        tasks = []
        for _ in range(n):
            self._n += 1
            job = Request(f"{user.id} {self._n}", tokens_of(10_000 * self._n, n_tokens), user=user, **more)
            tasks.append(self.house.start(self._hold(job), job.id))
            self.house.loop.settle()
        return tasks

    async def _hold(self, job: Request) -> None:
        with await self.house.dispatcher.lease(job):
            go, task = asyncio.Event(), asyncio.current_task()
            assert task is not None
            self.order.append(job.user.id)
            self.held[task] = job.user.id, go
            await go.wait()
            del self.held[task]

    def end(self, user: User, n: int = 1) -> None:
        """Its ``n`` oldest slots are given back."""
        for _ in range(n):
            next(go for whose, go in self.held.values() if whose == user.id and not go.is_set()).set()
            self.house.loop.settle()

    def deficits(self) -> dict[str, float]:
        return {one.id: one.deficit_s for one in self.house.dispatcher.queue.loads(self.house.loop.time())}

    def holds(self, user: User) -> int:
        return sum(whose == user.id for whose, _ in self.held.values())

    def close(self) -> None:
        while self.held:
            for _, go in list(self.held.values()):
                go.set()
            self.house.loop.settle()
        self.house.check_nothing_is_left()
        assert self.house.dispatcher.queue._n_running == {}
        self.house.close()


@pytest.fixture
def desk(request: pytest.FixtureRequest) -> Iterator[Desk]:
    desk = Desk(**getattr(request, "param", {}))
    yield desk
    desk.close()


def with_(**limits: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("desk", [limits], indirect=True)


def test_a_single_question_does_not_wait_for_all_that_another_user_has_asked_before(desk: Desk) -> None:
    """It gets the next slot that becomes free."""
    desk.come(GREEDY, 8)
    desk.come(ANNA)
    assert (desk.holds(GREEDY), desk.holds(ANNA)) == (4, 0)
    desk.end(GREEDY)
    assert (desk.holds(GREEDY), desk.holds(ANNA)) == (3, 1)


def test_a_small_request_goes_first(desk: Desk) -> None:
    """A title, between the long ones of the same user."""
    desk.come(GREEDY, 6)
    (title,) = desk.come(GREEDY, n_tokens=60)
    desk.end(GREEDY)
    assert title in desk.held


@pytest.mark.parametrize(("n_tokens", "is_first"), [(300, True), (6000, False)])
def test_so_does_who_wants_a_short_answer_to_what_is_there_already(
    desk: Desk, n_tokens: int, is_first: bool
) -> None:
    """A summary of a long conversation; but not one that has to be computed first."""
    desk.come(GREEDY, 6)
    (summary,) = desk.come(GREEDY, n_tokens=n_tokens, max_tokens=20)
    desk.end(GREEDY)
    assert (summary in desk.held) is is_first


@with_(small_request_max_overtake_s=0.0)
def test_no_request_is_overtaken_where_that_is_switched_off(desk: Desk) -> None:
    """They come in their order."""
    desk.come(GREEDY, 6)
    (title,) = desk.come(GREEDY, n_tokens=60)
    desk.end(GREEDY)
    assert title not in desk.held


def test_small_requests_do_not_pass_for_ever(desk: Desk) -> None:
    """After ten seconds of slots that others got before it, whoever waits is next."""
    desk.come(GREEDY, 4)
    (patient,) = desk.come(ANNA)
    n_passed = 0
    while patient not in desk.held:
        n_before = len(desk.order)
        desk.come(BERT, n_tokens=60)
        task = next(iter(desk.held))
        desk.held[task][1].set()
        desk.house.loop.settle()
        assert len(desk.order) == n_before + 1
        n_passed += patient not in desk.held
        assert n_passed < 50
    assert n_passed >= 1


@with_(user_max_running=2)
def test_a_user_at_its_limit_waits_though_slots_are_idle(desk: Desk) -> None:
    """And others do not wait behind it; a key's own limit counts more."""
    desk.come(GREEDY, 4)
    assert desk.holds(GREEDY) == 2
    desk.come(User("key:more", max_running=3), 1)
    desk.come(ANNA)
    assert desk.holds(ANNA) == 1
    desk.end(GREEDY)
    assert desk.holds(GREEDY) == 2
    one_at_a_time = User("key:one", max_running=1)
    desk.end(ANNA)
    desk.come(one_at_a_time, 2)
    assert desk.holds(one_at_a_time) == 1


@pytest.mark.parametrize("desk", [{}, {"user_max_running": 2, "user_max_waiting": 2}], indirect=True)
def test_what_a_key_says_counts_more_than_the_configuration(desk: Desk) -> None:
    """Of how many may run, and of how many may wait."""
    own = User("key:own", max_running=3, max_waiting=1)
    *_, waits = desk.come(own, 4)
    assert desk.holds(own) == 3
    (late,) = desk.come(own)
    assert isinstance(outcome(late), TooManyRequests)
    assert not waits.done()


@with_(user_max_waiting=2)
def test_a_user_with_too_many_waiting_is_told_so(desk: Desk) -> None:
    """429, with a time to come again; another user still may wait."""
    desk.come(GREEDY, 6)
    (late,) = desk.come(GREEDY)
    error = outcome(late)
    assert isinstance(error, TooManyRequests)
    assert (error.status, error.type) == (429, "rate_limit_error")
    assert error.retry_after_s
    assert not desk.come(ANNA)[0].done()


def test_of_a_full_queue_the_one_who_has_most_in_it_loses_the_last(desk: Desk) -> None:
    """And not the one who has just come with his first; when all have as many, the newcomer is sent away."""
    greedy = desk.come(GREEDY, N_SLOTS + 8)
    (anna,) = desk.come(ANNA)
    assert isinstance(outcome(greedy[-1]), QueueFull)
    assert not anna.done()
    (more,) = desk.come(GREEDY)
    assert isinstance(outcome(more), QueueFull)
    assert not any(task.done() for task in greedy[:-1])


@with_(return_grace_s=10.0)
def test_one_slot_is_left_to_a_user_who_was_here_a_moment_ago(desk: Desk) -> None:
    """Until he is not expected back any more."""
    desk.come(ANNA)
    desk.end(ANNA)
    desk.come(GREEDY, 6)
    assert desk.holds(GREEDY) == 3
    desk.come(ANNA)
    assert desk.holds(ANNA) == 1
    desk.end(ANNA)
    assert desk.holds(GREEDY) == 3
    desk.house.loop.pass_time(10.1)
    desk.house.loop.settle()
    assert desk.holds(GREEDY) == 4


@with_(return_grace_s=10.0)
def test_slots_are_left_to_all_who_always_come_back_at_once(desk: Desk) -> None:
    """As many as are likely to be asked for before the answer of whoever has one already is through."""
    for _ in range(20):
        for user in (ANNA, BERT):
            desk.come(user)
            desk.house.loop.pass_time(0.1)
            desk.end(user)
    desk.come(GREEDY, 6)
    assert desk.holds(GREEDY) == 2
    desk.house.loop.pass_time(10.1)
    desk.house.loop.settle()
    assert desk.holds(GREEDY) == 4


def test_what_a_slot_was_given_away_for_is_what_it_took(desk: Desk) -> None:
    """Whatever was estimated; and who has gone is owed nothing any more, but owes."""
    desk.come(ANNA)
    desk.come(GREEDY)
    desk.house.loop.pass_time(100.0)
    desk.end(GREEDY)
    assert desk.deficits() == pytest.approx({"key:greedy": -50.0, "key:anna": 50.0})
    desk.end(ANNA)
    assert desk.deficits() == pytest.approx({"key:greedy": -50.0, "key:anna": 0.0})


@with_(return_grace_s=10.0)
def test_who_is_expected_back_has_a_share_too(desk: Desk) -> None:
    """He waits for nothing only because he is just reading an answer."""
    desk.come(ANNA)
    desk.end(ANNA)
    desk.come(GREEDY)
    desk.house.loop.pass_time(5.0)
    desk.end(GREEDY)
    assert desk.deficits() == pytest.approx({"key:greedy": -2.5, "key:anna": 2.5})


@with_(user_max_running=3)
def test_each_of_several_answers_takes_a_slot(desk: Desk) -> None:
    """Of the limit of its user: after two and one, two more have to wait."""
    desk.come(GREEDY, n_children=1)
    desk.come(GREEDY, n_children=1)
    desk.come(GREEDY)
    assert desk.holds(GREEDY) == 2


def test_each_of_several_answers_is_paid_for(desk: Desk) -> None:
    """Two slots for twenty seconds, shared by two."""
    desk.come(ANNA)
    desk.come(GREEDY, n_children=1)
    desk.house.loop.pass_time(20.0)
    desk.end(GREEDY)
    assert desk.deficits()["key:greedy"] == pytest.approx(-20.0)


@with_(user_max_running=1)
def test_a_user_at_its_limit_gets_no_turn_either(desk: Desk) -> None:
    """Also while no slot is idle, when a turn would need none of its own."""
    desk.come(GREEDY)
    desk.come(ANNA), desk.come(BERT), desk.come(User("key:carl"))
    (turn,) = desk.come(GREEDY, placement=Placement.SERVER_CHOSEN)
    assert turn not in desk.held
    desk.end(GREEDY)
    assert turn in desk.held


@with_(user_max_running=1)
def test_who_leaves_keeps_the_slot_until_it_is_idle(desk: Desk) -> None:
    """It computes for him; afterwards his next request has its turn."""
    house = desk.house
    leaver = house.start(house.ask(Request("leaves", tokens_of(5000, 200), user=GREEDY)), "leaves")
    house.loop.settle()
    leaver.cancel()
    house.loop.settle()
    assert house.dispatcher.queue._n_running["key:greedy"] == 1
    (again,) = desk.come(GREEDY)
    assert again not in desk.held
    house.loop.pass_time(30.0)
    house.loop.settle()
    assert again in desk.held


@with_(return_grace_s=10.0)
def test_who_was_here_once_is_hardly_expected_back(desk: Desk) -> None:
    """Eight users with a question each, then somebody with an agent: one slot is left alone, not all."""
    for n in range(8):
        desk.come(User(f"key:{n}"))
        desk.end(User(f"key:{n}"))
    desk.come(GREEDY, 6)
    assert desk.holds(GREEDY) == 3


@with_(return_grace_s=10.0)
def test_llamaslot_itself_is_no_user(desk: Desk) -> None:
    """No slot is left to it, and nobody owes it anything."""
    desk.come(SYSTEM_USER)
    desk.end(SYSTEM_USER)
    desk.come(GREEDY, 6)
    assert desk.holds(GREEDY) == 4
    assert set(desk.deficits()) == {"key:greedy"}


def test_a_request_refused_at_once_disturbs_no_other(desk: Desk) -> None:
    """Nobody's place is thought over again for it, and it was not here."""
    desk.come(GREEDY, N_SLOTS)
    for n in range(8):
        desk.come(User(f"key:{n}"))
    n_changes = desk.house.dispatcher._n_changes
    for n in range(20):
        (late,) = desk.come(User(f"key:late{n}"))
        assert isinstance(outcome(late), QueueFull)
    assert desk.house.dispatcher._n_changes == n_changes
    assert not [user for user in desk.deficits() if "late" in user]


def test_users_are_forgotten(desk: Desk) -> None:
    """After a minute, also while nobody comes; and few are looked at each time."""
    for n in range(30):
        desk.come(User(f"key:{n}"))
        desk.end(User(f"key:{n}"))
    assert len(desk.deficits()) == 30
    desk.house.loop.pass_time(61.0)
    assert desk.deficits() == {}
    for _ in range(4):
        desk.come(ANNA)
        desk.end(ANNA)
    assert desk.house.dispatcher.queue._seen_at.keys() == {"key:anna"}


def test_each_limit_of_the_configuration_is_in_its_place(tmp_path: Path) -> None:
    """Numbers that are all different."""
    queue = {"max_waiting": 1, "max_wait_s": 2, "user_max_waiting": 3, "user_max_running": 4}
    settings = {"queue": {**queue, "small_request_max_overtake_s": 5, "return_grace_s": 6}}
    url = "http://127.0.0.1:9"
    registry = Registry.of(with_one_backend(tmp_path, url, None, settings))
    assert registry.pools[0].dispatcher.queue.limits == QueueLimits(1, 2.0, 4, 3, 5.0, 6.0)


def test_what_everybody_has_is_told(desk: Desk) -> None:
    """For the status: users by their names."""
    desk.come(GREEDY, 6)
    desk.come(ANNA)
    desk.end(GREEDY)
    loads = {
        one.id: (one.n_running, one.n_waiting)
        for one in desk.house.dispatcher.queue.loads(desk.house.loop.time())
    }
    assert loads == {"key:greedy": (3, 2), "key:anna": (1, 0)}


def waits_s(n_greedy: int, think_s: float, return_grace_s: float = 10.0) -> dict[str, float]:
    """Median seconds that each of five users waits for a slot, with one request each after the other, beside a greedy
    one with ``n_greedy`` at a time. Answers take a second; slots are four."""
    house = House(
        VirtualLoop(),
        StubServer(N_SLOTS),
        limits=QueueLimits(return_grace_s=return_grace_s),
        settings=SchedulingSettings(small_prompt_tokens=100),
    )
    rng, waited, loop = random.Random(1), dict[str, list[float]](), house.loop
    serial = itertools.count(1)

    async def one(user: User) -> float:
        asked_at, n = loop.time(), next(serial)
        job = Request(f"{user.id} {n}", tokens_of(1000 * n, 200), user=user)
        with await house.dispatcher.lease(job):
            waited_s = loop.time() - asked_at
            await asyncio.sleep(rng.uniform(0.7, 1.3))
        return waited_s

    async def modest(user: User) -> None:
        await asyncio.sleep(rng.random())
        for _ in range(40):
            waited.setdefault(user.id, []).append(await one(user))
            await asyncio.sleep(rng.expovariate(1 / think_s) if think_s else 0.001)

    async def greedy() -> None:
        while True:
            await one(GREEDY)

    streams = [house.start(greedy(), "greedy") for _ in range(n_greedy)]

    async def all_of_them() -> None:
        await asyncio.gather(*(modest(User(f"key:{i}")) for i in range(5)))

    loop.run(all_of_them())
    for stream in streams:
        stream.cancel()
    loop.settle()
    house.close()
    return {user: statistics.median(seconds) for user, seconds in waited.items()}


@pytest.mark.parametrize("think_s", [0.0, 0.5, 1.0])
def test_twenty_streams_of_one_user_are_to_others_as_one_is(think_s: float) -> None:
    """Each waits at most twice as long for its slot as all do beside a single stream, but for a tenth of an answer."""
    single, many = waits_s(1, think_s), waits_s(20, think_s)
    assert max(many.values()) <= 2 * statistics.median(single.values()) + 0.1


@pytest.mark.parametrize("grace_s", [0.0, 5.0, 90.0])
def test_users_are_here_while_they_are_expected_back(grace_s: float) -> None:
    """As the times of their last requests say, also once others are forgotten and after the grace was changed."""
    rng, now, present = random.Random(3), 0.0, list[Charge]()
    queue = Queue(QueueLimits(return_grace_s=grace_s))
    for n in range(400):
        now += rng.choice((0.0, 0.5, 3.0))
        if present and rng.random() < 0.5:
            queue.released(present.pop(rng.randrange(len(present))), now)
        else:
            request = Request("r", b"", user=User(f"u{rng.randrange(60)}"))
            charge = queue.granted_at_once(request, 1.0, now)
            assert charge is not None
            present.append(charge)
        if n == 300:
            grace_s *= 2
            queue.limits = QueueLimits(return_grace_s=grace_s)
        expected = {user for user, at in queue._seen_at.items() if now - at < grace_s}
        assert queue._here(now) == expected | {charge.booked.user for charge in present}
