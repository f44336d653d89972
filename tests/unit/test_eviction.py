"""Which snapshots go when room is needed: those that nobody can use, then those worth least. And how that is found
without ranking all: the heap against a plain sort."""

from __future__ import annotations

import math
import random
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.simulator.orders import ByUse
from llamaslot.cache.content import SnapshotKind
from llamaslot.scheduling.snapshot_value import ByValue
from llamaslot.store import Snapshot
from llamaslot.store.eviction import Ranking
from llamaslot.store.snapshot import Part
from llamaslot.store.snapshot_table import SnapshotTable

OURS, OTHERS = "model-a", "model-b"


def snapshot(id_: str, size_bytes: int = 1_000, n_tokens: int = 10, **more: Any) -> Snapshot:
    fields: dict[str, Any] = {"fingerprint": OURS, **more}
    return Snapshot(id_, n_tokens, "", size_bytes, created_at=0.0, checkpoints=(), source="t", **fields)


def table_of(*snapshots: Snapshot, order: ByValue | ByUse | None = None) -> SnapshotTable:
    """Each was used ten seconds after the one before, the first at 0."""
    table = SnapshotTable(order)
    table.eviction.fingerprints = frozenset({OURS})
    for at, each in enumerate(snapshots):
        table.add(each, 10.0 * at)
    return table


def ids(victims: list[Snapshot]) -> list[str]:
    return [victim.id for victim in victims]


# -- what is there without it --------------------------------------------------------------------------------------


def covered(*snapshots: Snapshot) -> list[int]:
    table = table_of(*snapshots)
    found = [table.files.n_covered(each) for each in snapshots]
    table.eviction.tend(1_000.0)
    assert [table.stats[each.id].n_covered for each in snapshots] == found
    return found


def rows(*files: tuple[str, int, int]) -> tuple[Part, ...]:
    return tuple(Part(file, start, end, 100) for file, start, end in files)


def test_rows_that_another_needs_are_there_without_it() -> None:
    """Up to where they part, also in the middle of a file; not those that only a shared prefix goes on with."""
    first = snapshot("a", n_tokens=1000)
    second = snapshot("b", n_tokens=900, parts=rows(("a.kv", 0, 700), ("b.ext", 700, 900)))
    third = snapshot(
        "c", n_tokens=950, parts=rows(("a.kv", 0, 700), ("b.ext", 700, 850), ("c.ext", 850, 950))
    )
    assert covered(first) == [0]
    assert covered(first, second) == [700, 700]
    assert covered(first, second, third) == [700, 850, 850]
    goes_on = snapshot("d", n_tokens=1200, parts=rows(("a.kv", 0, 1000), ("d.ext", 1000, 1200)))
    assert covered(first, goes_on) == [1000, 1000]
    trunk = snapshot("a", n_tokens=1000, kind=SnapshotKind.TRUNK)
    assert covered(trunk, goes_on) == [0, 1000]


def test_on_models_with_states_the_last_common_one_counts() -> None:
    """Rows behind it are of no use."""
    parts = (*rows(("a.ext", 0, 1000)), *rows(("s.ext", 600, 600), ("t.ext", 1000, 1000)))
    other = (*rows(("a.ext", 0, 800), ("b.ext", 800, 900)), *rows(("s.ext", 600, 600), ("u.ext", 900, 900)))
    first, second = snapshot("a", n_tokens=1000, parts=parts), snapshot("b", n_tokens=900, parts=other)
    assert covered(first, second) == [600, 600]
    assert covered(first, snapshot("c", n_tokens=900, parts=(*other[:2], other[3]))) == [0, 0]


# -- who goes ------------------------------------------------------------------------------------------------------


def test_what_another_model_made_goes_first() -> None:
    """However worthless what can be used may be; and before it is known which model it is, nobody is another's."""
    table = table_of(snapshot("dead"), snapshot("other", fingerprint=OTHERS), snapshot("live"))
    assert ids(table.eviction.victims(2_500, 0, (), 30.0)) == ["other", "dead", "live"]
    table.eviction.fingerprints = frozenset()
    assert ids(table.eviction.victims(1, 0, (), 30.0)) == ["dead"]


def test_one_that_goes_further_is_as_likely_to_be_asked_for() -> None:
    """It has the hits of the one that it supersedes: a conversation does not become a new one by being saved."""
    table = table_of(snapshot("first"), snapshot("other"))
    table.hit("first", 15.0)
    table.add(snapshot("second"), 16.0)
    table.inherit("second", "first", 16.0)
    table.take("first", 16.0)
    assert ids(table.eviction.victims(1, 0, (), 600.0)) == ["other"]
    assert table.stats["second"].n_hits == 1


def test_no_slot_is_given_up_that_is_not_needed() -> None:
    """When the last victim is so large that an earlier one can stay, it stays."""
    table = table_of(snapshot("small", 100), snapshot("large", 5_000), order=ByUse())
    assert ids(table.eviction.victims(4_000, 0, (), 30.0)) == ["large"]
    assert ids(table.eviction.victims(5_050, 0, (), 30.0)) == ["small", "large"]
    assert table.eviction.victims(0, 0, (), 30.0) == []


def test_room_for_files_too() -> None:
    """As many go as there are files too many, though their bytes would fit."""
    table = table_of(*(snapshot(str(i)) for i in range(5)), order=ByUse())
    assert ids(table.eviction.victims(0, 2, (), 60.0)) == ["0", "1"]
    assert ids(table.eviction.victims(2_500, 1, (), 60.0)) == ["0", "1", "2"]
    assert ids(table.eviction.victims(-9_000, 1, (), 60.0)) == ["0"]


def test_held_ones_stay() -> None:
    """A plan's source, what the caller keeps, what is pinned for good; a pin of another model's holds nothing."""
    pinned = snapshot("pinned", is_pinned=True)
    useless = snapshot("useless", is_pinned=True, fingerprint=OTHERS)
    table = table_of(snapshot("source"), snapshot("kept"), pinned, useless, snapshot("free"))
    table.pin("source")
    assert sorted(ids(table.eviction.victims(10**9, 0, {"kept"}, 60.0))) == ["free", "useless"]
    table.unpin("source")
    assert sorted(ids(table.eviction.victims(10**9, 0, {"kept"}, 60.0))) == ["free", "source", "useless"]


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40))
def test_the_order_is_that_of_a_plain_sort(seed: int, n: int) -> None:
    """Over a random day, at each question, as long as there are few enough to look at all of them."""
    rng = random.Random(seed)
    order, now = ByValue(), 0.0
    table = table_of(order=order)
    for serial in range(n):
        now += rng.expovariate(1 / 100)
        kind = rng.choice([SnapshotKind.LEAF, SnapshotKind.LEAF, SnapshotKind.TRUNK])
        of = rng.choice([OURS, OURS, OTHERS])
        table.add(
            snapshot(str(serial), rng.randrange(1, 10**6), rng.randrange(1, 500), kind=kind, fingerprint=of),
            now,
        )
        one = rng.choice(list(table.snapshots))
        match rng.randrange(3):
            case 0:
                table.hit(one, now)
            case 1 if serial > 3:
                gone = table.snapshots[one]
                table.take(one, now)
                table.release(gone)
        table.check()
    now += rng.expovariate(1 / 1_000)
    table.eviction.tend(now)
    everybody = table.eviction.victims(10**12, 0, (), now)
    ranks = [(each.fingerprint == OURS, order.rank(table.stats[each.id], now)) for each in everybody]
    assert len(everybody) == len(table.snapshots)
    assert ranks == sorted(ranks)


def test_ten_thousand_are_not_all_looked_at() -> None:
    """Each choice looks at a few hundred at most, and after enough of them everybody has had a turn."""

    class Counting(ByUse):
        n_looks = 0

        def rank(self, stats: Any, now: float) -> float:
            self.n_looks += 1
            return super().rank(stats, now)

    order = Counting()
    table = table_of(*(snapshot(f"{i:05}") for i in range(10_000)), order=order)
    order.n_looks = 0
    table.eviction.tend(10**6)
    assert ids(table.eviction.victims(1, 0, (), 10**6)) == ["00000"]
    assert order.n_looks < 500


# -- learning ------------------------------------------------------------------------------------------------------


def seconds_of(order: ByValue) -> float:
    return sum(
        math.fsum(reuse_class["seconds"]) for reuse_class in order.hit_rates.to_json()["classes"].values()
    )


def test_time_before_it_was_listed_teaches_nothing() -> None:
    """While llamaslot was not running nobody could come back."""
    order = ByValue()
    table = table_of(order=order)
    table.add(snapshot("a"), 5_000.0, last_used=0.0)
    table.eviction.tend(5_100.0)
    assert seconds_of(order) == pytest.approx(100.0, rel=0.2)


def test_only_what_can_be_used_teaches() -> None:
    """Nobody comes back to what another model made."""
    order = ByValue()
    table = table_of(snapshot("other", fingerprint=OTHERS), order=order)
    table.eviction.tend(1_000.0)
    table.hit("other", 1_000.0)
    table.take("other", 2_000.0)
    assert seconds_of(order) == 0


def test_a_kind_that_never_comes_back_makes_room_for_others() -> None:
    """Once that was seen often enough, it goes before what is older."""
    order, now = ByValue(), 0.0
    table = table_of(order=order)
    for serial in range(300):
        now += 60.0
        table.add(snapshot(f"trunk-{serial}", kind=SnapshotKind.TRUNK), now)
        table.add(snapshot(f"leaf-{serial}"), now)
        table.hit(f"leaf-{serial}", now + 30.0)
        table.take(f"leaf-{serial}", now + 31.0)
        if serial >= 5:
            table.take(f"trunk-{serial - 5}", now + 50.0)
    table.add(snapshot("leaf", n_tokens=9), now)
    table.add(snapshot("trunk", kind=SnapshotKind.TRUNK), now + 60.0)
    assert ids(table.eviction.victims(1, 0, {f"trunk-{serial}" for serial in range(300)}, now + 100.0)) == [
        "trunk"
    ]


# -- the heap ------------------------------------------------------------------------------------------------------

OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["put", "add", "rank", "drop", "set", "ask"]), st.integers(0, 9), st.integers(0, 99)
    )
)


@given(OPERATIONS)
def test_few_are_sorted_as_of_now(operations: list[tuple[str, int, int]]) -> None:
    """Whatever has come, gone or changed, once each was looked at again."""
    values: dict[str, int] = {}
    ranking = Ranking(lambda holder: (values[holder], holder))
    for what, which, value in operations:
        holder = str(which)
        if what == "put":
            values[holder] = value
            ranking.put(holder)
        elif what == "add":
            values[holder] = value
            ranking.add_many([holder])
        elif what == "rank":
            ranking.rank_some(1)
        elif what == "drop":
            ranking.drop(holder)
            values.pop(holder, None)
        elif what == "set" and holder in values:
            values[holder] = value
        elif what == "ask":
            for due in ranking.turn():
                ranking.put(due)
            assert list(ranking.least_first()) == sorted(values, key=lambda each: (values[each], each))
        assert len(ranking) == len(values)


def test_each_has_its_turn() -> None:
    """All are looked at again within as many turns as it takes, also those that came meanwhile."""
    ranking = Ranking(lambda holder: (0, holder))
    for serial in range(10):
        ranking.put(str(serial))
    seen = ranking.turn(4) + ranking.turn(4)
    ranking.drop("9")
    ranking.put("10")
    seen += ranking.turn(4) + ranking.turn(4) + ranking.turn(4)
    assert set(seen) - {"9"} == {str(serial) for serial in range(11)} - {"9"}
    assert Ranking(lambda holder: (0, holder)).turn() == []


def test_a_turn_ranks_no_more_than_its_share_of_many_new_ones() -> None:
    """All at once would hold up the first save after a start. The order is right all the same."""
    ranked = list[str]()

    def rank(holder: str) -> tuple[int]:
        ranked.append(holder)
        return (-int(holder),)

    ranking = Ranking(rank)
    ranking.add_many([str(serial) for serial in range(10)])
    assert ranking.turn(4) == ranking.turn(4) == []
    assert len(ranked) == 8
    assert len(ranking.turn(4)) == 4
    assert len(ranked) == 10
    ranking.add_many([str(serial) for serial in range(10, 20)])
    assert ranking.turn(4) == []
    assert list(ranking.least_first()) == [str(serial) for serial in reversed(range(20))]


def test_stopping_half_way_loses_nobody() -> None:
    """Who was looked at and not taken is there the next time."""
    ranking = Ranking(lambda holder: (int(holder), holder))
    for serial in range(5):
        ranking.put(str(serial))
    assert list(islice(ranking.least_first(), 2)) == ["0", "1"]
    assert list(ranking.least_first()) == ["0", "1", "2", "3", "4"]


def test_one_whose_rank_has_grown_waits_for_its_turn() -> None:
    """Its old rank is not believed, even if nobody said that it has changed."""
    values = {"a": 1, "b": 2, "c": 3}
    ranking = Ranking(lambda holder: (values[holder], holder))
    for holder in values:
        ranking.put(holder)
    values["a"] = 9
    assert list(ranking.least_first()) == ["b", "c", "a"]


def test_a_long_day_does_not_fill_the_heap() -> None:
    """Ranks that are no longer true are thrown away in time."""
    values = {str(serial): 0 for serial in range(10)}
    ranking = Ranking(lambda holder: (values[holder], holder))
    for serial in range(10_000):
        holder = str(serial % 10)
        values[holder] = serial
        ranking.put(holder)
    assert len(ranking._heap) <= 4 * 10 + Ranking.AT_ONCE + 1
    assert list(ranking.least_first()) == sorted(values, key=lambda each: values[each])
