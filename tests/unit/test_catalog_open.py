"""Opening a catalog: the lock, what a restart finds, and what it repairs."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from llamaslot.store import DirectoryUnusable, QuotaExceeded, sidecar
from llamaslot.store.upkeep import Upkeep
from tests.support.snapshots import Shelter, opened, refuse, slot_file, some_tokens

TOKENS = some_tokens(40)
FOREIGN = (
    "notes.txt",
    "slot0.kv",
    "ls-0123456789abcdef.kv.bak",
    "ls-0123456789ABCDEF.kv",
    "ls-0123.kv",
    "xls-0123456789abcdef.kv",
    "ls-0123456789abcdef0.part",
)


@pytest.fixture
async def shelter(tmp_path: Path) -> AsyncIterator[Shelter]:
    async with opened(tmp_path) as shelter:
        yield shelter


async def test_a_restart_finds_everything(shelter: Shelter) -> None:
    """Tokens come from the header, the rest from the sidecar, the times of use from its date."""
    snapshots = [
        await shelter.save(some_tokens(40, seed), 1_000 + seed, checkpoints=(seed,)) for seed in range(4)
    ]
    shelter.catalog.touch(snapshots[1].id)
    before = {snapshot.id: shelter.catalog.last_used(snapshot.id) for snapshot in snapshots}
    catalog = await shelter.reopen()
    assert catalog.snapshots == {snapshot.id: snapshot.listed for snapshot in snapshots}
    assert {id_: catalog.last_used(id_) for id_ in before} == before
    assert catalog.size_bytes == shelter.bytes_on_disk()


async def test_times_of_use_decide_after_a_restart_too(shelter: Shelter) -> None:
    """Touched before, evicted last."""
    a, b = [await shelter.save(some_tokens(40, seed), 5_000) for seed in range(2)]
    shelter.catalog.touch(a.id)
    await (await shelter.reopen()).reserve(1_000)
    assert shelter.dropped == [b.id]


async def test_a_touch_while_the_sidecar_is_written_again_is_not_lost(
    shelter: Shelter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new sidecar is dated as of its beginning; what came meanwhile is noted after it."""
    entered, leave = threading.Event(), threading.Event()
    real = sidecar.make_durable

    def slowly(*arguments: Any) -> None:
        entered.set()
        assert leave.wait(10)
        real(*arguments)

    monkeypatch.setattr(sidecar, "make_durable", slowly)
    snapshot = await shelter.save(TOKENS)
    await asyncio.to_thread(entered.wait, 10)
    shelter.catalog.touch(snapshot.id)
    last_used = shelter.catalog.last_used(snapshot.id)
    leave.set()
    assert (await shelter.reopen()).last_used(snapshot.id) == last_used


async def test_touches_while_dates_are_written_are_not_lost(
    shelter: Shelter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One task dates them all, however many come in the meantime."""
    snapshot = await shelter.save(TOKENS)
    await shelter.catalog.settle()
    entered, leave = threading.Event(), threading.Event()
    n_trips = 0

    def slowly(*arguments: Any) -> None:
        nonlocal n_trips
        n_trips += 1
        entered.set()
        assert leave.wait(10)
        real(*arguments)

    real = sidecar.date
    monkeypatch.setattr(sidecar, "date", slowly)
    shelter.catalog.touch(snapshot.id)
    await asyncio.to_thread(entered.wait, 10)
    for _ in range(100):
        shelter.catalog.touch(snapshot.id)
    leave.set()
    last_used = shelter.catalog.last_used(snapshot.id)
    assert (await shelter.reopen()).last_used(snapshot.id) == last_used
    assert n_trips == 2


async def test_a_smaller_quota_is_enforced_at_opening(
    shelter: Shelter, caplog: pytest.LogCaptureFixture
) -> None:
    """In the order of use, without a word to a listener that knows none of them; one line in the log."""
    snapshots = [await shelter.save(some_tokens(40, seed), 3_000) for seed in range(3)]
    shelter.quota_bytes = 4_000
    with caplog.at_level(logging.INFO, "llamaslot.store"):
        catalog = await shelter.reopen()
    assert set(catalog.snapshots) == {snapshots[2].id}
    assert await shelter.settled() == shelter.whole()
    assert not shelter.dropped
    assert [record.message for record in caplog.records] == [
        f"snapshots: 1 in {shelter.directory}, 2.9 KiB used of the quota of 3.9 KiB; "
        "removed 0 unfinished and 0 broken ones, evicted 2, left 0 unknown files alone"
    ]


async def test_foreign_files_are_never_touched(shelter: Shelter) -> None:
    """Other names, and other things than files that bear names of ours."""
    for name in FOREIGN:
        shelter.put(name, b"mine")
    os.mkdir(shelter.directory / "ls-00000000000000aa.kv")
    os.symlink("/etc/passwd", shelter.directory / "ls-00000000000000bb.part")
    before = shelter.names()
    await (await shelter.reopen()).reserve(10_000)
    assert await shelter.settled() == before


@pytest.mark.parametrize("suffix", ["part", "kv", "json", "json.new", "probe"])
async def test_what_a_crash_leaves_is_removed(shelter: Shelter, suffix: str) -> None:
    """One of our files without the others is no snapshot."""
    snapshot = await shelter.save(TOKENS)
    shelter.put(f"ls-00000000000000aa.{suffix}", slot_file(TOKENS, 500))
    assert set((await shelter.reopen()).snapshots) == {snapshot.id}
    assert await shelter.settled() == shelter.whole()


@pytest.mark.parametrize("suffix", ["part", "json.new"])
async def test_leftovers_beside_a_whole_snapshot_go_alone(shelter: Shelter, suffix: str) -> None:
    """A sidecar that was being written again when we were killed: the old one is good."""
    snapshot = await shelter.save(TOKENS)
    await shelter.catalog.settle()
    shelter.put(f"{snapshot.id}.{suffix}", b"half")
    assert set((await shelter.reopen()).snapshots) == {snapshot.id}
    assert await shelter.settled() == shelter.whole()


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 4},
        {"id": "ls-00000000000000aa"},
        {"n_tokens": 41},
        {"n_tokens": True},
        {"size_bytes": 999},
        {"fingerprint": None},
        {"created_at": "yesterday"},
        {"checkpoints": [1.5]},
        {"checkpoints": None},
        {"source": 3},
        {"boot": 7},
    ],
)
async def test_a_sidecar_that_does_not_fit(
    shelter: Shelter, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Of another version, another file, or damaged: the pair is removed, with a line that says why."""
    snapshot = await shelter.save(TOKENS)
    await shelter.catalog.settle()
    shelter.sidecar(snapshot.id, **changes)
    assert (await shelter.reopen()).snapshots == {}
    assert await shelter.settled() == set()
    assert any(snapshot.id in record.message for record in caplog.records)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"version": 1}'])
async def test_a_broken_sidecar(shelter: Shelter, content: bytes) -> None:
    """Half-written or overwritten JSON is a broken snapshot, never an exception."""
    snapshot = await shelter.save(TOKENS)
    await shelter.catalog.settle()
    shelter.put(f"{snapshot.id}.json", content)
    assert (await shelter.reopen()).snapshots == {}
    assert await shelter.settled() == set()


async def test_a_truncated_file_is_found_at_opening(shelter: Shelter) -> None:
    """Its header claims all tokens; only the size noted in the sidecar tells."""
    snapshot = await shelter.save(TOKENS)
    os.truncate(shelter.directory / snapshot.file_name, 700)
    assert (await shelter.reopen()).snapshots == {}


async def test_an_unreadable_file_is_not_deleted_but_counts(
    shelter: Shelter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's umask changed: nothing says that it is broken. It goes only when its room is needed."""
    snapshot = await shelter.save(TOKENS, 6_000)
    await shelter.catalog.settle()
    real = open

    def guarded(path: Any, *arguments: Any, **keywords: Any) -> Any:
        if str(path).endswith(".kv"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", guarded)
        catalog = await shelter.reopen(has_manifest=False)
    assert catalog.snapshots == {}
    assert catalog.size_bytes == 6_000
    await catalog.abandon(await catalog.reserve(4_000))
    assert snapshot.file_name in shelter.names()
    await catalog.reserve(5_000)
    assert await shelter.settled() == set()


async def test_what_cannot_be_removed_at_opening_is_accounted_for(
    shelter: Shelter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part file of 6,000 bytes that resists leaves 4,000."""
    shelter.put("ls-00000000000000aa.part", bytes(6_000))
    with monkeypatch.context() as patch:
        refuse(patch, "unlink", errno.EACCES, lambda path: path.suffix == ".part")
        catalog = await shelter.reopen()
        await catalog.abandon(await catalog.reserve(4_000))
        with pytest.raises(QuotaExceeded):
            await catalog.reserve(4_001)
    await catalog.reserve(10_000)


async def test_unsynced_data_is_not_believed_after_a_power_cut(
    shelter: Shelter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renamed, but perhaps never on the disk: zeros behind a good header would be somebody's context."""
    synced = await shelter.save(some_tokens(40, 1))
    await shelter.catalog.settle()
    with monkeypatch.context() as patch:
        patch.setattr(Upkeep, "sync", lambda *_: None)
        await shelter.save(some_tokens(40, 2))
        assert len((await shelter.reopen()).snapshots) == 2  # the same boot: a killed process loses nothing
    monkeypatch.setattr(sidecar, "boot_id", lambda: "another boot")
    assert set((await shelter.reopen()).snapshots) == {synced.id}
    assert await shelter.settled() == shelter.whole()


async def test_what_a_killed_llamaslot_did_not_sync_is_synced_by_the_next(
    shelter: Shelter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be read at every start, and given up after the next power cut."""
    with monkeypatch.context() as patch:
        patch.setattr(Upkeep, "sync", lambda *_: None)
        snapshot = await shelter.save(some_tokens(40, 1))
    await (await shelter.reopen()).settle()
    monkeypatch.setattr(sidecar, "boot_id", lambda: "another boot")
    assert set((await shelter.reopen()).snapshots) == {snapshot.id}


async def test_data_that_the_disk_lost_is_dropped(shelter: Shelter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reports a failed write-back once; a restore would read whatever is there."""

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    snapshot = await shelter.save(TOKENS)
    await shelter.catalog.settle()
    assert shelter.dropped == [snapshot.id]
    assert await shelter.settled() == set()


async def test_a_drop_while_its_sidecar_is_written_again(
    shelter: Shelter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No sidecar rises from the dead."""
    entered, leave = threading.Event(), threading.Event()

    def slowly(directory: Path, noted: sidecar.Sidecar, last_used: float) -> None:
        entered.set()
        assert leave.wait(10)
        sidecar.write(directory, noted, last_used)

    monkeypatch.setattr(sidecar, "make_durable", slowly)
    snapshot = await shelter.save(TOKENS)
    await asyncio.to_thread(entered.wait, 10)
    await shelter.catalog.drop(snapshot.id)
    leave.set()
    assert await shelter.settled() == set()


async def test_a_second_llamaslot_is_refused(shelter: Shelter) -> None:
    """Two in one directory would delete each other's files; the message says who is there."""
    second = Shelter(shelter.directory)
    with pytest.raises(DirectoryUnusable, match=rf"in use by another llamaslot \(pid {os.getpid()}\)"):
        await second.open()
    shelter.catalog.close()
    await second.open()
    second.catalog.close()
    await shelter.catalog.settle()


async def test_a_missing_directory_is_said(tmp_path: Path) -> None:
    """Not created: created in the wrong place it would only hide the mistake."""
    with pytest.raises(DirectoryUnusable, match="does not exist"):
        await Shelter(tmp_path / "nowhere").open()


async def test_a_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other refusal is passed on in our words."""
    refuse(monkeypatch, "open", errno.EACCES, lambda path: path.name == ".llamaslot.lock")
    with pytest.raises(DirectoryUnusable, match="not usable for snapshots: Permission denied"):
        await Shelter(tmp_path).open()


async def test_a_canceled_opening_gives_the_lock_back(tmp_path: Path) -> None:
    """At whatever await, also while a thread is just taking it."""
    first = Shelter(tmp_path)
    await first.open()
    for seed in range(3):
        await first.save(some_tokens(40, seed))
    await first.catalog.settle()
    first.catalog.close()
    for n_rounds in range(30):
        task = asyncio.get_running_loop().create_task(Shelter(tmp_path).open())
        for _ in range(n_rounds):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result().close()
            break
    assert len((await Shelter(tmp_path).open()).snapshots) == 3


@pytest.mark.parametrize("has_manifest", [True, False])
async def test_whose_a_snapshot_is_outlives_a_restart(shelter: Shelter, has_manifest: bool) -> None:
    """By the register, or by the sidecar where all files are read."""
    namespaces = ["", "key:anna", 'key:anna\n[{"id":0,"scale":0.5}]']
    saved = {
        (await shelter.save(some_tokens(40, i), namespace=its)).id: its for i, its in enumerate(namespaces)
    }
    catalog = await shelter.reopen(has_manifest=has_manifest)
    assert {id_: snapshot.namespace for id_, snapshot in catalog.snapshots.items()} == saved
