"""What a snapshot is worth: returns are learned by class, age and length; who goes first reads like a transcript."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.simulator.orders import ByUse
from llamaslot.cache.content import SnapshotKind
from llamaslot.scheduling.snapshot_value import (
    N_BUCKETS,
    ByValue,
    HitRateModel,
    Order,
    ReuseClass,
    SnapshotStats,
    bucket_of,
)

REUSE_CLASSES = list(ReuseClass)


def stats(id_: str = "a", n_tokens: int = 10_000, used: float = 0.0, **more: Any) -> SnapshotStats:
    fields: dict[str, Any] = {
        "size_bytes": n_tokens * 100,
        "kind": SnapshotKind.LEAF,
        "counted_until": used,
        **more,
    }
    return SnapshotStats(id_, n_tokens, last_used=used, **fields)


def first(order: Order, now: float, *stats: SnapshotStats) -> list[str]:
    """Their ids, in the order in which they go."""
    return [each.id for each in sorted(stats, key=lambda each: order.rank(each, now))]


def lived(
    hit_rates: HitRateModel,
    reuse_class: ReuseClass,
    rng: random.Random,
    rate: float,
    n: int,
    n_tokens: int = 10_000,
) -> None:
    """``n`` snapshots of a class that come back at a constant rate per second, or are evicted after an hour."""
    for _ in range(n):
        age = min(rng.expovariate(rate), 3600.0) if rate else 3600.0
        hit_rates.waited(reuse_class, 0.0, age, n_tokens)
        if age < 3600.0:
            hit_rates.hit(reuse_class, age, n_tokens)
        else:
            hit_rates.gone(reuse_class)


# -- learning ------------------------------------------------------------------------------------------------------


def test_without_data_the_priors_hold() -> None:
    """What was used a moment ago comes back sooner than what was not; a trunk is likeliest."""
    hit_rates = HitRateModel()
    for reuse_class in REUSE_CLASSES:
        densities = [hit_rates.density(reuse_class, age, 10_000) for age in (0, 60, 600, 6_000, 60_000)]
        assert densities == sorted(densities, reverse=True)
        assert densities[0] > 10 * densities[-1] > 0
    at_an_hour = {
        reuse_class: hit_rates.density(reuse_class, 3600.0, 10_000) for reuse_class in REUSE_CLASSES
    }
    assert at_an_hour[ReuseClass.TRUNK] > at_an_hour[ReuseClass.RETURNING] > at_an_hour[ReuseClass.FRESH]


@pytest.mark.parametrize("rate", [1e-2, 1e-3, 1e-4])
def test_a_rate_is_learned(rate: float) -> None:
    """From a thousand lives, wherever there was much to see of it."""
    hit_rates = HitRateModel()
    lived(hit_rates, ReuseClass.FRESH, random.Random(1), rate, 1_000)
    for age in (30.0, 100.0):
        assert rate / 2 < hit_rates.density(ReuseClass.FRESH, age, 10_000) < 4 * rate


def test_a_kind_that_never_returns_sinks() -> None:
    """Below what is left behind is believed of others, whatever was believed of it before."""
    hit_rates, rng = HitRateModel(), random.Random(1)
    before = hit_rates.density(ReuseClass.FRESH, 60.0, 10_000)
    for _ in range(20):
        lived(hit_rates, ReuseClass.FRESH, rng, 0.0, 10)
        lived(hit_rates, ReuseClass.RETURNING, rng, 1e-3, 10)
    assert hit_rates.density(ReuseClass.FRESH, 60.0, 10_000) < before / 50
    assert hit_rates.density(ReuseClass.RETURNING, 60.0, 10_000) > 1e-4


def test_a_few_events_do_not_mislead() -> None:
    """One that came back does not make all of its age worth keeping, nor do three that did not."""
    hit_rates = HitRateModel()
    before = hit_rates.density(ReuseClass.FRESH, 600.0, 10_000)
    hit_rates.waited(ReuseClass.FRESH, 0.0, 600.0, 10_000)
    hit_rates.hit(ReuseClass.FRESH, 600.0, 10_000)
    assert before / 4 < hit_rates.density(ReuseClass.FRESH, 600.0, 10_000) < 4 * before
    for _ in range(3):
        hit_rates.waited(ReuseClass.FRESH, 0.0, 600.0, 10_000)
        hit_rates.gone(ReuseClass.FRESH)
    assert before / 4 < hit_rates.density(ReuseClass.FRESH, 600.0, 10_000) < 4 * before


def test_what_is_learned_of_all_helps_those_of_whom_little_is_known() -> None:
    """Where nobody comes back within minutes, a class that was not seen yet is believed to be as slow."""
    hit_rates = HitRateModel()
    before = hit_rates.density(ReuseClass.TRUNK, 60.0, 10_000)
    lived(hit_rates, ReuseClass.RETURNING, random.Random(1), 1e-5, 1_000)
    assert hit_rates.density(ReuseClass.TRUNK, 60.0, 10_000) < before / 3


def test_old_lives_fade() -> None:
    """Users whose ways change are known anew after some thousand events."""
    hit_rates, rng = HitRateModel(), random.Random(1)
    lived(hit_rates, ReuseClass.FRESH, rng, 1e-2, 10_000)
    quick = hit_rates.density(ReuseClass.FRESH, 100.0, 10_000)
    lived(hit_rates, ReuseClass.FRESH, rng, 1e-4, 20_000)
    assert hit_rates.density(ReuseClass.FRESH, 100.0, 10_000) < quick / 30


def test_a_pause_is_worth_waiting_for() -> None:
    """Nobody comes back in the middle of a break, but everybody after it: until then the value does not fall."""
    hit_rates = HitRateModel()
    for _ in range(500):
        hit_rates.waited(ReuseClass.RETURNING, 0.0, 3_000.0, 10_000)
        hit_rates.hit(ReuseClass.RETURNING, 3_000.0, 10_000)
    assert hit_rates.density(ReuseClass.RETURNING, 600.0, 10_000) > 1e-4
    assert hit_rates.density(ReuseClass.RETURNING, 2_500.0, 10_000) > hit_rates.density(
        ReuseClass.RETURNING, 600.0, 10_000
    )


def test_lengths_that_never_return_sink_alone() -> None:
    """Single questions do not come back, and do not make conversations of the same class look dead."""
    hit_rates, rng = HitRateModel(), random.Random(1)
    for _ in range(50):
        lived(hit_rates, ReuseClass.FRESH, rng, 0.0, 20, n_tokens=300)
        lived(hit_rates, ReuseClass.FRESH, rng, 1e-3, 10, n_tokens=10_000)
    short, long = (hit_rates.density(ReuseClass.FRESH, 60.0, n) for n in (300, 10_000))
    assert short < long / 20
    assert long == pytest.approx(1e-3, rel=0.7)


@given(st.floats(0, 1e9), st.floats(0, 1e9))
def test_time_is_neither_lost_nor_made(one: float, other: float) -> None:
    """However a life is cut into pieces, all of it is counted, in the buckets of its ages."""
    start, end = sorted((one, other))
    whole, parts = HitRateModel(), HitRateModel()
    whole.waited(ReuseClass.FRESH, start, end, 64)
    cuts = [start, (start + end) / 2, end]
    for a, b in pairwise(cuts):
        parts.waited(ReuseClass.FRESH, a, b, 64)
    seconds = whole.to_json()["classes"]["fresh"]["seconds"]
    assert math.fsum(seconds) == pytest.approx(end - start)
    held = [b for b, s in enumerate(seconds) if s > 1e-9 * (end - start)]
    assert not held or bucket_of(start) <= held[0] <= held[-1] <= bucket_of(end)
    assert math.fsum(parts.to_json()["classes"]["fresh"]["seconds"]) == pytest.approx(end - start, rel=0.2)


@given(
    st.lists(
        st.tuples(st.sampled_from(REUSE_CLASSES), st.floats(0, 1e8), st.integers(1, 10**6), st.booleans())
    )
)
def test_densities_are_finite_and_above_zero(lives: list[tuple[ReuseClass, float, int, bool]]) -> None:
    """Whatever happened, and at any age."""
    hit_rates = HitRateModel()
    for reuse_class, age, n_tokens, is_hit in lives:
        hit_rates.waited(reuse_class, 0.0, age, n_tokens)
        if is_hit:
            hit_rates.hit(reuse_class, age, n_tokens)
    for reuse_class in REUSE_CLASSES:
        for age in (-1.0, 0.0, 1.0, 1e3, 1e6, 1e12):
            assert 0 < hit_rates.density(reuse_class, age, 1_000) < math.inf


# -- kept ----------------------------------------------------------------------------------------------------------


def test_what_was_learned_is_kept() -> None:
    """Through JSON, exactly."""
    hit_rates = HitRateModel()
    lived(hit_rates, ReuseClass.FRESH, random.Random(1), 1e-3, 100)
    lived(hit_rates, ReuseClass.TRUNK, random.Random(2), 1e-2, 100, n_tokens=500)
    kept = HitRateModel.from_json(orjson.loads(orjson.dumps(hit_rates.to_json())))
    assert kept.to_json() == hit_rates.to_json()
    before, after = (model.density(ReuseClass.TRUNK, 50.0, 10_000) for model in (hit_rates, kept))
    assert after == pytest.approx(before, rel=0.2)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {"classes": 3},
        {"classes": {"fresh": {"hits": [1], "seconds": [1], "n_events": 1}}},
        {"classes": {"fresh": {"hits": [-1.0] * N_BUCKETS, "seconds": [0.0] * N_BUCKETS, "n_events": 0}}},
        {"classes": {"fresh": {"hits": [True] * N_BUCKETS, "seconds": [0.0] * N_BUCKETS, "n_events": 0}}},
        {"classes": {"lost": {}}, "lengths": {"hits": "many", "expected": []}},
    ],
)
def test_a_spoilt_file_teaches_nothing(data: object) -> None:
    """Then it is the priors again."""
    assert HitRateModel.from_json(data).to_json() == HitRateModel().to_json()


def test_a_habit_that_was_not_known_yet_starts_from_its_prior() -> None:
    """New classes may come: what was learned of the others stays."""
    hit_rates = HitRateModel()
    lived(hit_rates, ReuseClass.FRESH, random.Random(1), 1e-3, 100)
    data = hit_rates.to_json()
    del data["classes"]["trunk"]
    kept = HitRateModel.from_json(data).to_json()
    assert kept["classes"]["fresh"] == hit_rates.to_json()["classes"]["fresh"]
    assert kept["classes"]["trunk"] == HitRateModel().to_json()["classes"]["trunk"]


# -- who goes first ------------------------------------------------------------------------------------------------


def test_reuse_classes() -> None:
    """A trunk is one whatever happens."""
    assert stats().reuse_class is ReuseClass.FRESH
    assert stats(n_hits=1).reuse_class is ReuseClass.RETURNING
    assert stats(kind=SnapshotKind.TRUNK, n_hits=9).reuse_class is ReuseClass.TRUNK


def test_of_two_alike_the_older_goes_first() -> None:
    order = ByValue()
    assert first(order, 1_000.0, stats("new", used=900.0), stats("old", used=100.0)) == ["old", "new"]


def test_a_trunk_stays_longest() -> None:
    """A conversation that nobody has come back to goes first, then one that somebody has."""
    order = ByValue()
    leaf, back = stats("leaf"), stats("back", n_hits=1)
    assert first(order, 600.0, stats("trunk", kind=SnapshotKind.TRUNK), back, leaf) == [
        "leaf",
        "back",
        "trunk",
    ]


def test_what_saves_less_for_its_bytes_goes_first() -> None:
    """Two contexts of one size and age: the one of which others hold most is computed again soon."""
    order = ByValue()
    order.saves_s = lambda each: {"covered": 0.1, "alone": 10.0}[each.id]
    assert first(order, 100.0, stats("alone"), stats("covered")) == ["covered", "alone"]
    order.saves_s = lambda each: 1.0
    small, large = stats("small", size_bytes=100), stats("large", size_bytes=1_000)
    assert first(order, 100.0, small, large) == ["large", "small"]


def test_what_saves_nothing_still_goes_in_order() -> None:
    """Restoring takes longer than computing: the older first all the same."""
    order = ByValue()
    order.saves_s = lambda each: 0.0
    assert first(order, 1_000.0, stats("new", used=900.0), stats("old")) == ["old", "new"]


def test_an_order_learns_from_what_happens() -> None:
    """Time without a hit is counted once, whoever asks how often."""
    order, one = ByValue(), stats("one")
    order.passed(one, 50.0)
    order.passed(one, 50.0)
    order.hit(one, 100.0)
    learned = order.hit_rates.to_json()["classes"]["fresh"]
    assert math.fsum(learned["seconds"]) == pytest.approx(100.0)
    assert learned["hits"][bucket_of(100.0)] == math.fsum(learned["hits"]) == 1


def test_by_use_is_least_recently_used() -> None:
    """The baseline: nothing else matters."""
    order = ByUse()
    old_trunk = stats("trunk", used=1.0, kind=SnapshotKind.TRUNK, n_hits=100)
    assert first(order, 9.0, stats("new", used=2.0), old_trunk) == ["trunk", "new"]
