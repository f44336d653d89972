"""Agents: system prompts that many conversations share, and reasoning that the next turn drops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import models
from tests.support.agents import WHERE, Where, join, think_and_go_on
from tests.support.figures import Figure
from tests.support.stack import Stack

pytestmark = [pytest.mark.soak, pytest.mark.real, pytest.mark.timeout(3600)]

N_SLOTS = 3
PREFILLS_ITSELF: dict[str, Any] = {
    "prefill": {"chunk_threshold_s": 0.001}
}  # also what these models compute in no time


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", ["dense", "swa", "recurrent", "hybrid"])
async def test_a_new_conversation_finds_the_system_prompt_of_an_earlier_one(
    tmp_path: Path, figure: Figure, kind: str, where: Where
) -> None:
    """10,000 tokens of system prompt and tools: at least 0.98 of what is shared is computed only once."""
    async with Stack(model_of(kind, tmp_path), tmp_path, slots=N_SLOTS, settings=PREFILLS_ITSELF) as stack:
        result = await join(stack, where, n_slots=N_SLOTS)
    figure(result)
    assert result.first.n_computed <= result.first.n_prompt + 10, "no token is computed twice to get there"
    assert result.ratio >= 0.98


@pytest.mark.parametrize("is_evicted", [False, True])
@pytest.mark.parametrize("kind", ["swa", "recurrent", "hybrid"])
async def test_dropped_reasoning_costs_no_more_than_it_must(
    tmp_path: Path, figure: Figure, kind: str, is_evicted: bool
) -> None:
    """A question of 6,000 tokens, 3,000 of reasoning: 0.97 of what the next turn shares is reused, in the slot and when
    others have had it meanwhile."""
    async with Stack(model_of(kind, tmp_path), tmp_path, slots=N_SLOTS, settings=PREFILLS_ITSELF) as stack:
        result = await think_and_go_on(
            stack, n_slots=N_SLOTS, is_evicted=is_evicted, n_question=6000, n_thoughts=3000
        )
    figure(result)
    assert result.ratio >= 0.97


def model_of(kind: str, directory: Path) -> Path:
    return models.of_kind(kind, directory)
