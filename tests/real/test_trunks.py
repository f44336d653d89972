"""System prompts that many conversations begin with, on the real llama.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import models
from tests.support.figures import Figure
from tests.support.sharing import find_prewarmed, share_a_system_prompt
from tests.support.stack import Stack

pytestmark = pytest.mark.real


@pytest.mark.parametrize("kind", ["dense", "recurrent", "swa"])
async def test_a_new_conversation_reuses_a_system_prompt_that_another_one_computed(
    tmp_path: Path, figure: Figure, kind: str
) -> None:
    """Right away, when that one has gone further, and when it lives on disk only."""
    model = {"recurrent": models.recurrent, "swa": models.swa}.get(kind, models.dense)(tmp_path)
    async with Stack(model, tmp_path) as stack:
        openings = await share_a_system_prompt(stack, n_system=3000, n_turns=4)
    for opening in openings:
        figure(opening)
    assert min(opening.share for opening in openings) >= 0.98


@pytest.mark.parametrize("kind", ["dense", "recurrent"])
async def test_a_prewarmed_system_prompt_is_there_before_anybody_asks(
    tmp_path: Path, figure: Figure, kind: str
) -> None:
    """Computed once while nobody wants anything, found by the first conversation, not computed again after both have
    been restarted."""
    model = models.recurrent(tmp_path) if kind == "recurrent" else models.dense(tmp_path)
    async with Stack(model, tmp_path, settings={"store": {"idle_save_s": 0.2}}) as stack:
        openings = await find_prewarmed(stack, n_system=2000)
    for opening in openings:
        figure(opening)
    assert min(opening.share for opening in openings) >= 0.98
