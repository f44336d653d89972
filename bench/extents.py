"""What it costs to keep a slot file as extents and to put it together again, against ``cp``.

    python -m bench.extents                  1 GiB, 20 extents; files in a new directory under --disk and --memory

In turns: ``cp`` of a slot file from disk to memory, and ``assemble`` of the same file from its extents; each with its
sources in the page cache and without. Beside each runs an event loop with a timer of 1 ms, in a process set up as one
that serves, and another process that only sleeps for 1 ms again and again. Told are the loop's longest pause, and the
longest part of one in which it neither waited for a processor nor the other process had a pause too. Only that part can
be llamaslot's: the thread's own work, the GIL. The rest is the machine's: with a disk at work, pauses of 15 to 50 ms
come in an idle process too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import uvloop

from llamaslot.cache.ids import pack
from llamaslot.http.serve import keep_answers_flowing
from llamaslot.store.assemble import assemble
from llamaslot.store.extent import Piece, verify, write_extent
from llamaslot.store.slot_file import PLAIN, make_cells
from llamaslot.store.slot_layout import read_layout

TICK_S = 0.001


def show(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def write_slot_file(path: Path, n_bytes: int, n_layers: int, row_bytes: int) -> None:
    """A dense slot file of about ``n_bytes``."""
    n = n_bytes // (2 * n_layers * row_bytes)
    tokens = pack([token % 50_000 for token in range(n)])
    rows = os.urandom(1 << 20) * (n * row_bytes // (1 << 20) + 1)
    with path.open("wb") as file:
        file.write(struct.pack("<IIIiiI", 0x67677371, 4, n + 4, -1, 1, n) + tokens + bytes(4))
        file.write(struct.pack("<II", 1, n) + b"".join(make_cells(tokens, PLAIN)))
        file.write(struct.pack("<IIII", 0, n_layers, 0, 0))
        for tensor in range(2 * n_layers):
            file.write(struct.pack("<iQ", 1, row_bytes))
            file.write(memoryview(rows)[tensor : tensor + n * row_bytes])
        file.flush()
        os.fsync(file.fileno())


def forget(paths: list[Path]) -> None:
    """Take the files out of the page cache."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


class Late(NamedTuple):
    """From when to when (``time.perf_counter``) a timer was late, and for how much of it its thread waited for a
    processor.
    """

    start_s: float
    end_s: float
    waited_s: float


class Timer:
    """Notes when a timer of TICK_S is late by more than a fifth."""

    def __init__(self) -> None:
        self.late: list[Late] = []
        self._last, self._waited = time.perf_counter(), _waited_s()

    def tick(self) -> None:
        """Call it whenever TICK_S is over."""
        now, waited = time.perf_counter(), _waited_s()
        if now > self._last + 1.2 * TICK_S:
            self.late.append(Late(self._last + TICK_S, now, waited - self._waited))
        self._last, self._waited = now, waited


def _waited_s() -> float:
    """For how long this thread has waited for a processor so far."""
    return int(Path("/proc/thread-self/schedstat").read_bytes().split()[1]) / 1e9


def tick_beside() -> None:
    """The other process: ticks until its input ends. Upon each line it writes what was late since the line before."""
    timer = Timer()
    while True:
        time.sleep(TICK_S)
        timer.tick()
        if select.select([sys.stdin], [], [], 0)[0]:
            if not sys.stdin.readline():
                return
            show(json.dumps(timer.late))
            timer = Timer()


class Pause(NamedTuple):
    """The longest pause of the event loop beyond a tick, in ms, and the longest part of one that is its own."""

    ms: float = 0.0
    own_ms: float = 0.0

    @classmethod
    def longest(cls, pauses: Iterable[Pause]) -> Pause:
        pauses = list(pauses)
        return cls(max((it.ms for it in pauses), default=0), max((it.own_ms for it in pauses), default=0))

    def __str__(self) -> str:
        return f"longest pause {self.ms:.1f} ms, {self.own_ms:.1f} ms beyond the machine's"


class Clock:
    """Times work and the pauses of the event loop meanwhile. A context manager."""

    def __enter__(self) -> Clock:
        command = [sys.executable, "-c", "from bench.extents import tick_beside; tick_beside()"]
        self._other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._late_beside()
        return self

    def __exit__(self, *_: object) -> None:
        self._other.communicate()

    async def measured(self, work: Callable[[], Awaitable[object]]) -> tuple[float, Pause]:
        """Seconds that it takes, and the longest pause meanwhile."""
        self._late_beside()
        timer = Timer()

        async def tick() -> None:
            while True:
                await asyncio.sleep(TICK_S)
                timer.tick()

        async with asyncio.TaskGroup() as tasks:
            ticking = tasks.create_task(tick())
            await asyncio.sleep(0.05)
            start = time.perf_counter()
            await work()
            took = time.perf_counter() - start
            ticking.cancel()
        beside, pauses = self._late_beside(), []
        for late in timer.late:
            both_s = sum(
                max(0.0, min(late.end_s, end) - max(late.start_s, start)) for start, end, _ in beside
            )
            late_s = late.end_s - late.start_s
            pauses.append(Pause(late_s * 1e3, (late_s - max(both_s, late.waited_s)) * 1e3))
        return took, Pause.longest(pauses)

    def _late_beside(self) -> list[Late]:
        assert self._other.stdin is not None
        assert self._other.stdout is not None
        self._other.stdin.write("\n")
        self._other.stdin.flush()
        return [Late(*late) for late in json.loads(self._other.stdout.readline())]


async def bench(clock: Clock, disk: Path, memory: Path, n_bytes: int, n_extents: int, rounds: int) -> None:
    keep_answers_flowing()
    measured = clock.measured
    whole, target = disk / "whole.kv", memory / "target.kv"
    await asyncio.to_thread(write_slot_file, whole, n_bytes, 32, 2048)
    took, pause = await measured(lambda: asyncio.to_thread(read_layout, whole))
    layout = read_layout(whole)
    show(
        f"{layout.size_bytes / 2**30:.2f} GiB, {layout.n_tokens} tokens; layout read in {took * 1e3:.1f} ms, "
        f"{pause}"
    )
    steps = [round(layout.n_tokens * i / n_extents) for i in range(n_extents + 1)]
    pieces = [Piece(disk / f"{start}.extent", start, end) for start, end in pairwise(steps)]
    tooks, pauses = list[float](), list[Pause]()
    for piece in pieces:
        took, pause = await measured(
            lambda piece=piece: asyncio.to_thread(  # type: ignore[misc]
                write_extent, whole, layout, piece.start, piece.end, [], piece.path
            )
        )
        tooks.append(took)
        pauses.append(pause)
    size = sum(piece.path.stat().st_size for piece in pieces)
    show(
        f"{n_extents} extents, {size / layout.size_bytes:.4f} of its bytes: written and synced in "
        f"{sum(tooks):.2f} s, {Pause.longest(pauses)}"
    )
    took, pause = await measured(lambda: asyncio.to_thread(lambda: [verify(piece.path) for piece in pieces]))
    show(f"verified in {took:.2f} s, {pause}")
    assemble(pieces, None, [], target)
    compared = await asyncio.create_subprocess_exec("cmp", whole, target)
    assert await compared.wait() == 0, "the assembled file is another"

    async def copy() -> None:
        process = await asyncio.create_subprocess_exec("cp", whole, target)
        assert await process.wait() == 0

    async def put_together() -> None:
        await asyncio.to_thread(assemble, pieces, None, [], target)

    for has_cache in (True, False):
        times: dict[str, list[tuple[float, Pause]]] = {"cp": [], "assemble": []}
        for turn in range(rounds):
            both = [("cp", copy), ("assemble", put_together)]
            for name, work in both if turn % 2 else both[::-1]:
                target.unlink(missing_ok=True)
                if not has_cache:
                    forget([whole, *(piece.path for piece in pieces)])
                times[name].append(await measured(work))
        seconds = {name: sorted(took for took, _ in all_) for name, all_ in times.items()}
        middle = {name: all_[rounds // 2] for name, all_ in seconds.items()}
        show(f"{'in the page cache' if has_cache else 'read from disk'}, {rounds} turns each:")
        for name, all_ in times.items():
            longest = Pause.longest(pause for _, pause in all_)
            show(
                f"  {name:9} {middle[name]:.3f} s (median; {seconds[name][0]:.3f} to {seconds[name][-1]:.3f}), "
                f"{longest}"
            )
        show(f"  assemble / cp: {middle['assemble'] / middle['cp']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.extents", description=__doc__)
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--extents", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    with (
        Clock() as clock,
        tempfile.TemporaryDirectory(dir=given.disk) as disk,
        tempfile.TemporaryDirectory(dir=given.memory) as memory,
    ):
        n_bytes = int(given.gib * 2**30)
        uvloop.run(bench(clock, Path(disk), Path(memory), n_bytes, given.extents, given.rounds))


if __name__ == "__main__":
    main()
