"""/v1/messages and /v1/responses: what agents speak is recognized token by token, and lands where it was prepared."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support import models
from tests.support.figures import Figure
from tests.support.stack import Stack
from tests.support.users import Meter, words

pytestmark = pytest.mark.real

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
# The first comment of a stream that waits takes its headers along, before the slot is known.
UNCOMMENTED = {"stream": {"keepalive_s": 3600}}
N_USERS, N_TURNS, N_CONTEXT, N_QUESTION, N_ANSWER = 6, 3, 1600, 60, 12


@dataclass(slots=True)
class Reply:
    text: str
    n_prompt: int
    n_reused: int  # as the answer's usage tells
    slot: int


@dataclass(slots=True)
class Agent:
    """One conversation on one of the two routes."""

    path: str
    rng: random.Random
    turns: list[dict[str, Any]] = field(default_factory=list)
    n_last: int = 0  # tokens of its last prompt

    def body(self, stream: bool) -> dict[str, Any]:
        body: dict[str, Any] = {"model": "any", "stream": stream, "temperature": 0}
        if self.path == MESSAGES:
            system = [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}]
            return {**body, "system": system, "messages": self.turns, "max_tokens": N_ANSWER}
        return {**body, "instructions": "be brief", "input": self.turns, "max_output_tokens": N_ANSWER}

    async def ask(self, url: str, *, stream: bool) -> Reply:
        self.turns.append(
            {"role": "user", "content": words(self.rng, N_QUESTION if self.turns else N_CONTEXT)}
        )
        async with (
            aiohttp.ClientSession() as session,
            session.post(url + self.path, json=self.body(stream)) as response,
        ):
            text = await response.text()
            assert response.status == 200, text
            slot = int(response.headers["x-llamaslot-slot"])
        reply = told(text, slot) if stream else whole(json.loads(text), slot)
        answer: dict[str, Any] = {"role": "assistant", "content": reply.text}
        if self.path == RESPONSES:
            answer = {**answer, "type": "message", "content": [{"type": "output_text", "text": reply.text}]}
        self.turns.append(answer)
        return reply


def whole(answer: dict[str, Any], slot: int) -> Reply:
    content = answer["content"] if "content" in answer else answer["output"][0]["content"]
    return Reply(content[0]["text"], *counts(answer["usage"]), slot)


def counts(usage: dict[str, Any]) -> tuple[int, int]:
    """Tokens of the prompt and those that were reused."""
    if "cache_read_input_tokens" in usage:
        return usage["input_tokens"] + usage["cache_read_input_tokens"], usage["cache_read_input_tokens"]
    return usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]


def told(text: str, slot: int) -> Reply:
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    assert not any("prompt_progress" in event for event in events), "nobody has asked for progress"
    if events[-1]["type"] == "response.completed":
        return whole(events[-1]["response"], slot)
    assert events[0]["type"] == "message_start"
    pieces = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    return Reply("".join(pieces), *counts(events[0]["message"]["usage"]), slot)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (MESSAGES, "dense"),
        (MESSAGES, "swa"),
        (MESSAGES, "recurrent"),
        (RESPONSES, "dense"),
        pytest.param(RESPONSES, "swa", marks=pytest.mark.soak),
        pytest.param(RESPONSES, "recurrent", marks=pytest.mark.soak),
    ],
)
async def test_follow_ups_find_their_context(tmp_path: Path, figure: Figure, path: str, kind: str) -> None:
    """Six agents, 4 slots, streaming or not: what a follow-up shares with the turn before is hardly computed again."""
    rng = random.Random(1)
    settings = {"prefill": {"chunk_threshold_s": 0.2}, **UNCOMMENTED}
    async with Stack(
        getattr(models, kind)(tmp_path), tmp_path, batch=512, ubatch=512, settings=settings
    ) as stack:
        meter = Meter(stack.server.metrics)
        await meter.resume()
        agents = [Agent(path, rng) for _ in range(N_USERS)]
        gate = asyncio.Semaphore(4)
        n_known = n_prompt = n_told = 0

        async def turn(number: int, agent: Agent, n_round: int) -> None:
            nonlocal n_known, n_prompt, n_told
            async with gate:
                reply = await agent.ask(stack.url, stream=(number + n_round) % 2 == 0)
            if n_round:
                n_known, n_prompt, n_told = (
                    n_known + agent.n_last,
                    n_prompt + reply.n_prompt,
                    n_told + reply.n_reused,
                )
            agent.n_last = reply.n_prompt

        await asyncio.gather(*(turn(number, agent, 0) for number, agent in enumerate(agents)))
        before = await meter.total()
        for n_round in range(1, N_TURNS):
            rng.shuffle(agents)
            await asyncio.gather(*(turn(number, agent, n_round) for number, agent in enumerate(agents)))
        n_reused = n_prompt - (await meter.total() - before)
    figure(f"{n_reused:.0f} of {n_known} tokens reused ({n_reused / n_known:.4f}), told {n_told}")
    assert n_reused >= 0.97 * n_known
    assert abs(n_told - n_reused) <= 0.01 * n_known, "the client reads what its whole request cost"


async def test_a_message_lands_in_the_slot_that_was_prepared(tmp_path: Path) -> None:
    """llama-server chooses, and chooses just that one: beside others in all slots, however short it is."""
    rng = random.Random(2)
    async with Stack(models.dense(tmp_path), tmp_path, settings=UNCOMMENTED) as stack:
        agents = [Agent(MESSAGES, rng) for _ in range(6)]
        for agent in (*agents, *reversed(agents)):
            reply = await agent.ask(stack.url, stream=True)
            slots = {slot["id"]: slot.get("n_prompt_tokens") for slot in await stack.server.slots()}
            assert slots[reply.slot] == reply.n_prompt + N_ANSWER - 1
