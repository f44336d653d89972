"""Logs faults that come again with each request, as on a full disk: one line when they begin, one each ten minutes
while they last, one when there was none for a minute.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable

from msgspec import Struct

AGAIN_S, OVER_S = 600.0, 60.0
_KINDS_MAX = 64
# What differs from one failure to the next: ids of snapshots and requests, sizes, counts.
_PARTICULARS = re.compile(r"\b(?:ls|req)-[\w-]+|\d[\d.,]*(?: ?[KMGT]?i?B\b)?")


class _Said(Struct):
    at: float
    n_unsaid: int = 0


class Recurring:
    """The failures of one kind of work, which go to ``log``. ``over``: the log line when nothing fails any more."""

    def __init__(self, log: logging.Logger, over: str, *, now: Callable[[], float] = time.monotonic) -> None:
        self._log, self._over, self._now = log, over, now
        self._kinds: dict[str, _Said] = {}  # those that last
        self._failed_at = -math.inf

    def failed(self, reason: object, text: str, *values: object) -> None:
        """Log a failure with ``text``: as a warning, unless one of the same kind was logged less than ten minutes ago:
        then at level debug. Reasons are of one kind if they differ in numbers and ids only.
        """
        kind, now = _PARTICULARS.sub("", str(reason)), self._now()
        self._failed_at = now
        said = self._kinds.get(kind)
        if said is not None and now < said.at + AGAIN_S:
            said.n_unsaid += 1
            self._log.debug(text, *values)
            return
        if said is not None and said.n_unsaid:
            text, values = text + "; since this was last said, %d times more", (*values, said.n_unsaid)
        self._log.warning(text, *values)
        if len(self._kinds) >= _KINDS_MAX:
            self._kinds.clear()
        self._kinds[kind] = _Said(now)

    def succeeded(self) -> None:
        """Log that nothing fails any more, if failures were logged and the last was a minute ago: until then others
        may fail all the same, as large files do where small ones still fit.
        """
        if self._kinds and self._now() >= self._failed_at + OVER_S:
            self._kinds.clear()
            self._log.info(self._over)
