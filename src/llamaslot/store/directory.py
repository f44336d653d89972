"""The directory that llama-server and llamaslot share: a lock that keeps other llamaslots out, and a check that
llama-server really saves there.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiofiles.os
import aiofiles.ospath

from llamaslot.errors import LlamaslotError, SnapshotInvalid
from llamaslot.store.sidecar import PROBE, new_id
from llamaslot.store.slot_file import read_slot_file

LOCK_NAME = ".llamaslot.lock"
HITS_NAME = ".llamaslot.hits"  # see learned.py
_GROUP = (
    "let llama-server and llamaslot share a group: chgrp GROUP {directory}, chmod 2770 {directory} (setgid: files "
    "inherit the group), and run llama-server with umask 0007 (UMask=0007 in its systemd unit)"
)


class DirectoryUnusable(LlamaslotError):
    """The snapshot directory is missing, locked by another llamaslot, or not accessible."""


class NotShared(LlamaslotError):
    """A file that llama-server saves does not appear in llamaslot's directory, or llamaslot may not read, rename or
    unlink it.
    """


class DirectoryLock:
    """An flock on ``.llamaslot.lock`` in a directory. It keeps a second llamaslot out, because each would delete the
    other's files. The kernel releases the lock when the process ends; the file stays.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK_NAME
        self._fd: int | None = None

    def acquire(self) -> None:
        """Take the lock without waiting for it. Blocking file access. Raises DirectoryUnusable if the directory cannot
        be used, or if another llamaslot has the lock; then the error names its process id.
        """
        directory = self._path.parent
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
        except FileNotFoundError:
            raise DirectoryUnusable(f"{directory} does not exist: create it, or mount it here") from None
        except OSError as error:
            raise DirectoryUnusable(
                f"{directory} is not usable for snapshots: {error.strerror or error}"
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            if not isinstance(error, BlockingIOError):
                raise DirectoryUnusable(
                    f"{self._path} cannot be locked: {error.strerror or error}"
                ) from error
            raise DirectoryUnusable(
                f"{directory} is in use by another llamaslot (pid {holder}): stop it, or give each its own directory"
            ) from None
        self._fd = fd
        # On a full disk the lock works all the same; only the holder's pid is missing.
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Release the lock. Idempotent."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


async def prove_shared(
    directory: Path,
    save: Callable[[str], Awaitable[None]],
    restore: Callable[[str], Awaitable[None]] | None = None,
    name: str | None = None,
) -> None:
    """Check that llama-server's ``--slot-save-path`` is ``directory``, and that llamaslot can read, rename and unlink
    llama-server's files.

    ``save(name)`` makes llama-server save an idle slot under that name. The file must then appear in ``directory`` and
    be a readable slot file. It is renamed and unlinked. After a crash in between, the next scan removes it by its name.
    ``restore(name)`` makes llama-server restore the renamed file, which shows that llama-server sees the rename.
    ``name``: the file's name, if space is reserved under it; a new one by default.

    Raises NotShared or DirectoryUnusable with the fix, SnapshotInvalid if the server writes an unknown format, and
    whatever ``save`` and ``restore`` raise. Canceling is safe.
    """
    probe, moved = directory / (name or new_id() + PROBE), directory / (new_id() + PROBE)
    fix = _GROUP.format(directory=directory)
    if not await aiofiles.os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        exists = await aiofiles.ospath.isdir(directory)
        why = (
            f"cannot be read and written by us: {fix}"
            if exists
            else "does not exist: create it, or mount it here"
        )
        raise DirectoryUnusable(f"{directory} {why}")
    try:
        await save(probe.name)
        try:
            await read_slot_file(probe)
        except SnapshotInvalid as error:
            _explain(error, probe, fix)
            raise
        await _attempt("renamed", aiofiles.os.rename, probe, moved, fix=fix)
        if restore is not None:
            await restore(moved.name)
        await _attempt("unlinked", aiofiles.os.unlink, moved, fix=fix)
    finally:
        await asyncio.shield(asyncio.to_thread(_clear, probe, moved))


def _explain(error: SnapshotInvalid, probe: Path, fix: str) -> None:
    """Raise NotShared, with the remedy, if ``error`` says that the probe is missing or not readable. Return if the
    probe has an unknown format.
    """
    cause = error.__cause__
    if isinstance(cause, FileNotFoundError):
        raise NotShared(
            f"llama-server saved a slot as {probe.name}, but it did not appear in {probe.parent}: slot_save_path must "
            "be the directory that llama-server was given as --slot-save-path, as seen from here (in a container: "
            "where that volume is mounted); the probe still lies in llama-server's directory, delete it there"
        ) from error
    if isinstance(cause, OSError):
        raise NotShared(
            f"llamaslot cannot read what llama-server saves in {probe.parent} ({cause.strerror or cause}): {fix}"
        ) from error


async def _attempt(done: str, act: Callable[..., Awaitable[None]], *paths: Path, fix: str) -> None:
    try:
        await act(*paths)
    except OSError as error:
        raise NotShared(
            f"{paths[0].name} in {paths[0].parent}, saved by llama-server, cannot be {done} by llamaslot "
            f"({error.strerror or error}): {fix}; the directory must be writable for that group and without sticky bit"
        ) from error


def _clear(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            os.unlink(path)
