"""Saves that share rows, and copies for a restore, while the disk fails or the caller goes."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from llamaslot.cache.ids import pack
from llamaslot.store.assemble import assemble
from llamaslot.store.manifest import Manifest
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

    monkeypatch.setattr("llamaslot.store.giving_out.assemble", slowly)
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
    assert "kept whole: 'no such root'" in caplog.text
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
