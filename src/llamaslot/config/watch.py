"""Detects changes of files that are read while llamaslot runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llamaslot.file_id import FileId

CHECK_S = 1.0


class Watch:
    """Tells whether any of a few files has changed; checks when called, at most once a second. Follows links."""

    def __init__(
        self, *paths: Path, clock: Callable[[], float], known: tuple[FileId | None, ...] | None = None
    ) -> None:
        """``known``: the marks of the files as read before; by default those of the present files."""
        self._paths, self._clock = paths, clock
        self.known = self._file_ids() if known is None else known
        self._looked = clock()

    def has_changed(self) -> bool:
        """Whether a file has changed since the last call; the new state is then the known one."""
        if self._clock() - self._looked < CHECK_S:
            return False
        self._looked = self._clock()
        before, self.known = self.known, self._file_ids()
        return self.known != before

    def _file_ids(self) -> tuple[FileId | None, ...]:
        return tuple(_file_id(path) for path in self._paths)


def _file_id(path: Path) -> FileId | None:
    """None if the file cannot be accessed."""
    try:
        return FileId.of(path.stat())
    except OSError:
        return None
