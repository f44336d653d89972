"""Slots of a greedy user, in which prompts are still computed, go to users that wait and have fewer."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from llamaslot.cache.reuse import CacheKind
from llamaslot.fleet.preemption import Claim, Stoppable, chosen
from llamaslot.scheduling.request import Request, User
from tests.support.house import outcome_of, tokens_of
from tests.support.mainloop import Paced, talk

EVERY = pytest.mark.parametrize("cache_kind", list(CacheKind))
GREEDY = User("key:greedy")
N_PROMPT = 1200  # 1.2 s of computing


def modest(i: int) -> User:
    return User(f"key:modest-{i}")


def asks(user: User, number: int, n: int = N_PROMPT) -> Request:
    return Request(f"{user.id} {number}", tokens_of(1_000_000 + 10_000 * number, n), user=user, max_tokens=60)


# -- which prompts stop ------------------------------------------------------------------------------------------------


def prompt(user: str, loss_s: float = 0.1, left_s: float = 5.0, **more: Any) -> Stoppable:
    return Stoppable(user, 0.0, loss_s, left_s, **more)


def stops(
    n_claims: int, prompts: list[Stoppable], n_held: dict[str, int], idle_in_s: float = 5.0
) -> list[int]:
    """For claims of as many users, none of whom has a slot."""
    claims = [Claim(f"new {i}", 0.0) for i in range(n_claims)]
    return chosen(claims, prompts, n_held, [idle_in_s] * sum(n_held.values()))


def test_a_user_with_two_slots_or_more_gives_them_up() -> None:
    """One for each who waits, and keeps one."""
    prompts = [prompt("greedy")] * 4
    assert len(stops(1, prompts, {"greedy": 4})) == 1
    assert len(stops(5, prompts, {"greedy": 4})) == 3
    assert not stops(5, prompts[:1], {"greedy": 1})


def test_the_one_that_loses_least_stops() -> None:
    """Then the one that would have its slot longest, then the one that came last."""
    assert stops(1, [prompt("a", 0.3), prompt("a", 0.1), prompt("a", 0.2)], {"a": 3}) == [1]
    assert stops(
        1, [prompt("a", left_s=4.0), prompt("a", left_s=5.0), prompt("a", left_s=3.0)], {"a": 3}
    ) == [1]
    assert stops(1, [prompt("a")] * 3, {"a": 3}) == [2]


def test_none_stops_where_a_slot_is_idle_sooner() -> None:
    """Of two that wait, the first gets the slot that is idle soon, and the second one that is made idle."""
    prompts = [prompt("greedy", loss_s=1.0)] * 3
    assert not stops(1, prompts, {"greedy": 4}, idle_in_s=0.5)
    claims = [Claim("new 0", 0.0), Claim("new 1", 0.0)]
    assert len(chosen(claims, prompts, {"greedy": 4}, [0.5, 4.0, 4.0, 4.0])) == 1


def test_who_was_told_to_stop_stops() -> None:
    """And not now this one, now another."""
    assert stops(1, [prompt("a", 0.1), prompt("a", 0.2, is_chosen=True)], {"a": 4}) == [1]


def test_a_user_with_a_slot_takes_none_from_a_user_that_is_owed_more() -> None:
    """It was here all the time, and the other one comes once a day with three requests."""
    owed = [Stoppable("owed", 10.0, 0.1, 5.0)] * 3
    assert not chosen([Claim("busy", -10.0)], owed, {"owed": 3, "busy": 1}, [5.0] * 4)
    assert chosen([Claim("busy", -10.0)], owed, {"owed": 4}, [5.0] * 4), "but it gets a first one"


@example(claims=["a", "c"], prompts=[("a", 0.0), ("b", 0.0)], n_held={"a": 1, "b": 3})
@given(
    claims=st.lists(st.sampled_from("abc"), max_size=6),
    prompts=st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 3)), max_size=6),
    n_held=st.dictionaries(st.sampled_from("abc"), st.integers(0, 4)),
)
def test_a_user_that_gives_a_slot_up_has_no_fewer_than_the_other(
    claims: list[str], prompts: list[tuple[str, float]], n_held: dict[str, int]
) -> None:
    """So that no two users take slots from each other in turn."""
    waits_s = [2.0] * max(sum(n_held.values()), 1)
    all_of_them = [Stoppable(user, 0.0, loss_s, 5.0) for user, loss_s in prompts]
    result = chosen([Claim(user, 0.0) for user in claims], all_of_them, n_held, waits_s)
    assert len(result) == len(set(result)) <= len(claims)
    for i in result:
        user = prompts[i][0]
        n_left = n_held.get(user, 0) - sum(prompts[j][0] == user for j in result)
        assert n_left >= 1, "nobody loses its last slot"


# -- a greedy user, and others that come later -------------------------------------------------------------------------


def greedy_first(house: Paced, n: int = 20, lead_s: float = 3.0) -> list[Any]:
    house.begin()
    clients = [house.come(asks(GREEDY, i)) for i in range(n)]
    house.until(lead_s)
    return clients


async def asks_on(
    house: Paced, user: User, numbers: Iterator[int], until: float, n_least: int = 0
) -> list[float]:
    """One request after the other, ``n_least`` or until then; the seconds to the first token of each."""
    first_s = list[float]()
    while house.now < until or len(first_s) < n_least:
        job = asks(user, next(numbers))
        await house.ask(job)
        first_s.append(house.first_s[job.id])
    return first_s


@pytest.mark.parametrize(
    ("cache_kind", "token_s", "answer_s", "lead_s"),
    [
        (CacheKind.DENSE, 0.0002, 0.3, 4.2),
        (CacheKind.SWA, 0.0005, 0.8, 3.0),
        (CacheKind.RECURRENT, 0.001, 2.0, 4.2),
    ],
)
def test_five_users_wait_beside_twenty_streams_as_beside_one(
    cache_kind: CacheKind, token_s: float, answer_s: float, lead_s: float
) -> None:
    """With two requests each, when the greedy one has had all four slots for three seconds or four."""
    medians_s = {}
    for n_streams in (1, 20):
        with Paced(cache_kind, 4, answer_s=answer_s) as house:
            numbers = itertools.count(1)
            house.server.token_s = token_s
            house.begin()
            for i in range(n_streams):
                house.start(asks_on(house, GREEDY, numbers, house.began + lead_s + 10.0), f"stream {i}")
            house.until(lead_s)
            users = [house.start(asks_on(house, modest(i), numbers, 0.0, 2), f"user {i}") for i in range(5)]
            house.wait(*users)
            medians_s[n_streams] = statistics.median(itertools.chain(*map(outcome_of, users)))
            house.drive()
            assert house.server.n_computed <= (next(numbers) - 1) * N_PROMPT * 1.01, "twice"
            assert n_streams > 1 or not house.preempted
    assert medians_s[20] <= 1.15 * medians_s[1], medians_s


@EVERY
def test_what_was_computed_is_found_again(cache_kind: CacheKind) -> None:
    """The prompt goes on from where it was: in its slot, or from the disk."""
    with Paced(cache_kind, 2, answer_s=30.0) as house:
        house.main.answers_s = {}
        house.begin()
        first, second = asks(GREEDY, 1, 6000), asks(GREEDY, 2, 6000)
        clients = [house.come(first), house.come(second)]
        house.until(2.0)
        newcomer = asks(modest(1), 3, 100)
        house.wait(house.come(newcomer))
        assert house.first_s[newcomer.id] < 2.0, "no answer of 30 s was waited for"
        assert len(house.preempted) == 1
        house.wait(*clients)
        assert house.server.n_computed <= 12_100 + 200


def test_an_answer_is_never_stopped() -> None:
    """Its user has all slots, and another one waits for the first that ends."""
    with Paced(CacheKind.DENSE, 2, answer_s=5.0) as house:
        house.begin()
        clients = [house.come(asks(GREEDY, i, 150)) for i in range(2)]
        house.until(1.0)
        newcomer = asks(modest(1), 3, 150)
        house.wait(house.come(newcomer))
        assert house.preempted == []
        assert house.first_s[newcomer.id] > 4.0
        house.wait(*clients)


def test_no_prompt_stops_for_a_request_of_its_own_user() -> None:
    """Nor for llamaslot itself, nor for somebody with as many slots."""
    with Paced(CacheKind.DENSE, 2, answer_s=5.0) as house:
        clients = greedy_first(house, 6, 1.0)
        house.until(4.0)
        assert house.preempted == []
        house.wait(*clients)
    with Paced(CacheKind.DENSE, 2, answer_s=5.0) as house:
        house.begin()
        clients = [house.come(asks(modest(i), i)) for i in range(3)]
        house.until(1.0)
        assert house.preempted == []
        house.wait(*clients)


def test_one_that_is_wanted_no_longer_goes_on() -> None:
    """The client that waited has left before the chunk was over."""
    with Paced(CacheKind.DENSE, 2, answer_s=5.0) as house:
        clients = greedy_first(house, 2, 0.3)
        newcomer = house.come(asks(modest(1), 3))
        house.loop.pass_time(0.001)
        house.leave(newcomer)
        house.wait(*clients)
        assert len(house.preempted) <= 1


def test_what_a_user_has_had_is_charged_once() -> None:
    """A slot that it gave up is paid for as long as it had it, and no longer."""
    with Paced(CacheKind.DENSE, 2, answer_s=1.0) as house:
        clients = greedy_first(house, 2, 0.4)
        newcomer = house.come(asks(modest(1), 3, 300))
        house.wait(*clients, newcomer)
        assert house.preempted
        deficits = {one.id: one.deficit_s for one in house.dispatcher.queue.loads(house.now)}
        assert abs(deficits[GREEDY.id]) < 5.0, "two slots for five seconds, of which half was its own"


@settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))
@given(
    cache_kind=st.sampled_from(list(CacheKind)),
    comers=st.lists(
        st.tuples(st.floats(0, 1.5), st.integers(0, 3), st.integers(50, 2500)), min_size=5, max_size=25
    ),
)
def test_everybody_is_served_at_last(cache_kind: CacheKind, comers: list[tuple[float, int, int]]) -> None:
    """However many come and whoever they are; no request gives its slot up more than twice, and no work is lost but
    for what a sliding window needs again."""
    with Paced(cache_kind, 3, answer_s=0.7) as house:
        house.begin()
        n_all = 0
        for number, (after_s, user, n) in enumerate(comers):
            house.come(asks(modest(user), number, n))
            n_all += n
            house.loop.pass_time(after_s)
            house.check()
        house.drive()
        assert len(house.first_s) == len(comers)
        assert all(house.preempted.count(job) <= 2 for job in house.preempted)
        assert house.server.n_computed <= n_all + 600 * len(house.preempted)


# -- the server's time -------------------------------------------------------------------------------------------------


async def asks_short(house: Paced, user: User, at: int, seconds: float) -> None:
    """Follow-ups of a conversation, each as soon as the last one is answered."""
    until, n = house.now + seconds, 0
    while house.now < until:
        n += 150
        await house.ask(replace(talk(at, n), user=user))


@EVERY
def test_many_short_requests_of_one_user_take_no_more_than_its_part(cache_kind: CacheKind) -> None:
    """Three streams without a gap hold another user's long prompt back for as long as that has been computed; those of
    its own user go before it as ever."""
    took_s = {}
    for is_own in (False, True):
        with Paced(cache_kind, 4, answer_s=0.001) as house:
            user = modest(1)
            filler = house.come(
                asks(user, 50, 60)
            )  # what is in a lower slot the server itself computes first
            house.until_leased(filler)
            house.talk(3)
            house.begin()
            streams = [
                house.start(asks_short(house, user if is_own else GREEDY, i, 12.0), f"stream {i}")
                for i in range(3)
            ]
            house.until(0.5)
            job = asks(user, 1, 3000)
            client = house.come(job)
            house.wait(client)
            assert house.slots[job.id] == 0
            took_s[is_own] = house.first_s[job.id]
            house.wait(*streams)
    assert took_s[False] <= 2 * 3.0 + 3.0, took_s
    assert took_s[False] <= 0.7 * took_s[True], took_s


def test_a_user_that_had_the_server_is_behind_another_users_prompt() -> None:
    """Five prompts of one user, and one of another that is a little longer: it is second, not sixth."""
    with Paced(CacheKind.DENSE, 8) as house:
        house.begin()
        clients = [house.come(asks(GREEDY, i, 1900)) for i in range(5)]
        house.until(0.1)
        newcomer = asks(modest(1), 9, 2000)
        clients.append(house.come(newcomer))
        house.wait(*clients)
        assert house.first_s[newcomer.id] < 1.9 + 2.0 + 0.5


def test_of_many_users_each_the_shortest_is_first_all_the_same() -> None:
    """Their prompts are not computed in slices, which would let all of them wait for the last."""
    with Paced(CacheKind.DENSE, 8) as house:
        house.begin()
        jobs = [asks(modest(i), i, 2000 + 300 * i) for i in range(5)]
        house.wait(*(house.come(job) for job in jobs))
        first_s = [house.first_s[job.id] for job in jobs]
        assert first_s == sorted(first_s)
        assert first_s[0] < 2.5
