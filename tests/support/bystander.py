"""The longest gap between the tokens of one user's stream while other users' contexts are evicted and restored.

The same workload runs on a llama-server with fewer slots than users, and on one with a slot for each. A save, an erase
and a restore each stop every stream while they run; they may cost the bystander no more than one of them at a time.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.support.jobs import team_of
from tests.support.real import RealServer
from tests.support.stack import Stack
from tests.support.users import talking
from tests.support.waiting import ServerClock

N_TRIES = 5  # of a single save and a single restore


@dataclass(frozen=True, slots=True)
class Watched:
    """The figures of one run.

    Gaps are those in the bystander's stream, without the time in which other processes had llama-server's CPU.
    ``transfer_s``: the longest single save or restore, measured on an idle server.
    """

    first_gap_s: float  # while the others' contexts are computed
    later_gap_s: float  # while the others follow up: nothing but a few tokens is computed
    transfer_s: float
    n_saves: int
    n_restores: int
    n_errors: int

    @property
    def gap_s(self) -> float:
        return max(self.first_gap_s, self.later_gap_s)


@dataclass(frozen=True, slots=True)
class Pair:
    """The same workload with fewer slots than users, and with a slot for each user."""

    tight: Watched
    roomy: Watched

    @property
    def excess_s(self) -> float:
        """By how many seconds the longest gap exceeds what is allowed; negative if it is shorter."""
        return self.tight.gap_s - self.roomy.gap_s - self.tight.transfer_s

    @property
    def later_excess_s(self) -> float:
        """As ``excess_s``, for the follow-up turns alone, where hardly anything but saves and restores makes gaps."""
        return self.tight.later_gap_s - self.roomy.later_gap_s - self.tight.transfer_s

    def __str__(self) -> str:
        tight, roomy = self.tight, self.roomy
        return (
            f"longest gap {tight.gap_s:.3f} s ({tight.n_saves} saves, {tight.n_restores} restores), with a slot for "
            f"each context {roomy.gap_s:.3f} s, a single transfer {tight.transfer_s:.3f} s; of follow-up turns "
            f"{tight.later_gap_s:.3f} and {roomy.later_gap_s:.3f} s"
        )


async def watch(
    stack: Stack, *, n_users: int, n_context: int, n_turns: int, at_a_time: int, seed: int
) -> Watched:
    """Users take turns beside a bystander; ``n_turns`` of each after the first."""
    async with team_of(stack, n_users, n_context, seed=seed) as (team, _):
        clock = ServerClock(stack.server.pid)
        async with talking(team.client, random.Random(seed), clock=clock) as times:
            await clock.start()
            async with gaps(times, clock) as first:
                turns = await team.round(at_a_time=at_a_time)
            async with gaps(times, clock) as later:
                turns += await team.run(n_turns, at_a_time=at_a_time)
        counts = await stack.own_metrics()
        return Watched(
            first_gap_s=max(first),
            later_gap_s=max(later),
            transfer_s=await longest_transfer_s(stack.server),
            n_saves=int(counts["llamaslot_snapshot_saves_total"]),
            n_restores=int(counts["llamaslot_snapshot_restores_total"]),
            n_errors=sum(bool(turn.reply.error) for turn in turns),
        )


@asynccontextmanager
async def gaps(times: Sequence[float], clock: ServerClock) -> AsyncIterator[list[float]]:
    """The gaps in a stream while the block lasts, those at its two ends included."""
    found: list[float] = []
    begin, n_before = clock(), len(times)
    yield found
    found += [b - a for a, b in pairwise([begin, *times[n_before:], clock()])]


async def longest_transfer_s(server: RealServer) -> float:
    """The longest of some single saves and restores of the largest slot, asked of an idle llama-server directly."""
    slots = await server.slots()
    largest = max(slots, key=lambda slot: slot.get("n_prompt_tokens") or 0)["id"]
    took: list[float] = []
    for _ in range(N_TRIES):
        for action, field in (("save", "save_ms"), ("restore", "restore_ms")):
            answer: dict[str, Any] = await server.post(
                f"/slots/{largest}?action={action}", {"filename": "measured.tmp"}
            )
            took.append(answer["timings"][field] / 1000)
    return max(took)


async def compare_gaps(
    model: Path,
    directory: Path,
    n_pairs: int,
    *,
    slots: int = 4,
    n_users: int = 7,
    n_context: int = 6500,
    n_turns: int = 3,
    at_a_time: int = 3,
    seed: int = 1,
    batch: int = 512,
) -> list[Pair]:
    """``n_pairs`` pairs, each with users of its own; who goes first alternates. ``slots`` in the tight runs."""
    pairs = []
    for number in range(n_pairs):
        runs: dict[bool, Watched] = {}
        for is_tight in (number % 2 == 0, number % 2 == 1):
            where = directory / f"{number}-{'tight' if is_tight else 'roomy'}"
            n_slots = slots if is_tight else n_users + 1
            async with Stack(model, where, slots=n_slots, batch=batch, ubatch=batch) as stack:
                runs[is_tight] = await watch(
                    stack,
                    n_users=n_users,
                    n_context=n_context,
                    n_turns=n_turns,
                    at_a_time=at_a_time,
                    seed=seed + number,
                )
        pairs.append(Pair(runs[True], runs[False]))
    return pairs
