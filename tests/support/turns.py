"""Counts the turns that other tasks get while something runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from llamaslot.tasks import TaskOwner

T = TypeVar("T")


async def with_turns(work: Awaitable[T]) -> tuple[T, int]:
    """Await ``work``. Returns its result, and how many turns of the event loop another task has had meanwhile."""
    n_turns = 0

    async def count() -> None:
        nonlocal n_turns
        while True:
            n_turns += 1
            await asyncio.sleep(0)

    tasks = TaskOwner()
    tasks.spawn(count(), "count turns")
    result = await work
    await tasks.close()
    return result, n_turns


async def until_idle() -> None:
    """Let everything run that can run without waiting for time or for a socket."""
    for _ in range(10):
        await asyncio.sleep(0)
