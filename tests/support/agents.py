"""Agents: conversations that begin with the same long system prompt and tools, and turns whose reasoning the template
drops.

Reuse is computed from llama-server's own counter of computed prompt tokens. So the figures include what llamaslot
itself computes on the way.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

from tests.support.jobs import clients
from tests.support.stack import Stack
from tests.support.users import Client, Meter, User, common, symbols, words

Body = dict[str, Any]
Where = Literal["at once", "ten turns later", "on disk only", "ten turns later on disk only"]
WHERE: tuple[Where, ...] = ("at once", "ten turns later", "on disk only", "ten turns later on disk only")
N_ANSWER = 20


@dataclass(frozen=True, slots=True)
class Shared:
    """The tokens that a prompt has in common with earlier prompts, and how many of these were not computed again."""

    n_prompt: int
    n_shared: int
    n_computed: int

    @property
    def ratio(self) -> float:
        """The share of the common tokens that was not computed again. Negative if more tokens were computed than the
        prompt has, because llamaslot has computed something else for it too.
        """
        return (self.n_prompt - self.n_computed) / self.n_shared

    def __str__(self) -> str:
        n_reused = self.n_prompt - self.n_computed
        return f"{n_reused} of {self.n_shared} common tokens reused ({self.ratio:.4f})"


@dataclass(frozen=True, slots=True)
class Newcomers:
    """Conversations that begin as an earlier one did. ``first`` is the earlier one, of which nothing was reused."""

    first: Shared
    later: list[Shared]

    @property
    def ratio(self) -> float:
        """The ratio of the worst newcomer."""
        return min(shared.ratio for shared in self.later)

    def __str__(self) -> str:
        first = f"first of all {self.first.n_computed} computed of {self.first.n_prompt}"
        return f"{first}; then " + ", ".join(map(str, self.later))


class Agent:
    """Asks llama-server what a body becomes and what it costs."""

    def __init__(self, front: Client, server: Client, meter: Meter) -> None:
        self._front, self._server, self._meter = front, server, meter

    async def ask(self, body: Body, before: Sequence[Body] = ()) -> tuple[Shared, str]:
        """Ask. Returns what its prompt shares with the prompts of ``before``, what was computed, and the answer."""
        prompt = await self._prompt(body)
        others = [await self._prompt(other) for other in before]
        n_before = await self._meter.total()
        reply = await self._front.ask(
            "/v1/chat/completions", {**body, "max_tokens": N_ANSWER, "temperature": 0, "stream": True}
        )
        assert not reply.error, reply.error
        n_computed = await self._meter.total() - n_before
        n_shared = max((common(prompt, other) for other in others), default=0)
        return Shared(len(prompt), n_shared, round(n_computed)), reply.text

    async def _prompt(self, body: Body) -> str:
        return symbols((await self._server.post("/apply-template", body))["prompt"])


@asynccontextmanager
async def agent_on(stack: Stack) -> AsyncIterator[tuple[Agent, Client]]:
    """An agent, and the client with which others ask."""
    async with clients(stack) as (front, server):
        meter = Meter(stack.server.metrics)
        await meter.resume()
        yield Agent(front, server, meter), front


async def crowd(stack: Stack, client: Client, rng: random.Random, n_slots: int) -> None:
    """Other users take every slot at the same moment, so that what was in the slots is only on disk afterwards."""
    n_context = 2000
    others = [User(f"other {number}", n_context, rng) for number in range(n_slots)]
    turns = await asyncio.gather(*(other.turn(client) for other in others))
    assert not any(turn.reply.error for turn in turns), turns
    largest = max(slot.get("n_prompt_tokens") or 0 for slot in await stack.server.slots())
    assert largest < n_context + 200, "something else is still in a slot"


def with_tools(rng: random.Random, n_system: int, question: str) -> Body:
    """A first question to an agent whose system prompt and tools are about ``n_system`` tokens, drawn from ``rng``."""
    tool = {
        "type": "function",
        "function": {
            "name": "look",
            "description": words(rng, n_system // 4),
            "parameters": {"type": "object", "properties": {"what": {"type": "string"}}},
        },
    }
    system = words(rng, n_system - n_system // 4)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return {"messages": messages, "tools": [tool]}


async def join(
    stack: Stack,
    where: Where,
    *,
    n_slots: int,
    n_system: int = 10_000,
    n_question: int = 500,
    n_newcomers: int = 2,
    seed: int = 1,
) -> Newcomers:
    """New conversations of an agent, after one that has computed its system prompt and is now ``where``."""
    rng = random.Random(seed)
    async with agent_on(stack) as (agent, front):
        body = with_tools(random.Random(seed), n_system, words(rng, n_question))
        first, answer = await agent.ask(body)
        if "ten turns" in where:
            for _ in range(10):
                follow_up = [
                    {"role": "assistant", "content": answer},
                    {"role": "user", "content": words(rng, 200)},
                ]
                body = {**body, "messages": [*body["messages"], *follow_up]}
                _, answer = await agent.ask(body)
        if "on disk" in where:
            await crowd(stack, front, rng, n_slots)
        asked, later = [body], []
        for _ in range(n_newcomers):
            newcomer = with_tools(random.Random(seed), n_system, words(rng, n_question))
            shared, _ = await agent.ask(newcomer, asked)
            asked.append(newcomer)
            later.append(shared)
        return Newcomers(first, later)


async def think_and_go_on(
    stack: Stack,
    *,
    n_slots: int,
    is_evicted: bool = False,
    n_question: int = 3000,
    n_thoughts: int = 1500,
    seed: int = 1,
) -> Shared:
    """A tool round whose reasoning the template drops at the next question.

    The two prompts differ from behind the last user message on; llama-server's own checkpoint lies before that message.
    With a long question most of what the prompts have in common is that question. ``is_evicted``: other users have
    taken every slot in between.
    """
    rng = random.Random(seed)
    question = {"role": "user", "content": words(rng, n_question)}
    answer = {"role": "assistant", "content": "Let me see."}
    result = {"role": "tool", "tool_call_id": "c1", "content": words(rng, 200)}
    thinking = [question, {**answer, "reasoning_content": words(rng, n_thoughts)}, result]
    rest = [{"role": "assistant", "content": "So."}, {"role": "user", "content": "And now?"}]
    async with agent_on(stack) as (agent, front):
        await agent.ask({"messages": thinking})
        if is_evicted:
            await crowd(stack, front, rng, n_slots)
        shared, _ = await agent.ask({"messages": [question, answer, result, *rest]}, [{"messages": thinking}])
        return shared
