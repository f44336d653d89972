"""One user with many parallel streams, and five with one each, on four slots."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import models
from tests.support.stack import Stack
from tests.support.users import Client, User

N_MODEST, N_SLOTS = 5, 4


@dataclass(slots=True)
class Waits:
    """Seconds to the first token of the modest users' requests, by user; ``n_greedy``: answers of the greedy one."""

    ttft_s: dict[str, list[float]] = field(default_factory=dict)
    n_greedy: int = 0

    @property
    def median_s(self) -> float:
        return statistics.median(second for seconds in self.ttft_s.values() for second in seconds)

    @property
    def medians_s(self) -> list[float]:
        """Of each user."""
        return [statistics.median(seconds) for seconds in self.ttft_s.values()]

    def __str__(self) -> str:
        each = ", ".join(f"{seconds:.2f}" for seconds in sorted(self.medians_s))
        worst = max(max(seconds) for seconds in self.ttft_s.values())
        return f"median {self.median_s:.2f} s (of each: {each}; longest {worst:.2f}), greedy answers {self.n_greedy}"


@dataclass(frozen=True, slots=True)
class Scene:
    """``think_s``: mean pause of a modest user between an answer and its next question; the greedy one has none."""

    n_turns: int = 6
    n_context: int = 1500
    n_answer: int = 150
    think_s: float = 0.0


async def play(url: str, n_streams: int, scene: Scene, seed: int) -> Waits:
    """Until each of the modest users has had its turns; the greedy one asks all the time with ``n_streams``."""
    rng, waits = random.Random(seed), Waits()
    async with contextlib.AsyncExitStack() as stack:

        async def client_of(name: str) -> Client:
            return await stack.enter_async_context(Client(url, {"x-llamaslot-user": name}))

        async def greed(client: Client, number: int) -> None:
            user = User(f"greedy {seed} {number}", scene.n_context, random.Random(f"{seed} {number}"))
            while True:
                turn = await user.turn(client, max_tokens=scene.n_answer)
                assert not turn.reply.error, turn.reply.error
                waits.n_greedy += 1
                if user.n_turns % 8 == 0:
                    user.forget(scene.n_context)

        async def ask(name: str) -> None:
            client, user = await client_of(name), User(name, scene.n_context, random.Random(f"{seed} {name}"))
            pauses = random.Random(f"{seed} {name} pauses")
            for _ in range(scene.n_turns):
                if scene.think_s:
                    await asyncio.sleep(pauses.expovariate(1 / scene.think_s))
                turn = await user.turn(client, max_tokens=scene.n_answer)
                assert not turn.reply.error, turn.reply.error
                if user.n_turns > 1:  # the first one has a context to compute
                    waits.ttft_s.setdefault(name, []).append(turn.reply.ttft_s)

        greedy = await client_of("greedy")
        streams = [
            asyncio.get_running_loop().create_task(greed(greedy, number)) for number in range(n_streams)
        ]
        try:
            async with asyncio.TaskGroup() as group:
                for number in rng.sample(range(N_MODEST), N_MODEST):
                    group.create_task(ask(f"user-{seed}-{number}"))
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.wait(streams)
            dead = [stream for stream in streams if not stream.cancelled() and stream.exception()]
            assert not dead, [stream.exception() for stream in dead]
    return waits


@contextlib.asynccontextmanager
async def stage(
    directory: Path, settings: Mapping[str, Mapping[str, object]] | None = None
) -> AsyncIterator[Stack]:
    async with Stack(
        models.dense(directory, layers=4, width=256),
        directory,
        slots=N_SLOTS,
        context=8192,
        settings=settings,
    ) as stack:
        yield stack
