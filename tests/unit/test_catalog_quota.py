"""The quota of a catalog holds at each write, whoever comes at once, and whatever the disk refuses."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from llamaslot.store import Draft, QuotaExceeded
from tests.support.snapshots import Shelter, opened, refuse, some_tokens

TOKENS = some_tokens(40)


@pytest.fixture
async def shelter(tmp_path: Path) -> AsyncIterator[Shelter]:
    async with opened(tmp_path) as shelter:
        yield shelter


async def test_least_recently_used_goes_first(shelter: Shelter) -> None:
    """Room is made by what was touched longest ago, and no more than is needed."""
    a, b, c = [await shelter.save(some_tokens(40, seed), 3_000) for seed in range(3)]
    shelter.catalog.touch(a.id)
    await shelter.catalog.reserve(2_500)
    assert shelter.dropped == [b.id]
    assert set(shelter.catalog.snapshots) == {a.id, c.id}


async def test_another_fingerprint_goes_before_the_valid_one(shelter: Shelter) -> None:
    """What no server can use now is worth least, however fresh it is."""
    old = await shelter.save(TOKENS, 3_000, fingerprint="model-b")
    await shelter.save(TOKENS, 3_000)
    stale = await shelter.save(TOKENS, 3_000, fingerprint="model-a")
    shelter.catalog.fingerprint = "model-b"
    shelter.catalog.touch(stale.id)
    await shelter.catalog.reserve(7_000)
    assert set(shelter.catalog.snapshots) == {old.id}
    assert shelter.catalog.fingerprint == "model-b"


async def test_the_quota_holds_before_the_write(shelter: Shelter) -> None:
    """When reserve returns, the victims are gone from the disk: the write that follows fits."""
    for seed in range(3):
        await shelter.save(some_tokens(40, seed), 3_000)
    draft = await shelter.catalog.reserve(4_000)
    assert shelter.bytes_on_disk() + draft.size_bytes <= shelter.quota_bytes
    assert shelter.catalog.size_bytes <= shelter.quota_bytes


async def test_more_than_the_quota_is_refused_and_nothing_evicted(shelter: Shelter) -> None:
    """One snapshot that can never fit costs nobody's context."""
    await shelter.save(TOKENS)
    with pytest.raises(QuotaExceeded, match=r"no room for 9\.8 KiB: the quota is 9\.8 KiB"):
        await shelter.catalog.reserve(10_001)
    assert not shelter.dropped


async def test_what_is_pinned_or_kept_is_not_evicted(shelter: Shelter) -> None:
    """The source of a restore must survive the save that comes before it."""
    pinned, kept, other = [await shelter.save(some_tokens(40, seed), 3_000) for seed in range(3)]
    with shelter.catalog.pin(pinned.id):
        with pytest.raises(QuotaExceeded):
            await shelter.catalog.reserve(4_001, keep=[kept.id])
        assert not shelter.dropped
        await shelter.catalog.reserve(4_000, keep=[kept.id])
    assert shelter.dropped == [other.id]


async def test_drafts_count_before_they_are_written(shelter: Shelter) -> None:
    """Two saves under way never share the same room."""
    await shelter.catalog.reserve(6_000)
    with pytest.raises(QuotaExceeded, match=r"5\.9 KiB being written"):
        await shelter.catalog.reserve(6_000)


async def test_reservations_at_once_evict_no_more_than_they_need(shelter: Shelter) -> None:
    """Each chooses victims of its own: three reservations, three victims, and the quota holds throughout."""
    for seed in range(5):
        await shelter.save(some_tokens(40, seed), 2_000)
    drafts = await asyncio.gather(*(shelter.catalog.reserve(2_000) for _ in range(3)))
    assert len({draft.id for draft in drafts}) == 3
    assert len(shelter.dropped) == len(set(shelter.dropped)) == 3
    assert shelter.catalog.size_bytes == shelter.quota_bytes
    assert shelter.bytes_on_disk() == 4_000


async def test_reservations_share_the_rest_of_a_large_victim(shelter: Shelter) -> None:
    """What one victim gives beyond the first need serves the second, who waits for the same removal."""
    await shelter.save(some_tokens(40, 0), 6_000)
    await shelter.save(some_tokens(40, 1), 4_000)
    await asyncio.gather(shelter.catalog.reserve(3_000), shelter.catalog.reserve(3_000))
    assert len(shelter.dropped) == 1


async def test_room_on_its_way_to_somebody_is_not_given_away(
    shelter: Shelter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a victim is being unlinked for the first, a second is refused at once, if there is nobody else to go."""
    pinned, victim = [await shelter.save(some_tokens(40, seed), 5_000) for seed in range(2)]
    await shelter.catalog.settle()
    leave = threading.Event()
    real = os.unlink

    def slowly(path: Any) -> None:
        assert leave.wait(10)
        real(path)

    monkeypatch.setattr(os, "unlink", slowly)
    with shelter.catalog.pin(pinned.id):
        first = asyncio.get_running_loop().create_task(shelter.catalog.reserve(4_500))
        await shelter.has_dropped.wait()
        with pytest.raises(QuotaExceeded):
            await asyncio.wait_for(shelter.catalog.reserve(1_000), 5)
        assert not first.done()
        leave.set()
        assert (await first).size_bytes == 4_500
    assert shelter.dropped == [victim.id]


async def test_a_canceled_reservation_takes_no_room(shelter: Shelter) -> None:
    """At whatever await: what was evicted for it is gone, but the room is free."""
    for n_rounds in range(12):
        for seed in range(2 - len(shelter.catalog.snapshots)):
            await shelter.save(some_tokens(40, seed), 5_000)
        task = asyncio.get_running_loop().create_task(shelter.catalog.reserve(6_000))
        for _ in range(n_rounds):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await shelter.catalog.settle()
        shelter.catalog.check()
        if task.cancelled():
            assert shelter.catalog.size_bytes == shelter.bytes_on_disk()
        else:
            await shelter.catalog.abandon(task.result())


async def test_a_file_larger_than_reserved_makes_others_go(shelter: Shelter) -> None:
    """It is on disk already: the quota is put right before it is listed."""
    old, new = [await shelter.save(some_tokens(40, seed), 4_000) for seed in range(2)]
    draft = await shelter.catalog.reserve(1_000)
    snapshot = await shelter.commit(draft, TOKENS, shelter.write(draft, TOKENS, 5_000))
    assert shelter.dropped == [old.id]
    assert set(shelter.catalog.snapshots) == {new.id, snapshot.id}
    assert shelter.catalog.size_bytes == shelter.bytes_on_disk() == 9_000


async def test_a_file_larger_than_reserved_that_cannot_fit_goes_itself(shelter: Shelter) -> None:
    """Neither pinned ones nor what its reservation wanted to keep give way."""
    pinned, kept = [await shelter.save(some_tokens(40, seed), 4_000) for seed in range(2)]
    with shelter.catalog.pin(pinned.id):
        draft = await shelter.catalog.reserve(1_000, keep={kept.id})
        with pytest.raises(QuotaExceeded):
            await shelter.commit(draft, TOKENS, shelter.write(draft, TOKENS, 5_000))
    assert shelter.catalog.size_bytes == shelter.bytes_on_disk() == 8_000
    assert await shelter.settled() == shelter.whole()


async def test_a_vanished_file_gives_its_room_back(shelter: Shelter) -> None:
    """Somebody else deleted it: the next reservation notices, and evicts nobody for room that is there."""
    there, gone = [await shelter.save(some_tokens(40, seed), 5_000) for seed in range(2)]
    os.unlink(shelter.directory / gone.file_name)
    await shelter.catalog.reserve(5_000)
    assert shelter.dropped == [gone.id]
    assert set(shelter.catalog.snapshots) == {there.id}


async def test_a_late_part_file_is_removed(shelter: Shelter) -> None:
    """llama-server carries out a save whose asker is gone: nobody knows the file that then appears."""
    draft = await shelter.catalog.reserve(1_000)
    await shelter.catalog.abandon(draft)
    shelter.write(draft, TOKENS, 9_000)
    await shelter.save(TOKENS, 5_000)
    assert draft.part_name not in shelter.names()
    assert shelter.bytes_on_disk() == 5_000


async def test_an_unmounted_directory_is_not_taken_for_an_empty_one(shelter: Shelter) -> None:
    """Where the lock file is missing nothing is concluded from what else is missing."""
    snapshot = await shelter.save(TOKENS)
    lock = shelter.directory / ".llamaslot.lock"
    content = [(path, path.read_bytes()) for path in shelter.directory.iterdir() if path != lock]
    for path in (lock, *(path for path, _ in content)):
        os.unlink(path)
    await shelter.catalog.abandon(await shelter.catalog.reserve(1_000))
    for path, data in content:
        shelter.put(path.name, data)
    assert await shelter.catalog.verify(snapshot.id) == snapshot


async def test_a_file_that_cannot_be_unlinked_counts_until_it_can(
    shelter: Shelter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing wedges: it is no longer listed, its bytes stay accounted for, others go instead."""
    stuck, other = [await shelter.save(some_tokens(40, seed), 4_000) for seed in range(2)]
    with monkeypatch.context() as patch:
        refuse(patch, "unlink", errno.EACCES, lambda path: path.name == stuck.file_name)
        await shelter.catalog.drop(stuck.id)
        assert shelter.catalog.size_bytes == shelter.bytes_on_disk() == 8_000
        draft = await shelter.catalog.reserve(6_000)
        assert shelter.dropped == [stuck.id, other.id]
        assert shelter.bytes_on_disk() == 4_000
        with pytest.raises(QuotaExceeded, match=r"3\.9 KiB in files that cannot be removed"):
            await shelter.catalog.reserve(1_000)
        shelter.catalog.check()
    await shelter.catalog.abandon(draft)
    await shelter.catalog.reserve(10_000)
    assert await shelter.settled() == set()


async def test_a_victim_that_cannot_be_unlinked_is_replaced_by_the_next(
    shelter: Shelter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reservation waits for room that is really there, so it goes on to choose."""
    stuck, *others = [await shelter.save(some_tokens(40, seed), 3_000) for seed in range(3)]
    refuse(monkeypatch, "unlink", errno.EPERM, lambda path: path.name == stuck.file_name)
    draft = await shelter.catalog.reserve(3_000)
    assert shelter.dropped == [stuck.id, others[0].id]
    assert shelter.bytes_on_disk() + draft.size_bytes <= shelter.quota_bytes


async def test_all_at_once(shelter: Shelter) -> None:
    """Ten savers on a quota for four, touching, pinning and dropping: the quota holds at each write."""
    n_refused = 0

    async def saver(seed: int) -> None:
        nonlocal n_refused
        for turn in range(5):
            try:
                draft: Draft = await shelter.catalog.reserve(2_500)
            except QuotaExceeded:
                n_refused += 1
                continue
            tokens = some_tokens(30, seed * 100 + turn)
            n_written = shelter.write(draft, tokens)
            assert shelter.bytes_on_disk() <= shelter.quota_bytes
            shelter.catalog.check()
            if (seed + turn) % 3 == 0:
                await shelter.catalog.abandon(draft)
                continue
            snapshot = await shelter.commit(draft, tokens, n_written)
            shelter.catalog.touch(snapshot.id)
            if snapshot.id in shelter.catalog.snapshots:
                with shelter.catalog.pin(snapshot.id):
                    if turn % 2:
                        await shelter.catalog.drop(snapshot.id)
                    else:
                        await shelter.catalog.verify(snapshot.id)

    await asyncio.gather(*(saver(seed) for seed in range(10)))
    await shelter.catalog.settle()
    assert n_refused < 50
    assert len(shelter.dropped) == len(set(shelter.dropped))
    assert await shelter.settled() == shelter.whole()
    assert shelter.catalog.size_bytes == shelter.bytes_on_disk()
