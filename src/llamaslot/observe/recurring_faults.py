"""Logs faults that come again with each request, as on a full disk. There is one line when they begin, one every ten
minutes while they last, and one at the first success after a minute without a fault.
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
    """Logs the failures of one kind of work (saves, for example) to ``log``. ``over``: the line that says that the work
    succeeds again.
    """

    def __init__(self, log: logging.Logger, over: str, *, now: Callable[[], float] = time.monotonic) -> None:
        self._log, self._over, self._now = log, over, now
        self._kinds: dict[str, _Said] = {}  # those that last
        self._failed_at = -math.inf

    def failed(self, reason: object, text: str, *values: object) -> None:
        """Log a failure: ``text`` with ``values`` filled in, as a warning. If a failure of the same kind was logged as
        a warning less than ten minutes ago, the line is logged at level debug and counted. Two failures are of the same
        kind if their reasons differ only in numbers and ids.
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
        """Record a success. Logs ``over`` if failures were logged and the last one was at least a minute ago. Before
        that the fault may not be over: on a nearly full disk small files still fit, and large ones fail.
        """
        if self._kinds and self._now() >= self._failed_at + OVER_S:
            self._kinds.clear()
            self._log.info(self._over)
