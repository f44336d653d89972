"""Codex itself, the command-line agent: what it makes of comments and of errors in a stream. ``make soak`` has it."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.forked import die_with_parent
from tests.support.inprocess import Served, served, spawn

pytestmark = pytest.mark.soak

RESPONSES = "/v1/responses"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
CODEX = CACHE / "llamaslot" / "codex-0.171.0" / "node_modules" / ".bin" / "codex"
SOON: dict[str, Any] = {"stream": {"keepalive_s": 0.01}}
PATIENCE_S = 90.0

CONFIG = """
model = "any"
model_provider = "local"
[model_providers.local]
name = "local"
base_url = "{url}/v1"
wire_api = "responses"
"""


@dataclass(frozen=True, slots=True)
class ReportedCounts:
    """What Codex has told its user."""

    answers: list[str]
    errors: list[str]


async def ask(it: Served, home: Path) -> ReportedCounts:
    """One question, to its end. Its first prompt has some 40,000 letters."""
    (home / "here").mkdir(parents=True)
    (home / "config.toml").write_text(CONFIG.format(url=it.url))
    process = await asyncio.create_subprocess_exec(
        *(str(CODEX), "exec", "--skip-git-repo-check", "--json", "Say hello."),
        cwd=home / "here",
        env={"PATH": os.environ["PATH"], "HOME": str(home), "CODEX_HOME": str(home)},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        preexec_fn=die_with_parent,
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    told = [json.loads(line) for line in out.decode().splitlines() if line.startswith("{")]
    items = [event["item"] for event in told if event["type"] == "item.completed"]
    answers = [item["text"] for item in items if item["type"] == "agent_message"]
    return ReportedCounts(answers, [event["message"] for event in told if event["type"] == "error"])


@pytest.fixture(autouse=True)
def is_installed() -> None:
    if not CODEX.exists():
        pytest.skip("Codex is not installed: make soak does it")


def n_asked(it: Served) -> int:
    return len(it.fake.sent(RESPONSES))


async def test_comments_and_their_answer(tmp_path: Path) -> None:
    """It passes over comments, in the queue and before the answer."""
    async with served(tmp_path, SOON, slots=1, context=1 << 17) as it, it.busy():
        task = spawn(ask(it, tmp_path / "home"))
        await it.until(lambda: it.pool.dispatcher.n_waiting == 1, PATIENCE_S)
        it.fake.go()
        told = await task
    assert len(told.answers) == 1
    assert told.errors == []
    assert n_asked(it) == 1


@pytest.mark.parametrize(
    ("kind", "shown"),
    [("invalid_request_error", "no such luck"), ("exceed_context_size_error", "ran out of room")],
)
async def test_what_is_the_requests_own_fault_is_shown_and_not_asked_again(
    tmp_path: Path, kind: str, shown: str
) -> None:
    """A refusal that comes after the first comment."""
    async with served(tmp_path, SOON, slots=1, context=1 << 17) as it:
        hang = it.fake.faults.hang(RESPONSES)
        it.fake.faults.refuse(RESPONSES, "no such luck", kind)
        task = spawn(ask(it, tmp_path / "home"))
        await asyncio.wait_for(hang.reached.wait(), PATIENCE_S)
        await asyncio.sleep(0.2)  # many times keepalive_s
        hang.release()
        told = await task
    assert [error for error in told.errors if shown in error]
    assert not [error for error in told.errors if "Reconnecting" in error]
    assert n_asked(it) == 1


async def test_what_is_no_fault_of_the_request_is_asked_again_and_shown(tmp_path: Path) -> None:
    """An error of llama-server's in the middle of its answer: five times more, and then its message."""
    async with served(tmp_path, SOON, slots=1, context=1 << 17) as it:
        for _ in range(6):
            it.fake.faults.fail_stream("out of luck", after_tokens=2)
        told = await ask(it, tmp_path / "home")
    assert "out of luck" in told.errors[-1]
    assert "stream closed" not in " ".join(told.errors)
    assert n_asked(it) == 6
