"""Saves that share rows, and copies for a restore, while the disk fails or the caller goes."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamaslot.cache.ids import pack
from llamaslot.store import Snapshot
from llamaslot.store.assemble import assemble
from llamaslot.store.deduplicate import Base
from llamaslot.store.manifest import Manifest
from llamaslot.store.slot_layout import read_layout
from llamaslot.store.upkeep import Upkeep
from tests.support.trees import Tree, words

A = words(700, 1)


async def tree_of(directory: Path, kind: str = "dense", quota_bytes: int = 1 << 20) -> Tree:
    tree = Tree(directory, kind, quota_bytes)
    await tree.open()
    return tree


async def test_what_the_disk_lost_under_a_save_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save syncs the file it goes on from, and hears the kernel's only word: the file is not believed again."""
    tree = await tree_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Upkeep, "sync", lambda *_: None)
        first = await tree.take(A[:400])
    real, codes = os.fdatasync, [errno.EIO]

    def fail_once(fd: int) -> None:
        if codes:
            raise OSError(codes[0], os.strerror(codes.pop()))
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fail_once)
    second = await tree.take(A, after=first.id)
    assert not second.parts
    assert tree.dropped == [first.id]
    await tree.check_all()
    tree.catalog.close()


async def test_a_cancelled_copy_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread goes on to write: the file is removed after that, and counts until then."""
    tree = await tree_of(tmp_path)
    snapshot = await tree.take(A)
    entered, leave = threading.Event(), threading.Event()

    def slowly(*arguments: Any) -> int:
        entered.set()
        assert leave.wait(10)
        return assemble(*arguments)

    monkeypatch.setattr("llamaslot.store.restore_file.assemble", slowly)
    task = asyncio.get_running_loop().create_task(tree.given(snapshot.id, 350))
    await asyncio.to_thread(entered.wait, 10)
    for _ in range(2):
        task.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
    assert not task.done()
    leave.set()
    await asyncio.wait([task])
    assert task.cancelled()
    await tree.check_all()
    tree.catalog.close()


async def test_a_base_that_cannot_be_found_costs_no_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is wrong with the search: what was written is kept whole."""

    def find_base(_: bytes) -> None:
        raise KeyError("no such root")

    tree = await tree_of(tmp_path)
    draft = await tree.catalog.reserve(1 << 18)
    saved = await tree.commit(draft, pack(A), tree.write_file(draft, A), find_base=find_base)
    assert not saved.parts
    assert "shares no rows with others: 'no such root'" in caplog.text
    await tree.check_all()
    tree.catalog.close()


async def test_a_save_of_what_was_idle_is_in_the_manifest(tmp_path: Path) -> None:
    """Its sidecar has the date of its last use, so the next start does not read it."""
    tree = await tree_of(tmp_path, "hybrid")
    saved = await tree.take(A, idle_s=100.0)
    assert saved.parts
    await tree.catalog.settle()
    await tree.catalog.write_manifest()
    known = await Manifest(tree.manifest, tmp_path).read()
    assert known.last_used == {saved.id: saved.created_at - 100}
    tree.catalog.close()


async def test_a_damaged_base_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It says nothing about the files that this server writes; each save that meets one says so."""
    tree = await tree_of(tmp_path)
    for seed in (1, 2):
        tokens = words(700, seed)
        first = await tree.take(tokens[:400])
        path = tmp_path / first.file_name
        data, at = bytearray(path.read_bytes()), read_layout(path).rows_at[0]
        data[at - 12 : at] = bytes([0xF1] * 12)
        path.write_bytes(data)
        second = await tree.take(tokens, after=first.id)
        assert not second.parts
        assert (
            f"{second.id} is kept whole, it shares no rows with others: the file it goes on from"
            in caplog.text
        )
        assert f"{first.file_name}: rows of type" in caplog.text
        await tree.catalog.drop(first.id)
    assert "slot files of this model are kept whole" not in caplog.text
    await tree.check_all()
    tree.catalog.close()


# -- room --------------------------------------------------------------------------------------------------------------


async def test_nothing_is_evicted_for_a_copy_that_is_none(tmp_path: Path) -> None:
    """Kept whole, with a window: there is no state inside, so the whole file is given, for which nothing need go."""
    tree = Tree(tmp_path, "window")
    other, whole = words(700, 2), A
    tree.quota_bytes = len(tree.file(other)) + len(tree.file(whole)) + 5_000
    await tree.reopen()
    for tokens in (other, whole):
        draft = await tree.catalog.reserve(len(tree.file(tokens)))
        saved = await tree.commit(draft, pack(tokens), tree.write_file(draft, tokens))
    assert await tree.given(saved.id, 420) == tree.file(whole)
    assert not tree.dropped
    tree.catalog.close()


class Followed:
    """A conversation of 400 tokens that goes on, besides another of 500, both kept whole."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.n_follow_up = len(tree.file(A))

    async def begin(self) -> None:
        await self.tree.reopen()
        self.other = await self.tree.take(words(500, 7))
        self.first = await self.tree.take(A[:400])
        await self.tree.catalog.settle()

    async def go_on(self, spare: tuple[str, ...] = ()) -> Snapshot:
        catalog = self.tree.catalog
        draft = await catalog.reserve(self.n_follow_up, spare=spare)
        base = Base(catalog.snapshots[self.first.id], 400, True)
        n_written = self.tree.write_file(draft, A)
        saved = await self.tree.commit(draft, pack(A), n_written, find_base=lambda _: base)
        assert not self.tree.dropped
        await self.tree.check_all()
        return saved


async def test_a_file_that_has_landed_is_not_free_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room on the disk for it and for what is written of it, nothing goes."""
    tree = Tree(tmp_path)
    tree.min_free_bytes = 2_000
    day = Followed(tree)
    n_disk = len(tree.file(words(500, 7))) + len(tree.file(A[:400])) + 2 * day.n_follow_up + 2_000

    def statvfs(_: object) -> Any:
        return SimpleNamespace(f_bavail=n_disk - tree.bytes_on_disk(), f_frsize=1, f_blocks=n_disk)

    monkeypatch.setattr(os, "statvfs", statvfs)
    await day.begin()
    assert (await day.go_on()).parts
    tree.catalog.close()


async def test_to_write_less_nothing_that_is_spared_goes(tmp_path: Path) -> None:
    """There is room for the whole file, but not for its new rows beside it: it is kept whole."""
    tree = Tree(tmp_path)
    day = Followed(tree)
    tree.quota_bytes = len(tree.file(words(500, 7))) + len(tree.file(A[:400])) + day.n_follow_up + 100
    await day.begin()
    assert not (await day.go_on(spare=(day.other.id,))).parts
    tree.catalog.close()


async def test_a_save_is_one_of_the_files_that_there_may_be(tmp_path: Path) -> None:
    """Counted when it was reserved, not once more for its new rows."""
    tree = Tree(tmp_path)
    tree.max_files = 3
    day = Followed(tree)
    await day.begin()
    assert (await day.go_on()).parts
    tree.catalog.close()
