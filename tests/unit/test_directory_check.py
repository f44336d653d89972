"""The proof that llama-server saves into our directory, and that its files are ours to handle."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiofiles.os
import pytest

from llamaslot.errors import SlotActionFailed, SnapshotInvalid
from llamaslot.store import DirectoryUnusable, NotShared, prove_shared
from llamaslot.store.snapshot import own_name
from tests.support.snapshots import slot_file

GROUP = r"chgrp GROUP .*, chmod 2770 .* \(setgid.*umask 0007"  # the fix that is always the same
EMPTY = slot_file(b"", 48)  # what llama-server saves for a slot that holds nothing


def saver(directory: Path, data: bytes = EMPTY) -> Callable[[str], Awaitable[None]]:
    """A llama-server that saves into ``directory``."""

    async def save(name: str) -> None:
        assert own_name(name), "a crash in between would leave a file that no scan removes"
        (directory / name).write_bytes(data)

    return save


def refused(code: int) -> Callable[..., Awaitable[None]]:
    """An operation that the file system does not permit. (Tests may run as root, to whom chmod says nothing.)"""

    async def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


async def test_a_shared_directory_is_proved(tmp_path: Path) -> None:
    """It appears, is read, renamed, unlinked; nothing is left."""
    await prove_shared(tmp_path, saver(tmp_path))
    assert os.listdir(tmp_path) == []


async def test_another_directory(tmp_path: Path) -> None:
    """The save succeeded, but elsewhere: a wrong path, or a container's own file system."""
    here, there = tmp_path / "here", tmp_path / "there"
    os.mkdir(here)
    os.mkdir(there)
    with pytest.raises(NotShared, match=r"did not appear in .*here: slot_save_path must be the directory .*"):
        await prove_shared(here, saver(there))
    assert os.listdir(here) == []


async def test_a_file_that_we_may_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-server's umask kept the group out."""

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuse)
        patch.setattr(Path, "write_bytes", lambda path, data: os.close(os.open(path, os.O_CREAT)))
        with pytest.raises(NotShared, match=rf"cannot read what llama-server saves .*denied\): .*{GROUP}"):
            await prove_shared(tmp_path, saver(tmp_path))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("step", "code", "said"),
    [
        ("rename", errno.EPERM, "cannot be renamed by llamaslot .Operation not permitted"),
        ("unlink", errno.EACCES, "cannot be unlinked by llamaslot .Permission denied"),
    ],
)
async def test_a_file_that_is_not_ours_to_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int, said: str
) -> None:
    """A directory that only its owner may write, or one with the sticky bit."""
    monkeypatch.setattr(aiofiles.os, step, refused(code))
    with pytest.raises(NotShared, match=f"{said}.*{GROUP}.*without sticky bit"):
        await prove_shared(tmp_path, saver(tmp_path))
    assert os.listdir(tmp_path) == []


async def test_a_missing_directory(tmp_path: Path) -> None:
    """Said before llama-server is bothered."""
    with pytest.raises(DirectoryUnusable, match="does not exist"):
        await prove_shared(tmp_path / "nowhere", saver(tmp_path))
    assert os.listdir(tmp_path) == []


async def test_a_closed_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours to see, not to write."""

    async def no(*_: Any) -> bool:
        return False

    monkeypatch.setattr(aiofiles.os, "access", no)
    with pytest.raises(DirectoryUnusable, match=f"cannot be read and written by us: .*{GROUP}"):
        await prove_shared(tmp_path, saver(tmp_path))
    assert os.listdir(tmp_path) == []


async def test_an_unknown_format(tmp_path: Path) -> None:
    """A build whose slot files we cannot read is found out before anything is saved for good."""
    with pytest.raises(SnapshotInvalid, match="version 9; llamaslot knows"):
        await prove_shared(tmp_path, saver(tmp_path, slot_file(b"", 48, version=9)))
    assert os.listdir(tmp_path) == []


async def test_a_failed_save_passes_through(tmp_path: Path) -> None:
    """What the server said is what matters; its half-written file goes."""

    async def save(name: str) -> None:
        (tmp_path / name).write_bytes(b"half")
        raise SlotActionFailed("501: start llama-server with --slot-save-path")

    with pytest.raises(SlotActionFailed, match="501"):
        await prove_shared(tmp_path, save)
    assert os.listdir(tmp_path) == []
