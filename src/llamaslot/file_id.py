"""Whether a file is still the one that was read."""

from __future__ import annotations

import os
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
