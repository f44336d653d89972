"""Saves that share rows, and copies for a restore, while the disk fails or the caller goes."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from llamaslot.store.assemble import assemble
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
