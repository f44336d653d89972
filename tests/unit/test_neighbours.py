"""Several llamaslots in one shared store: one quota for all their snapshots."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from llamaslot.store import QuotaExceeded
from llamaslot.store.neighbours import IN_PLANS_S, RESERVED, Neighbours
from llamaslot.store.shared_store import META, Part, claim
from tests.support.cancelled import CancelledAt
from tests.support.inprocess import spawn
from tests.support.snapshots import Shelter, opened, some_tokens

NOW = 2_000_000.0


class House:
    """A shared store of 10,000 bytes with one catalog for each model."""

    def __init__(self, root: Path) -> None:
        self.root, self._stack = root, AsyncExitStack()
        self.parts: dict[str, Part] = {}

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
    monkeypatch.setattr("llamaslot.store.neighbours.time.time", lambda: NOW)
    house = House(tmp_path / "store")
    yield house
    await house.close()


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
    pinned = await one.save(some_tokens(40, 0), 3_000, is_pinned=True)
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
    assert sum(shelter.bytes_on_disk() for shelter in shelters) > 5_000
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


async def _awaited(step: CancelledAt[None]) -> None:
    await step


def test_another_directory_has_no_neighbours(tmp_path: Path) -> None:
    """Only the parts of a shared store have."""
    (tmp_path / "kv").mkdir()
    assert Neighbours.of(tmp_path / "kv") is None
