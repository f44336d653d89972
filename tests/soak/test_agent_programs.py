"""Claude Code, Codex, opencode, Qwen Code, Cline, Continue and Aider themselves, non-interactive, through llamaslot on
the real llama.cpp.

``make agents`` installs them with npm and pip, and runs this; LLAMASLOT_AGENTS is where they are otherwise. They send 2
to 60 kB of system prompt and tools, one token each here.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.support import models
from tests.support.agent_programs import AGENTS, N_ANSWER, Agent
from tests.support.figures import Figure
from tests.support.stack import Stack

pytestmark = [pytest.mark.soak, pytest.mark.real, pytest.mark.timeout(1200)]

SERVER: dict[str, Any] = {
    "slots": 2,
    "context": 131072,
    "batch": 512,
    "ubatch": 512,
    "extra": ("-n", str(N_ANSWER)),
}
EVERY = pytest.mark.parametrize("agent", AGENTS, ids=[agent.name for agent in AGENTS])
LONG = [agent for agent in AGENTS if agent.n_least >= 8000]


@pytest.fixture(autouse=True)
def is_installed(agent: Agent) -> None:
    if not agent.path.exists():
        pytest.skip(f"{agent.name} is not installed: make agents does it")


async def conversations(stack: Stack, agent: Agent) -> list[dict[str, Any]]:
    """The completions so far, oldest first; titles and the like, which are short, are left out."""
    made = [
        its for its in (await stack.journal())["decisions"] if its["user"] and its["n_reused"] is not None
    ]
    return [its for its in reversed(made) if its["n_tokens"] > agent.n_least]


@EVERY
async def test_a_session_that_goes_on_is_found_again(tmp_path: Path, figure: Figure, agent: Agent) -> None:
    """A first question, and another one in the same session by a new process: its prompt is reused."""
    async with Stack(models.dense(tmp_path, layers=1), tmp_path, **SERVER) as stack:
        first = await agent.ask(tmp_path / "home", stack.url, "What is two plus two?")
        n_before = len(await conversations(stack, agent))
        computed = (await stack.server.metrics())["llamacpp:prompt_tokens_total"]
        second = await agent.ask(tmp_path / "home", stack.url, "And three plus three?", goes_on=True)
        computed = (await stack.server.metrics())["llamacpp:prompt_tokens_total"] - computed
        made = await conversations(stack, agent)
    assert made[:n_before], first
    assert made[n_before:], second
    follow_up = made[n_before]
    reuse = follow_up["n_reused"] / follow_up["n_tokens"]
    figure(
        f"first prompt {made[0]['n_tokens']}, follow-up {follow_up['n_tokens']} tokens, {reuse:.4f} reused; "
        f"{computed:.0f} computed for all that the second process asked; it ended with {second.status}"
    )
    assert reuse >= agent.reuse


@pytest.mark.parametrize("agent", LONG, ids=[agent.name for agent in LONG])
async def test_a_server_that_dies_during_a_long_wait(tmp_path: Path, figure: Figure, agent: Agent) -> None:
    """The agent hears of it in the middle of its stream of comments. It asks again by itself, or says what is wrong; it
    does not hang, and the restarted server gets its prompt."""
    settings = {"stream": {"keepalive_s": 0.5}}
    async with Stack(models.dense(tmp_path, layers=1), tmp_path, settings=settings, **SERVER) as stack:
        asking = asyncio.get_running_loop().create_task(
            agent.ask(tmp_path / "home", stack.url, "What is two plus two?")
        )
        while not any((slot.get("n_prompt_tokens") or 0) > 8000 for slot in await stack.server.slots()):
            assert not asking.done(), asking.result()
            await asyncio.sleep(1.6)
        await stack.server.kill()
        await asyncio.sleep(2.0)
        await stack.server.start()
        ended = await asking
        made = await conversations(stack, agent)
    figure(f"ended with {ended.status}, {len(made)} answers after the restart: {ended.text.strip()[-120:]!r}")
    assert made or ended.text.strip()


@pytest.mark.parametrize("agent", AGENTS[:1], ids=["Claude Code"])
@pytest.mark.parametrize("is_on", [True, False], ids=["as it comes", "switched off"])
async def test_a_new_conversation_finds_the_system_prompt(
    tmp_path: Path, figure: Figure, agent: Agent, is_on: bool
) -> None:
    """By llama-server's own counter; with the ready rule switched off it computes nearly all of it again."""
    settings: dict[str, Any] = {} if is_on else {"rewrite_off": ["claude-code-attribution"]}
    async with Stack(models.dense(tmp_path, layers=1), tmp_path, settings=settings, **SERVER) as stack:
        n_computed = []
        for text in ("What is two plus two?", "Name three colours."):
            before = (await stack.server.metrics())["llamacpp:prompt_tokens_total"]
            await agent.ask(tmp_path / "home", stack.url, text)
            n_computed.append((await stack.server.metrics())["llamacpp:prompt_tokens_total"] - before)
        decisions = [made for made in (await stack.journal())["decisions"] if made["n_reused"] is not None]
    figure(
        f"computed {n_computed[0]:.0f} tokens of the first conversation, {n_computed[1]:.0f} of the second"
    )
    assert all("claude-code-attribution" in made["rewrote"] for made in decisions) == is_on
    assert (n_computed[1] < 0.25 * n_computed[0]) == is_on
