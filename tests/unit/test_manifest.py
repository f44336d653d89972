"""What all sidecars say, in one file: a start opens only what has changed since, and believes nothing beyond that."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest import mock

import orjson
import pytest
from msgspec.structs import replace
from xxhash import xxh3_128_hexdigest

from llamaslot.cache.content import SnapshotKind
from llamaslot.errors import SnapshotInvalid
from llamaslot.file_id import FileId
from llamaslot.store import Snapshot, manifest, scan, sidecar, upkeep
from tests.support.opens import OPENS
from tests.support.snapshots import Killed, Shelter, opened, slot_file, some_tokens

N = 10  # snapshots


@pytest.fixture
async def shelter(tmp_path: Path) -> AsyncIterator[Shelter]:
    """With ten snapshots of all sorts, some used since."""
    directory = tmp_path / "kv"
    directory.mkdir()
    async with opened(directory) as shelter:
        shelter.quota_bytes = 1 << 30
        await shelter.reopen()
        for n in range(N):
            special: dict[str, Any] = {"kind": SnapshotKind.TRUNK, "is_prewarmed": True} if n == 3 else {}
            await shelter.save(some_tokens(40, n), checkpoints=(n,), fingerprint=f"model-{n % 2}", **special)
        for id_ in list(shelter.catalog.snapshots)[::3]:
            shelter.catalog.touch(id_)
        await shelter.catalog.settle()
        yield shelter


async def reopened(shelter: Shelter) -> tuple[dict[str, Snapshot], list[str]]:
    """What a killed llamaslot's successor finds, with the register as it is; and which files it has opened."""
    shelter.catalog.close()
    shelter.catalog = shelter._catalog()
    with OPENS.noted() as seen:
        await shelter.open()
    return dict(shelter.catalog.snapshots), seen


def moved(path: Path, content: bytes) -> None:
    """Another file of that name."""
    new = path.with_name("new")
    new.write_bytes(content)
    new.rename(path)


async def test_a_start_opens_no_file_that_is_as_it_was(shelter: Shelter) -> None:
    """All that the sidecars say, and the dates of use, are in the register."""
    before = dict(shelter.catalog.snapshots)
    used = {id_: shelter.catalog.last_used(id_) for id_ in before}
    await shelter.catalog.write_manifest()
    found, seen = await reopened(shelter)
    assert seen == []
    assert found == before
    assert {id_: shelter.catalog.last_used(id_) for id_ in before} == used
    for id_ in found:
        assert (await shelter.catalog.verify(id_)).listed == before[id_]
    shelter.catalog.check()


async def test_two_thousand_snapshots_are_not_opened(tmp_path: Path) -> None:
    """They are listed and looked at, and the directory is opened."""
    shelter = Shelter(tmp_path / "kv", 1 << 30)
    shelter.directory.mkdir()
    shelter.max_files = 2_001
    await shelter.reopen()
    one = await shelter.save(some_tokens(4), 100)
    await shelter.catalog.settle()
    listed = {one.id: one.listed}
    for n in range(2_000):
        id_ = f"ls-{n:016x}"
        listed[id_] = replace(one.listed, id=id_)
        for suffix in (".kv", ".json"):  # as good as files of their own, and made in no time
            os.link(shelter.directory / f"{one.id}{suffix}", shelter.directory / f"{id_}{suffix}")
    mark = FileId.of(os.lstat(shelter.directory / one.file_name))
    writer = manifest.Manifest(shelter.manifest, shelter.directory)
    writer.file_ids, writer.durable = dict.fromkeys(listed, mark), set(listed)
    await writer.write(listed, lambda _: shelter.catalog.last_used(one.id))
    found, seen = await reopened(shelter)
    assert found == listed
    assert seen == []
    shelter.catalog.close()


async def test_what_came_and_went_since_is_noticed(shelter: Shelter) -> None:
    """A pair that is gone, one that is new, half a pair, and one that was used."""
    await shelter.catalog.write_manifest()
    gone, half, used, *_ = before = dict(shelter.catalog.snapshots)
    new = await shelter.save(some_tokens(40, 77))
    shelter.catalog.touch(used)
    dated = shelter.catalog.last_used(used)
    await shelter.catalog.settle()
    for name in (f"{gone}.kv", f"{gone}.json", f"{half}.json"):
        (shelter.directory / name).unlink()
    found, seen = await reopened(shelter)
    assert found == {id_: one for id_, one in before.items() if id_ not in (gone, half)} | {
        new.id: new.listed
    }
    assert seen == sorted(f"{id_}{suffix}" for id_ in (new.id, used) for suffix in (".json", ".kv"))
    assert shelter.catalog.last_used(used) == dated
    assert await shelter.settled() == shelter.whole()
    shelter.catalog.check()


@pytest.mark.parametrize("change", ["longer", "other tokens", "other file", "not ours", "in its place"])
async def test_a_slot_file_that_has_changed_is_read(shelter: Shelter, change: str) -> None:
    """Broken ones are removed, and so is one that holds other tokens than were saved: its rows are not known."""
    await shelter.catalog.write_manifest()
    id_, *others = shelter.catalog.snapshots
    path, other = shelter.directory / f"{id_}.kv", some_tokens(40, 99)
    match change:
        case "longer":
            path.write_bytes(path.read_bytes() + b"x")
        case "other tokens":
            path.write_bytes(slot_file(other, 1_000))
        case "other file":
            moved(path, slot_file(other, 1_000))
        case "not ours":
            moved(path, bytes(1_000))
        case "in its place":  # with the date of the one before it, as a backup does
            dated = path.stat()
            path.write_bytes(slot_file(other, 1_000))
            os.utime(path, ns=(dated.st_atime_ns, dated.st_mtime_ns))
    found, seen = await reopened(shelter)
    assert seen == [f"{id_}.json", f"{id_}.kv"]
    assert found.keys() == set(others)


async def test_a_sidecar_that_has_changed_is_read(shelter: Shelter) -> None:
    """What it says now counts."""
    await shelter.catalog.write_manifest()
    id_ = next(iter(shelter.catalog.snapshots))
    shelter.sidecar(id_, source="somebody")
    found, seen = await reopened(shelter)
    assert seen == [f"{id_}.json", f"{id_}.kv"]
    assert found[id_].source == "somebody"


async def test_what_another_process_changed_is_not_entered(shelter: Shelter) -> None:
    """A file that is not as it was when it was read, at the time when the register is written."""
    a, b, c, *_ = shelter.catalog.snapshots
    moved(shelter.directory / f"{a}.kv", slot_file(some_tokens(40, 99), 1_000))
    shelter.sidecar(b, source="somebody")
    (shelter.directory / f"{c}.kv").unlink()
    found, seen = await reopened(await _registered(shelter))
    assert seen == sorted(f"{id_}{suffix}" for id_ in (a, b) for suffix in (".json", ".kv"))
    assert found[b].source == "somebody"
    assert not found.keys() & {a, c}


async def _registered(shelter: Shelter) -> Shelter:
    await shelter.catalog.write_manifest()
    return shelter


async def test_only_what_is_on_the_disk_is_entered(shelter: Shelter, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose data is still on its way is read at each start, and not believed after a power cut."""
    before = set(shelter.catalog.snapshots)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", mock.Mock(side_effect=OSError(28, "No space left on device")))
        unsynced = await shelter.save(some_tokens(40, 50))
        await shelter.catalog.settle()
        found, seen = await reopened(await _registered(shelter))
        assert set(found) == {*before, unsynced.id}
        assert sorted(seen) == [f"{unsynced.id}.json", f"{unsynced.id}.kv"]
        await shelter.catalog.settle()
        await shelter.catalog.write_manifest()
    monkeypatch.setattr(sidecar, "boot_id", lambda: "another boot")
    found, _ = await reopened(shelter)
    assert set(found) == before


async def test_a_register_from_before_a_power_cut_makes_nothing_appear(
    shelter: Shelter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that a snapshot is on the disk, but its sidecar on the disk is still the one that does not."""
    draft = await shelter.catalog.reserve(1_000)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", mock.Mock(side_effect=OSError(28, "No space left on device")))
        snapshot = await shelter.commit(draft, some_tokens(40, 50), shelter.write(draft, some_tokens(40, 50)))
        await shelter.catalog.settle()
    path = shelter.directory / f"{snapshot.id}.json"
    first = path.with_name("first")
    os.link(path, first)  # what the disk has
    shelter.sidecar(snapshot.id)
    moved(path, json.dumps(json.loads(path.read_bytes()) | {"boot": None}).encode())
    used = shelter.catalog.last_used(snapshot.id)
    os.utime(path, (used, used))
    shelter.catalog._manifest.durable.add(snapshot.id)
    await shelter.catalog.write_manifest()
    first.rename(path)
    monkeypatch.setattr(sidecar, "boot_id", lambda: "another boot")
    found, seen = await reopened(shelter)
    assert snapshot.id not in found
    assert seen == [f"{snapshot.id}.json"]
    assert await shelter.settled() == shelter.whole()


async def test_every_flipped_byte_is_noticed(shelter: Shelter, caplog: pytest.LogCaptureFixture) -> None:
    """A line in the log; all files are read, and nothing is different."""
    before = dict(shelter.catalog.snapshots)
    await shelter.catalog.write_manifest()
    whole, rng = shelter.manifest.read_bytes(), random.Random(3)
    for at in {0, 20, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(20))}:
        flipped = bytearray(whole)
        flipped[at] ^= 1 << rng.randrange(8)
        shelter.manifest.write_bytes(flipped)
        caplog.clear()
        found, seen = await reopened(shelter)
        assert found == before
        assert len(seen) == 2 * N
        assert len([record for record in caplog.records if "cannot use" in record.message]) == 1


async def test_a_register_of_before_prewarmed_snapshots_were_told_apart_is_used(shelter: Shelter) -> None:
    """No snapshot needs to be opened for that."""
    await shelter.catalog.write_manifest()
    head, _, body = shelter.manifest.read_bytes().partition(b"\n")
    content = orjson.loads(body)
    del content["snapshots"]["is_prewarmed"]
    body = orjson.dumps(content)
    shelter.manifest.write_bytes(
        head.rsplit(b" ", 1)[0] + b" " + xxh3_128_hexdigest(body).encode() + b"\n" + body
    )
    found, seen = await reopened(shelter)
    assert not any(snapshot.is_prewarmed for snapshot in found.values())
    assert len(seen) < N


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        (b"", "it is damaged, or of another version"),
        (b"somebody's\nfile", "it is damaged, or of another version"),
        (b'{"n": 1}', "not of this format: KeyError"),
        (b'{"n": 1, "fingerprints": [], "snapshots": 7}', "not of this format: TypeError"),
        (
            b'{"n": 1, "fingerprints": [], "snapshots": {"fingerprint": [0]}}',
            "not of this format: IndexError",
        ),
        (b"[]", "not of this format: TypeError"),
        (b"{", "not of this format: JSONDecodeError"),
    ],
)
async def test_a_register_that_cannot_be_used_is_done_without(
    shelter: Shelter, caplog: pytest.LogCaptureFixture, content: bytes | None, said: str
) -> None:
    """Also one with a right checksum of wrong content: of a version that forgot to change its number."""
    before = dict(shelter.catalog.snapshots)
    shelter.manifest.unlink()
    if content is not None:
        if content[:1] in (b"{", b"["):
            content = (
                f"llamaslot sidecars {manifest.VERSION} {xxh3_128_hexdigest(content)}\n".encode() + content
            )
        shelter.manifest.write_bytes(content)
    with caplog.at_level(logging.INFO, "llamaslot.store"):
        found, seen = await reopened(shelter)
    assert found == before
    assert len(seen) == 2 * N
    assert said in caplog.text


async def test_a_register_that_cannot_be_written_costs_nothing(
    shelter: Shelter, caplog: pytest.LogCaptureFixture
) -> None:
    """A line in the log; the old one is still good."""
    await shelter.catalog.write_manifest()
    before = shelter.manifest.read_bytes()
    with mock.patch.object(os, "fsync", side_effect=OSError(28, "No space left on device")):
        await shelter.catalog.write_manifest()
    assert ": No space left on device" in caplog.text
    assert shelter.manifest.read_bytes() == before
    assert (await reopened(shelter))[1] == []


async def test_nobody_else_reads_it(shelter: Shelter) -> None:
    """It says who has talked to the model, and when."""
    old = os.umask(0)
    try:
        await shelter.catalog.write_manifest()
    finally:
        os.umask(old)
    assert shelter.manifest.stat().st_mode & 0o077 == 0


async def test_a_snapshot_exchanged_after_the_start_is_not_restored(shelter: Shelter) -> None:
    """Its tokens were not read at the start, but a digest of them is known."""
    await shelter.catalog.write_manifest()
    found, _ = await reopened(shelter)
    id_ = next(iter(found))
    (shelter.directory / f"{id_}.kv").write_bytes(slot_file(some_tokens(40, 99), 1_000))
    with pytest.raises(SnapshotInvalid, match="other tokens"):
        await shelter.catalog.verify(id_)
    assert id_ not in shelter.catalog.snapshots


async def test_a_first_start_that_is_killed_goes_on_where_it_was(
    shelter: Shelter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has read is in the register."""
    before = dict(shelter.catalog.snapshots)
    monkeypatch.setattr(scan, "_AT_ONCE", 2)
    monkeypatch.setattr(scan, "_SOME", 2)
    n_read = 0

    def read(directory: Path, ids: list[str]) -> dict[str, scan.Loaded | SnapshotInvalid]:
        nonlocal n_read
        if n_read == 6:
            raise Killed
        n_read += len(ids)
        return load_some(directory, ids)

    load_some = scan._load_some
    with monkeypatch.context() as patch:
        patch.setattr(scan, "_load_some", read)
        with pytest.raises(Killed):
            await reopened(shelter)
    found, seen = await reopened(shelter)
    assert found == before
    assert len(seen) == 2 * (N - 6)


async def test_the_register_follows_what_changes(shelter: Shelter, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill few files are read, however long llamaslot has run."""
    await shelter.catalog.write_manifest()
    monkeypatch.setattr(upkeep, "_CHANGES_MAX", 3)
    for n in range(20, 25):
        await shelter.save(some_tokens(40, n))
        await shelter.catalog.settle()
    before = dict(shelter.catalog.snapshots)
    found, seen = await reopened(shelter)
    assert found == before
    assert len(seen) == 2 * 1


async def test_what_a_first_start_has_read_is_in_the_register(
    shelter: Shelter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "_CHANGES_MAX", 3)
    assert len((await reopened(shelter))[1]) == 2 * N
    await shelter.catalog.settle()
    assert (await reopened(shelter))[1] == []


async def test_a_new_directory_needs_no_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its first start says nothing of a file that is missing."""
    caplog.set_level(logging.INFO)
    register = manifest.Manifest(tmp_path / "kv.sidecars", tmp_path)
    await register.read()
    assert caplog.messages == []
    (tmp_path / "ls-0123456789abcdef.json").touch()
    await register.read()
    assert "llamaslot reads each sidecar" in caplog.text
