"""The quota of a catalog holds at each write, whoever comes at once, and whatever the disk refuses."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from llamaslot.store import QuotaExceeded, Reservation, catalog, quota, upkeep
from llamaslot.store.quota import Limits, beyond_disk
from llamaslot.tasks import TaskOwner
from tests.support.snapshots import Shelter, opened, refuse, some_tokens, temporary_directory

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
    shelter.catalog.serve("gpu0", "model-b")
    shelter.catalog.touch(stale.id)
    await shelter.catalog.reserve(7_000)
    assert set(shelter.catalog.snapshots) == {old.id}
    assert shelter.catalog.fingerprints == {"model-b"}


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


async def test_what_is_spared_goes_when_nothing_else_is_left(shelter: Shelter) -> None:
    """Somebody waits for it, but no more than somebody waits for the save."""
    spared, other = [await shelter.save(some_tokens(40, seed), 4_000) for seed in range(2)]
    await shelter.catalog.reserve(4_000, spare=[spared.id])
    assert shelter.dropped == [other.id]
    await shelter.catalog.reserve(4_000, spare=[spared.id])
    assert shelter.dropped == [other.id, spared.id]


async def test_drafts_count_before_they_are_written(shelter: Shelter) -> None:
    """Two saves under way never share the same room."""
    await shelter.catalog.reserve(6_000)
    with pytest.raises(QuotaExceeded, match=r"5\.9 KiB being written"):
        await shelter.catalog.reserve(6_000)


async def test_a_save_waits_for_the_room_that_another_one_gives_back(shelter: Shelter) -> None:
    """Two conversations go on in the same instant, and only one more snapshot fits: the second is written once the
    first has replaced its old one. Neither old one may go before: its slot has nothing else on disk."""
    old = [await shelter.save(some_tokens(40, seed), 4_000) for seed in range(2)]
    keep = {snapshot.id for snapshot in old}

    async def go_on(seed: int) -> None:
        draft = await shelter.catalog.reserve(2_000, keep, may_wait=lambda: True)
        tokens = some_tokens(60, seed)
        n_written = shelter.write(draft, tokens)
        await asyncio.sleep(0.01)  # llama-server writes it while the other one looks for room
        await shelter.commit(draft, tokens, n_written)
        keep.discard(old[seed].id)
        await shelter.catalog.drop(old[seed].id)

    await asyncio.wait_for(asyncio.gather(go_on(0), go_on(1)), 10)
    assert len(shelter.catalog.snapshots) == 2
    assert set(shelter.dropped) == {snapshot.id for snapshot in old}


async def test_only_who_has_room_is_waited_for(shelter: Shelter) -> None:
    """Three wait for each other in vain: all are refused, also the one that waited for a fourth."""
    held = await shelter.catalog.reserve(6_000)
    waiting = [
        asyncio.get_running_loop().create_task(shelter.catalog.reserve(6_000, may_wait=lambda: True))
        for _ in range(3)
    ]
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in waiting)
    waiting.pop().cancel()
    snapshot = await shelter.commit(held, TOKENS, shelter.write(held, TOKENS))
    with shelter.catalog.pin(snapshot.id):
        results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 10)
    assert all(isinstance(result, QuotaExceeded) for result in results)
    shelter.catalog.check()


async def test_a_save_that_hangs_is_not_waited_for_for_ever(
    shelter: Shelter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server may have stopped."""
    monkeypatch.setattr(quota, "_PATIENCE_S", 0.01)
    await shelter.catalog.reserve(6_000)
    with pytest.raises(QuotaExceeded):
        await asyncio.wait_for(shelter.catalog.reserve(6_000, may_wait=lambda: True), 10)


async def test_others_that_come_and_go_are_not_waited_for_for_ever(
    shelter: Shelter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each end of a small save gives hope, and none gives room enough."""
    monkeypatch.setattr(quota, "_PATIENCE_S", 0.1)
    tasks = TaskOwner()

    async def come_and_go() -> None:
        while True:
            draft = await shelter.catalog.reserve(1_000, may_wait=lambda: True)
            await asyncio.sleep(0.01)  # llama-server writes it
            await shelter.catalog.abandon(draft)

    await shelter.catalog.reserve(1_000)  # as of a server that hangs
    tasks.spawn(come_and_go(), "small saves")
    try:
        with pytest.raises(QuotaExceeded):
            await asyncio.wait_for(shelter.catalog.reserve(9_500, may_wait=lambda: True), 10)
    finally:
        await tasks.close()


async def test_a_save_that_must_give_way_waits_no_more(shelter: Shelter) -> None:
    """The request that it gives way to may want the very slot."""
    await shelter.catalog.reserve(6_000)
    answers = [True, True, True]
    with pytest.raises(QuotaExceeded):
        await asyncio.wait_for(
            shelter.catalog.reserve(6_000, may_wait=lambda: bool(answers and answers.pop())), 10
        )
    assert not answers


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


async def test_space_on_its_way_to_a_reservation_is_not_given_away(
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


async def test_many_files_are_compared_now_and_then(
    shelter: Shelter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for each reservation, for that takes a while; what has vanished is noticed all the same."""
    monkeypatch.setattr(upkeep, "_MANY_FILES", 0)
    gone = await shelter.save(TOKENS)
    await shelter.save(some_tokens(40, 1))
    os.unlink(shelter.directory / gone.file_name)
    await shelter.catalog.reserve(1_000)
    assert not shelter.dropped
    monkeypatch.setattr(upkeep, "_SWEPT_S", 0.0)
    await shelter.catalog.reserve(1_000)
    assert shelter.dropped == [gone.id]


async def test_many_files_are_not_compared_again_just_after_the_start(
    shelter: Shelter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start has compared them, and the first save must not wait for that again."""
    monkeypatch.setattr(upkeep, "_MANY_FILES", 0)
    kept = await shelter.save(TOKENS)
    await shelter.reopen()
    os.unlink(shelter.directory / kept.file_name)
    await shelter.catalog.reserve(1_000)
    assert not shelter.dropped
    monkeypatch.setattr(upkeep, "_SWEPT_S", 0.0)
    await shelter.catalog.reserve(1_000)
    assert shelter.dropped == [kept.id]


async def test_an_unmounted_directory_is_not_taken_for_an_empty_one(
    shelter: Shelter, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the lock file is missing nothing is concluded from what else is missing; the log says so once."""
    snapshot = await shelter.save(TOKENS)
    await shelter.settled()
    lock = shelter.directory / ".llamaslot.lock"
    content = [(path, path.read_bytes()) for path in shelter.directory.iterdir() if path != lock]
    for path in (lock, *(path for path, _ in content)):
        os.unlink(path)
    for _ in range(3):
        await shelter.catalog.abandon(await shelter.catalog.reserve(1_000))
    assert caplog.text.count("its lock file is missing (unmounted? moved?)") == 1
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


@pytest.mark.parametrize("waits", [False, True])
async def test_all_at_once(shelter: Shelter, waits: bool) -> None:
    """Ten savers on a quota for four, touching, pinning and dropping: the quota holds at each write. None of those
    that wait for room is refused."""
    n_refused = 0

    async def saver(seed: int) -> None:
        nonlocal n_refused
        for turn in range(5):
            try:
                draft: Reservation = await shelter.catalog.reserve(2_500, may_wait=lambda: waits)
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
    assert n_refused < (1 if waits else 50)
    assert len(shelter.dropped) == len(set(shelter.dropped))
    assert await shelter.settled() == shelter.whole()
    assert shelter.catalog.size_bytes == shelter.bytes_on_disk()


# -- files, and what others leave ----------------------------------------------------------------------------------


async def limited(directory: Path, *, max_files: int = 10_000, min_free_bytes: int = 0) -> Shelter:
    shelter = Shelter(directory)
    shelter.max_files, shelter.min_free_bytes = max_files, min_free_bytes
    await shelter.reopen()
    return shelter


async def closed(shelter: Shelter) -> None:
    await shelter.catalog.settle()
    shelter.catalog.check()
    shelter.catalog.close()


class FileSystem:
    """One of ``size_bytes`` as ``os.statvfs`` tells it, on which besides our files others have ``others_bytes``."""

    def __init__(self, shelter: Shelter, size_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shelter, self.size_bytes, self.others_bytes = shelter, size_bytes, 0
        monkeypatch.setattr(os, "statvfs", self.statvfs)

    @property
    def free_bytes(self) -> int:
        return self.size_bytes - self.others_bytes - self.shelter.bytes_on_disk()

    def statvfs(self, path: object) -> Any:
        return SimpleNamespace(f_bavail=self.free_bytes, f_frsize=1, f_blocks=self.size_bytes)


async def test_as_many_files_as_there_may_be(tmp_path: Path) -> None:
    """Small snapshots that fill no disk still fill a directory: the least valuable goes, and drafts count."""
    shelter = await limited(tmp_path, max_files=3)
    a, *_ = [await shelter.save(some_tokens(40, seed), 100) for seed in range(3)]
    draft = await shelter.catalog.reserve(100)
    assert shelter.dropped == [a.id]
    assert sum(name.endswith(".kv") for name in shelter.names()) == 2
    with shelter.catalog.pin(next(iter(shelter.catalog.snapshots))):
        await shelter.catalog.reserve(100)
        with pytest.raises(QuotaExceeded, match=r"no room for another file: store\.max_files is 3"):
            await shelter.catalog.reserve(100)
    await shelter.catalog.abandon(draft)
    await closed(shelter)


async def test_fewer_files_at_the_next_start(tmp_path: Path) -> None:
    """A smaller number in the configuration is kept from the opening on."""
    shelter = await limited(tmp_path)
    saved = [await shelter.save(some_tokens(40, seed), 100) for seed in range(5)]
    shelter.max_files = 2
    await shelter.reopen()
    assert set(shelter.catalog.snapshots) == {saved[3].id, saved[4].id}
    await closed(shelter)


async def test_opening_compares_ranks_of_one_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the files takes time, in the order of their names: what is read first is not worth more for that."""
    ids = iter(f"ls-{n:016x}" for n in (1, 3, 2))
    monkeypatch.setattr(catalog, "new_id", lambda: next(ids))
    shelter = await limited(tmp_path)
    saved = [await shelter.save(some_tokens(40, seed), 100) for seed in range(3)]
    shelter.max_files, shelter.seconds_per_look = 2, 100.0
    await shelter.reopen()
    assert set(shelter.catalog.snapshots) == {saved[1].id, saved[2].id}
    await closed(shelter)


async def test_free_space_is_left_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quota has room, the file system has not: our own go, until after the write there is as much as there must."""
    shelter = await limited(tmp_path, min_free_bytes=2_000)
    disk = FileSystem(shelter, 9_000, monkeypatch)
    saved = [await shelter.save(some_tokens(40, seed), 2_000) for seed in range(3)]
    disk.others_bytes = 500
    draft = await shelter.catalog.reserve(1_500)
    assert shelter.dropped == [saved[0].id]
    assert disk.free_bytes - draft.size_bytes >= 2_000
    await closed(shelter)


async def test_drafts_are_not_promised_the_same_free_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not written yet is not free any more."""
    shelter = await limited(tmp_path, min_free_bytes=2_000)
    FileSystem(shelter, 5_000, monkeypatch)
    await shelter.catalog.reserve(2_000)
    with pytest.raises(QuotaExceeded):
        await shelter.catalog.reserve(2_000)
    await closed(shelter)


async def test_a_full_disk_evicts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If none of it must be left to others: the least valuable goes when the disk has no room for the next file."""
    shelter = await limited(tmp_path)
    assert not shelter.min_free_bytes
    disk = FileSystem(shelter, 6_000, monkeypatch)
    saved = [await shelter.save(some_tokens(40, seed), 2_000) for seed in range(3)]
    assert (shelter.dropped, disk.free_bytes) == ([], 0)
    await shelter.save(some_tokens(40, 9), 2_000)
    assert shelter.dropped == [saved[0].id]
    await closed(shelter)


async def test_a_file_that_has_grown_evicts_no_more_than_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that is full with it: what was removed for it is free."""
    shelter = await limited(tmp_path)
    FileSystem(shelter, 9_000, monkeypatch)
    saved = [await shelter.save(some_tokens(40, seed), 2_000) for seed in range(3)]
    draft = await shelter.catalog.reserve(1_000)
    tokens = some_tokens(40, 9)
    await shelter.commit(draft, tokens, shelter.write(draft, tokens, 4_500))
    assert shelter.dropped == [saved[0].id]
    await closed(shelter)


async def test_a_file_system_that_tells_no_size_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of the network say 0 of 0 blocks."""
    shelter = await limited(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=0, f_frsize=1, f_blocks=0))
    await shelter.save(TOKENS, 2_000)
    assert beyond_disk(2_000, 0, tmp_path, 0) is None
    await closed(shelter)


async def test_smaller_limits_hold_at_once(shelter: Shelter, caplog: pytest.LogCaptureFixture) -> None:
    """Without a save: what is too much goes, the least valuable first; what is in use stays."""
    caplog.set_level("INFO")
    saved = [await shelter.save(some_tokens(40, seed), 2_000) for seed in range(4)]
    with shelter.catalog.pin(saved[0].id):
        shelter.catalog.take_limits(Limits(4_500))
        await shelter.catalog.settle()
        assert shelter.dropped == [saved[1].id, saved[2].id]
        assert shelter.bytes_on_disk() <= 4_500
    assert "snapshots: 2 evicted to keep to the new limits of store" in caplog.messages
    shelter.catalog.take_limits(Limits(4_500, max_files=1))
    await shelter.catalog.settle()
    assert shelter.dropped == [saved[1].id, saved[2].id, saved[0].id]
    shelter.catalog.check()


async def test_a_disk_that_others_have_filled_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When even without ours there would be too little, none of ours goes, and the reason is said."""
    shelter = await limited(tmp_path, min_free_bytes=2_000)
    disk = FileSystem(shelter, 9_000, monkeypatch)
    await shelter.save(TOKENS, 1_000)
    disk.others_bytes = 6_500
    said = r"no room for 1\.0 KiB: 1\.5 KiB are free on the file system of .*, of which store\.min_free leaves 2\.0 KiB"
    with pytest.raises(QuotaExceeded, match=said):
        await shelter.catalog.reserve(1_024)
    disk.others_bytes = 7_500
    shelter.catalog.take_limits(replace(shelter.catalog.limits, max_files=9_999))
    await shelter.catalog.settle()
    assert not shelter.dropped
    await shelter.reopen()
    assert len(shelter.catalog.snapshots) == 1
    await closed(shelter)


async def test_too_little_free_at_the_start_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others have filled the disk meanwhile: what is worth least goes at once."""
    shelter = await limited(tmp_path, min_free_bytes=2_000)
    disk = FileSystem(shelter, 9_000, monkeypatch)
    saved = [await shelter.save(some_tokens(40, seed), 1_000) for seed in range(3)]
    disk.others_bytes = 5_500
    await shelter.reopen()
    assert set(shelter.catalog.snapshots) == {each.id for each in saved[2:]}
    assert disk.free_bytes >= 2_000
    await closed(shelter)


async def test_a_file_system_that_does_not_tell_is_no_reason_not_to_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the quota alone counts, and the write itself says what is wrong."""
    shelter = await limited(tmp_path, min_free_bytes=2_000)
    refuse(monkeypatch, "statvfs", errno.ENOSYS, lambda path: True)
    await shelter.save(TOKENS, 1_000)
    await closed(shelter)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**9))
def test_no_limit_is_ever_broken(seed: int) -> None:
    """Savers at once, others who fill and empty the disk, pins, random sizes: bytes, files and free space hold at each
    write, and what is pinned for good stays."""
    rng = random.Random(seed)

    async def saver(shelter: Shelter, disk: FileSystem, number: int) -> None:
        for turn in range(8):
            for _ in range(rng.randrange(5)):
                await asyncio.sleep(0)
            if rng.random() < 0.3 and (ids := list(shelter.catalog.snapshots)):
                shelter.catalog.touch(rng.choice(ids))
            size = rng.randrange(300, 3_000)
            try:
                draft = await shelter.catalog.reserve(size)
            except QuotaExceeded:
                continue
            tokens = some_tokens(10, 100 * number + turn)
            n_written = shelter.write(draft, tokens)
            n_files = sum(name.endswith((".kv", ".part")) for name in shelter.names())
            assert shelter.bytes_on_disk() <= shelter.quota_bytes
            assert n_files <= shelter.max_files
            assert disk.free_bytes >= shelter.min_free_bytes
            shelter.catalog.check()
            await shelter.commit(draft, tokens, n_written)

    async def play(patch: pytest.MonkeyPatch) -> None:
        with temporary_directory() as directory:
            shelter = await limited(directory, max_files=6, min_free_bytes=1_000)
            disk = FileSystem(shelter, 12_000, patch)
            pinned = await shelter.save(some_tokens(10, 999), 700, is_prewarmed=True)
            disk.others_bytes = rng.randrange(0, 10_000)
            await asyncio.gather(*(saver(shelter, disk, number) for number in range(3)))
            assert pinned.id in shelter.catalog.snapshots
            await closed(shelter)

    with pytest.MonkeyPatch.context() as patch:
        asyncio.run(play(patch))
