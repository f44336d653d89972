"""Cancels a coroutine at one of its awaits, counted from 0, either while it waits or just as it is woken."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")


class CancelledAt(Awaitable[T]):
    """``await CancelledAt(coroutine, 3)`` inside a task: the task is cancelled at the fourth suspension of
    ``coroutine``.

    With ``is_late`` it is cancelled when the future that it waits for is done already, but the task has not run yet.
    ``was_reached`` is False if the coroutine has ended before that suspension.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T], at: int, *, is_late: bool) -> None:
        self._coroutine, self._at, self._is_late = coroutine, at, is_late
        self.was_reached = False

    def __await__(self) -> Generator[Any, Any, T]:
        inner = self._coroutine.__await__()
        task = asyncio.current_task()
        assert task is not None
        n, send, thrown = 0, None, None
        while True:
            try:
                waits_for = inner.throw(thrown) if thrown is not None else inner.send(send)
            except StopIteration as stop:
                result: T = stop.value
                return result
            if n == self._at:
                self.was_reached = True
                if self._is_late and isinstance(waits_for, asyncio.Future):
                    waits_for.add_done_callback(lambda _: task.cancel())
                else:
                    asyncio.get_running_loop().call_soon(task.cancel)
            n += 1
            thrown = None
            try:
                send = yield waits_for
            except BaseException as error:
                thrown = error
