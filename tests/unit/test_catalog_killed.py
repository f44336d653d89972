"""SIGKILL between any two file operations: the directory opens cleanly and lists nothing that is not whole."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llamaslot.errors import LlamaslotError
from llamaslot.store import Catalog, WithTokens
from tests.support.snapshots import Killed, Killer, Shelter, some_tokens

REPOSITORY = Path(__file__).parents[2]
SIZE, QUOTA = 3_000, 10_000


class Victim(Shelter):
    """Runs a day of a catalog and notes what must survive, and what may."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, QUOTA)
        self.committed: dict[str, WithTokens] = {}
        self.doomed: set[str] = set()

    async def a_day(self) -> None:
        """Two commits that evict, one that is refused, an abandoned draft, a touch, a pinned and a plain drop."""
        for seed in (10, 11):
            draft = await self.catalog.reserve(SIZE)
            tokens = some_tokens(30, seed)
            snapshot = await self.commit(draft, tokens, self.write(draft, tokens))
            self.committed[snapshot.id] = snapshot
        draft = await self.catalog.reserve(SIZE)
        self.write(draft, tokens)
        await self.catalog.abandon(draft)
        self.catalog.touch(snapshot.id)
        first, *_ = self.catalog.snapshots
        with self.catalog.pin(first):
            self.doomed.add(first)
            await self.catalog.drop(first)
        await self.catalog.settle()


async def before(directory: Path) -> list[WithTokens]:
    """A directory with three snapshots, full to its quota."""
    shelter = Shelter(directory, QUOTA)
    await shelter.open()
    snapshots = [await shelter.save(some_tokens(30, seed), SIZE) for seed in range(3)]
    await shelter.catalog.settle()
    shelter.catalog.close()
    return snapshots


async def live_and_die(directory: Path, killer: Killer) -> Victim:
    """A catalog that opens and works until ``killer`` strikes."""
    await before(directory)
    victim = Victim(directory)
    with killer.armed():
        try:
            await victim.open()
            await victim.a_day()
        except (Killed, LlamaslotError):
            assert killer.has_struck
        finally:
            await victim.catalog.settle()  # its threads run on until they reach a file operation
            victim.catalog.close()  # as the kernel does
    return victim


async def check_survivor(directory: Path) -> Catalog:
    """Opens, lists only what is whole, holds exactly that, within the quota."""
    survivor = Shelter(directory, QUOTA)
    catalog = await survivor.open()
    for id_ in list(catalog.snapshots):
        await catalog.verify(id_)
    assert await survivor.settled() == survivor.whole()
    assert survivor.bytes_on_disk() == catalog.size_bytes <= QUOTA
    catalog.check()
    await survivor.save(some_tokens(30, 99), SIZE)  # and is good for another day
    await catalog.settle()
    catalog.close()
    return catalog


@pytest.fixture
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Tasks that die of the kill are reported, rightly, but by the hundred."""
    caplog.set_level(logging.CRITICAL)


@pytest.mark.usefixtures("_quiet")
async def test_killed_at_each_step(tmp_path: Path) -> None:
    """After every single file operation of a day, including those of the opening."""
    n_steps = 0
    while True:
        directory = tmp_path / str(n_steps)
        os.mkdir(directory)
        killer = Killer(n_steps)
        victim = await live_and_die(directory, killer)
        catalog = await check_survivor(directory)
        lost = victim.committed.keys() - catalog.snapshots.keys() - set(victim.dropped) - victim.doomed
        assert not lost, f"committed before step {n_steps}, lost after it"
        assert all(
            catalog.snapshots.get(id_, snapshot.listed) == snapshot.listed
            for id_, snapshot in victim.committed.items()
        )
        if not killer.has_struck:
            break
        n_steps += 1
    assert len(victim.committed) == 2
    assert set(killer.log) == {"open", "fsync", "fdatasync", "utime", "rename", "unlink"}
    assert n_steps > 20


@pytest.mark.usefixtures("_quiet")
async def test_killed_again_while_it_repairs(tmp_path: Path) -> None:
    """A repair that is cut short is repaired by the next."""
    n_days = len((await _full_day(tmp_path / "full")).log)
    for n_steps in range(0, n_days, 3):
        directory = tmp_path / str(n_steps)
        os.mkdir(directory)
        await live_and_die(directory, Killer(n_steps))
        for n_more in range(4):
            repairer = Shelter(directory, QUOTA // 2)  # a smaller quota gives it more to do
            with Killer(n_more).armed():
                try:
                    await repairer.open()
                except Killed:
                    pass
                finally:
                    await repairer.catalog.settle()
                    repairer.catalog.close()
        await check_survivor(directory)


async def _full_day(directory: Path) -> Killer:
    os.mkdir(directory)
    killer = Killer(10**6)
    await live_and_die(directory, killer)
    return killer


WORKER = """
import asyncio, random, sys, time
from pathlib import Path
from llamaslot.store import Catalog, QuotaExceeded
from tests.support.snapshots import Shelter, some_tokens

async def worker(shelter, seed):
    rng = random.Random(seed)
    while True:
        try:
            draft = await shelter.catalog.reserve(rng.randrange(1_000, 4_000))
        except QuotaExceeded:
            continue
        tokens = some_tokens(30, rng.randrange(1 << 30))
        size = shelter.write(draft, tokens)
        if rng.random() < 0.2:
            await shelter.catalog.abandon(draft)
        else:
            snapshot = await shelter.commit(draft, tokens, size)
            print(snapshot.id, flush=True)
            if rng.random() < 0.3:
                await shelter.catalog.drop(snapshot.id)

async def main():
    shelter = Shelter(Path(sys.argv[1]), 10_000)
    await shelter.open()
    async with asyncio.TaskGroup() as group:
        for seed in range(3):
            group.create_task(worker(shelter, seed))

asyncio.run(main())
"""


async def test_killed_for_real(tmp_path: Path) -> None:
    """A process with three savers on a quota for four, SIGKILL, again in the same directory: always whole."""
    for n_commits in (1, 7, 23, 40):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", WORKER, str(tmp_path)), stdout=subprocess.PIPE, cwd=REPOSITORY
        )
        assert process.stdout is not None
        for _ in range(n_commits):
            assert await process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        await process.communicate()
        await check_survivor(tmp_path)
