"""An event loop whose clock jumps: what waits for time waits for nothing, and nothing depends on the machine."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class Stuck(AssertionError):
    """All tasks wait, and neither a timer nor a socket will ever wake one."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time passes only while all tasks wait, and then at once up to the next timer.

    For code without threads and without sockets. A loop in which all tasks wait for ever raises Stuck.
    """

    def __init__(self) -> None:
        self._jumper = _Jumper()
        super().__init__(self._jumper)

    def time(self) -> float:
        return self._jumper.now

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run ``main`` to its end, then time does not pass any more."""
        return self.run_until_complete(main)

    def call(self, function: Callable[[], None]) -> None:
        """Call ``function`` as a callback of this loop, and let nothing else run."""
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        try:
            function()
        finally:
            asyncio._set_running_loop(before)

    def settle(self, rounds: int = 30) -> None:
        """Let all that is ready run, and what that makes ready, for so many rounds at most; time does not pass."""
        self.run_until_complete(self._spin(rounds))

    def pass_time(self, seconds: float) -> None:
        """Let ``seconds`` pass, with all that happens in them."""
        self.run_until_complete(asyncio.sleep(seconds))

    async def _spin(self, rounds: int) -> None:
        for _ in range(rounds):
            await asyncio.sleep(0)
            if not self._is_anything_ready():
                return

    def _is_anything_ready(self) -> bool:
        """Beside the one that asks, which runs now."""
        timers: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        return bool(self._ready) or bool(timers and timers[0].when() <= self.time())  # type: ignore[attr-defined]


class _Jumper(selectors.BaseSelector):
    """A selector that looks at its files once, and takes the time it should have waited as passed."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._real = selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # The loop's own pipe, which only threads and signals write to, is always there; asking takes as long as a step.
        events = self._real.select(0) if len(self._real.get_map()) > 1 else []
        if events or timeout == 0:
            return events
        if timeout is None:
            raise Stuck("all tasks wait for ever")
        self.now += timeout
        return events

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def close(self) -> None:
        self._real.close()

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.get_key(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()
