"""llamaslot killed at random moments, while it works with a quota that is much too small."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from llamaslot.store import sidecar
from llamaslot.store.extent import verify
from llamaslot.store.restore_file import outgoing
from llamaslot.store.snapshot import EXT
from tests.support.jobs import clients, snapshot_files, team_of
from tests.support.real import RealServer
from tests.support.stack import Stack, size_of
from tests.support.users import User

FOREIGN = "foreign.kv"
# Settings with which llamaslot tells what it lists and drops.
TELLS: dict[str, Any] = {"log": {"level": "debug"}}
_TOLD = re.compile(
    r"snapshots: (?P<id>ls-\w+) is (?:listed|no longer listed: (?P<why>\w+))|snapshot dropped: (?P<dropped>ls-\w+)"
)
N_ANSWER = (
    200  # tokens: a slot holds more than the prompt that llamaslot knows, and its file needs room for that
)


@dataclass(slots=True)
class Killing:
    """The figures over all kills."""

    quota_bytes: int
    n_kills: int = 0
    n_answers: int = 0
    n_saved: int = 0  # snapshots that llamaslot had listed before a kill and not dropped, summed up
    n_listed: int = 0  # snapshots found after the restarts, summed up
    n_restored: int = 0  # of these, by a llama-server of the same model
    n_gone: int = 0  # of these, dropped before they could be tried, as llamaslot's log tells
    n_unlisted: int = (
        0  # files of llamaslot's without a sidecar that are still there some seconds after a restart
    )
    most_bytes: int = 0  # of all snapshot files at any moment
    start_s: list[float] = field(default_factory=list)
    process_s: list[float] = field(default_factory=list)  # of each start, until it listens
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        slowest_s, process_s = max(zip(self.start_s, self.process_s, strict=True), default=(0.0, 0.0))
        return (
            f"{self.n_kills} kills, {self.n_answers} answers between them, {len(self.start_s)} starts "
            f"(slowest {slowest_s:.1f} s, of which {process_s:.1f} s until it listened), "
            f"{self.n_saved} snapshots saved before a kill, "
            f"{self.n_restored} + {self.n_gone} gone of {self.n_listed} snapshots restored, "
            f"{self.n_unlisted} left-overs, "
            f"at most {self.most_bytes} of {self.quota_bytes} bytes, faults: {self.faults or 'none'}"
        )


async def kill_llamaslot(
    stack: Stack,
    other: RealServer,
    *,
    quota_bytes: int,
    n_kills: int = 20,
    n_users: int = 8,
    n_context: int = 3000,
    longest_s: float = 3.0,
    seed: int = 1,
) -> Killing:
    """Users work; llamaslot is killed up to ``longest_s`` later; it starts, its snapshots are tried; and so on.

    What its log says that it has listed, and not that it has dropped, must still be there: use the settings TELLS.

    ``other``: a llama-server with the same model and directory, used for restores only. So llama.cpp judges a snapshot,
    not llamaslot. The directory also has a foreign file, which must not change.
    """
    rng = random.Random(seed)
    directory = stack.server.save_dir
    (directory / FOREIGN).write_bytes(b"not yours")
    figures = Killing(quota_bytes)
    async with clients(stack) as (front, _):
        users = [User(f"user {n}", n_context, rng) for n in range(n_users)]
        working = asyncio.Event()

        async def work(user: User) -> None:
            while True:
                await working.wait()
                turn = await user.turn(front, max_tokens=N_ANSWER)
                figures.n_answers += not turn.reply.error
                if turn.reply.error:
                    await asyncio.sleep(0.05)
                if user.n_turns % 5 == 0:
                    user.forget(n_context)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work(user)) for user in users]
            tasks.append(group.create_task(watch(directory, figures)))
            for _ in range(n_kills):
                working.set()
                await asyncio.sleep(rng.uniform(0.1, longest_s))
                working.clear()
                await stack.llamaslot.kill()
                figures.n_kills += 1
                saved = {id_ for id_, why in told(stack).items() if not why}
                figures.n_saved += len(saved)
                await start(stack, figures)
                check_saved(stack, saved, figures)
                await try_snapshots(stack, other, figures)
            await settled(lambda: unlisted(directory), figures)
            for task in tasks:
                task.cancel()
    if (directory / FOREIGN).read_bytes() != b"not yours":
        figures.faults.append("the foreign file was touched")
    return figures


async def work_within_quota(
    stack: Stack,
    *,
    quota_bytes: int,
    n_users: int = 8,
    n_context: int = 1500,
    n_answer: int = 500,
    n_turns: int = 3,
) -> Killing:
    """Users with long answers evict each other all the time, and the directory is watched. Nothing is killed.

    A slot also holds the answer, which llamaslot has not counted: the bytes reserved for its file must cover the
    answer.
    """
    figures = Killing(quota_bytes)
    async with team_of(stack, n_users, n_context) as (team, _), asyncio.TaskGroup() as group:
        watching = group.create_task(watch(stack.server.save_dir, figures))
        turns = await team.run(n_turns, max_tokens=n_answer)
        watching.cancel()
    figures.n_answers = sum(not turn.reply.error for turn in turns)
    figures.faults += [turn.reply.error for turn in turns if turn.reply.error]
    return figures


async def start(stack: Stack, figures: Killing) -> None:
    now = asyncio.get_running_loop().time
    began = now()
    await stack.llamaslot.start(wait=False)
    await stack.llamaslot.listens()
    figures.process_s.append(now() - began)
    await stack.llamaslot.healthy()
    figures.start_s.append(now() - began)


def told(stack: Stack) -> dict[str, str]:
    """By snapshot id why llamaslot has dropped it, as its log tells so far; "" for those that it has not."""
    log = stack.llamaslot.log
    each = _TOLD.finditer(log)  # the last line about a snapshot counts
    return {its["id"] or its["dropped"]: its["why"] or ("dropped" if its["dropped"] else "") for its in each}


def check_saved(stack: Stack, saved: set[str], figures: Killing) -> None:
    """Record a fault for each snapshot in ``saved`` that is not on disk, unless llamaslot tells that it was dropped."""
    there = {path.stem for path in stack.server.save_dir.glob("*.json") if path.with_suffix(".kv").exists()}
    why = told(stack)
    figures.faults += [f"{id_}: was saved, and is lost" for id_ in saved - there if not why[id_]]


async def watch(directory: Path, figures: Killing) -> None:
    """Look every 5 ms at the bytes of llamaslot's files: those that begin with ``ls-``."""
    while True:
        held = held_by(directory)
        total = sum(size for name, size in held.items() if not name.endswith(".json"))
        figures.most_bytes = max(figures.most_bytes, total)
        if total > figures.quota_bytes and not any("quota" in fault for fault in figures.faults):
            figures.faults.append(f"quota: {total} bytes at {datetime.now():%H:%M:%S.%f}: {held}")
        await asyncio.sleep(0.005)


def held_by(directory: Path) -> dict[str, int]:
    """The size of each file with llamaslot's own form of name."""
    return {path.name: size_of(path) for path in directory.glob("ls-*")}


async def try_snapshots(stack: Stack, other: RealServer, figures: Killing) -> None:
    """Restore every finished snapshot into slot 0 of the other server, and verify each of its parts."""
    directory = stack.server.save_dir
    for path, tokens in snapshot_files(directory):
        figures.n_listed += 1
        copy = directory / "tried"
        try:
            noted = sidecar.parse(path.with_suffix(".json").name, path.with_suffix(".json").read_bytes())
            order = outgoing(noted.snapshot(""), noted.n_tokens)
            if order is not None:
                order.write(directory, copy)
            for part in noted.parts:
                if part.file.endswith(EXT):
                    verify(directory / part.file)
            await other.post("/slots/0?action=erase", {})
            name = path.name if order is None else copy.name
            answer = await other.post("/slots/0?action=restore", {"filename": name})
        except Exception as error:  # whatever it is, it is told with the file's name
            if told(stack).get(path.stem):
                figures.n_gone += 1
            else:
                figures.faults.append(f"{path.name}: {error}")
            continue
        if answer["n_restored"] == len(tokens):
            figures.n_restored += 1
        else:
            figures.faults.append(f"{path.name}: {answer['n_restored']} of {len(tokens)} tokens")
        copy.unlink(missing_ok=True)


def unlisted(directory: Path) -> list[Path]:
    """The files with llamaslot's own form of name that no sidecar belongs to or names."""
    needed = set[str]()
    for path in directory.glob("ls-*.json"):
        with suppress(FileNotFoundError):
            needed |= sidecar.parse(path.name, path.read_bytes()).snapshot("").files.keys()
    return [path for path in directory.glob("ls-*") if path.suffix != ".json" and path.name not in needed]


async def settled(left: Callable[[], list[Path]], figures: Killing, *, patience_s: float = 10.0) -> None:
    """Wait until the saves that run now are complete, then count the files that are left over."""
    with suppress(TimeoutError):
        async with asyncio.timeout(patience_s):
            while left():  # noqa: ASYNC110  a directory sets no event
                await asyncio.sleep(0.2)
    figures.n_unlisted = len(left())
