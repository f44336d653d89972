"""Conversations that begin with the same system prompt, as agents' do, and how much of it is computed again."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Any

from tests.support.jobs import clients, restart
from tests.support.stack import Stack
from tests.support.users import Client, Meter, common, rendered, symbols, words


@dataclass(frozen=True, slots=True)
class Opening:
    """The first turn of a conversation: the tokens of its prompt, how many of them other conversations have computed
    before, and how many llama-server has computed for it, by its own counter.
    """

    when: str
    n_prompt: int
    n_shared: int
    n_computed: float

    @property
    def share(self) -> float:
        """The share of the tokens computed before that was not computed again."""
        return (self.n_prompt - self.n_computed) / self.n_shared

    def __str__(self) -> str:
        return f"{self.when}: {self.share:.4f} of {self.n_shared} shared tokens reused"


class Agent:
    """Conversations with one system prompt; each question is its own."""

    def __init__(self, client: Client, meter: Meter, *, n_system: int, seed: int = 1) -> None:
        self.client, self.meter, self.rng = client, meter, random.Random(seed)
        self.system = {"role": "system", "content": words(self.rng, n_system)}
        self.n_shared = common(*(symbols(rendered([self.system, question])) for question in (_A, _B)))

    def begin(self, n_question: int = 200) -> list[dict[str, str]]:
        return [self.system, {"role": "user", "content": words(self.rng, n_question)}]

    async def turn(self, messages: list[dict[str, str]], n_question: int = 80) -> int:
        """Ask, and append the answer and the next question to the conversation. Returns the tokens of the prompt."""
        body: dict[str, Any] = {
            "messages": list(messages),
            "max_tokens": 20,
            "temperature": 0,
            "stream": True,
        }
        n_prompt = len(symbols(rendered(messages)))
        reply = await self.client.ask("/v1/chat/completions", body)
        assert not reply.error, reply.error
        assert reply.n_prompt == n_prompt, "the model renders and counts as this module does"
        messages.append({"role": "assistant", "content": reply.text})
        messages.append({"role": "user", "content": words(self.rng, n_question)})
        return n_prompt

    async def open(self, when: str) -> Opening:
        """A new conversation."""
        before = await self.meter.total()
        n_prompt = await self.turn(self.begin())
        return Opening(when, n_prompt, self.n_shared, await self.meter.total() - before)


_A, _B = {"role": "user", "content": "a"}, {"role": "user", "content": "b"}


async def share_a_system_prompt(stack: Stack, *, n_system: int, n_turns: int = 10) -> list[Opening]:
    """New conversations: right after the first one has begun, when that has gone further, and after a restart of
    llama-server, when all contexts are only on disk.
    """
    async with clients(stack) as (front, _):
        meter = Meter(stack.server.metrics)
        await meter.resume()
        agent = Agent(front, meter, n_system=n_system)
        first = agent.begin()
        await agent.turn(first)
        openings = [await agent.open("right away")]
        for _ in range(n_turns - 1):
            await agent.turn(first)
        openings.append(await agent.open(f"{n_turns} turns later"))
        await restart(stack, "llama-server", meter)
        while stack.llamaslot.log.count(" slots of ") < 2:  # noqa: ASYNC110 - its probes are computed when it is met
            await asyncio.sleep(0.05)
        openings.append(await agent.open("from the disk alone"))
        return openings


async def find_prewarmed(stack: Stack, *, n_system: int) -> list[Opening]:
    """New conversations that begin with what ``prewarm`` names: the first of all, and one after llama-server and
    llamaslot have been restarted.
    """
    async with clients(stack) as (front, _):
        meter = Meter(stack.server.metrics)
        await meter.resume()
        agent = Agent(front, meter, n_system=n_system)
        stack.llamaslot.prewarm({"messages": [agent.system]})
        openings = []
        for n, when in enumerate(("the first", "after a restart"), 1):
            await restart(stack, "both", meter)
            before = await meter.total()
            while stack.llamaslot.log.count("is saved as snapshot") < n:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            n_computed = await meter.total() - before
            assert n == 1 or n_computed < 200, f"{n_computed} tokens were computed again"
            openings.append(await agent.open(when))
        return openings
