"""Claude Code's attribution line on the real server: what it costs, where it is told, and that a rule mends it."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from tests.support import models
from tests.support.figures import Figure
from tests.support.inprocess import Front, fronted
from tests.support.real import RealServer
from tests.support.users import words

pytestmark = pytest.mark.real

MESSAGES = "/v1/messages"
RNG = random.Random(6)
SYSTEM, QUESTIONS = words(RNG, 3000), [words(RNG, 500) for _ in range(2)]


def body(n_conversation: int, n_turn: int) -> dict[str, Any]:
    """As Claude Code sends it: the version ends otherwise in each conversation, ``cch`` in each request."""
    stamp = f"{n_conversation * 7 + 1:x}a{n_conversation}"
    line = f"x-anthropic-billing-header: cc_version=2.1.37.{stamp}; cc_entrypoint=cli; cch={n_conversation}{n_turn}0fe;"
    system = [{"type": "text", "text": text} for text in (line, SYSTEM)]
    messages: list[Any] = [{"role": "user", "content": QUESTIONS[n_conversation]}]
    for _ in range(n_turn):
        messages += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Go on."}]
    return {"model": "any", "system": system, "messages": messages, "max_tokens": 4, "temperature": 0}


async def asked(it: Front, n_conversation: int, n_turn: int) -> tuple[int, int, Any]:
    """Tokens of the prompt, those that llama-server has found itself, and why not more."""
    answer = await it.post(MESSAGES, body(n_conversation, n_turn))
    assert answer.status == 200, answer.raw
    usage = answer.json["usage"]
    n_found = usage.get("cache_read_input_tokens", 0)
    await it.until(lambda: not any("diverges" in task.get_name() for task in asyncio.all_tasks()))
    decisions = (await it.get("/llamaslot/journal")).json["decisions"]
    made = next(made for made in decisions if made["id"] == answer.headers["x-request-id"])
    return made["n_tokens"], n_found, made["diverged"]


async def test_the_attribution_line_stands_still(tmp_path: Path, figure: Figure) -> None:
    """Without the rule a second conversation computes the system prompt again, and it is told why; with it, it does
    not, and follow-up turns find all."""
    settings = {"log": {"prompts": True}}
    async with RealServer(models.dense(tmp_path), tmp_path / "kv", slots=3) as server:
        async with fronted(tmp_path, server.url, tmp_path / "kv", settings) as it:
            await asked(it, 0, 0)
            n_tokens, n_without, diverged = await asked(it, 1, 0)
        async with fronted(
            tmp_path, server.url, tmp_path / "kv", {"rewrite": ["claude-code-attribution"]}
        ) as it:
            await asked(it, 0, 0)
            _, n_with, nothing = await asked(it, 1, 0)
            turn = await asked(it, 1, 1)
    n_system = len(SYSTEM)
    assert n_without < 200 < n_system < n_with
    assert (diverged["why"], diverged["where"], diverged["message"]) == ("changed", "system", None)
    assert diverged["n_lost"] >= n_system
    assert diverged["text"]["before"] == "<|im_start|>system\nx-anthropic-billing-header: cc_version=2.1.37."
    assert diverged["text"]["now"].startswith("8a1; ")
    assert diverged["text"]["earlier"].startswith("1a0; ")
    assert nothing is None
    assert turn[1] / turn[0] > 0.97
    figure(f"reused of a second conversation: {n_without} of {n_tokens} tokens, with the rule {n_with}")
