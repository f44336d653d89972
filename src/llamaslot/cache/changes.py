"""What has changed in a prefix index since it was last looked at."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

_KEPT = 8


class Changes:
    """Records the changes of an index: how many there were (``n``), and the sequences of the last ``_KEPT``."""

    def __init__(self) -> None:
        self.n = 0
        self._last: deque[bytes] = deque(maxlen=_KEPT)

    def note(self, tokens: bytes) -> None:
        """Record one change: ``tokens``, which start with the mark of their namespace, were added or removed."""
        self.n += 1
        self._last.append(tokens)

    def note_many(self) -> None:
        """Record that many sequences have changed at once: it is not known which."""
        self.n += 1
        self._last.clear()

    def since(self, n: int) -> Sequence[bytes] | None:
        """The sequences added or removed after the first ``n`` changes, oldest first; None if these are more than the
        last few that are recorded.
        """
        n_new = self.n - n
        return None if n_new > len(self._last) else [*self._last][len(self._last) - n_new :]
