"""A fixture for tests of what clients see: the test must leave no task, socket, open file, process or
warning behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio


def open_files() -> Counter[str]:
    """What this process has open: paths, and the numbers of sockets, pipes and so on.

    Only numbers, because uvloop makes its own pair of sockets each time it runs. From its first listener on it keeps
    ``/dev/null`` open, for the case that no more files can be opened.
    """
    found = Counter[str]()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that is reading the directory
            found[os.readlink(entry).partition(":[")[0]] += 1
    del found["/dev/null"]
    return found


def children() -> set[str]:
    """Process ids of this process's children."""
    found: set[str] = set()
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found |= set((thread / "children").read_text().split())
    return found


def tasks() -> set[asyncio.Task[object]]:
    return asyncio.all_tasks()


@pytest_asyncio.fixture(autouse=True)
async def nothing_left(caplog: pytest.LogCaptureFixture) -> AsyncIterator[None]:
    """Fail a test that leaves something behind, or during which llamaslot has logged a traceback."""
    before = tasks(), open_files(), children()
    yield
    left: list[object] = []
    for n in range(1, 201):
        left = [
            *(tasks() - before[0] - {asyncio.current_task()}),
            *(open_files() - before[1]).elements(),
            *(children() - before[2]),
        ]
        if not left:
            break
        if n % 20 == 0:
            gc.collect()  # files of an index are mapped, and let go with the backend that mapped them
        await asyncio.sleep(0.005)  # closed transports let go of their sockets in the loop's next rounds
    assert left == [], "nothing is left behind"
    mistakes = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [
        record.getMessage() for record in mistakes if record.name.startswith(("llamaslot", "aiohttp"))
    ] == []
