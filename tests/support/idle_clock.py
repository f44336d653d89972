"""An event loop whose time passes only while nothing happens, for tests of time limits on a busy machine.

All sockets belong to this process. So while the loop has nothing to do, all tasks wait, and work takes no time.
"""

from __future__ import annotations

import asyncio
import selectors
from typing import Any

#: How long nothing has to happen, and what passes then. What is on its way through the kernel comes earlier.
IDLE_S, PASSES_S = 0.001, 0.005


class IdleClock(asyncio.SelectorEventLoop):
    """One second of its time passes in 0.2 s without any event, and none while a thread works for the loop."""

    def __init__(self) -> None:
        self._passed_s = 0.0
        self._n_working = 0
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self._passed_s

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Any, *args: Any
    ) -> asyncio.Future[Any]:
        future = super().run_in_executor(executor, func, *args)
        self._n_working += 1
        future.add_done_callback(self._worked)
        return future

    def _worked(self, future: asyncio.Future[Any]) -> None:
        self._n_working -= 1

    def idle(self, timeout_s: float | None) -> None:
        """Called when nothing has happened for ``IDLE_S``. ``timeout_s``: seconds until the next timer, None without
        one.
        """
        if not self._n_working:
            self._passed_s += PASSES_S if timeout_s is None else min(timeout_s, PASSES_S)


class _Selector(selectors.EpollSelector):
    def __init__(self, loop: IdleClock) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            return super().select(0)
        if not (events := super().select(IDLE_S)):
            self._loop.idle(timeout)
        return events
