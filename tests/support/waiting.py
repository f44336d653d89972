"""Time without the time that other processes took, to compare two servers on a machine that also does other work.

Linux notes for each thread how long it ran, and how long it was ready to run while other threads had the CPUs. The
busiest thread of a llama-server with one compute thread is its main loop. The time that it waited for a CPU is no part
of what is measured.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

NS = 1e-9
LOOK_S = 0.2  # for the busiest thread


def threads(pid: int) -> dict[str, tuple[float, float]]:
    """For each thread, the seconds that it ran and the seconds that it waited for a CPU
    (``/proc/<pid>/task/*/schedstat``).
    """
    found = {}
    for path in Path(f"/proc/{pid}/task").iterdir():
        if (ran_waited := read(path)) is not None:
            found[path.name] = ran_waited
    return found


def read(task: Path) -> tuple[float, float] | None:
    """The same for one thread; None if it has ended, or if Linux keeps no such account."""
    try:
        ran, waited, _ = (task / "schedstat").read_text().split()
    except OSError:
        return None
    return int(ran) * NS, int(waited) * NS


def busiest(
    before: dict[str, tuple[float, float]], after: dict[str, tuple[float, float]]
) -> tuple[str, float, float]:
    """The thread that ran longest between ``before`` and ``after``, and how long it ran and waited for a CPU."""
    since = {
        name: (ran - before.get(name, (0.0, 0.0))[0], waited - before.get(name, (0.0, 0.0))[1])
        for name, (ran, waited) in after.items()
    }
    name = max(since, key=lambda name: since[name][0])
    return name, *since[name]


class Stopwatch:
    """Measures time from its creation on, and how much of it the server's main loop waited for a CPU."""

    def __init__(self, pid: int) -> None:
        self._pid, self._before, self._begin = pid, threads(pid), time.perf_counter()

    def stop(self) -> tuple[float, float]:
        """The seconds in all, and the seconds without waiting for a CPU."""
        seconds = time.perf_counter() - self._begin
        _, _, waited = busiest(self._before, threads(self._pid))
        return seconds, seconds - waited


class ServerClock:
    """Seconds that go on as time does, but stand still while the server's main loop waits for a CPU.

    Before ``start`` it is an ordinary clock.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._task: Path | None = None
        self._waited = 0.0

    async def start(self) -> None:
        """Find the main loop; the server must be at work."""
        before = threads(self._pid)
        await asyncio.sleep(LOOK_S)
        after = threads(self._pid)
        name, _, _ = busiest(before, after)
        self._task, self._waited = Path(f"/proc/{self._pid}/task/{name}"), after[name][1]

    def __call__(self) -> float:
        now = time.perf_counter()
        if self._task is None or (ran_waited := read(self._task)) is None:
            return now
        return now - (ran_waited[1] - self._waited)
