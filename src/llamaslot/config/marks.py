"""Whether a file that is read while llamaslot runs has changed since."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Mark:
    """What tells that a file is another one, was written to, or belongs to somebody else now."""

    inode: int
    size_bytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Mark:
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def mark_of(path: Path) -> Mark | None:
    """None where it can not be looked at. Links are followed."""
    try:
        return Mark.of(path.stat())
    except OSError:
        return None
