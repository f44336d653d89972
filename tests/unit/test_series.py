"""Sums over time, and the words about a decision."""

from __future__ import annotations

import pytest

from llamaslot.observe.activity import Activity, Outcome, Savings, error_share, in_words, stages
from llamaslot.observe.journal import Act, Decision
from llamaslot.observe.series import HOUR, MINUTE, Series, class_of, total
from llamaslot.scheduling.prefill_rate import PrefillRate
from llamaslot.sizes import readable_seconds

NOON = 1_700_000_000.0 // HOUR * HOUR


def ended(at: float = NOON, **more: object) -> Activity:
    told = {
        "id": "r",
        "at": at,
        "backend": "gpu0",
        "model": "m",
        "n_prompt": 100,
        "n_reused": 80,
        "n_computed": 20,
    }
    return Activity(**{**told, **more})  # type: ignore[arg-type]


def test_sums_are_those_of_their_requests() -> None:
    """Of each backend and model apart, and of all."""
    series = Series()
    series.count(ended(first_s=0.1, saved_s=2.0))
    series.count(ended(first_s=9.0, backend="gpu1", outcome=Outcome.UNSERVED))
    series.count(ended(model="other", outcome=Outcome.FAULT))
    assert (series.ever.n, series.ever.n_reused, series.ever.n_computed) == (3, 240, 60)
    assert (series.ever.n_unserved, series.ever.n_faults, series.ever.saved_s) == (1, 1, 2.0)
    assert series.names() == (["gpu0", "gpu1"], ["m", "other"])
    (point,) = series.points("hour", NOON + 30, backend="gpu1")
    assert (point[0], point[1].n) == (NOON, 1)
    (point,) = series.points("day", NOON + 30, model="m")
    assert point[1].n == 2


def test_a_request_counts_when_it_ends() -> None:
    """A long one belongs to the minute in which its answer was complete."""
    series = Series()
    series.count(ended(total_s=90.0))
    assert [at for at, _ in series.points("hour", NOON + 100)] == [NOON + 60]
    assert total(series.since(NOON + 60)).n == 1
    assert total(series.since(NOON + 120)).n == 0


@pytest.mark.parametrize("offset_s", [0, MINUTE, HOUR / 2, HOUR - 1])
def test_a_day_may_begin_in_the_middle_of_an_hour(offset_s: float) -> None:
    """Each minute from then on counts once, be it in its minute's or its hour's sum."""
    series = Series()
    for minute in range(180):
        series.count(ended(NOON + minute * MINUTE))
    assert total(series.since(NOON + offset_s)).n == 180 - offset_s // MINUTE


@pytest.mark.parametrize("seconds", [0.001, 0.02, 0.5, 7.0, 300.0])
def test_percentiles_are_within_seven_percent(seconds: float) -> None:
    """Of a histogram with classes a seventh wide."""
    series = Series()
    for _ in range(10):
        series.count(ended(first_s=seconds))
    for share in (0.5, 0.95):
        found = series.ever.first_s(share)
        assert found is not None
        assert found == pytest.approx(seconds, rel=0.08)


def test_percentiles_of_two_kinds() -> None:
    """Half of them quick, one in ten slow; none without a first token."""
    series = Series()
    for seconds in [0.1] * 9 + [20.0]:
        series.count(ended(first_s=seconds))
    assert class_of(series.ever.first_s(0.5) or 0) == class_of(0.1)
    assert class_of(series.ever.first_s(0.95) or 0) == class_of(20.0)
    assert Series().ever.first_s(0.5) is None


def test_an_empty_disk_has_no_bytes() -> None:
    """Not one, which the page would draw; where it was not looked at, none is told."""
    series = Series()
    series.stored(NOON, 0)
    assert [sums.to_json()["disk_bytes"] for _, sums in series.points("hour", NOON)] == [0]
    assert Series().ever.to_json()["disk_bytes"] is None


def test_old_sums_go() -> None:
    """Minutes after a day; what is since ever stays."""
    series = Series()
    series.count(ended())
    series.sweep(NOON + 30 * 86_400)
    assert (len(list(series.points("hour", NOON))), total(series.since(0)).n, series.ever.n) == (0, 1, 1)
    series.sweep(NOON + 500 * 86_400)
    assert (len(series), total(series.since(0)).n, series.ever.n) == (1, 0, 1)


def test_sums_of_an_earlier_process_are_added() -> None:
    """Also to a minute that has begun again."""
    first, second = Series(), Series()
    first.count(ended(first_s=1.0))
    second.count(ended(first_s=1.0))
    second.load(first.take_dirty())
    assert (second.ever.n, sum(second.ever.first.values())) == (2, 2)
    assert first.take_dirty() == []
    assert total([]).n == 0


# -- savings


def test_nothing_is_claimed_before_a_prefill_was_seen() -> None:
    assert Savings().of(PrefillRate(), 1000) == (0.0, 0.0)


def test_savings_say_how_sure_they_are() -> None:
    """By how far the observed prefills lie from the learned line."""
    exact, rough = PrefillRate(), PrefillRate()
    for i in range(8):
        exact.observe(0, 1000, 1.0)
        rough.observe(0, 1000, 1.2 if i % 2 else 0.8)
    assert Savings().of(exact, 500) == pytest.approx((0.5, 0.0), abs=0.01)
    saved_s, error_s = Savings().of(rough, 1000)
    assert error_s / saved_s == pytest.approx(0.2, abs=0.03)
    assert error_share(PrefillRate()) == 0.0


def test_savings_by_one_or_two_prefills_are_a_guess() -> None:
    """A line through them lies on them; that is no certainty, and the next one is looked at again."""
    rate, savings = PrefillRate(), Savings()
    for _ in range(2):
        rate.observe(0, 1000, 1.0)
        assert savings.of(rate, 500) == pytest.approx((0.5, 0.5), abs=0.01)
    rate.observe(0, 1000, 1.0)
    assert savings.of(rate, 500) == pytest.approx((0.5, 0.0), abs=0.01)


def test_short_pieces_do_not_raise_what_a_long_prompt_is_said_to_take() -> None:
    """Each call of llama-server costs some time more. Of hundreds of follow-ups, none counts as part of a long prompt,
    and a restart remembers the long ones."""
    rate = PrefillRate()
    for start in range(0, 8192, 2048):
        rate.observe(start, start + 2048, 2.048)
    for i in range(300):
        rate.observe(7000 + i, 7080 + i, 0.2)
    for its in (rate, PrefillRate.from_json(rate.to_json())):
        assert its.seconds(0, 8000) > 10.0  # what placement thinks
        assert Savings().of(its, 8000) == pytest.approx((8.0, 0.0), rel=0.01)


# -- words


def restored(**more: object) -> list[Act]:
    act = {
        "step": "restore",
        "seconds": 0.6,
        "is_done": True,
        "n_tokens": 41_203,
        "size_bytes": 2_100_000_000,
    }
    return [Act(**{**act, **more})]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("activity", "acts", "text"),
    [
        (
            ended(slot=2, n_prompt=41_560, n_reused=41_203, source="resident"),
            [],
            "slot 2 held 41,203 of 41,560 tokens",
        ),
        (
            ended(slot=0, n_prompt=41_560, n_reused=41_203, source="snapshot", saved_s=71.0),
            restored(),
            "restored 2.0 GiB in 0.6 s instead of 71 s of prefill: 41,203 of 41,560 tokens",
        ),
        (ended(slot=0, n_prompt=500, n_reused=0), [], "nothing of it was cached: all 500 tokens computed"),
        (ended(slot=0, n_prompt=6_042, n_reused=8), [], "only 8 of its 6,042 tokens were cached"),
        (
            ended(slot=0, n_prompt=500, n_reused=0),
            restored(is_done=False),
            "nothing of it was cached: all 500 tokens computed",
        ),
        (
            ended(slot=0, diverged={"why": "changed", "at": 16_276, "where": "system", "n_lost": 9_000}),
            [],
            "differs at token 16,276, in the system message: 9,000 cached tokens behind it computed again",
        ),
        (
            ended(slot=0, diverged={"why": "went back", "at": 7, "where": "message", "message": 3, "role": "user"}),
            [],
            "the conversation went back to token 7, in message 3 (user)",
        ),
        (
            ended(slot=0, diverged={"why": "checkpoint", "at": 7, "where": "tools", "n_lost": 2_000}),
            [],
            "differs at token 7, in the tools: this model rewinds to checkpoints only,"
            " 2,000 tokens before it computed again",
        ),
        (ended(source="server"), [], "llama-server chose the slot: 80 of 100 tokens reused"),
        (ended(backend="gpu0"), [], "llama-server chose the slot"),
        (ended(backend=None, queued_s=5.0), [], "it left the queue"),
        (ended(slot=1, n_reused=None), [], "slot 1; its answer had not begun"),
    ],
)  # fmt: skip
def test_decisions_in_words(activity: Activity, acts: list[Act], text: str) -> None:
    assert in_words(activity, acts) == text


def test_a_timeline_has_its_steps_in_order() -> None:
    """From the arrival on; what took no time is left out."""
    decision = Decision("r", NOON, 500, since=100.5, queued_s=2.0)
    decision.acts = [
        Act("restore", 0.5, is_done=True, size_bytes=3_000_000),
        Act("prefill", 4.0, is_done=True, n_tokens=400, waited_s=1.0, n_interruptions=2),
    ]
    decision.act_ends = [103.0, 108.0]
    found = stages([decision], began=100.0, sent_at=108.0, first_s=8.5, total_s=12.0)
    assert [(one.name, one.begin_s, one.seconds) for one in found] == [
        ("read", 0.0, 0.5),
        ("queue", 0.5, 2.0),
        ("restore", 2.5, 0.5),
        ("turn", 3.0, 1.0),
        ("prefill", 4.0, 4.0),
        ("prompt", 8.0, 0.5),
        ("answer", 8.5, 3.5),
    ]
    assert found[2].note == "2.9 MiB"
    assert found[4].note == "400 tokens, stopped 2 times for others"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.004, "4 ms"), (0.62, "0.62 s"), (7.24, "7.2 s"), (71, "71 s"), (720, "12 min"), (12_240, "3.4 h")],
)
def test_seconds_in_words(value: float, text: str) -> None:
    assert readable_seconds(value) == text
