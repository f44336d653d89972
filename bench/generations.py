"""What the index of snapshots costs when most of it is a generation on disk: the second half of ``bench.index``."""

from __future__ import annotations

import asyncio
import gc
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from itertools import count as counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from bench import index as bench
from bench.index import Row, Traffic, timed, us
from llamaslot.cache.disk_index import DiskIndex
from llamaslot.cache.layered_index import LayeredIndex
from llamaslot.store.disk_index_rebuild import DiskIndexRebuild
from llamaslot.tasks import TaskOwner

TICK_S = 0.001
IDLE_S = 1.5  # before and after


@dataclass(frozen=True, slots=True)
class Composite:
    """An index, nine tenths of which are a generation; what it was filled with, as far as that is kept."""

    index: LayeredIndex
    base: DiskIndex
    stored: list[bytes]
    size_bytes: int  # of the generation's files
    idle: list[float]  # seconds that the event loop was late, before and after
    busy: list[float]  # while the generation was made
    took_s: float


async def filled(directory: Path, snapshots: Iterator[bytes], n_entries: int, keep_each: int) -> Composite:
    """Insert nine tenths, make a generation of them, insert the rest."""
    names, stored = counter(), list[bytes]()
    renewal = DiskIndexRebuild(directory, "bench", TaskOwner())
    index = LayeredIndex(await renewal.open())

    def insert(n: int) -> None:
        for tokens in islice(snapshots, n):
            name = next(names)
            if name % keep_each == 0:
                stored.append(tokens)
            index.insert(f"ls-{name:016x}", tokens)

    insert(n_entries * 9 // 10)
    gc.collect()
    gc.freeze()  # a full collection of the tree takes longer than all that is measured here
    idle, busy = list[float](), list[float]()
    await late(beside_another(IDLE_S), idle)
    start = time.monotonic()
    await late(renewal.renew(index), busy)
    took_s = time.monotonic() - start
    await late(beside_another(IDLE_S), idle)
    gc.unfreeze()
    insert(n_entries - n_entries * 9 // 10)
    size = await asyncio.to_thread(lambda: sum(path.stat().st_size for path in directory.iterdir()))
    assert index.base is not None, "no generation could be made"
    return Composite(index, index.base, stored, size, idle, busy, took_s)


async def late(work: Coroutine[Any, Any, object], lags: list[float]) -> None:
    """Note by how many seconds each tick comes late until ``work`` has ended."""
    async with asyncio.TaskGroup() as group:
        running = group.create_task(work)
        while not running.done():
            due = time.perf_counter() + TICK_S
            await asyncio.sleep(TICK_S)
            lags.append(time.perf_counter() - due)


async def beside_another(seconds: float) -> None:
    """Do nothing, but beside a process that computes as the one does that makes a generation."""
    spin = "import os, sys\nos.nice(10)\nwhile sys.stdin: pass"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", spin)
    try:
        await asyncio.sleep(seconds)
    finally:
        process.kill()
        await process.wait()


def wait_p99(lags: list[float]) -> float:
    """What an event that arrives at a random moment waits until the loop is free: 99th percentile, in seconds.

    A loop that stands still for a second is late once. So a moment counts, and not a tick.
    """
    return_grace_s = 0.01 * (sum(lags) + len(lags) * TICK_S)
    longest = sorted(lags, reverse=True)
    total = 0.0
    for n, (lag, shorter) in enumerate(pairwise([*longest, 0.0]), 1):
        total += lag  # of the n longest: all moments at which more than ``shorter`` is left are total - n * shorter
        if total - n * shorter > return_grace_s:
            return (total - return_grace_s) / n
    return 0.0


def n_unique(base: DiskIndex) -> int:
    """Tokens of a generation, each shared prefix once."""
    n_tokens, above = base.columns.n_tokens, base.columns.above
    return sum(n_tokens[point] - n_tokens[above[point]] for point in range(1, len(n_tokens)))


def changes(few: Composite, many: Composite, later: list[bytes], n_drops: int) -> Iterator[Row]:
    """Inserts and drops by number of entries; the drops are from the generation."""
    names = {tokens: f"later-{i}" for i, tokens in enumerate(later)}

    def changed(filled: Composite) -> Iterator[tuple[float, float]]:
        index = filled.index
        yield timed(lambda tokens: index.insert(names[tokens], tokens), later, rounds=1)
        frozen = [name.encode() for name in sorted(filled.base.holders())[:: len(filled.base) // n_drops]]
        yield timed(lambda name: index.drop(name.decode()), frozen, rounds=1)

    for name, slow, fast in zip(("insert", "drop"), changed(many), changed(few), strict=True):
        name = f"with a generation: {name}, {len(many.index)} / {len(few.index)} entries"
        yield Row(name, slow[0] / fast[0], 4, False, f"{us(slow)} / {us(fast)}")


def sizes(many: Composite) -> Iterator[Row]:
    """What a generation takes on disk, and what is in Python's memory beside it."""
    n_tokens, base = n_unique(many.base), many.base
    gc.collect()
    tracemalloc.start()
    again = DiskIndex(base.trie, base.columns, [name + " " for name in base.names])
    in_memory, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    on_disk, beside = many.size_bytes / 2**20, in_memory / 2**20
    detail = f"{on_disk:.0f} MiB on disk, {beside:.1f} in memory / {n_tokens / 1e6:.1f} M unique tokens"
    name = f"bytes per unique token of a generation of {len(again)}"
    yield Row(name, (many.size_bytes + in_memory) / n_tokens, 3, False, detail)


def lags(many: Composite) -> Row:
    """What a generation in the making costs the event loop, beyond the core that it takes."""
    busy, idle = wait_p99(many.busy) * 1000, wait_p99(many.idle) * 1000
    worst = f"at worst {max(many.busy) * 1000:.1f} / {max(many.idle) * 1000:.1f}"
    detail = f"{busy:.2f} ms / {idle:.2f} ms ({worst}), made in {many.took_s:.1f} s"
    return Row("wait for the loop while a generation is made / idle", busy / idle, 5, False, detail)


def measure(n_few: int = 1_000, n_many: int = 10_000, n_prompts: int = 200) -> Iterator[Row]:
    """Every ratio in turn. The default numbers are those that the bounds are for."""
    traffic = Traffic()
    snapshots = traffic.snapshots()
    with tempfile.TemporaryDirectory(prefix="llamaslot-bench-") as directory:
        many = asyncio.run(filled(Path(directory, "many"), snapshots, n_many, 10))
        few = asyncio.run(filled(Path(directory, "few"), snapshots, n_few, 1))
        yield lags(many)
        yield from sizes(many)
        yield from bench.lookups(traffic, few, many, n_prompts, what="with a generation: ", packing_bound=1.5)
        yield from changes(few, many, list(islice(snapshots, n_prompts)), n_prompts)
