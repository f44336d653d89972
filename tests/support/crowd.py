"""More agents than slots, which begin at the same moment with a long prompt each, and go on for some turns.

They run through llamaslot, and on llama-server alone with its RAM cache, in turns.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.jobs import clients
from tests.support.rival import RAM_CACHE
from tests.support.stack import Stack
from tests.support.users import Client, Turn, User


@dataclass(frozen=True, slots=True)
class Crowd:
    """Seconds of a run. ``first_s``: to the first token of each agent's first turn; ``later_s``: the same for the other
    turns; ``answered_s``: to the end of each agent's first answer.
    """

    first_s: tuple[float, ...]
    later_s: tuple[float, ...]
    answered_s: tuple[float, ...]
    makespan_s: float

    @property
    def mean_first_s(self) -> float:
        return statistics.mean(self.first_s)

    @property
    def mean_s(self) -> float:
        return statistics.mean((*self.first_s, *self.later_s))

    def __str__(self) -> str:
        each = ", ".join(f"{seconds:.2f}" for seconds in sorted(self.first_s))
        later = statistics.mean(self.later_s) if self.later_s else 0.0
        return (
            f"first turn {self.mean_first_s:.2f} s ({each}), answered {statistics.mean(self.answered_s):.2f} s, "
            f"later turns {later:.2f} s, all {self.mean_s:.2f} s; whole run {self.makespan_s:.2f} s"
        )


async def run(
    stack: Stack,
    *,
    n_agents: int = 6,
    n_context: int = 8000,
    n_turns: int = 4,
    n_answer: int = 60,
    seed: int = 1,
) -> Crowd:
    async with clients(stack) as (front, _):
        agents = [
            User(f"agent {n}", n_context, random.Random(100 * seed + n), n_question=300)
            for n in range(n_agents)
        ]
        began = time.perf_counter()
        turns = await asyncio.gather(*(_work(agent, front, n_turns, n_answer) for agent in agents))
        makespan_s = time.perf_counter() - began
    return Crowd(
        tuple(own[0].reply.ttft_s for own in turns),
        tuple(turn.reply.ttft_s for own in turns for turn in own[1:]),
        tuple(own[0].reply.total_s for own in turns),
        makespan_s,
    )


async def _work(agent: User, client: Client, n_turns: int, n_answer: int) -> Sequence[Turn]:
    for _ in range(n_turns):
        turn = await agent.turn(client, max_tokens=n_answer)
        assert not turn.reply.error, turn.reply.error
    return agent.turns


async def compare(model: Path, directory: Path, n_pairs: int, **sizes: int) -> list[tuple[Crowd, Crowd]]:
    """Pairs of runs, through llamaslot and on llama-server alone; which runs first alternates. The first pair is left
    out, because llamaslot has not learned its rates yet.
    """
    flags: dict[str, Any] = {"context": 12288}
    async with (
        Stack(model, directory / "through", **flags) as stack,
        Stack(model, directory / "alone", alone=True, extra=RAM_CACHE, **flags) as alone,
    ):
        pairs = []
        for number in range(n_pairs + 1):
            runs = {}
            for side in (stack, alone) if number % 2 else (alone, stack):
                runs[side] = await run(side, seed=number, **sizes)
            if number:
                pairs.append((runs[stack], runs[alone]))
        return pairs
