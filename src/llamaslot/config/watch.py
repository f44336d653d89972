"""Whether files that are read while llamaslot runs have changed since."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llamaslot.file_id import FileId

CHECK_S = 1.0


class Watch:
    """Tells whether any of a few files has changed; looks when asked, once a second at most. Follows links."""

    def __init__(
        self, *paths: Path, clock: Callable[[], float], known: tuple[FileId | None, ...] | None = None
    ) -> None:
        """``known``: the marks of what was read already; else what is there now counts as that."""
        self._paths, self._clock = paths, clock
        self.known = self._look() if known is None else known
        self._looked = clock()

    def has_changed(self) -> bool:
        """Whether another state is there than at the last look; that is then the known one."""
        if self._clock() - self._looked < CHECK_S:
            return False
        self._looked = self._clock()
        before, self.known = self.known, self._look()
        return self.known != before

    def _look(self) -> tuple[FileId | None, ...]:
        return tuple(_file_id(path) for path in self._paths)


def _file_id(path: Path) -> FileId | None:
    """None where it cannot be looked at."""
    try:
        return FileId.of(path.stat())
    except OSError:
        return None
