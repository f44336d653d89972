"""One user with many parallel streams, and five with one each, on four slots."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import statistics
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import models
from tests.support.stack import Stack
from tests.support.users import Client, User

N_MODEST, N_SLOTS, N_STREAMS = 5, 4, 20


@dataclass(slots=True)
class Waits:
    """Seconds to the first token of the modest users' requests, by user. ``n_greedy``: number of answers to the greedy
    user.
    """

    ttft_s: dict[str, list[float]] = field(default_factory=dict)
    n_greedy: int = 0

    @property
    def median_s(self) -> float:
        return statistics.median(second for seconds in self.ttft_s.values() for second in seconds)

    @property
    def medians_s(self) -> list[float]:
        """The median for each user."""
        return [statistics.median(seconds) for seconds in self.ttft_s.values()]

    def add(self, other: Waits) -> None:
        for name, seconds in other.ttft_s.items():
            self.ttft_s.setdefault(name, []).extend(seconds)
        self.n_greedy += other.n_greedy

    def __str__(self) -> str:
        each = ", ".join(f"{seconds:.2f}" for seconds in sorted(self.medians_s))
        worst = max(max(seconds) for seconds in self.ttft_s.values())
        return f"median {self.median_s:.2f} s (of each: {each}; longest {worst:.2f}), greedy answers {self.n_greedy}"


@dataclass(frozen=True, slots=True)
class Scene:
    """The settings of a run. ``think_s``: the mean pause of a modest user between an answer and its next question; the
    greedy user makes none.

    Answers have 0.5 to 1.5 times ``n_answer`` tokens. If all were equally long, all would end at once, and a request
    that waits would wait for a whole answer. After ``n_turns`` a conversation is replaced by a new one.
    """

    n_context: int = 1500
    n_answer: int = 150
    n_turns: int = 8
    think_s: float = 0.0


class Team:
    """The six users. Their first conversations have begun before a round starts. So a round is like a piece of a
    working day, not like the moment at which twenty new contexts come at once.
    """

    def __init__(self, url: str, scene: Scene) -> None:
        self._url, self._scene = url, scene
        self._greedy = [self._user("greedy", number) for number in range(N_STREAMS)]
        self._modest = [self._user("modest", number) for number in range(N_MODEST)]
        self._clients: dict[str, Client] = {}

    @contextlib.asynccontextmanager
    async def there(self) -> AsyncIterator[Team]:
        async with contextlib.AsyncExitStack() as stack:
            for name in ("greedy", *(user.name for user in self._modest)):
                client = Client(self._url, {"x-llamaslot-user": name})
                self._clients[name] = await stack.enter_async_context(client)
            for user in self._modest:
                await self._turn(user, self._clients[user.name], 1)
            for user in self._greedy:
                await self._turn(user, self._clients["greedy"], 1)
            yield self

    def _user(self, name: str, number: int) -> User:
        return User(f"{name}-{number}", self._scene.n_context, random.Random(f"{name} {number}"))

    async def _turn(self, user: User, client: Client, n_answer: int) -> float:
        """Ask once. Returns the seconds to the first token."""
        turn = await user.turn(client, max_tokens=n_answer)
        assert not turn.reply.error, turn.reply.error
        if user.n_turns % self._scene.n_turns == 0:
            user.forget(self._scene.n_context)
        return turn.reply.ttft_s

    async def round(self, n_streams: int, n_turns: int) -> Waits:
        """Run until each of the modest users has had ``n_turns`` follow-ups. The greedy user asks all the time, with
        ``n_streams`` at once.
        """
        waits, scene = Waits(), self._scene

        def n_answer(rng: random.Random) -> int:
            return round(scene.n_answer * rng.uniform(0.5, 1.5))

        async def greed(user: User) -> None:
            rng = random.Random(f"{user.name} {user.n_turns}")
            while True:
                await self._turn(user, self._clients["greedy"], n_answer(rng))
                waits.n_greedy += 1

        async def ask(user: User) -> None:
            n_left, rng = n_turns, random.Random(f"{user.name} {user.n_turns}")
            while n_left:
                if scene.think_s:
                    await asyncio.sleep(rng.expovariate(1 / scene.think_s))
                is_first = len(user.messages) == 1
                ttft_s = await self._turn(user, self._clients[user.name], n_answer(rng))
                if not is_first:  # that one has a context to compute
                    waits.ttft_s.setdefault(user.name, []).append(ttft_s)
                    n_left -= 1

        streams = [asyncio.get_running_loop().create_task(greed(user)) for user in self._greedy[:n_streams]]
        try:
            async with asyncio.TaskGroup() as group:
                for user in self._modest:
                    group.create_task(ask(user))
        finally:
            await _end(streams)
        return waits


@dataclass(frozen=True, slots=True)
class Rush:
    """The greedy user's streams begin at once, each request with a context of its own. ``lead_s`` later the other users
    come, for the first time, and ask one request after the other: ``n_requests`` each, or for ``for_s`` seconds.
    """

    n_prompt: int = 1200
    n_answer: int = 60
    n_greedy_prompt: int = 1200
    n_greedy_answer: int = 60
    is_talk: bool = False
    lead_s: float = 3.0
    n_requests: int = 2
    for_s: float = 0.0

    async def run(self, url: str, n_streams: int, name: str) -> Waits:
        """``name`` begins the names of this run's users, so that they are not those of other runs."""
        waits, loop, names = Waits(), asyncio.get_running_loop(), itertools.count()

        async def ask(client: Client, user: str) -> float:
            number = next(names)
            one = User(f"{user} {number}", self.n_prompt, random.Random(f"{user} {number}"))
            turn = await one.turn(client, max_tokens=self.n_answer)
            assert not turn.reply.error, turn.reply.error
            return turn.reply.ttft_s

        async def greed(client: Client) -> None:
            one: User | None = None
            while True:
                number = next(names)
                if one is None or not self.is_talk or one.n_turns >= 8:
                    one = User(f"greedy {number}", self.n_greedy_prompt, random.Random(f"{name} {number}"))
                turn = await one.turn(client, max_tokens=self.n_greedy_answer)
                assert not turn.reply.error, turn.reply.error
                waits.n_greedy += 1

        async def modest(number: int) -> None:
            user = f"modest-{name}-{number}"
            async with Client(url, {"x-llamaslot-user": user}) as client:
                until, n = loop.time() + self.for_s, 0
                while n < self.n_requests or loop.time() < until:
                    waits.ttft_s.setdefault(user, []).append(await ask(client, user))
                    n += 1

        async with Client(url, {"x-llamaslot-user": f"greedy-{name}"}) as client:
            streams = [loop.create_task(greed(client)) for _ in range(n_streams)]
            try:
                await asyncio.sleep(self.lead_s)
                async with asyncio.TaskGroup() as group:
                    for number in range(N_MODEST):
                        group.create_task(modest(number))
            finally:
                await _end(streams)
        return waits


async def _end(streams: Sequence[asyncio.Task[None]]) -> None:
    """Let the clients of these streams leave. Raises AssertionError if one has failed before."""
    for stream in streams:
        stream.cancel()
    await asyncio.wait(streams)
    dead = [stream for stream in streams if not stream.cancelled() and stream.exception()]
    assert not dead, [stream.exception() for stream in dead]


async def rest(stack: Stack) -> None:
    """Wait until llama-server has ended all work for clients that have left."""
    while True:
        status = await stack.status()
        if not status["queue"] and all(
            slot["state"] in ("FREE", "HOT") for slot in status["backends"][0]["slots"]
        ):
            return
        await asyncio.sleep(0.2)


@contextlib.asynccontextmanager
async def stage(
    directory: Path, scene: Scene, settings: Mapping[str, Mapping[str, object]] | None = None
) -> AsyncIterator[tuple[Stack, Team]]:
    model = models.dense(directory, layers=4, width=256)
    async with (
        Stack(model, directory, slots=N_SLOTS, context=8192, settings=settings) as stack,
        Team(stack.url, scene).there() as team,
    ):
        yield stack, team
