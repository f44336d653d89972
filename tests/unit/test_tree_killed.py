"""llamaslot dies, or the power goes, before each file operation of saves that share rows, copies, evictions, repairs.

The next start lists what was saved and not dropped, all of it is whole, and no file is left over.
"""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable
from pathlib import Path
from typing import NamedTuple

import pytest

from llamaslot.cache.content import SnapshotKind
from llamaslot.store import Reservation, Snapshot, sidecar
from llamaslot.store.snapshot import EXT
from llamaslot.store.upkeep import Upkeep
from tests.support.crashes import WATCHED, Disk
from tests.support.trees import Tree, words

A = words(700, 1)


@pytest.fixture(autouse=True)
def _no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the disk of this machine: what it would have is computed."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda _: None)


class Left(NamedTuple):
    """A copy of a store and its landing place as a crash leaves them; ``listed``: the snapshots that must be there."""

    directory: Path
    landing: Path | None
    listed: dict[str, Snapshot]


class Crashing(Tree):
    """A tree that keeps, for each of its file operations, what a crash just before it would leave."""

    def __init__(
        self, parent: Path, kind: str, *, power_cut: bool = False, landing: Path | None = None
    ) -> None:
        self.parent, self.is_power_cut = parent, power_cut
        (directory := parent / "kv").mkdir(exist_ok=True)
        super().__init__(directory, kind, landing=landing)
        self.quota_bytes = 3 * len(self.file(A))
        self.catalog = self._catalog()
        self.left: list[Left] = []
        self.disk: Disk | None = None
        self._rng = random.Random(1)

    def write_data(self, draft: Reservation, data: bytes) -> None:
        super().write_data(draft, data)
        if self.disk is not None and not draft.has_landed:
            self.disk.wrote(draft.part_name)

    async def crash_in(self, work: Awaitable[object]) -> None:
        """Do the work, and note what crashes meanwhile leave."""
        self.disk = Disk(self.directory, self._crash)
        with self.disk.watched():
            await work

    def _crash(self) -> None:
        assert self.disk is not None
        target, landing = self.parent / f"left-{len(self.left)}", None
        listed = dict(self.catalog.snapshots)
        if self.is_power_cut:
            self.disk.cut(target, self._rng)
            listed = {id_: its for id_, its in listed.items() if its.parts}  # synced before they are listed
        else:
            self.disk.killed(target)
        if self.landing is not None:
            Disk(self.landing, lambda: None).killed(landing := self.parent / f"landing-{len(self.left)}")
        self.left.append(Left(target, landing, listed))

    async def check_left(self) -> list[set[str]]:
        """Each crash is survived: all that is listed is whole, nothing is left over, and it is good for another day.
        Returns the digests of the snapshots found after each.
        """
        found = []
        for each in self.left:
            # With twice the quota, nothing is evicted for a copy.
            tree = Tree(each.directory, "dense", 2 * self.quota_bytes, each.landing)
            tree.model = self.model
            catalog = await tree.open()
            if each.landing is not None:
                assert [path.name for path in each.landing.iterdir()] == [".llamaslot.lock"]
            if not self.is_power_cut:  # that brings removed files back
                assert catalog.size_bytes <= self.quota_bytes
            lost = each.listed.keys() - catalog.snapshots.keys()
            assert not lost, f"{each.directory.name}: {lost} were saved and are lost"
            assert all(catalog.snapshots[id_].digest == its.digest for id_, its in each.listed.items())
            found.append({its.digest for its in catalog.snapshots.values()})
            await tree.check_all()
            await tree.take(A[:650])
            await tree.check_all()
            catalog.close()
        return found


async def before(tree: Tree) -> tuple[Snapshot, Snapshot]:
    """Two snapshots, of which the second one needs the file of the first."""
    await tree.open()
    first = await tree.take(A[:400])
    second = await tree.take(A[:500], after=first.id)
    await tree.catalog.settle()
    return first, second


async def a_day(tree: Tree, first: Snapshot, second: Snapshot) -> None:
    """Goes on, pins, drops what was superseded, branches, gives a beginning out, goes on at once, and evicts."""
    longer = await tree.take(A, after=second.id)
    await tree.catalog.change_kind(longer.id, SnapshotKind.LEAF, is_pinned=True)
    await tree.catalog.drop(second.id)
    await tree.take([*A[:450], *words(200, 2)])
    await tree.given(longer.id, 560)
    await tree.catalog.drop(first.id)
    assert tree.dropped == [second.id, first.id]
    whole = await tree.take(words(300, 6))
    assert await tree.take([*words(300, 6), *words(50, 7)], after=whole.id)
    for seed in (3, 4, 5):
        await tree.take(words(500, seed))
    assert len(tree.dropped) > 2
    await tree.catalog.settle()
    await tree.catalog.write_manifest()


async def live(tree: Crashing) -> None:
    """A day and its crashes."""
    begun = await before(tree)
    await tree.crash_in(a_day(tree, *begun))
    assert tree.disk is not None
    assert tree.disk.seen | {"fdatasync"} == set(WATCHED)  # only whole files are synced so
    assert len(tree.left) > 50
    tree.catalog.close()


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
async def test_a_kill_loses_nothing_that_is_listed(kind: str, tmp_path: Path) -> None:
    tree = Crashing(tmp_path, kind)
    await live(tree)
    await tree.check_left()


async def test_a_kill_leaves_nothing_in_the_landing_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There llama-server's file is written, and the copy for a restore is put together."""
    monkeypatch.setattr("llamaslot.store.landing._are_apart", lambda *_: True)
    (landing := tmp_path / "landing").mkdir()
    tree = Crashing(tmp_path, "dense", landing=landing)
    await live(tree)
    assert any(len(list(each.landing.iterdir())) > 1 for each in tree.left if each.landing is not None)
    await tree.check_left()


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
async def test_a_power_cut_loses_nothing_that_was_synced(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is kept whole is synced later. Here it never is, but for snapshots that need its rows."""
    tree = Crashing(tmp_path, kind, power_cut=True)
    with monkeypatch.context() as patch:
        patch.setattr(Upkeep, "sync", lambda *_: None)
        await live(tree)
    monkeypatch.setattr(sidecar, "boot_id", lambda: "the next boot")
    await tree.check_left()


@pytest.mark.parametrize("power_cut", [False, True])
async def test_a_crash_while_a_start_repairs(power_cut: bool, tmp_path: Path) -> None:
    """A file of a snapshot is gone, so its beginning is kept; others are left over. The next start does it again."""
    tree = Crashing(tmp_path, "hybrid", power_cut=power_cut)
    _, second = await before(tree)
    longer = await tree.take(A, after=second.id)
    tree.catalog.close()
    (tree.directory / longer.parts[-1].file).unlink()
    tree.put("ls-0123456789abcdef.part", b"left")
    tree.put("ls-0123456789abcdee" + EXT, b"left")
    tree.catalog = tree._catalog()
    await tree.crash_in(tree.open())
    expected = {its.digest for its in tree.catalog.snapshots.values()}
    assert len(expected) == 3
    tree.catalog.close()
    for found in await tree.check_left():
        assert found == expected
