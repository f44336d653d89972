"""Whose long prompt is computed now, read like transcripts: what is under way goes in, who is next comes out."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamaslot.scheduling.prefill_policy import GRAIN, Pending, chunk_end, next_up, pause_s, rank
from llamaslot.scheduling.prefill_rate import PrefillRate
from llamaslot.scheduling.rates import Delay, Rates
from llamaslot.scheduling.settings import PrefillSettings

MAX_S, SWITCH_S, CHUNK_S = 120.0, 0.1, 0.5


def of(left_s: float, *, waited: float = 0.0, came: float = 0.0) -> Pending:
    return Pending(left_s, waited, came)


def first(*pendings: Pending, current: int | None = None, starvation_s: float = MAX_S) -> int:
    return next_up(pendings, current, SWITCH_S, starvation_s)


# -- who is next -------------------------------------------------------------------------------------------------------


def test_the_shortest_is_first() -> None:
    """Whoever needs least is through soonest, and holds up the others least. Who came first decides a draw."""
    assert first(of(40), of(8), of(20)) == 1
    assert first(of(8, came=2), of(8, came=1)) == 1


def test_who_has_waited_counts_as_shorter() -> None:
    """After half of the time for half of what is left."""
    assert rank(of(40, waited=60), MAX_S)[0] == 20
    assert first(of(40, waited=60), of(30, came=60)) == 0
    assert first(of(40, waited=60), of(15, came=60)) == 1


def test_who_has_waited_long_enough_is_first() -> None:
    """However much is left of it, and however little of the others. Of two such the one that came first."""
    assert first(of(3600, waited=MAX_S), of(0.5, came=MAX_S)) == 0
    assert first(of(10, waited=MAX_S, came=5), of(3600, waited=MAX_S + 50, came=1)) == 1
    assert rank(of(3600, waited=10 * MAX_S), MAX_S)[0] == 0, "and never before an earlier one by more of it"


def test_without_a_limit_they_are_computed_as_they_come() -> None:
    """``starvation_s`` 0: nobody passes anybody."""
    assert first(of(1, came=2), of(1000, came=1), starvation_s=0) == 1
    assert first(of(1, came=2), of(1000, came=1), current=1, starvation_s=0) == 1


def test_the_current_one_goes_on_unless_the_switch_pays() -> None:
    """It costs the end of a batch, and the whole prompt sent again."""
    assert first(of(10), of(9.95, came=1), current=0) == 0
    assert first(of(10), of(9.85, came=1), current=0) == 1
    assert first(of(10), of(9.95, came=1), current=None) == 1


def test_a_current_one_gives_way_to_who_has_waited_too_long() -> None:
    """Even when there is hardly anything left of it: so nobody who comes later is ever counted on to be short."""
    assert first(of(0.05, came=110), of(500, waited=MAX_S), current=0) == 1
    assert first(of(0.05, waited=MAX_S, came=110), of(500, waited=MAX_S), current=0) == 0, "both: it goes on"


def test_waiting_alone_interrupts_no_prefill() -> None:
    """Of two that take long the one that waits counts for less all the time, by more than the other one computes: each
    would be interrupted for the other again and again. It is ahead where both can be begun, or when it is overdue."""
    assert first(of(280, came=1), of(300, waited=20), current=0) == 0
    assert first(of(280, came=1), of(300, waited=20), current=None) == 1


def test_one_that_has_waited_does_not_keep_others_from_passing() -> None:
    """It is first of all, and may not interrupt the current one: a third with little left may."""
    waits, passes = of(300, waited=119), of(5, came=20)
    assert first(of(200, came=10), waits, passes, current=None) == 1
    assert first(of(200, came=10), waits, passes, current=0) == 2


PENDINGS = st.lists(
    st.builds(
        Pending,
        st.sampled_from([0.0, 0.5, 10.0, 300.0]) | st.floats(0, 1000),
        st.sampled_from([0.0, 60.0, MAX_S, 500.0]) | st.floats(0, 300),
        st.floats(0, 1000),
    ),
    min_size=1,
    max_size=6,
)


@given(PENDINGS, st.integers(0, 6), st.randoms(use_true_random=False))
def test_the_next_request_stays_next(pendings: list[Pending], current: int, rng: Any) -> None:
    """Asked again with the new one under way the answer is the same, and their order in the list decides nothing."""
    at = current if current < len(pendings) else None
    chosen = first(*pendings, current=at)
    assert first(*pendings, current=chosen) == chosen
    order = list(range(len(pendings)))
    rng.shuffle(order)
    again = first(*(pendings[i] for i in order), current=order.index(at) if at is not None else None)
    assert rank(pendings[order[again]], MAX_S) == rank(pendings[chosen], MAX_S)


# -- everybody's turn comes --------------------------------------------------------------------------------------------


@dataclass
class Prefill:
    came_at: float
    work_s: float
    done_s: float = 0.0
    overdue_at: float = math.inf
    ended_at: float = math.inf
    passed_by: list[int] = field(default_factory=list)  # after it was overdue
    overtaken_s: float = 0.0  # what they took

    @property
    def left_s(self) -> float:
        return self.work_s - self.done_s

    def waited_s(self, now: float) -> float:
        return max(now - self.came_at - self.done_s, 0.0)


@dataclass
class Server:
    """Computes what ``next_up`` says, a chunk at a time. ``interruptions``: who was, for whom, and by how much he had
    more left; inf for somebody who was overdue."""

    prefills: list[Prefill]
    starvation_s: float
    switch_s: float
    interruptions: list[tuple[int, int, float]] = field(default_factory=list)
    current_at_overdue: dict[int, int | None] = field(default_factory=dict)

    def run(self) -> None:
        now, last = 0.0, None  # type: float, int | None
        while waiting := [i for i, one in enumerate(self.prefills) if one.ended_at == math.inf]:
            here = [i for i in waiting if self.prefills[i].came_at <= now]
            if not here:
                now = min(self.prefills[i].came_at for i in waiting)
                continue
            pendings = [self._pending(i, now) for i in here]
            current = here.index(last) if last in here else None
            at = here[next_up(pendings, current, self.switch_s, self.starvation_s)]
            if last is not None and last in here and at != last:
                now += self._interrupt(last, at, now)
            now, last = self._compute(at, here, now), at

    def _pending(self, i: int, now: float) -> Pending:
        one = self.prefills[i]
        return Pending(one.left_s, one.waited_s(now), one.came_at)

    def _interrupt(self, old: int, new: int, now: float) -> float:
        is_overdue = self.prefills[new].waited_s(now) >= self.starvation_s
        more_s = math.inf if is_overdue else self.prefills[old].left_s - self.prefills[new].left_s
        self.interruptions.append((old, new, more_s))
        return self.switch_s

    def _compute(self, at: int, here: list[int], now: float) -> float:
        one = self.prefills[at]
        took_s = min(CHUNK_S, one.left_s)
        for i in here:
            other = self.prefills[i]
            if i != at and now >= other.overdue_at:
                other.passed_by.append(at)
                other.overtaken_s += took_s
            if i != at and other.overdue_at == math.inf and other.waited_s(now + took_s) >= self.starvation_s:
                other.overdue_at = now + took_s
                self.current_at_overdue[i] = at
        one.done_s = one.work_s if took_s == one.left_s else one.done_s + took_s
        if one.done_s == one.work_s:
            one.ended_at = now + took_s
        return now + took_s


ARRIVALS = st.lists(
    st.tuples(st.floats(0, 200), st.sampled_from([0.7, 5.0, 30.0, 100.0, 300.0]) | st.floats(0.2, 300)),
    min_size=1,
    max_size=7,
)


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(ARRIVALS, st.sampled_from([0.0, 10.0, 60.0, MAX_S]), st.sampled_from([0.001, 0.1, 1.0]))
def test_no_request_waits_for_ever(
    arrivals: list[tuple[float, float]], starvation_s: float, switch_s: float
) -> None:
    """A prefill that has waited for ``starvation_s`` waits for those that came before it, for the rest of the one that
    is computed just then, and for no other. In all no longer than that, and the switches between them."""
    prefills = [Prefill(came, work) for came, work in arrivals]
    server = Server(prefills, starvation_s, switch_s)
    server.run()
    for i, one in enumerate(prefills):
        current = server.current_at_overdue.get(i)
        for by in set(one.passed_by):
            assert prefills[by].came_at <= one.came_at or by == current, "nobody who came later gets ahead"
        before_s = sum(
            other.work_s for other in prefills if other.came_at <= one.came_at and other is not one
        )
        rest_s = prefills[current].work_s if current is not None else 0.0
        switches_s = switch_s * (len(server.interruptions) + 1)
        waited_s = one.ended_at - one.came_at - one.work_s
        assert waited_s <= starvation_s + before_s + rest_s + CHUNK_S + switches_s + 1e-6


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(ARRIVALS, st.sampled_from([10.0, 60.0, MAX_S]), st.sampled_from([0.001, 0.1, 1.0]))
def test_no_prefill_is_interrupted_for_nothing(
    arrivals: list[tuple[float, float]], starvation_s: float, switch_s: float
) -> None:
    """Whoever is interrupted has more left than the other one, by more than the interruption costs, or the other one
    has waited too long. So it happens once or twice to each, however long they take."""
    prefills = [Prefill(came, work) for came, work in arrivals]
    server = Server(prefills, starvation_s, switch_s)
    server.run()
    assert all(more_s > switch_s for _, _, more_s in server.interruptions)
    assert len(server.interruptions) <= 2 * len(prefills)


def test_alone_they_are_through_as_soon_as_they_can_be() -> None:
    """A short one that comes later passes; the long one goes on from where it was."""
    long, short = Prefill(0.0, 100.0), Prefill(20.0, 5.0)
    server = Server([long, short], MAX_S, SWITCH_S)
    server.run()
    assert short.ended_at == pytest.approx(20 + 5 + SWITCH_S, abs=CHUNK_S)
    assert long.ended_at == pytest.approx(105 + SWITCH_S)
    assert [(old, new) for old, new, _ in server.interruptions] == [(0, 1)]


# -- chunks and pauses ----------------------------------------------------------------------------------------------


def rate_of(tokens_per_s: int) -> PrefillRate:
    rate = PrefillRate()
    rate.observe(0, tokens_per_s, 1.0)
    return rate


@given(st.integers(0, 100_000), st.integers(1, 20_000), st.integers(0, 30_000))
def test_a_chunk_is_whole_pieces_and_leaves_no_crumb(start: int, n: int, n_reached: int) -> None:
    """It has at least one piece, and no more than fit into its time; the last few tokens of a prompt belong to it."""
    stop, end = start + n, chunk_end(start, start + n, rate_of(1000), n_reached / 1000)
    assert start < end <= stop
    assert end == stop or ((end - start) % GRAIN == 0 and stop - end > GRAIN // 2)
    assert end - start <= max(n_reached, GRAIN) + GRAIN // 2


def test_a_chunk_that_has_nothing_to_compute_is_sent_all_the_same() -> None:
    """llama-server then reports what the slot has: it always computes one token."""
    assert chunk_end(5000, 5000, rate_of(1000), 0.6) == 5000


def test_a_chunk_is_as_long_as_the_known_speed_allows() -> None:
    """Half a second at 4,000 tokens/s. Before any speed is known, it is the shortest chunk."""
    assert chunk_end(1000, 60_000, rate_of(4000), 0.5) - 1000 == 2000 // GRAIN * GRAIN
    assert chunk_end(1000, 60_000, PrefillRate(), 0.5) - 1000 == GRAIN


@given(st.floats(0, 100), st.integers(1, 5), st.floats(0, 0.9))
def test_streams_get_their_share_of_the_time(computed_s: float, n_streams: int, share: float) -> None:
    """Of prefill and pause together. With nobody there it is all of the prefill's."""
    pause = pause_s(computed_s, n_streams, share)
    assert pause == pytest.approx(share * (computed_s + pause))
    assert pause_s(computed_s, 0, share) == 0


def test_the_usual_settings() -> None:
    """A tenth of the time for streams: a pause of 56 ms after half a second."""
    usual = PrefillSettings()
    assert pause_s(usual.chunk_s, 1, usual.decode_share) == pytest.approx(0.0556, abs=1e-4)


# -- what is learned ---------------------------------------------------------------------------------------------------


def learned(a: float, b: float) -> PrefillRate:
    """Of a server that takes ``a + b * depth`` for each token."""
    rate = PrefillRate()
    for start in (0, 20_000, 100_000):
        end = start + 1000
        rate.observe(start, end, a * 1000 + b * (end**2 - start**2) / 2)
    return rate


A = st.floats(1e-6, 1e-1)
B = st.floats(1e-10, 1e-5)


@settings(deadline=None)
@given(
    st.tuples(A, st.just(0.0)) | st.tuples(st.just(0.0), B) | st.tuples(A, B),
    st.integers(0, 200_000),
    st.integers(0, 100_000),
)
def test_reached_is_the_inverse_of_seconds(ab: tuple[float, float], start: int, n: int) -> None:
    """With a slope or without, also where the first token takes no time at all."""
    rate = learned(*ab)
    seconds = rate.seconds(start, start + n)
    assert rate.reached(start, seconds) == pytest.approx(start + n, abs=1.01, rel=1e-6)


@settings(deadline=None)
@given(A, st.just(0.0) | B, st.integers(0, 200_000), st.floats(0, 1000))
def test_no_more_is_reached_than_there_is_time_for(a: float, b: float, start: int, seconds: float) -> None:
    """And with twice the time no less."""
    rate = learned(a, b)
    reached = rate.reached(start, seconds)
    assert rate.seconds(start, reached) <= seconds * (1 + 1e-6) + 1e-9
    assert rate.reached(start, 2 * seconds) >= reached


def test_reached_before_the_first_sample() -> None:
    """A millisecond for each token, as ``seconds`` has it."""
    assert PrefillRate().reached(500, 0.25) == 750


def test_what_an_interruption_costs_is_learned() -> None:
    """Twenty of half a second are enough; then the estimate is about that."""
    one = Rates().interruption
    for _ in range(20):
        one.observe(0.5)
    assert one.seconds == pytest.approx(0.5, rel=0.05)
    assert repr(one) == "<Delay 495 ms>"


@pytest.mark.parametrize(("seconds", "counts_as"), [(10.0, 0.3), (0.0, 0.1 / 3), (0.2, 0.2)])
def test_one_that_is_far_off_says_little(seconds: float, counts_as: float) -> None:
    """It was held up by something else: it counts as three times as much as usual, or as a third."""
    one = Delay(0.1)
    one.observe(seconds)
    assert one.seconds == pytest.approx(0.1 + Delay.GAIN * (counts_as - 0.1))


@settings(deadline=None)
@given(st.lists(st.floats() | st.floats(0, 1e9), max_size=100))
def test_an_interruption_stays_within_reason(samples: list[float]) -> None:
    """Whatever was measured: between a tenth of a millisecond and ten seconds."""
    one = Rates().interruption
    for seconds in samples:
        one.observe(seconds)
    assert Delay.LIMITS[0] <= one.seconds <= Delay.LIMITS[1]
    again = Rates().interruption
    again.take_over(json.loads(json.dumps(one.to_json())))
    assert again.seconds == one.seconds


SPOILT: list[Any] = [None, [], "", 3, {}, {"seconds": None}, {"seconds": "0.2"}, {"seconds": [0.2]}]
SPOILT += [{"seconds": seconds} for seconds in (0, -1, math.nan, math.inf, True, 10**400)]


@pytest.mark.parametrize("data", SPOILT)
def test_a_spoilt_interruption_is_learned_anew(data: Any) -> None:
    """From the prior. What is merely too much is brought within its limits."""
    assert Rates.from_json({"interruption": data}).interruption.seconds == Rates().interruption.seconds
    most = Rates.from_json({"interruption": {"seconds": 5000}})
    assert most.interruption.seconds == Delay.LIMITS[1]


def test_what_a_request_costs_is_learned_and_kept() -> None:
    """From ten milliseconds on; what is spoilt starts there again."""
    rates = Rates()
    assert repr(rates.request) == "<Delay 10 ms>"
    for _ in range(30):
        rates.request.observe(0.002)
    again = Rates.from_json(json.loads(json.dumps(rates.to_json())))
    assert again.request.seconds == pytest.approx(rates.request.seconds) == pytest.approx(0.002, rel=0.1)
    assert Rates.from_json({"request": "soon"}).request.seconds == Rates().request.seconds
