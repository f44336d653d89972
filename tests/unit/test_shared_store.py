"""Several llamaslots in one shared store: which part each has, and one quota for all their snapshots."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from llamaslot.store import QuotaExceeded, deduplicate, inventory
from llamaslot.store.shared_store import (
    IN_PLANS_S,
    META,
    QUOTA_LOCK,
    RESERVED,
    Neighbours,
    StorePart,
    StoreUnusable,
    claim,
    name_of,
    try_lock,
)
from tests.support.cancelled import CancelledAt
from tests.support.inprocess import spawn
from tests.support.snapshots import Shelter, opened, some_tokens
from tests.support.trees import Tree, words

NOW = 2_000_000.0


class House:
    """A shared store of 10,000 bytes with one catalog for each model."""

    def __init__(self, root: Path) -> None:
        self.root, self._stack = root, AsyncExitStack()
        self.parts: dict[str, StorePart] = {}

    async def part(self, model: str, *, time: float) -> Shelter:
        """The catalog of a model, whose clock begins at ``time``."""
        self.parts[model] = part = claim(self.root, model)
        shelter = await self._stack.enter_async_context(opened(part.directory))
        shelter.time = time
        return shelter

    def die(self, model: str) -> None:
        """The kernel releases the claim of a process that has died."""
        self.parts.pop(model).release()

    def saved_bytes(self) -> int:
        """Of all models' whole files."""
        total = 0
        for file in self.root.glob("*/*.kv"):
            with contextlib.suppress(FileNotFoundError):  # on its way out
                total += file.stat().st_size
        return total

    async def close(self) -> None:
        await self._stack.aclose()
        for part in self.parts.values():
            part.release()


@pytest.fixture
async def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    monkeypatch.setattr("llamaslot.store.shared_store.time.time", lambda: NOW)
    house = House(tmp_path / "store")
    yield house
    await house.close()


# -- parts ------------------------------------------------------------------------------------------------------


def test_each_model_has_a_part_that_is_found_again(tmp_path: Path) -> None:
    """Named after it, another one for another path; the same after a restart."""
    one, other = claim(tmp_path, "/m/qwen.gguf"), claim(tmp_path, "/other/qwen.gguf")
    assert one.directory != other.directory
    assert one.directory.name.startswith("qwen-")
    one.release()
    again = claim(tmp_path, "/m/qwen.gguf")
    assert (again.directory, again.taken) == (one.directory, ())
    for part in (other, again):
        part.release()


def test_a_second_one_of_the_same_model_gets_another_part(tmp_path: Path) -> None:
    """It is told which process has the first; the first that is free is taken."""
    parts = [claim(tmp_path, "m") for _ in range(3)]
    assert len({part.directory for part in parts}) == 3
    assert parts[2].taken == (str(os.getpid()),) * 2
    parts[1].release()
    second = claim(tmp_path, "m")
    assert second.directory == parts[1].directory
    for part in (parts[0], second, parts[2]):
        part.release()


@pytest.mark.parametrize("model", ["/m/a b/ü.gguf", "a/b:Q4_K_M", "..", "x" * 300, "https://h/x.gguf?a=1"])
def test_a_part_is_one_legible_file_name(model: str) -> None:
    """Whatever names the model."""
    name = name_of(model)
    assert "/" not in name
    assert not name.startswith(".")
    assert len(name) < 60


def test_a_store_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    """With its path."""
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnusable, match=r"the store .*file/s cannot be used: Not a directory"):
        claim(tmp_path / "file" / "s", "m")


# -- one quota --------------------------------------------------------------------------------------------------


async def test_the_least_recently_used_goes_wherever_it_is(house: House) -> None:
    """Another model's older snapshots go before one's own; then one's own."""
    one, two = await house.part("one", time=1000), await house.part("two", time=2000)
    old = [await one.save(some_tokens(40, seed), 3_000) for seed in range(2)]
    own = await two.save(some_tokens(40, 2), 3_000)
    await two.save(some_tokens(40, 3), 3_000)
    assert {file.stem for file in one.directory.glob("*.kv")} == {old[1].id}
    one.time = 3000
    one.catalog.touch(old[1].id)
    await one.catalog.settle()
    await two.save(some_tokens(40, 4), 3_000)
    assert two.dropped == [own.id]
    assert one.bytes_on_disk() + two.bytes_on_disk() == 9_000


async def test_one_that_lost_a_file_drops_it_at_its_next_save(house: House) -> None:
    """Its accounts follow the disk."""
    one, two = await house.part("one", time=1000), await house.part("two", time=2000)
    lost = await one.save(some_tokens(40, 0), 6_000)
    await two.save(some_tokens(40, 1), 6_000)
    await one.save(some_tokens(40, 2), 1_000)
    assert one.dropped == [lost.id]
    assert one.catalog.size_bytes == one.bytes_on_disk() == 1_000


async def test_what_another_has_reserved_counts_while_it_lives(house: House) -> None:
    """It is not on disk yet. What a dead one had reserved never will be."""
    one, two = await house.part("one", time=1000), await house.part("two", time=2000)
    await one.catalog.reserve(6_000)
    with pytest.raises(QuotaExceeded, match="of other models in the same store"):
        await two.catalog.reserve(6_000)
    house.die("one")
    await two.catalog.reserve(6_000)


async def test_what_is_given_back_is_free_for_all(house: House) -> None:
    """An abandoned reservation, and the rest of one that was too large."""
    one, two = await house.part("one", time=1000), await house.part("two", time=2000)
    await one.catalog.abandon(await one.catalog.reserve(10_000))
    draft = await two.catalog.reserve(10_000)
    await two.commit(draft, some_tokens(40), two.write(draft, some_tokens(40), 4_000))
    await one.catalog.reserve(6_000)
    assert not two.dropped


async def test_what_another_may_need_now_is_spared(house: House) -> None:
    """A process cannot see what is in the plans of another: what that has just used stays, while it lives."""
    one, two = await house.part("one", time=NOW - IN_PLANS_S), await house.part("two", time=2000)
    await one.save(some_tokens(40, 0), 6_000)
    with pytest.raises(QuotaExceeded):
        await two.catalog.reserve(6_000)
    house.die("one")
    await two.catalog.reserve(6_000)
    assert not one.bytes_on_disk()


async def test_pinned_snapshots_of_others_are_spared(house: House) -> None:
    """They must be there before they are asked for."""
    one, two = await house.part("one", time=1000), await house.part("two", time=2000)
    pinned = await one.save(some_tokens(40, 0), 3_000, is_prewarmed=True)
    await one.save(some_tokens(40, 1), 3_000)
    await two.save(some_tokens(40, 2), 6_000)
    assert {file.stem for file in one.directory.glob("*.kv")} == {pinned.id}
    with pytest.raises(QuotaExceeded):
        await two.catalog.reserve(8_000)


async def test_what_can_never_fit_removes_nothing(house: House) -> None:
    """Neither of one's own nor of others."""
    one, two = await house.part("one", time=1000), await house.part("two", time=2000)
    await one.save(some_tokens(40, 0), 3_000)
    await two.save(some_tokens(40, 1), 3_000)
    with pytest.raises(QuotaExceeded):
        await two.catalog.reserve(10_001)
    assert one.bytes_on_disk() + two.bytes_on_disk() == 6_000


async def test_what_ones_own_plans_hold_is_made_up_for_by_others(house: House) -> None:
    """Though that was used later."""
    one, two = await house.part("one", time=3000), await house.part("two", time=2000)
    await one.save(some_tokens(40, 0), 5_000)
    own = await two.save(some_tokens(40, 1), 5_000)
    with two.catalog.pin(own.id):
        await two.catalog.reserve(5_000)
    assert not one.bytes_on_disk()
    assert not two.dropped


async def test_the_quota_holds_whatever_happens_at_once(house: House) -> None:
    """Three models that save all the time: what is on disk and what is reserved is never more than the quota."""
    rng = random.Random(1)
    shelters = [await house.part(name, time=1000) for name in "abc"]

    def reserved() -> int:
        return sum(int(file.read_text()) for file in house.root.glob(f"{META}/*/{RESERVED}"))

    async def save_often(shelter: Shelter) -> None:
        for seed in range(25):
            try:
                await shelter.save(some_tokens(40, seed), rng.randrange(1_000, 4_000))
            except QuotaExceeded:
                continue
            assert house.saved_bytes() <= shelter.quota_bytes
            assert reserved() <= shelter.quota_bytes

    await asyncio.gather(*map(save_often, shelters))
    assert sum(shelter.bytes_on_disk() for shelter in shelters) >= 1_000  # the last one saved at least
    assert reserved() == 0


async def test_cancelling_leaves_the_lock_free(house: House) -> None:
    """At every await of a reservation; the next one finds it, and no reservation is left."""
    one, two = await house.part("one", time=1000), await house.part("two", time=2000)
    await one.save(some_tokens(40, 0), 6_000)

    async def reserve() -> None:
        await two.catalog.abandon(await two.catalog.reserve(6_000))

    for is_late in (False, True):
        at, was_reached = 0, True
        while was_reached:
            step = CancelledAt(reserve(), at, is_late=is_late)
            with contextlib.suppress(asyncio.CancelledError):
                await spawn(_awaited(step))
            at, was_reached = at + 1, step.was_reached
    await two.catalog.settle()
    neighbours = Neighbours.of(one.directory)
    assert neighbours is not None
    async with asyncio.timeout(5), neighbours.turn():
        await neighbours.look()
    assert neighbours.others == two.bytes_on_disk() == 0


async def test_a_cancelled_turn_lasts_until_its_thread_ends(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would remove files in another's turn."""
    one, two = await house.part("one", time=1000), await house.part("two", time=2000)
    await one.save(some_tokens(40, 0), 6_000)
    begun, may_end = threading.Event(), threading.Event()
    take_stock = inventory.take_stock

    def slowly(directory: Path) -> inventory.Stock:
        begun.set()
        assert may_end.wait(30)
        return take_stock(directory)

    monkeypatch.setattr(inventory, "take_stock", slowly)
    reserving = spawn(two.catalog.reserve(6_000))
    assert await asyncio.to_thread(begun.wait, 30)
    reserving.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    assert try_lock(house.root / META / QUOTA_LOCK) is None
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await reserving
    assert not one.bytes_on_disk()
    lock = try_lock(house.root / META / QUOTA_LOCK)
    assert lock is not None
    os.close(lock)


async def test_a_part_is_read_once_for_all_that_go(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once for each, while the others wait for the lock."""
    one, two = await house.part("one", time=1000), await house.part("two", time=2000)
    for seed in range(5):
        await one.save(some_tokens(40, seed), 2_000)
    read: list[Path] = []
    take_stock = inventory.take_stock

    def counted(directory: Path) -> inventory.Stock:
        read.append(directory)
        return take_stock(directory)

    monkeypatch.setattr(inventory, "take_stock", counted)
    await two.catalog.reserve(7_000)
    assert one.bytes_on_disk() == 2_000
    assert read == [one.directory]


A = words(600, 1)


@pytest.mark.parametrize("is_slow", [False, True])
async def test_an_eviction_by_another_costs_a_save_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_slow: bool
) -> None:
    """One that began before the sidecar of the save was written, and ends after it. What the save goes on from counts
    as just used, so it stays; if it goes after all, since the save takes longer than that holds, all of the save is
    kept.
    """
    later = NOW + 2 * IN_PLANS_S if is_slow else NOW
    monkeypatch.setattr("llamaslot.store.shared_store.time.time", lambda: later)
    parts = [claim(tmp_path / "store", model) for model in ("one", "two")]
    tree, neighbours = Tree(parts[0].directory), Neighbours.of(parts[1].directory)
    assert neighbours is not None
    await tree.open()
    tree.time = NOW - 2 * IN_PLANS_S
    base = await tree.take(A[:400])
    await tree.catalog.settle()
    tree.time = NOW
    begun, stocked, is_over = threading.Event(), threading.Event(), threading.Event()
    take_in, let_go, take_stock = deduplicate.take_in, deduplicate.let_go, inventory.take_stock

    def taken_in(*arguments: Any) -> Any:
        begun.set()
        assert stocked.wait(30)
        return take_in(*arguments)

    def gone(*arguments: Any) -> Any:
        try:
            return let_go(*arguments)
        finally:
            is_over.set()

    def locked(path: Path) -> int | None:
        if (lock := try_lock(path)) is None and path.name == QUOTA_LOCK:
            is_over.set()  # or it waits for the end of the eviction
        return lock

    def stock(directory: Path) -> inventory.Stock:
        its = take_stock(directory)
        stocked.set()
        assert is_over.wait(30)
        return its

    with monkeypatch.context() as patch:
        patch.setattr("llamaslot.store.commit.take_in", taken_in)
        patch.setattr("llamaslot.store.commit.let_go", gone)
        patch.setattr("llamaslot.store.shared_store.try_lock", locked)
        patch.setattr(inventory, "take_stock", stock)
        saving = spawn(tree.take(A, after=base.id))
        assert await asyncio.to_thread(begun.wait, 30)
        async with neighbours.turn():
            await neighbours.look()
            theirs = neighbours.share_of_others(1)
            assert [one.id for one in theirs] == ([base.id] if is_slow else [])
            await neighbours.remove(theirs)
            stocked.set()
        saved = await saving
    await tree.catalog.abandon(await tree.catalog.reserve(1))  # sweeps
    assert tree.dropped == ([base.id] if is_slow else [])
    assert bool(saved.parts) != is_slow
    await tree.check_all()
    tree.catalog.close()
    for part in parts:
        part.release()


async def test_what_is_gone_is_forgotten(tmp_path: Path) -> None:
    """What was read of another's sidecars does not grow for ever."""
    parts = [claim(tmp_path / "store", model) for model in ("one", "two")]
    tree, neighbours = Tree(parts[0].directory), Neighbours.of(parts[1].directory)
    assert neighbours is not None
    await tree.open()
    first = await tree.take(A[:400])
    second = await tree.take(A, after=first.id)
    await neighbours.look()
    assert set(neighbours._parts) == {first.id, second.id}
    await tree.catalog.drop(first.id)
    await neighbours.look()
    assert neighbours._parts == {second.id: second.parts}
    await tree.catalog.settle()
    tree.catalog.close()
    for part in parts:
        part.release()


async def _awaited(step: CancelledAt[None]) -> None:
    await step


def test_another_directory_has_no_neighbours(tmp_path: Path) -> None:
    """Only the parts of a shared store have."""
    (tmp_path / "kv").mkdir()
    assert Neighbours.of(tmp_path / "kv") is None
