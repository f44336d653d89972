"""Tells whether a file is still the one that was read before."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class FileId(NamedTuple):
    """Identifies the content of a file: it differs if the file was replaced, written to, or changed in owner or
    mode.
    """

    inode: int
    size_bytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> FileId:
        return cls(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


CHECK_S = 1.0


class Watch:
    """Tells whether any of a few files has changed. It looks at the files only when ``has_changed`` is called, and at
    most once a second. Symbolic links are followed.
    """

    def __init__(
        self, *paths: Path, clock: Callable[[], float], known: tuple[FileId | None, ...] | None = None
    ) -> None:
        """``clock`` returns seconds. ``known``: the ids that the files had when they were read, None for a file that is
        missing; by default the ids that they have now.
        """
        self._paths, self._clock = paths, clock
        self.known = self._file_ids() if known is None else known
        self._looked = clock()

    def has_changed(self) -> bool:
        """True if a file has changed since the last look at the files. Within a second of that look it returns False
        without looking again.
        """
        if self._clock() - self._looked < CHECK_S:
            return False
        self._looked = self._clock()
        before, self.known = self.known, self._file_ids()
        return self.known != before

    def _file_ids(self) -> tuple[FileId | None, ...]:
        return tuple(_file_id(path) for path in self._paths)


def _file_id(path: Path) -> FileId | None:
    """The ``FileId`` of the file at ``path``; None if it cannot be accessed."""
    try:
        return FileId.of(path.stat())
    except OSError:
        return None
