"""Which files were read to their end and found as they were written.

A checksum covers a whole section or file, so before a part of one is used all of it is read, once in this process: a
file of the store never changes, and one with the same ``FileId`` is not read again. What has changed is not remembered.

Blocking, for as long as reading the file takes; for threads.
"""

from __future__ import annotations

import functools
import mmap
import os
from pathlib import Path

from llamaslot.errors import SnapshotInvalid
from llamaslot.file_id import FileId
from llamaslot.store.copying import BLOCK, checksum_of
from llamaslot.store.extent import Source, verify

_REMEMBERED = 8192  # files


def check_extent(path: Path) -> None:
    """Raises SnapshotInvalid, with the reason in one line, unless all of the extent is as it was written."""
    _verified(path, _file_id(path))


@functools.lru_cache(_REMEMBERED)
def _verified(path: Path, file_id: FileId) -> None:
    verify(path)


def check_file(path: Path, checksum: int) -> None:
    """Raises SnapshotInvalid, with the reason in one line, unless the whole file has that checksum; OSError."""
    if checksum_of_file(path) != checksum:
        raise SnapshotInvalid(f"{path.name}: has changed since other snapshots began to need it")


def checksum_of_file(path: Path) -> int:
    """The xxh3_64 of all of it: a second or more for several GB. Raises SnapshotInvalid, OSError."""
    return _computed(path, _file_id(path))


@functools.lru_cache(_REMEMBERED)
def _computed(path: Path, file_id: FileId) -> int:
    with Source(path) as source:
        return checksum_of(source.fd, 0, source.size_bytes, memoryview(mmap.mmap(-1, BLOCK)))


def _file_id(path: Path) -> FileId:
    try:
        return FileId.of(os.stat(path))
    except OSError as error:
        raise SnapshotInvalid(f"{path.name}: cannot be read: {error.strerror or error}") from error
