"""Checks that llama-server and llamaslot share a directory: a slot that llama-server saves must appear in it, and
llamaslot must be able to read, rename and unlink it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiofiles.os
import aiofiles.ospath

from llamaslot.errors import LlamaslotError, SnapshotInvalid
from llamaslot.store.directory_lock import DirectoryUnusable
from llamaslot.store.slot_file import read_slot_file
from llamaslot.store.snapshot import PROBE, new_id

_GROUP = (
    "let llama-server and llamaslot share a group: chgrp GROUP {directory}, chmod 2770 {directory} (setgid: files "
    "inherit the group), and run llama-server with umask 0007 (UMask=0007 in its systemd unit)"
)


class NotShared(LlamaslotError):
    """A file that llama-server saves does not appear in llamaslot's directory, or llamaslot may not read, rename or
    unlink it.
    """


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
