"""Claude Code's attribution line on the real server: what it costs, where it is told, and that it stands still."""

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
SYSTEM, LATER, QUESTIONS = words(RNG, 3000), words(RNG, 300), [words(RNG, 500) for _ in range(3)]
TOOL = {"name": "Read", "description": "Reads a file", "input_schema": {"type": "object", "properties": {}}}
OFF: dict[str, Any] = {"rewrite_off": ["claude-code-attribution"]}

# As Claude Code writes it: the version ends otherwise in each conversation and subagent. Up to 2.1.119 and later there
# was a ``cch`` too, another one in each request; 2.1.197 has none.
LINES = {
    "2.1.37": "x-anthropic-billing-header: cc_version=2.1.37.{0:x}a{0}; cc_entrypoint=cli; cch={0}{1}0fe;",
    "2.1.197": "x-anthropic-billing-header: cc_version=2.1.197.{0:x}a{0}; cc_entrypoint=sdk-cli;",
    "subagent": "x-anthropic-billing-header: cc_version=2.1.197.{0:x}a{0}; cc_entrypoint=sdk-cli; cc_is_subagent=true;",
}


def body(n_conversation: int, n_turn: int, line: str = LINES["2.1.197"]) -> dict[str, Any]:
    """The shape that Claude Code sends: the system prompt in blocks, and a part of it behind the question."""
    blocks = [line.format(n_conversation * 7 + 1, n_turn), "You are a Claude agent.", SYSTEM]
    question = [
        {"type": "text", "text": "<system-reminder>\nToday's date is 2026-11-29.\n</system-reminder>"},
        {"type": "text", "text": QUESTIONS[n_conversation], "cache_control": {"type": "ephemeral"}},
    ]
    messages: list[Any] = [{"role": "user", "content": question}, {"role": "system", "content": LATER}]
    for _ in range(n_turn):
        messages += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Go on."}]
    return {
        "model": "any",
        "system": [{"type": "text", "text": text} for text in blocks],
        "messages": messages,
        "tools": [TOOL],
        "metadata": {"user_id": f'{{"session_id": "{n_conversation}"}}'},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "max_tokens": 4,
        "temperature": 0,
    }


async def asked(it: Front, sent: dict[str, Any]) -> tuple[int, int, Any]:
    """Tokens of the prompt and those that were reused, as llama-server counts them, and why not more."""
    answer = await it.post(MESSAGES, sent)
    assert answer.status == 200, answer.raw
    usage = answer.json["usage"]
    n_found = usage.get("cache_read_input_tokens", 0)
    await it.until(lambda: not any("diverges" in task.get_name() for task in asyncio.all_tasks()))
    decisions = (await it.get("/llamaslot/journal")).json["decisions"]
    made = next(made for made in decisions if made["id"] == answer.headers["x-request-id"])
    return n_found + usage["input_tokens"], n_found, made["diverged"]


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
async def test_the_attribution_line_stands_still_by_itself(tmp_path: Path, figure: Figure, line: str) -> None:
    """Nothing is configured: a second conversation computes its own words and no more, by llama-server's own counter;
    follow-up turns find all; and what is counted for a client is what is computed."""
    async with (
        RealServer(models.dense(tmp_path), tmp_path / "kv", slots=3) as server,
        fronted(tmp_path, server.url, tmp_path / "kv") as it,
    ):
        await asked(it, body(0, 0, line))
        before = await server.metrics()
        n_tokens, n_found, nothing = await asked(it, body(1, 0, line))
        after = await server.metrics()
        _, n_of_turn, _ = await asked(it, body(1, 1, line))
        counted = await it.post(MESSAGES + "/count_tokens", body(1, 0, line))
    n_computed = after["llamacpp:prompt_tokens_total"] - before["llamacpp:prompt_tokens_total"]
    assert n_computed <= len(QUESTIONS[1]) + len(LATER) + 100
    assert n_found > len(SYSTEM)
    assert nothing is None
    assert n_of_turn >= n_tokens - len("<|im_start|>assistant")
    assert counted.json["input_tokens"] == n_tokens
    assert counted.headers["x-llamaslot-rewrote"] == "claude-code-attribution"
    figure(f"computed of a second conversation: {n_computed:.0f} of {n_tokens} tokens")


async def test_the_attribution_line_as_it_is(tmp_path: Path, figure: Figure) -> None:
    """With one line in the configuration: a second conversation computes the system prompt again, and is told why."""
    settings = {"log": {"prompts": True}, **OFF}
    async with (
        RealServer(models.dense(tmp_path), tmp_path / "kv", slots=3) as server,
        fronted(tmp_path, server.url, tmp_path / "kv", settings) as it,
    ):
        await asked(it, body(0, 0))
        n_tokens, n_found, diverged = await asked(it, body(1, 0))
        counted = await it.post(MESSAGES + "/count_tokens", body(1, 0))
    assert n_found < 400 < len(SYSTEM)
    assert (diverged["why"], diverged["where"], diverged["message"]) == ("changed", "system", None)
    assert diverged["n_lost"] >= len(SYSTEM)
    assert diverged["text"]["before"].endswith("x-anthropic-billing-header: cc_version=2.1.197.")
    assert diverged["text"]["now"].startswith("8a8; ")
    assert diverged["text"]["earlier"].startswith("1a1; ")
    assert (counted.json["input_tokens"], counted.headers.get("x-llamaslot-rewrote")) == (n_tokens, None)
    figure(f"with the line as it is: {n_found} of {n_tokens} tokens reused")
