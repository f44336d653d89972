"""Snapshots come and go: commit, pins, drops, and files that are not what they should be."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from llamaslot.cache.content import SnapshotKind
from llamaslot.cache.ids import pack
from llamaslot.errors import SnapshotInvalid
from llamaslot.store import QuotaExceeded
from tests.support.snapshots import Shelter, opened, slot_file, some_tokens

TOKENS = some_tokens(40)


@pytest.fixture
async def shelter(tmp_path: Path) -> AsyncIterator[Shelter]:
    async with opened(tmp_path) as shelter:
        yield shelter


async def test_a_commit_lists_what_was_saved(shelter: Shelter) -> None:
    """The snapshot says what the engine told and what the header holds."""
    draft = await shelter.catalog.reserve(1_000)
    assert draft.part_name == f"{draft.id}.part"
    snapshot = await shelter.commit(draft, TOKENS, shelter.write(draft, TOKENS), checkpoints=(4, 36))
    assert shelter.catalog.snapshots == {draft.id: snapshot.listed}
    assert (snapshot.tokens, snapshot.n_tokens, snapshot.size_bytes) == (TOKENS, 40, 1_000)
    assert (snapshot.fingerprint, snapshot.checkpoints, snapshot.source) == ("model-a", (4, 36), "victim")
    assert snapshot.file_name == f"{snapshot.id}.kv"
    assert repr(snapshot) == f"<Snapshot {snapshot.id} 40 tok 1000 B victim>"
    assert await shelter.settled() == shelter.whole()


async def test_a_save_is_known_to_be_good_before_its_turn(shelter: Shelter) -> None:
    """Its slot is free then, and what is copied and synced waits for its turn."""
    turn, is_checked = asyncio.Semaphore(0), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(shelter.save(TOKENS, turn=turn, on_checked=lambda _: is_checked.set()))
        await is_checked.wait()
        await shelter.save(some_tokens(40, 2))
        assert len(shelter.catalog.snapshots) == 1
        turn.release()
    assert len(shelter.catalog.snapshots) == 2


async def test_generated_tokens_are_taken_from_the_header(shelter: Shelter) -> None:
    """The engine knows the prompt; the answer's tokens are in the file."""
    draft = await shelter.catalog.reserve(1_000)
    whole = TOKENS + pack([7, 8, 9])
    snapshot = await shelter.commit(draft, whole, shelter.write(draft, whole), tokens_expected=TOKENS)
    assert snapshot.tokens == whole


async def test_an_unknown_slot_is_adopted(shelter: Shelter) -> None:
    """Nothing expected: the header alone says what it is."""
    draft = await shelter.catalog.reserve(1_000)
    snapshot = await shelter.commit(draft, TOKENS, shelter.write(draft, TOKENS), tokens_expected=b"")
    assert snapshot.tokens == TOKENS


async def test_a_reservation_that_was_too_large_is_given_back(shelter: Shelter) -> None:
    """Estimates err; only what the file really has counts in the end."""
    draft = await shelter.catalog.reserve(9_000)
    await shelter.commit(draft, TOKENS, shelter.write(draft, TOKENS, 400))
    assert shelter.catalog.size_bytes == shelter.bytes_on_disk() == 400


async def fault_of(shelter: Shelter, data: bytes | None, **changes: Any) -> str:
    """What is said of a part file with this content; it is gone afterwards and nothing is accounted for it."""
    draft = await shelter.catalog.reserve(1_000)
    if data is not None:
        shelter.put(draft.part_name, data)
    with pytest.raises(SnapshotInvalid) as caught:
        await shelter.commit(draft, TOKENS, **({"n_written": len(data or b"")} | changes))
    assert await shelter.settled() == shelter.whole()
    assert shelter.catalog.size_bytes == shelter.bytes_on_disk()
    assert not shelter.dropped, "nobody has heard of it"
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "changes", "said"),
    [
        (None, {}, "cannot be read: No such file"),
        (slot_file(TOKENS, 999), {"n_written": 1_000}, "has 999 bytes, 1000 were written"),
        (slot_file(TOKENS, 900), {"n_saved": 41}, "holds 40 tokens, 41 were saved"),
        (slot_file(TOKENS, 900), {"tokens_expected": some_tokens(40, 1)}, "holds another conversation"),
        (slot_file(TOKENS, 900), {"tokens_expected": some_tokens(41)}, "holds another conversation"),
        (slot_file(TOKENS, 900, media=[3]), {}, "holds media"),
        (slot_file(b"", 48), {"n_saved": 0, "tokens_expected": b""}, "holds no tokens"),
        (b"GGUF" * 20, {}, "no slot file"),
        (slot_file(TOKENS)[:50], {}, "claims 44 words"),
    ],
)
async def test_a_file_that_is_not_what_was_saved(
    shelter: Shelter, data: bytes | None, changes: dict[str, Any], said: str
) -> None:
    """Refused with the reason, removed, and its room given back."""
    assert said in await fault_of(shelter, data, **changes)


@pytest.mark.parametrize("step", ["fsync", "rename", "utime"])
async def test_a_disk_that_fails_while_the_sidecar_is_written(shelter: Shelter, step: str) -> None:
    """ENOSPC or an I/O error: no snapshot, no files, no room taken."""
    with pytest.MonkeyPatch.context() as patch:

        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, step, full)
        assert "cannot be written: No space left" in await fault_of(shelter, slot_file(TOKENS, 800))
    await shelter.save(TOKENS)  # and it goes on when there is space again


async def test_a_draft_ends_once(shelter: Shelter) -> None:
    """A second commit, or one after abandon, is refused and harms nothing."""
    draft = await shelter.catalog.reserve(1_000)
    await shelter.commit(draft, TOKENS, shelter.write(draft, TOKENS))
    with pytest.raises(SnapshotInvalid, match="has ended"):
        await shelter.commit(draft, TOKENS, 1_000)
    await shelter.catalog.abandon(draft)
    assert draft.id in shelter.catalog.snapshots


async def test_abandon_removes_the_part_file(shelter: Shelter) -> None:
    """Idempotent, also before anything was written, and twice at once."""
    draft = await shelter.catalog.reserve(1_000)
    shelter.write(draft, TOKENS)
    await asyncio.gather(shelter.catalog.abandon(draft), shelter.catalog.abandon(draft))
    await shelter.catalog.abandon(draft)
    await shelter.catalog.abandon(await shelter.catalog.reserve(1_000))
    assert await shelter.settled() == set()
    assert shelter.catalog.size_bytes == 0


async def test_a_canceled_commit_is_carried_out(shelter: Shelter) -> None:
    """At whatever await the caller is canceled: in the end it is listed and whole, and abandon changes nothing."""
    for n_rounds in range(8):
        draft = await shelter.catalog.reserve(1_000)
        size = shelter.write(draft, TOKENS)
        task = asyncio.get_running_loop().create_task(shelter.commit(draft, TOKENS, size))
        for _ in range(n_rounds):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await shelter.catalog.abandon(draft)
        shelter.catalog.check()
        # Canceled before its first step it has not begun, and abandon has removed the part file.
        assert (draft.id in shelter.catalog.snapshots) == (n_rounds > 0)
    assert await shelter.settled() == shelter.whole()


async def test_a_sidecar_holds_no_tokens_and_is_closed_to_others(shelter: Shelter) -> None:
    """They are transcripts in all but name; the group may read them, where the umask lets it."""
    previous = os.umask(0o007)
    try:
        snapshot = await shelter.save(TOKENS, checkpoints=(12,))
        await shelter.catalog.settle()
    finally:
        os.umask(previous)
    assert shelter.sidecar(snapshot.id) == {
        "version": 1,
        "id": snapshot.id,
        "n_tokens": 40,
        "size_bytes": 1_000,
        "fingerprint": "model-a",
        "created_at": snapshot.created_at,
        "checkpoints": [12],
        "source": "victim",
        "boot": None,
        "kind": "leaf",
        "is_pinned": False,
        "is_prewarmed": False,
        "space": "",
        "digest": snapshot.digest,
    }
    mode = os.stat(shelter.directory / f"{snapshot.id}.json").st_mode
    assert stat.S_IMODE(mode) == 0o660


async def test_a_pinned_snapshot_is_dropped_at_its_last_unpin(shelter: Shelter) -> None:
    """Nobody finds it any more, but who restores from it can go on."""
    snapshot = await shelter.save(TOKENS)
    with shelter.catalog.pin(snapshot.id) as pinned, shelter.catalog.pin(snapshot.id):
        assert pinned == snapshot.listed
        await shelter.catalog.drop(snapshot.id)
        assert shelter.dropped == [snapshot.id]
        assert shelter.catalog.snapshots == {}
        with pytest.raises(KeyError):
            shelter.catalog.pin(snapshot.id)
        assert snapshot.file_name in shelter.names()
        assert shelter.catalog.size_bytes == 1_000
    assert await shelter.settled() == set()
    assert shelter.catalog.size_bytes == 0


async def test_a_pin_is_left_once(shelter: Shelter) -> None:
    """Leaving it again does not take away what somebody else holds."""
    snapshot = await shelter.save(TOKENS, 9_000)
    pin = shelter.catalog.pin(snapshot.id)
    with shelter.catalog.pin(snapshot.id):
        pin.release()
        pin.release()
        with pytest.raises(QuotaExceeded):
            await shelter.catalog.reserve(2_000)
    await shelter.catalog.reserve(2_000)


async def test_a_drop_is_idempotent(shelter: Shelter) -> None:
    """Several at once, and again later: told once, gone once."""
    snapshot = await shelter.save(TOKENS)
    await asyncio.gather(*(shelter.catalog.drop(snapshot.id) for _ in range(3)))
    await shelter.catalog.drop(snapshot.id)
    assert shelter.dropped == [snapshot.id]
    assert await shelter.settled() == set()


async def test_a_snapshot_on_its_way_out_cannot_be_pinned(shelter: Shelter) -> None:
    """From the moment it is chosen nobody can restore from it."""
    snapshot = await shelter.save(TOKENS, 9_000)
    reserving = asyncio.get_running_loop().create_task(shelter.catalog.reserve(5_000))
    await shelter.has_dropped.wait()
    with pytest.raises(KeyError):
        shelter.catalog.pin(snapshot.id)
    await reserving


async def test_what_a_snapshot_is_kept_for_can_change(shelter: Shelter) -> None:
    """At once, and over a restart; nothing else in its sidecar does."""
    snapshot = await shelter.save(TOKENS)
    marked = await shelter.catalog.change_kind(snapshot.id, SnapshotKind.TRUNK, is_pinned=True)
    assert shelter.catalog.snapshots[snapshot.id] is marked
    (again,) = (await shelter.reopen()).snapshots.values()
    assert again == replace(snapshot.listed, kind=SnapshotKind.TRUNK, is_pinned=True)


async def test_a_mark_survives_the_sync_of_its_file(shelter: Shelter) -> None:
    """Which writes the sidecar too, some seconds after the commit."""
    snapshot = await shelter.save(TOKENS)
    await shelter.catalog.change_kind(snapshot.id, SnapshotKind.TRUNK, is_pinned=True)
    await shelter.catalog.settle()
    sidecar = shelter.sidecar(snapshot.id)
    assert (sidecar["kind"], sidecar["is_pinned"], sidecar["boot"]) == ("trunk", True, None)


async def test_a_disk_that_refuses_a_mark_costs_nothing(
    shelter: Shelter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It counts until the next restart."""
    snapshot = await shelter.save(TOKENS)
    await shelter.catalog.settle()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        await shelter.catalog.change_kind(snapshot.id, SnapshotKind.TRUNK, is_pinned=True)
    assert "cannot write the sidecar of " in caplog.text
    assert shelter.catalog.snapshots[snapshot.id].is_pinned


async def test_what_is_gone_cannot_be_marked(shelter: Shelter) -> None:
    """KeyError, as for a pin."""
    with pytest.raises(KeyError):
        await shelter.catalog.change_kind("ls-0000000000000000", SnapshotKind.TRUNK, is_pinned=True)


async def test_verify_returns_what_is_whole(shelter: Shelter) -> None:
    """The usual case before a restore."""
    snapshot = await shelter.save(TOKENS)
    assert await shelter.catalog.verify(snapshot.id) == snapshot


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "cannot be read: No such file"),
        (slot_file(TOKENS, 1_000)[:700], "has 700 bytes, 1000 were written"),
        (slot_file(some_tokens(40, 1), 1_000), "holds other tokens"),
        (bytes(1_000), "no slot file"),
    ],
)
async def test_verify_drops_what_is_not_whole(shelter: Shelter, data: bytes | None, said: str) -> None:
    """Missing, truncated, exchanged, overwritten: said, told, removed."""
    snapshot = await shelter.save(TOKENS)
    path = shelter.directory / snapshot.file_name
    os.unlink(path) if data is None else shelter.put(snapshot.file_name, data)
    with pytest.raises(SnapshotInvalid, match=said):
        await shelter.catalog.verify(snapshot.id)
    await shelter.catalog.settle()
    assert shelter.dropped == [snapshot.id]
    assert await shelter.settled() == set()


async def test_verify_of_an_unknown_one(shelter: Shelter) -> None:
    """Evicted a moment ago: no other error than for any that cannot be used."""
    with pytest.raises(SnapshotInvalid, match="is gone"):
        await shelter.catalog.verify("ls-0000000000000000")


async def test_verify_keeps_a_snapshot_when_only_we_are_short(
    shelter: Shelter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many open files is no fault of the snapshot."""
    snapshot = await shelter.save(TOKENS)

    def short(*_: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", short)
        with pytest.raises(SnapshotInvalid, match="Too many open files"):
            await shelter.catalog.verify(snapshot.id)
    assert await shelter.catalog.verify(snapshot.id) == snapshot
