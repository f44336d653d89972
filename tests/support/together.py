"""Prompts that come at the same moment and have a prefix in common, as black-box runs: what is computed and
answered.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tests.support.jobs import clients
from tests.support.real import RealServer
from tests.support.rounding import Answers, answers_of
from tests.support.stack import Stack
from tests.support.users import (
    Client,
    Meter,
    Reply,
    User,
    common,
    rendered,
    symbols,
    talking,
    words,
)

Place = Literal["system", "user", "completions"]
PLACES: tuple[Place, ...] = ("system", "user", "completions")


@dataclass(frozen=True, slots=True)
class Together:
    """New conversations that begin at the same moment with the same tokens."""

    n_prompt: int
    n_distinct: int  # of these, when what they have in common counts once
    n_computed: int
    ttft_s: tuple[float, ...]

    @property
    def mean_s(self) -> float:
        return statistics.mean(self.ttft_s)

    @property
    def share(self) -> float:
        """Computed tokens divided by distinct ones: 1 if nothing is computed twice."""
        return self.n_computed / self.n_distinct

    def __str__(self) -> str:
        return (
            f"{self.n_computed} computed of {self.n_prompt} tokens, {self.n_distinct} of them distinct "
            f"({self.share:.3f}), first tokens after {self.mean_s:.2f} s (mean), {max(self.ttft_s):.2f} s (last)"
        )


def beginning(place: Place, common_part: str, own: str) -> tuple[str, dict[str, Any], str]:
    """Route, body and prompt of a new conversation. The prompt is in symbols, one for each token."""
    options = {"max_tokens": 8, "temperature": 0, "stream": True}
    if place == "completions":
        return "/v1/completions", {"prompt": common_part + own, **options}, common_part + own
    messages = [{"role": "user", "content": own if place == "system" else common_part + own}]
    if place == "system":
        messages.insert(0, {"role": "system", "content": common_part})
    return "/v1/chat/completions", {"messages": messages, **options}, symbols(rendered(messages))


async def begin_together(
    stack: Stack, place: Place, *, n_new: int = 4, n_common: int = 12_000, n_own: int = 500, seed: int = 1
) -> Together:
    """``n_new`` conversations at once, with ``n_common`` tokens in common and ``n_own`` of their own. ``place``: where
    the common tokens are: in the system message, at the beginning of the first user message, or of a plain prompt.
    """
    rng = random.Random(seed)
    common_part = words(rng, n_common)
    requests = [beginning(place, common_part, words(rng, n_own)) for _ in range(n_new)]
    async with clients(stack) as (front, _):
        meter = Meter(stack.server.metrics)
        await meter.resume()
        replies = await asyncio.gather(*(front.ask(path, body) for path, body, _ in requests))
        n_computed = round(await meter.total())
    for (_, _, prompt), reply in zip(requests, replies, strict=True):
        assert not reply.error, reply.error
        assert reply.n_prompt == len(prompt), "the model renders and counts as this module does"
    prompts = [prompt for _, _, prompt in requests]
    return Together(
        sum(map(len, prompts)), distinct(prompts), n_computed, tuple(reply.ttft_s for reply in replies)
    )


def distinct(prompts: Sequence[str]) -> int:
    """The number of tokens of all prompts, those of a common prefix counted once: the nodes of their trie."""
    ordered = sorted(prompts)
    before = ["", *ordered[:-1]]
    return sum(len(prompt) - common(prompt, other) for prompt, other in zip(ordered, before, strict=True))


async def answer_beside_others(
    stack: Stack,
    reference: RealServer,
    *,
    sizes: Sequence[int] = (6000, 300, 3000, 300, 1500, 6000),
    n_rounds: int = 2,
    n_answer: int = 40,
    seed: int = 1,
) -> Answers:
    """A conversation of each size; all ask at the same moment, every other one for a stream, beside another client that
    streams all the time. ``reference`` has the same model: it gets each prompt afterwards, one after another.
    """
    rng = random.Random(seed)
    users = [User(f"user {number}", size, rng) for number, size in enumerate(sizes)]
    bodies: list[dict[str, Any]] = []
    replies: list[Reply] = []
    async with clients(stack) as (front, _), talking(front, random.Random(seed + 1)):
        for _ in range(n_rounds):
            bodies += [user.body(max_tokens=n_answer, stream=False, cache_prompt=False) for user in users]
            turns = await asyncio.gather(
                *(
                    user.turn(front, max_tokens=n_answer, stream=number % 2 == 0)
                    for number, user in enumerate(users)
                )
            )
            replies += [turn.reply for turn in turns]
    async with Client(reference.url) as idle:
        return await answers_of(zip(bodies, replies, strict=True), idle)
