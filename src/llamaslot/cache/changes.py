"""The last changes of an index, so that what was computed from it is computed again only where it may differ."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

_KEPT = 8


class Changes:
    """The sequences that were added or removed last, and the number of all changes so far."""

    def __init__(self) -> None:
        self.n = 0
        self._last: deque[bytes] = deque(maxlen=_KEPT)

    def note(self, tokens: bytes) -> None:
        """``tokens``, behind the mark of their namespace, were added or removed."""
        self.n += 1
        self._last.append(tokens)

    def since(self, n: int) -> Sequence[bytes] | None:
        """What was added or removed after the first ``n`` changes; None if that is too much to tell."""
        n_new = self.n - n
        return None if n_new > len(self._last) else [*self._last][len(self._last) - n_new :]
