"""Which files were read to their end and found as they were written.

A checksum covers a whole section or file, so before a part of one is used all of it is read, once in this process: a
file of the store never changes, and one with the same ``FileId`` is not read again. What has changed is not remembered.

Blocking, for as long as reading the file takes; for threads.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from llamaslot.errors import SnapshotInvalid
from llamaslot.file_id import FileId
from llamaslot.store.extent import verify

_REMEMBERED = 8192  # files


def check_extent(path: Path) -> None:
    """Raises SnapshotInvalid, with the reason in one line, unless all of the extent is as it was written."""
    _verified(path, _file_id(path))


@functools.lru_cache(_REMEMBERED)
def _verified(path: Path, file_id: FileId) -> None:
    verify(path)


def _file_id(path: Path) -> FileId:
    try:
        return FileId.of(os.stat(path))
    except OSError as error:
        raise SnapshotInvalid(f"{path.name}: cannot be read: {error.strerror or error}") from error
