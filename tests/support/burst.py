"""A burst of small requests (titles, completions of code) while every slot holds another user's long conversation.

The same burst goes to a llama-server behind llamaslot and to one alone, in turns. The owners of the conversations ask
again afterwards. llama-server's own counter tells how many tokens are computed for them.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.support.jobs import quiet
from tests.support.stack import Stack
from tests.support.users import Client, Meter, User, words

N_SLOTS = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """A burst: ``n_requests`` at once that begin with the same ``n_alike`` tokens and continue with ``n_own`` other
    ones each.

    ``n_users``: how many users send them; 0: the user that owns the conversations sends them too.
    """

    n_requests: int = 8
    n_alike: int = 280
    n_own: int = 20
    n_answer: int = 100
    n_context: int = 5960
    is_clean: bool = True  # the conversations are on disk already
    n_users: int = 1


@dataclass(frozen=True, slots=True)
class Burst:
    """The figures of a burst. ``makespan_s``: from the first small request to the end of the last. The owners' next
    turns had ``n_prompt`` tokens; ``n_held`` of these were in a slot before the burst, and ``n_computed`` were
    computed.
    """

    makespan_s: float
    slots: tuple[int | None, ...]
    n_prompt: int
    n_held: int
    n_computed: int
    follow_up_s: float = 0.0
    first_s: float = 0.0

    @property
    def n_lost(self) -> int:
        """How many tokens were in a slot before the burst and were computed again."""
        return max(self.n_computed - (self.n_prompt - self.n_held), 0)


@dataclass(frozen=True, slots=True)
class Pair:
    through: Burst
    alone: Burst

    @property
    def ratio(self) -> float:
        return self.through.makespan_s / self.alone.makespan_s

    def __str__(self) -> str:
        a, b = self.through, self.alone
        return (
            f"{a.makespan_s:.2f} s through, {b.makespan_s:.2f} s alone: {self.ratio:.2f}; first tokens "
            f"{a.first_s:.2f}, {b.first_s:.2f}; follow-ups "
            f"{a.follow_up_s:.2f} s and {b.follow_up_s:.2f} s, of {a.n_held} tokens computed again "
            f"{a.n_lost} and {b.n_lost}; in slots {a.slots}"
        )


class Scene:
    """Four conversations, one in each slot, and the users that send the burst."""

    def __init__(
        self,
        stack: Stack,
        meter: Meter,
        owners: Sequence[tuple[User, Client]],
        senders: Sequence[Client],
        shape: Shape,
    ) -> None:
        self.stack, self.meter, self.owners, self.senders, self.shape = stack, meter, owners, senders, shape
        self.rng = random.Random(7)

    async def fill(self, n_question: int) -> None:
        """Each of the owners has a turn, at the same time, and is saved."""
        async with asyncio.TaskGroup() as group:
            for user, client in self.owners:
                user.n_question = n_question
                group.create_task(_turn(user, client))
        if self.shape.is_clean and not self.stack.alone:
            await quiet(self.stack, None)

    async def burst(self, *, is_last: bool) -> Burst:
        """Send a burst, then let the owners ask again. On llama-server alone that takes long, as it computes again what
        the burst has displaced, so there the owners ask only after the last burst (``is_last``).
        """
        shape, rng = self.shape, self.rng
        instruction = words(rng, shape.n_alike) if shape.n_alike else ""
        bodies = [
            {"messages": [{"role": "user", "content": instruction + words(rng, shape.n_own)}],
             "max_tokens": shape.n_answer, "temperature": 0, "stream": True}
            for _ in range(shape.n_requests)
        ]  # fmt: skip
        began = time.perf_counter()
        replies = await asyncio.gather(
            *(
                self.senders[n % len(self.senders)].ask("/v1/chat/completions", body)
                for n, body in enumerate(bodies)
            )
        )
        makespan_s = time.perf_counter() - began
        assert not any(reply.error for reply in replies), [reply.error for reply in replies]
        if self.stack.alone and not is_last:
            return Burst(makespan_s, (), 0, 0, 0, 0.0, statistics.mean(reply.ttft_s for reply in replies))
        before, began = await self.meter.total(), time.perf_counter()
        turns = [await _turn(user, client) for user, client in self.owners]
        follow_up_s = time.perf_counter() - began
        return Burst(
            makespan_s,
            tuple(reply.slot for reply in replies),
            sum(turn.n_prompt for turn in turns),
            sum(turn.n_unlimited for turn in turns),
            round(await self.meter.total() - before),
            follow_up_s,
            statistics.mean(reply.ttft_s for reply in replies),
        )


async def _turn(user: User, client: Client) -> Any:
    turn = await user.turn(client, max_tokens=8)
    assert not turn.reply.error, turn.reply.error
    return turn


@asynccontextmanager
async def scene(stack: Stack, shape: Shape, seed: int = 1) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as exits:

        async def client(name: str) -> Client:
            headers = {"x-llamaslot-user": name} if shape.n_users else None
            return await exits.enter_async_context(Client(stack.url, headers))

        owners = [
            (User(f"owner {n}", shape.n_context, random.Random(seed * 10 + n)), await client(f"owner{n}"))
            for n in range(N_SLOTS)
        ]
        senders = [await client(f"sender{n}") for n in range(max(shape.n_users, 1))]
        meter = Meter(stack.server.metrics)
        await meter.resume()
        yield Scene(stack, meter, owners, senders, shape)


async def compare(
    model: Path, directory: Path, shape: Shape, n_pairs: int, *, settings: Any = None, **server: Any
) -> list[Pair]:
    """``n_pairs`` bursts on each side, in turns, on the same two servers."""
    server = {"batch": 512, "ubatch": 512, "context": 16384} | server
    extra = server.pop("alone_extra", ())
    async with (
        Stack(model, directory / "through", settings=settings, **server) as stack,
        Stack(model, directory / "alone", alone=True, extra=extra, **server) as alone,
        scene(stack, shape) as ours,
        scene(alone, shape) as theirs,
    ):
        pairs = []
        for number in range(n_pairs + 1):
            bursts = {}
            for side in (ours, theirs) if number % 2 else (theirs, ours):
                if side is ours or number == 0:  # what a slot holds makes no difference to llama-server alone
                    await side.fill(600)
                bursts[side] = await side.burst(is_last=number == n_pairs)
            if number:  # in the first one rates are unknown
                pairs.append(Pair(bursts[ours], bursts[theirs]))
        return pairs


def ratio(pairs: Sequence[Pair]) -> float:
    """The median of the pairs' ratios."""
    return statistics.median(pair.ratio for pair in pairs)


ALIKE = Shape()
UNLIKE = replace(ALIKE, n_alike=0, n_own=300)
