"""What a catalog notes about a snapshot beyond its tokens: hits, its kind, and the pin that it is born with."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llamaslot.cache.content import SnapshotKind
from llamaslot.store import QuotaExceeded
from llamaslot.store.learned import HitLog
from tests.support.snapshots import Shelter, opened, refuse, some_tokens

TOKENS = some_tokens(40)


@pytest.fixture
async def shelter(tmp_path: Path) -> AsyncIterator[Shelter]:
    async with opened(tmp_path) as shelter:
        yield shelter


# -- hits ----------------------------------------------------------------------------------------------------------


async def test_each_touch_is_a_hit(shelter: Shelter) -> None:
    """A new snapshot has none; one that is gone has none to ask for."""
    a, b = [await shelter.save(some_tokens(40, seed)) for seed in range(2)]
    for _ in range(3):
        shelter.catalog.touch(a.id)
    shelter.catalog.touch("ls-0123456789abcdef")
    assert (shelter.catalog.n_hits(a.id), shelter.catalog.n_hits(b.id)) == (3, 0)
    await shelter.catalog.drop(a.id)
    with pytest.raises(KeyError):
        shelter.catalog.n_hits(a.id)


async def test_hits_survive_a_restart(shelter: Shelter) -> None:
    """And are counted on."""
    snapshot = await shelter.save(TOKENS)
    for n_hits in (1, 2, 3):
        shelter.catalog.touch(snapshot.id)
        catalog = await shelter.reopen()
        assert catalog.n_hits(snapshot.id) == n_hits


async def test_hits_cost_no_sync(shelter: Shelter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy day has thousands of them; what a power cut takes is a few counts."""
    snapshot = await shelter.save(TOKENS)
    await shelter.catalog.settle()
    for step in ("fsync", "fdatasync"):
        refuse(monkeypatch, step, errno.EIO, lambda path: True)
    monkeypatch.setattr("os.fsync", None)
    shelter.catalog.touch(snapshot.id)
    await shelter.catalog.settle()
    assert HitLog(shelter.directory).load() == {snapshot.id: 1}


async def test_a_disk_that_refuses_hits_harms_nothing(
    shelter: Shelter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They are counted in memory, and one line says that they are not kept."""
    snapshot = await shelter.save(TOKENS)
    await shelter.catalog.settle()
    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        refuse(patch, "open", errno.ENOSPC, lambda path: path.name == ".llamaslot.hits")
        shelter.catalog.touch(snapshot.id)
        await shelter.catalog.settle()
    assert shelter.catalog.n_hits(snapshot.id) == 1
    assert caplog.messages == [
        "snapshots: the file of hit counts cannot be written, a restart forgets the latest hits:"
        " No space left on device"
    ]


def test_what_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    """Lines cut off by a crash, or of anything else, cost no count but their own."""
    (tmp_path / ".llamaslot.hits").write_bytes(
        b'["a",2]\n["b",1,true]\n[3]\n["c",-1,true]\n{"d":4}\n["e",tr\xff\n["a",3]\n["f",'
    )
    log = HitLog(tmp_path)
    assert log.load() == {"a": 3, "b": 1}
    log.append({"b": 2})
    assert HitLog(tmp_path).load() == {"a": 3, "b": 2}


def test_the_file_does_not_grow_for_ever(tmp_path: Path) -> None:
    """A year of hits on two snapshots is a file of a few thousand lines, and no count is lost on the way."""
    log, counts = HitLog(tmp_path), {"a": 0, "b": 0}
    for hit in range(5_000):
        counts["ab"[hit % 2]] += 1
        listed = dict(counts)
        if log.is_long(len(listed)):
            log.rewrite(listed)
        else:
            log.append({"ab"[hit % 2]: listed["ab"[hit % 2]]})
    assert HitLog(tmp_path).load() == listed
    assert len((tmp_path / ".llamaslot.hits").read_bytes().splitlines()) < 3_000
    assert [entry.name for entry in tmp_path.iterdir()] == [".llamaslot.hits"]


# -- what became of it ---------------------------------------------------------------------------------------------


async def test_an_heir_has_the_hits_of_what_it_supersedes(shelter: Shelter) -> None:
    """Over a restart too; if either is gone nothing happens."""
    old, new = [await shelter.save(some_tokens(40, seed)) for seed in range(2)]
    shelter.catalog.touch(old.id)
    shelter.catalog.inherit(new.id, old.id)
    await shelter.catalog.drop(old.id)
    shelter.catalog.inherit(new.id, old.id)
    assert (await shelter.reopen()).n_hits(new.id) == 1


async def test_a_context_is_as_old_as_its_last_use(shelter: Shelter) -> None:
    """One that lay in its slot for an hour before it was saved is not fresh."""
    snapshot = await shelter.save(TOKENS, idle_s=3_600.0)
    assert shelter.catalog.last_used(snapshot.id) == snapshot.created_at - 3_600.0
    catalog = await shelter.reopen()
    assert catalog.last_used(snapshot.id) == snapshot.created_at - 3_600.0


# -- kind and pin --------------------------------------------------------------------------------------------------


async def test_kind_and_pin_survive_a_restart(shelter: Shelter) -> None:
    """They are in the sidecar."""
    trunk = await shelter.save(TOKENS, kind=SnapshotKind.TRUNK, is_prewarmed=True)
    leaf = await shelter.save(some_tokens(40, 1))
    assert repr(trunk) == f"<Snapshot {trunk.id} 40 tok 1000 B victim trunk pinned>"
    catalog = await shelter.reopen()
    assert catalog.snapshots == {trunk.id: trunk.listed, leaf.id: leaf.listed}
    assert (leaf.kind, leaf.is_pinned) == (SnapshotKind.LEAF, False)


async def test_an_older_sidecar_is_of_a_plain_conversation(shelter: Shelter) -> None:
    """Written before there were kinds: nobody's snapshots are lost by an update."""
    snapshot = await shelter.save(TOKENS)
    await shelter.catalog.settle()
    fields = shelter.sidecar(snapshot.id)
    del fields["kind"], fields["is_pinned"]
    (shelter.directory / f"{snapshot.id}.json").write_text(json.dumps(fields))
    assert (await shelter.reopen()).snapshots == {snapshot.id: snapshot.listed}


@pytest.mark.parametrize("changes", [{"kind": "root"}, {"kind": None}, {"is_pinned": 1}])
async def test_a_sidecar_of_an_unknown_kind_is_broken(shelter: Shelter, changes: dict[str, object]) -> None:
    """Like any other sidecar that says what cannot be."""
    snapshot = await shelter.save(TOKENS)
    await shelter.catalog.settle()
    shelter.sidecar(snapshot.id, **changes)
    assert not (await shelter.reopen()).snapshots


async def test_a_pinned_snapshot_is_not_evicted(shelter: Shelter) -> None:
    """Neither for a save nor by a smaller quota at the next start."""
    pinned = await shelter.save(TOKENS, 4_000, is_prewarmed=True)
    other = await shelter.save(some_tokens(40, 1), 4_000)
    with pytest.raises(QuotaExceeded):
        await shelter.catalog.reserve(6_001)
    await shelter.catalog.reserve(6_000)
    assert shelter.dropped == [other.id]
    shelter.quota_bytes = 1_000
    assert set((await shelter.reopen()).snapshots) == {pinned.id}
    shelter.catalog.check()


async def test_a_pinned_snapshot_of_another_model_is(shelter: Shelter) -> None:
    """Nobody can use it, and it goes before anything that can be used."""
    pinned = await shelter.save(TOKENS, 4_000, is_prewarmed=True, fingerprint="model-b")
    await shelter.save(some_tokens(40, 1), 4_000, fingerprint="model-a")
    shelter.catalog.serve("gpu0", "model-a")
    await shelter.catalog.reserve(5_000)
    assert shelter.dropped == [pinned.id]


async def test_a_pinned_snapshot_can_be_dropped(shelter: Shelter) -> None:
    """The pin is against eviction, not against one who says so."""
    pinned = await shelter.save(TOKENS, is_prewarmed=True)
    await shelter.catalog.drop(pinned.id)
    assert not shelter.catalog.snapshots
