"""The page's numbers, held against llama-server's own counters."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.real.test_serve import serving
from tests.support.inprocess import CHAT, Front, letters
from tests.support.leftovers import nothing_left

__all__ = ["nothing_left"]
pytestmark = pytest.mark.real

COMPUTED = "llamacpp:prompt_tokens_total"


async def conversation(it: Front, user: int, n_turns: int, *, stream: bool) -> None:
    """A user's turns, each answered before the next, behind a system prompt that all share."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": letters(99, 600)}]
    for turn in range(n_turns):
        messages.append({"role": "user", "content": letters(100 * user + turn, 700)})
        body = {"messages": messages, "max_tokens": 12, "stream": stream}
        answer = await it.post(CHAT, body, **{"x-llamaslot-user": f"user{user}"})
        assert answer.status == 200
        messages.append({"role": "assistant", "content": letters(user, 12)})


@pytest.mark.parametrize("kind", ["dense", "swa"])
async def test_tokens_are_those_that_llama_server_counts(tmp_path: Path, kind: str) -> None:
    """Reused, computed and answered, within 1 %: of more users than slots, with saves, restores, prompts in pieces."""
    settings = {"prefill": {"chunk_threshold_s": 0.05}, "store": {"idle_save_s": 0.2}}
    async with serving(tmp_path, settings, kind=kind, slots=2, context=16384) as (it, real):
        before = await real.metrics()
        await asyncio.gather(*(conversation(it, user, 3, stream=user % 2 == 0) for user in range(4)))
        await it.at_rest()
        after = await real.metrics()
        ended = (await it.get("/llamaslot/activity?n=100")).json["ended"]
        assert len(ended) == 12
        n_computed = after[COMPUTED] - before[COMPUTED]
        assert sum(its["n_computed"] for its in ended) == pytest.approx(n_computed, rel=0.01)
        assert [its["n_answered"] for its in ended] == [12] * 12
        assert any(its["waited_s"] > 0 for its in ended)  # for the turns of others, in a slot
        n_reused = sum(its["n_prompt"] for its in ended) - n_computed
        assert sum(its["n_reused"] for its in ended) == pytest.approx(n_reused, rel=0.01)
        if kind == "dense":
            assert any(its["text"].startswith("restored") for its in ended)
        history = (await it.get("/llamaslot/history?span=hour")).json["lines"][0]["points"]
        assert sum(point["n_reused"] for point in history) == sum(its["n_reused"] for its in ended)
