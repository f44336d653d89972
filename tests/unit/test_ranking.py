"""Which snapshot has the least rank among many whose ranks change: the heap against a plain sort."""

from __future__ import annotations

from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from llamaslot.store.eviction import Ranking

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
