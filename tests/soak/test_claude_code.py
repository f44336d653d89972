"""Claude Code itself in front of llamaslot and the real llama.cpp, nothing configured for it.

``npm install --prefix DIR @anthropic-ai/claude-code``, and its ``DIR/node_modules/.bin`` in PATH; skipped without. It
talks to nobody but llamaslot: its base URL is there, and all else that it would ask is off.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support import models
from tests.support.figures import Figure
from tests.support.stack import Stack

CLAUDE = shutil.which("claude")
pytestmark = [
    pytest.mark.soak,
    pytest.mark.real,
    pytest.mark.timeout(600),
    pytest.mark.skipif(CLAUDE is None, reason="Claude Code is not installed"),
]


async def converse(stack: Stack, home: Path, text: str) -> None:
    """A conversation of one turn; the directory and the user are the same each time."""
    assert CLAUDE is not None
    (home / "project").mkdir(parents=True, exist_ok=True)
    environment = {
        "HOME": str(home),
        "PATH": os.environ["PATH"],
        "ANTHROPIC_BASE_URL": stack.url,
        "ANTHROPIC_AUTH_TOKEN": "anything",
        "ANTHROPIC_MODEL": "local",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": "local",
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "8",  # this model ends no answer by itself
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        "DISABLE_TELEMETRY": "1",
    }
    process = await asyncio.create_subprocess_exec(
        *(CLAUDE, "--tools", "Read,Agent", "-p", text),
        cwd=home / "project",
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        await asyncio.wait_for(process.communicate(), 120)  # it may complain of an answer that was cut
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("is_on", [True, False], ids=["as it comes", "switched off"])
async def test_a_new_conversation_finds_the_system_prompt(
    tmp_path: Path, figure: Figure, is_on: bool
) -> None:
    """By llama-server's own counter; with the ready rule switched off it computes nearly all of it again."""
    settings: dict[str, Any] = {} if is_on else {"rewrite_off": ["claude-code-attribution"]}
    model = models.dense(tmp_path)
    server: dict[str, Any] = {"slots": 2, "context": 65536}
    async with Stack(model, tmp_path, settings=settings, **server) as stack:
        n_computed = []
        for text in ("What is two plus two?", "Name three colours."):
            before = (await stack.server.metrics())["llamacpp:prompt_tokens_total"]
            await converse(stack, tmp_path / "home", text)
            n_computed.append((await stack.server.metrics())["llamacpp:prompt_tokens_total"] - before)
        decisions = [made for made in (await stack.journal())["decisions"] if made["n_reused"] is not None]
    figure(
        f"computed {n_computed[0]:.0f} tokens of the first conversation, {n_computed[1]:.0f} of the second"
    )
    assert all("claude-code-attribution" in made["rewrote"] for made in decisions) == is_on
    assert (n_computed[1] < 0.25 * n_computed[0]) == is_on
