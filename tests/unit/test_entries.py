"""Who goes when room is needed: what nobody can use, then what is worth least; and whether a save is worth it."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaslot.cache.content import SnapshotKind
from llamaslot.scheduling.eviction import ByUse, ByValue, ReuseClass
from llamaslot.store import Prospect, Snapshot
from llamaslot.store.entries import SnapshotTable
from llamaslot.store.quota import Deficit

OURS, OTHERS = "model-a", "model-b"


def snapshot(id_: str, size_bytes: int = 1_000, n_tokens: int = 10, **more: Any) -> Snapshot:
    fields: dict[str, Any] = {"fingerprint": OURS, **more}
    return Snapshot(id_, n_tokens, "", size_bytes, created_at=0.0, checkpoints=(), source="t", **fields)


def shelf_of(*snapshots: Snapshot, order: ByValue | ByUse | None = None) -> SnapshotTable:
    """Each was used ten seconds after the one before, the first at 0."""
    shelf = SnapshotTable(order)
    shelf.fingerprint = OURS
    for at, each in enumerate(snapshots):
        shelf.add(each, 10.0 * at)
    return shelf


def ids(victims: list[Snapshot]) -> list[str]:
    return [victim.id for victim in victims]


# -- who goes ------------------------------------------------------------------------------------------------------


def test_what_another_model_made_goes_first() -> None:
    """However worthless what can be used may be; and before it is known which model it is, nobody is another's."""
    shelf = shelf_of(snapshot("dead"), snapshot("other", fingerprint=OTHERS), snapshot("live"))
    shelf.branch("dead", 20.0)
    assert ids(shelf.victims(2_500, 0, (), 30.0)) == ["other", "dead", "live"]
    shelf.fingerprint = None
    assert ids(shelf.victims(1, 0, (), 30.0)) == ["dead"]


def test_what_was_left_behind_goes_until_somebody_comes_back() -> None:
    """A hit says that it was not dead after all."""
    shelf = shelf_of(snapshot("old"), snapshot("edited"))
    shelf.branch("edited", 20.0)
    assert ids(shelf.victims(1, 0, (), 30.0)) == ["edited"]
    shelf.hit("edited", 40.0)
    assert shelf.standings["edited"].habit is ReuseClass.RETURNING
    assert ids(shelf.victims(1, 0, (), 50.0)) == ["old"]


def test_one_that_goes_further_is_as_likely_to_be_asked_for() -> None:
    """It has the hits of the one that it supersedes: a conversation does not become a new one by being saved."""
    shelf = shelf_of(snapshot("first"), snapshot("other"))
    shelf.hit("first", 15.0)
    shelf.add(snapshot("second"), 16.0)
    shelf.inherit("second", "first", 16.0)
    shelf.take("first", 16.0)
    assert ids(shelf.victims(1, 0, (), 600.0)) == ["other"]
    assert shelf.standings["second"].n_hits == 1


def test_nobody_goes_who_is_not_needed() -> None:
    """When the last victim is so large that an earlier one can stay, it stays."""
    shelf = shelf_of(snapshot("small", 100), snapshot("large", 5_000), order=ByUse())
    assert ids(shelf.victims(4_000, 0, (), 30.0)) == ["large"]
    assert ids(shelf.victims(5_050, 0, (), 30.0)) == ["small", "large"]
    assert shelf.victims(0, 0, (), 30.0) == []


def test_room_for_files_too() -> None:
    """As many go as there are files too many, though their bytes would fit."""
    shelf = shelf_of(*(snapshot(str(i)) for i in range(5)), order=ByUse())
    assert ids(shelf.victims(0, 2, (), 60.0)) == ["0", "1"]
    assert ids(shelf.victims(2_500, 1, (), 60.0)) == ["0", "1", "2"]
    assert ids(shelf.victims(-9_000, 1, (), 60.0)) == ["0"]


def test_held_ones_stay() -> None:
    """A plan's source, what the caller keeps, what is pinned for good; a pin of another model's holds nothing."""
    pinned = snapshot("pinned", is_pinned=True)
    useless = snapshot("useless", is_pinned=True, fingerprint=OTHERS)
    shelf = shelf_of(snapshot("source"), snapshot("kept"), pinned, useless, snapshot("free"))
    shelf.pin("source")
    assert sorted(ids(shelf.victims(10**9, 0, {"kept"}, 60.0))) == ["free", "useless"]
    shelf.unpin("source")
    assert sorted(ids(shelf.victims(10**9, 0, {"kept"}, 60.0))) == ["free", "source", "useless"]


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40))
def test_the_order_is_that_of_a_plain_sort(seed: int, n: int) -> None:
    """Over a random day, at each question, as long as there are few enough to look at all of them."""
    rng = random.Random(seed)
    order, now = ByValue(), 0.0
    shelf = shelf_of(order=order)
    for serial in range(n):
        now += rng.expovariate(1 / 100)
        kind = rng.choice([SnapshotKind.LEAF, SnapshotKind.LEAF, SnapshotKind.TRUNK])
        of = rng.choice([OURS, OURS, OTHERS])
        shelf.add(
            snapshot(str(serial), rng.randrange(1, 10**6), rng.randrange(1, 500), kind=kind, fingerprint=of),
            now,
        )
        one = rng.choice(list(shelf.snapshots))
        match rng.randrange(4):
            case 0:
                shelf.hit(one, now)
            case 1:
                shelf.branch(one, now)
            case 2 if serial > 3:
                shelf.take(one, now)
        shelf.check()
    now += rng.expovariate(1 / 1_000)
    shelf.tend(now)
    everybody = shelf.victims(10**12, 0, (), now)
    ranks = [(each.fingerprint == OURS, order.rank(shelf.standings[each.id], now)) for each in everybody]
    assert len(everybody) == len(shelf.snapshots)
    assert ranks == sorted(ranks)


def test_ten_thousand_are_not_all_looked_at() -> None:
    """Each choice looks at a few hundred at most, and after enough of them everybody has had a turn."""

    class Counting(ByUse):
        n_looks = 0

        def rank(self, standing: Any, now: float) -> float:
            self.n_looks += 1
            return super().rank(standing, now)

    order = Counting()
    shelf = shelf_of(*(snapshot(f"{i:05}") for i in range(10_000)), order=order)
    order.n_looks = 0
    shelf.tend(10**6)
    assert ids(shelf.victims(1, 0, (), 10**6)) == ["00000"]
    assert order.n_looks < 500


# -- learning ------------------------------------------------------------------------------------------------------


def seconds_of(order: ByValue) -> float:
    return sum(math.fsum(habit["seconds"]) for habit in order.returns.to_json()["habits"].values())


def test_time_before_it_was_listed_teaches_nothing() -> None:
    """While llamaslot was not running nobody could come back."""
    order = ByValue()
    shelf = shelf_of(order=order)
    shelf.add(snapshot("a"), 5_000.0, last_used=0.0)
    shelf.tend(5_100.0)
    assert seconds_of(order) == pytest.approx(100.0, rel=0.2)


def test_only_what_can_be_used_teaches() -> None:
    """Nobody comes back to what another model made."""
    order = ByValue()
    shelf = shelf_of(snapshot("other", fingerprint=OTHERS), order=order)
    shelf.tend(1_000.0)
    shelf.hit("other", 1_000.0)
    shelf.take("other", 2_000.0)
    assert seconds_of(order) == 0


def test_a_kind_that_never_comes_back_makes_room_for_others() -> None:
    """Once that was seen often enough, it goes before what is older."""
    order, now = ByValue(), 0.0
    shelf = shelf_of(order=order)
    for serial in range(300):
        now += 60.0
        shelf.add(snapshot(f"trunk-{serial}", kind=SnapshotKind.TRUNK), now)
        shelf.add(snapshot(f"leaf-{serial}"), now)
        shelf.hit(f"leaf-{serial}", now + 30.0)
        shelf.take(f"leaf-{serial}", now + 31.0)
        if serial >= 5:
            shelf.take(f"trunk-{serial - 5}", now + 50.0)
    shelf.add(snapshot("leaf", n_tokens=9), now)
    shelf.add(snapshot("trunk", kind=SnapshotKind.TRUNK), now + 60.0)
    assert ids(shelf.victims(1, 0, {f"trunk-{serial}" for serial in range(300)}, now + 100.0)) == ["trunk"]


# -- whether to save -----------------------------------------------------------------------------------------------


def test_a_save_that_costs_nobody_anything_gains() -> None:
    """There is room, or only what nobody can use has to go."""
    shelf = shelf_of(snapshot("other", fingerprint=OTHERS))
    wanted = Prospect(1_000, 1_000, saves_s=1.0)
    assert (
        shelf.would_gain(wanted, Deficit(-1, 0), (), 60.0)
        == shelf.would_gain(wanted, Deficit(500, 0), (), 60.0)
        > 0
    )


def test_a_save_that_costs_more_than_it_saves_does_not_gain() -> None:
    """A trunk that everybody needs would go for an answer that is computed again in no time."""
    shelf = shelf_of(snapshot("trunk", n_tokens=500, kind=SnapshotKind.TRUNK))
    assert shelf.would_gain(Prospect(1_000, 1_000, saves_s=0.01), Deficit(500, 0), (), 60.0) < 0
    assert shelf.would_gain(Prospect(1_000, 1_000, saves_s=100.0), Deficit(500, 0), (), 60.0) > 0


def test_a_save_without_room_is_refused_by_any_count() -> None:
    """Nothing may go for it."""
    shelf = shelf_of(snapshot("a"))
    assert shelf.would_gain(Prospect(1_000, 1_000, saves_s=9.0), Deficit(500, 0), {"a"}, 60.0) == -math.inf
    assert shelf.would_gain(Prospect(1_000, 1_000, saves_s=9.0), Deficit(2_000, 0), (), 60.0) == -math.inf


def test_what_was_left_alone_for_long_gains_less() -> None:
    """Idle for an hour and never come back to, against used just now and often."""
    shelf = shelf_of(snapshot("before"))
    for at in (10.0, 20.0):
        shelf.hit("before", at)
    idle = Prospect(1_000, 1_000, 1.0, idle_s=3_600.0)
    often = Prospect(1_000, 1_000, 1.0, after="before")
    new = Prospect(1_000, 1_000, 1.0)
    gains = [shelf.would_gain(each, Deficit(-1, 0), (), 60.0) for each in (idle, new, often)]
    assert gains == sorted(gains)
    assert gains[0] < gains[1] < gains[2]
