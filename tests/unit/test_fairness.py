"""Whose turn it is when slots are short."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from llamaslot.scheduling.fairness import (
    Ask,
    Booked,
    Pauses,
    Shares,
    is_above_limit,
    may_take_another,
    returns,
)

LONG = 1e9


def order_of(asks: list[Ask], shares: Shares, max_overtake_s: float = LONG) -> list[int]:
    """The indices of these, in the order in which they are served. They came in the order of the list."""
    queues: dict[str, list[Ask]] = {}
    for i, ask in enumerate(asks):
        queues.setdefault(ask.user, []).append(replace(ask, serial=i))
    return [ask.serial for ask in shares.order(queues, max_overtake_s)]


def users(asks: list[Ask], shares: Shares | None = None, max_overtake_s: float = LONG) -> list[str]:
    """Whose requests are next, in their order."""
    order = order_of(asks, shares or Shares(), max_overtake_s)
    assert sorted(order) == list(range(len(asks)))
    return [asks[i].user for i in order]


def serve(shares: Shares, asks: list[Ask]) -> Ask:
    """Give the next one its slot."""
    ask = asks.pop(order_of(asks, shares)[0])
    shares.granted(ask.user, ask.cost_s, {other.user for other in asks}, ())
    return ask


def test_small_requests_of_one_user_pass_others_for_its_part_only() -> None:
    """Of three users: a third of what somebody may be passed for. Those of another one still do."""
    passed = Ask("new", 10.0, overtaken_s=4.0, passed_by={"greedy": 4.0})
    greedy, other = [Ask("greedy", 0.5, is_small=True)] * 3, [Ask("other", 0.5, is_small=True)]
    assert users([passed, *greedy, *other], max_overtake_s=15.0).index("new") == 4
    assert users([passed, *greedy, *other], max_overtake_s=10.0)[:2] == ["other", "new"]


def test_of_one_user_the_first_request_is_served_first() -> None:
    """Whatever they cost."""
    asks = [Ask("a", cost) for cost in (5.0, 1.0, 3.0)]
    assert order_of(asks, Shares()) == [0, 1, 2]


def test_users_take_turns() -> None:
    """One with many requests gets a slot as often as one with few."""
    asks = [Ask("many", 1.0)] * 4 + [Ask("few", 1.0)] * 2
    assert users(asks) == ["many", "few", "many", "few", "many", "many"]


def test_who_has_just_come_is_before_who_was_just_served() -> None:
    """Both have got their share."""
    shares, asks = Shares(), [Ask("greedy", 10.0)] * 5
    for _ in range(4):
        serve(shares, asks)
    assert users([*asks, Ask("new", 10.0)], shares) == ["new", "greedy"]


def test_what_was_taken_while_no_request_waited_costs_nothing() -> None:
    """Slots that nobody wanted are nobody's loss."""
    shares, asks = Shares(), [Ask("greedy", 100.0)] * 3
    for _ in range(3):
        serve(shares, asks)
    assert shares.deficit_s("greedy") == 0


def test_long_requests_get_fewer_turns() -> None:
    """What is shared out is the time of slots."""
    shares, asks = Shares(), [Ask("long", 30.0)] * 10 + [Ask("short", 10.0)] * 30
    got = Counter(serve(shares, asks).user for _ in range(20))
    assert 4 <= got["long"] <= 6


def test_what_was_estimated_wrong_is_made_up_for() -> None:
    """Its answers are three times as long as was thought."""
    shares, asks, took_s = Shares(), [Ask("long", 10.0)] * 40 + [Ask("short", 10.0)] * 40, Counter[str]()
    for _ in range(40):
        ask = asks.pop(order_of(asks, shares)[0])
        booked = shares.granted(ask.user, ask.cost_s, ["long", "short"], ())
        actual_s = 30.0 if ask.user == "long" else 10.0
        took_s[ask.user] += int(actual_s)
        shares.took(booked, actual_s)
    assert abs(took_s["long"] - took_s["short"]) <= 40


def test_who_goes_away_is_owed_nothing_and_owes_for_a_while() -> None:
    """A user who comes back after a moment has not got rid of what it had too much."""
    shares, asks = Shares(), [Ask("a", 10.0), Ask("a", 10.0), Ask("b", 10.0)]
    serve(shares, asks)
    assert (shares.deficit_s("a"), shares.deficit_s("b")) == (-5, 5)
    shares.keep(present=(), remembered=("a", "b"))
    assert (shares.deficit_s("a"), shares.deficit_s("b")) == (-5, 0)
    shares.keep(present=(), remembered=())
    assert shares.deficit_s("a") == 0


def test_no_deficit_grows_for_ever() -> None:
    """A day of waiting must not be paid for with a day of slots afterwards."""
    shares = Shares()
    for _ in range(1000):
        shares.granted("a", 100.0, {"a", "b"}, ())
    assert shares.deficit_s("b") == -shares.deficit_s("a") == 300


def test_who_does_not_wait_is_owed_one_request_at_most() -> None:
    """However long somebody else works meanwhile; and what a user has got more than that it does not lose by it."""
    shares = Shares()
    for _ in range(1000):
        shares.granted("works", 20.0, (), {"reads"})
    assert shares.deficit_s("reads") == -shares.deficit_s("works") == 20
    for _ in range(3):
        shares.granted("works", 20.0, {"reads"}, ())
    shares.granted("works", 20.0, (), {"reads"})
    assert shares.deficit_s("reads") == 50


@pytest.mark.parametrize("n_users", [2, 3])
def test_a_wrong_estimate_is_taken_back_whole(n_users: int) -> None:
    """A huge prompt whose client hangs up at once is no credit, nor a debt of the others."""
    shares, others = Shares(), [f"other {n}" for n in range(n_users - 1)]
    for _ in range(20):
        booked = shares.granted("huge", 5000.0, others, ())
        shares.took(booked, 1.0)
    assert shares.deficit_s("huge") == pytest.approx(-20 * (n_users - 1) / n_users)
    for other in others:
        assert shares.deficit_s(other) == pytest.approx(20 / n_users)


def test_small_requests_go_first() -> None:
    """In their own order, also before the others of the same user."""
    asks = [Ask("a", 30.0), Ask("b", 30.0), Ask("b", 1.0, is_small=True), Ask("a", 1.0, is_small=True)]
    order = order_of(asks, Shares())
    assert set(order[:2]) == {2, 3}
    assert order[2:] == [0, 1]


def test_no_request_is_overtaken_by_small_requests_for_ever() -> None:
    """Who was passed for long enough stands, and so do those before."""
    asks = [
        Ask("a", 30.0, overtaken_s=2.0),
        Ask("b", 30.0, overtaken_s=10.0),
        Ask("c", 30.0),
        Ask("d", 1.0, is_small=True),
    ]
    assert order_of(asks, Shares(), 10.0) == [0, 1, 3, 2]
    assert order_of(asks, Shares(), 10.1) == [3, 0, 1, 2]


OFTEN, SELDOM = 0.2, 60.0  # pauses in seconds, beside answers of two


@pytest.mark.parametrize(
    ("n_held", "n_idle", "n_users", "pauses_s", "may"),
    [
        (0, 1, 6, [OFTEN] * 5, True),  # the first is anybody's right
        (3, 1, 1, [], True),  # nobody else was here
        (3, 1, 2, [OFTEN], False),  # somebody may come back
        (3, 1, 2, [SELDOM], True),  # hardly within these two seconds
        (3, 1, 2, [], True),  # he has a slot, or waits himself
        (2, 2, 2, [SELDOM], True),  # one is left for him
        (1, 1, 2, [OFTEN], True),  # two of four are the share of each of two
        (1, 3, 6, [OFTEN] * 3, False),  # three will be back before the answer is through
        (1, 3, 6, [OFTEN] * 2, True),
        (1, 2, 6, [SELDOM] * 5, True),  # hardly one of them will
    ],
)  # fmt: skip
def test_slots_are_left_to_who_will_come_back(
    n_held: int, n_idle: int, n_users: int, pauses_s: list[float], may: bool
) -> None:
    """By those who have more than their share of four."""
    assert may_take_another(n_held, 4, n_idle, n_users, pauses_s, 2.0) is may


def test_no_slot_is_left_alone_by_what_is_through_at_once() -> None:
    """A title of 0.2 s takes the last one beside four who read for a minute or are back every 1.5 s, and not one of
    0.3 s beside one who is back at once: what counts is how long those who come back would wait."""
    assert may_take_another(3, 4, 1, 5, [SELDOM] * 4, 0.2)
    assert may_take_another(3, 4, 1, 5, [SELDOM] * 4, 1.0)
    assert may_take_another(3, 4, 1, 5, [1.5] * 4, 0.22)
    assert not may_take_another(3, 4, 1, 5, [1.5] * 4, 0.4)
    assert not may_take_another(3, 4, 1, 5, [SELDOM] * 4, 2.0)
    assert not may_take_another(3, 4, 1, 2, [OFTEN], 0.3)
    assert not may_take_another(3, 4, 1, 2, [SELDOM], 10.0)


def test_a_limit_of_parallel_requests_counts_slots() -> None:
    """The user may have as many slots as its limit says. A request that needs more runs when the user has no other."""
    assert not is_above_limit(n_held=1, n_more=1, max_running=2)
    assert is_above_limit(n_held=2, n_more=1, max_running=2)
    assert is_above_limit(n_held=1, n_more=2, max_running=2)
    assert not is_above_limit(n_held=0, n_more=3, max_running=2)
    assert not is_above_limit(n_held=99, n_more=9, max_running=None)


def test_pauses_are_learned() -> None:
    """From the first one; a single long one among short ones says little."""
    pauses = Pauses()
    assert pauses.usual_s("a") == Pauses.UNKNOWN_S
    pauses.observe("a", 0.5)
    assert pauses.usual_s("a") == pytest.approx(0.5)
    pauses.observe("a", 50.0)
    assert 1.0 < pauses.usual_s("a") < 3.0
    for _ in range(20):
        pauses.observe("a", 50.0)
    assert pauses.usual_s("a") == pytest.approx(50.0, rel=0.01)
    pauses.observe("b", 0.0)
    assert returns([pauses.usual_s("b")], 1.0) == pytest.approx(1.0)
    assert returns([0.5], 0.5) == pytest.approx(1 - 1 / math.e)
    pauses.forget("a")
    assert pauses.usual_s("a") == Pauses.UNKNOWN_S


@given(st.integers(0, 10**9))
def test_no_user_that_waits_all_the_time_gets_less_than_a_share_but_for_one_request_of_each(
    seed: int,
) -> None:
    """The promise of deficit round robin, for random users and costs."""
    rng = random.Random(seed)
    names = [f"u{i}" for i in range(rng.randrange(2, 6))]
    cost_s = {name: rng.uniform(1, 20) for name in names}
    shares, got_s = Shares(), dict.fromkeys(names, 0.0)
    asks = [Ask(name, cost_s[name]) for name in names for _ in range(rng.choice([1, 5]))]
    for _ in range(60):
        ask = serve(shares, asks)
        got_s[ask.user] += ask.cost_s
        asks.append(ask)  # as many of it wait as before
    equal_s = sum(got_s.values()) / len(names)
    for name in names:
        assert got_s[name] >= equal_s - 2 * max(cost_s.values())


@pytest.mark.parametrize("seed", range(20))
def test_each_share_is_what_its_definition_says(seed: int) -> None:
    """An equal part of the time for each other one, up to its limit; all that is owed by the one with the slot."""
    rng, shares, deficits = random.Random(seed), Shares(), dict[str, float]()
    names = [f"u{n}" for n in range(6)]
    open_ = list[tuple[Booked, set[str], set[str], dict[str, float]]]()
    for _ in range(60):
        if open_ and rng.random() < 0.4:
            booked, waiting, idle, changes = open_.pop(rng.randrange(len(open_)))
            user, seconds = booked.user, rng.choice((0.0, 0.3, 7.0, 500.0))
            for other, change_s in changes.items():
                deficits[other] -= change_s
            shares.took(booked, seconds)
        else:
            user, seconds = rng.choice(names), rng.choice((0.0, 0.1, 1.0, 40.0, 900.0))
            waiting, idle = (set(rng.sample(names, rng.randrange(4))) for _ in range(2))
            booked = shares.granted(user, seconds, waiting, idle)
            open_.append((booked, waiting, idle, changes := {}))
        others = (waiting | idle) - {user}
        changes.clear()
        for other in others:
            most_s = 300.0 if other in waiting else min(seconds, 300.0)
            room_s = max(most_s - deficits.get(other, 0.0), 0.0)
            changes[other] = min(seconds / (len(others) + 1), room_s)
        changes[user] = -min(sum(changes.values()), max(300.0 + deficits.get(user, 0.0), 0.0))
        for other, change_s in changes.items():
            deficits[other] = deficits.get(other, 0.0) + change_s
        assert {name: shares.deficit_s(name) for name in names} == pytest.approx(
            {name: deficits.get(name, 0.0) for name in names}
        )
