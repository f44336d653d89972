"""llamaslot against its strongest rival: llama-server alone with a RAM cache (``--cache-ram``) that holds everything.

Both serve the same users with the same model. A pair is one run of each, one after the other, on fresh servers, so that
other work on the machine disturbs both.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.jobs import take_turns, team_of
from tests.support.stack import Stack
from tests.support.users import Tally, tally
from tests.support.waiting import Stopwatch

RAM_CACHE = ("--cache-ram", "8192")
RECOMMENDED = {"batch": 512, "ubatch": 512}  # beside those that every server of the tests has


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the workload. ``makespan_s`` is from the first question to the last answer, ``undisturbed_s`` the same
    without the time in which other processes had llama-server's CPU."""

    makespan_s: float
    undisturbed_s: float
    tally: Tally


@dataclass(frozen=True, slots=True)
class Pair:
    """The same workload through llamaslot and on llama-server alone with its RAM cache."""

    through: Run
    alone: Run

    @property
    def ratio(self) -> float:
        return self.through.makespan_s / self.alone.makespan_s

    @property
    def undisturbed_ratio(self) -> float:
        return self.through.undisturbed_s / self.alone.undisturbed_s

    def __str__(self) -> str:
        through, alone = self.through, self.alone
        return (
            f"{through.makespan_s:.2f} s through (reused {through.tally.ratio:.4f}), {alone.makespan_s:.2f} s alone "
            f"with a RAM cache (reused {alone.tally.ratio:.4f}): {self.ratio:.3f}; without waiting for a CPU "
            f"{through.undisturbed_s:.2f} and {alone.undisturbed_s:.2f} s: {self.undisturbed_ratio:.3f}"
        )


async def run(stack: Stack, *, n_users: int, n_context: int, n_turns: int, at_a_time: int, seed: int) -> Run:
    """The users' turns on a stack that has just been started."""
    if not stack.alone:
        await stack.status()  # loads the application, which takes 0.16 s after a start: 7 % of a run of 2.3 s
    async with team_of(stack, n_users, n_context, seed=seed) as (team, meter):
        watch = Stopwatch(stack.server.pid)
        turns = await team.run(n_turns, at_a_time=at_a_time)
        makespan_s, undisturbed_s = watch.stop()
        return Run(makespan_s, undisturbed_s, tally(turns, await meter.total()))


async def take_turns_alone(model: Path, directory: Path, *, cache_mib: int = 8192, seed: int = 1) -> Tally:
    """The workload on llama-server alone, with a RAM cache of ``cache_mib``."""
    flags = ("--cache-ram", str(cache_mib))
    async with Stack(model, directory, alone=True, extra=flags) as stack:
        return await take_turns(stack, seed=seed)


async def compare_makespans(
    model: Path,
    directory: Path,
    n_pairs: int,
    *,
    n_users: int = 12,
    n_context: int = 6500,
    n_turns: int = 4,
    at_a_time: int = 4,
    seed: int = 1,
) -> list[Pair]:
    """``n_pairs`` pairs, each with users of its own and flags that suit the side; who goes first alternates."""
    pairs = []
    for number in range(n_pairs):
        sizes = {"n_users": n_users, "n_context": n_context, "n_turns": n_turns, "at_a_time": at_a_time}
        runs = {}
        for is_alone in (number % 2 == 0, number % 2 == 1):
            where = directory / f"{number}-{'alone' if is_alone else 'through'}"
            flags: dict[str, Any] = {"extra": RAM_CACHE} if is_alone else RECOMMENDED
            async with Stack(model, where, alone=is_alone, **flags) as stack:
                runs[is_alone] = await run(stack, seed=seed + number, **sizes)
        pairs.append(Pair(runs[False], runs[True]))
    return pairs


def median_ratio(pairs: Sequence[Pair]) -> float:
    """The median of the ratios, each of one pair."""
    return statistics.median(pair.ratio for pair in pairs)


def median_undisturbed(pairs: Sequence[Pair]) -> float:
    """The same without the time in which other processes had the CPU."""
    return statistics.median(pair.undisturbed_ratio for pair in pairs)
