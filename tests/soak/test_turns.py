"""What a request for which llama-server chooses the slot costs everybody else."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support import models
from tests.support.figures import Figure
from tests.support.stack import Stack
from tests.support.users import Client, words

pytestmark = [pytest.mark.soak, pytest.mark.real, pytest.mark.timeout(1800)]

N_USERS, N_TURNS, N_SLOTS = 3, 12, 4
N_CONTEXT, N_SIDE, N_ANSWER = 4000, 300, 24


@dataclass
class Seen:
    """First tokens of the follow-up turns, in seconds, and tokens of their prompts."""

    first_s: list[float] = field(default_factory=list)
    n_prompt: int = 0
    n_reused: int = 0
    n_beside: int = 0

    def __str__(self) -> str:
        return (
            f"first token {statistics.mean(self.first_s):.3f} s on average, {max(self.first_s):.3f} s at worst;"
            f" {self.n_reused / self.n_prompt:.4f} reused; {self.n_beside} beside them"
        )


def in_turn(text: str) -> tuple[str, dict[str, Any]]:
    """A body that is not recognized: llama-server leaves the document out, and nobody knows its tokens."""
    document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}}
    content = [document, {"type": "text", "text": text}]
    body = {"model": "any", "messages": [{"role": "user", "content": content}]}
    return "/v1/messages", {**body, "max_tokens": N_ANSWER}


def pinned(text: str) -> tuple[str, dict[str, Any]]:
    body = {"messages": [{"role": "user", "content": text}]}
    return "/v1/chat/completions", {**body, "max_tokens": N_ANSWER}


@contextlib.asynccontextmanager
async def beside(client: Client, make: Any, seen: Seen) -> AsyncIterator[None]:
    """One request after the other, each another conversation, with a pause in between."""
    rng, is_over = random.Random(9), asyncio.Event()

    async def ask() -> None:
        while not is_over.is_set():
            path, body = make(words(rng, N_SIDE))
            async with client.session.post(client.url + path, json=body) as answer:
                assert answer.status == 200, await answer.text()
                await answer.read()
            seen.n_beside += 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(is_over.wait(), 0.1)

    async with asyncio.TaskGroup() as group:
        if make is not None:
            group.create_task(ask())
        yield
        is_over.set()


async def follow_up(client: Client, n_user: int, seen: Seen) -> None:
    rng = random.Random(n_user)
    messages = [{"role": "user", "content": words(rng, N_CONTEXT)}]
    for turn in range(N_TURNS):
        body = {"messages": messages, "max_tokens": N_ANSWER, "temperature": 0, "stream": True}
        reply = await client.ask("/v1/chat/completions", body)
        assert not reply.error, reply.error
        if turn:
            seen.first_s.append(reply.ttft_s)
            seen.n_prompt, seen.n_reused = seen.n_prompt + reply.n_prompt, seen.n_reused + reply.n_reused
        messages += [
            {"role": "assistant", "content": reply.text},
            {"role": "user", "content": words(rng, 40)},
        ]


async def run(stack: Stack, make: Any) -> Seen:
    seen = Seen()
    async with Client(stack.url) as client, beside(client, make, seen), asyncio.TaskGroup() as group:
        for n_user in range(N_USERS):
            group.create_task(follow_up(client, n_user, seen))
    return seen


async def test_what_is_served_in_turn_costs_others_no_context(tmp_path: Path, figure: Figure) -> None:
    """Three users with 4,000 tokens on 4 slots, and one who asks 300 tokens again and again: recognized or not, the
    others find what they had. What they wait longer is a figure."""
    model = models.dense(tmp_path, layers=2, width=128)
    seen = {}
    for name, make in {"nobody": None, "recognized": pinned, "in turn": in_turn}.items():
        async with Stack(model, tmp_path / name.replace(" ", "-"), slots=N_SLOTS, context=8192) as stack:
            seen[name] = await run(stack, make)
        figure(f"beside {name}: {seen[name]}")
    assert seen["in turn"].n_beside > 0
    assert seen["in turn"].n_reused / seen["in turn"].n_prompt >= 0.97
