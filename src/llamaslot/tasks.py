"""Tasks with an owner, a signal between tasks, and calls of functions in threads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Iterator
from functools import partial
from typing import Any, ParamSpec, TypeVar

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
E = TypeVar("E", bound=Exception)


_SLICE_S = 0.0002  # of work between two turns of other tasks: streams wait for half of it, a turn takes 20 us
_LONG_BYTES = 1 << 20


async def in_slices(items: Iterable[T]) -> AsyncGenerator[T]:
    """Iterate over ``items``, and let other tasks run after every 0.2 ms. Canceling is safe."""
    since = time.monotonic()
    for item in items:
        yield item
        if time.monotonic() - since > _SLICE_S:
            await asyncio.sleep(0)
            since = time.monotonic()


async def give_way(n_bytes: int) -> None:
    """Let other tasks run after a step over a mebibyte or more, which takes milliseconds. Canceling is safe."""
    if n_bytes >= _LONG_BYTES:
        await asyncio.sleep(0)


class ChangeEvent:
    """A signal without a value. ``notify`` wakes all tasks in ``wait``, and calls all functions that are
    ``subscribed``.
    """

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[None], None] = {}  # one for each ``wait``, in order
        self._calls: list[Callable[[], None]] = []

    @property
    def is_heard(self) -> bool:
        """True if any task is in ``wait``, or any function is ``subscribed``."""
        return bool(self._waiting or self._calls)

    def notify(self) -> None:
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
        for call in list(self._calls):
            call()

    @contextlib.contextmanager
    def subscribed(self, call: Callable[[], None]) -> Iterator[None]:
        """Within the ``with`` block, ``call`` is called at each ``notify``."""
        self._calls.append(call)
        try:
            yield
        finally:
            self._calls.remove(call)

    async def wait(self, timeout_s: float | None = None) -> None:
        """Wait for the next ``notify``, but not longer than ``timeout_s`` seconds (None: without a limit). Returns in
        the same way after both. Always lets other tasks run. Canceling is safe.
        """
        future = asyncio.get_running_loop().create_future()
        self._waiting[future] = None
        try:
            async with asyncio.timeout(timeout_s):
                await future
        except TimeoutError:
            pass
        finally:
            del self._waiting[future]


class TaskOwner:
    """A set of running tasks that end with their owner.

    ``spawn`` starts a task, and keeps a reference to it. ``close`` cancels the tasks that still run, and waits for
    them. If a task ends with an exception, the exception is logged with the task's name.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, coroutine: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error(
                "task %s died: internal error in llamaslot; please report it: %r",
                task.get_name(),
                error,
                exc_info=error,
            )

    def __len__(self) -> int:
        return len(self._tasks)

    async def all_ended(self) -> None:
        """Wait until the tasks that run now have ended, without cancelling them. Canceling this call is safe: the tasks
        go on.
        """
        if self._tasks:
            await asyncio.wait(set(self._tasks))

    async def close(self) -> None:
        """Cancel every task and wait until each has ended."""
        while self._tasks:
            running = set(self._tasks)
            for task in running:
                task.cancel()
            await asyncio.wait(running)


async def outcome(action: Callable[[], Awaitable[T]], error: type[E]) -> T | E:
    """Await ``action()`` and return its result. An exception of class ``error`` is returned too, not raised.

    For a task whose caller may stop waiting: ``TaskOwner`` would log a raised exception as the death of the task.
    """
    try:
        return await action()
    except error as raised:
        return raised


async def gather(*coroutines: Coroutine[Any, Any, T]) -> list[T]:
    """Run all coroutines concurrently, and return their results in order. The first exception cancels the other
    coroutines, and is raised itself, not in an ExceptionGroup.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def to_its_end(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T, bool]:
    """Run ``function`` in a thread, and wait for its end even if the calling task is cancelled meanwhile. Returns the
    function's result, and True if the task was cancelled.

    Raises what ``function`` raised. If the task was cancelled too, that becomes the cause of a CancelledError.
    """
    running = asyncio.get_running_loop().run_in_executor(None, partial(function, *args, **kwargs))
    is_cancelled = False
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError:
            is_cancelled = True
    if is_cancelled and (error := running.exception()) is not None:
        raise asyncio.CancelledError from error
    return running.result(), is_cancelled


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run ``function`` in a thread, and return its result. Canceling waits for the end of the function first: unlike
    ``asyncio.to_thread``, no thread goes on after the call.
    """
    result, is_cancelled = await to_its_end(function, *args, **kwargs)
    if is_cancelled:
        raise asyncio.CancelledError
    return result
