"""Owners of contexts that are just being saved ask again at that very moment; and others ask for many slots at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import models
from tests.support.figures import Figure
from tests.support.jobs import ask_at_idle_save, ask_many, ask_while_saved
from tests.support.stack import Stack

pytestmark = [pytest.mark.soak, pytest.mark.real, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("width", [64, 256])
async def test_an_owner_asks_again_while_its_context_is_saved_for_a_newcomer(
    tmp_path: Path, figure: Figure, width: int
) -> None:
    """Nothing is computed a second time; the wider model's files are 16 times larger, so a save takes longer."""
    async with Stack(models.dense(tmp_path, layers=width // 32, width=width), tmp_path) as stack:
        result = await ask_while_saved(stack, n_context=6500 if width == 64 else 2500)
    figure(result)
    assert result.n_errors == 0
    assert result.ratio >= 0.999


async def test_owners_ask_again_when_the_idle_save_is_due(tmp_path: Path, figure: Figure) -> None:
    """A save while nobody waits never costs those who come just then."""
    async with Stack(models.dense(tmp_path), tmp_path, settings={"store": {"idle_save_s": 0.5}}) as stack:
        result = await ask_at_idle_save(stack, idle_save_s=0.5)
    figure(result)
    assert result.n_errors == 0
    assert result.ratio >= 0.999


async def test_requests_that_take_several_slots_cost_no_context(tmp_path: Path, figure: Figure) -> None:
    """n = 3 and a list of three prompts, between the turns of as many users as slots."""
    async with Stack(models.dense(tmp_path), tmp_path) as stack:
        result, n_answers = await ask_many(stack, n_rounds=6)
    figure(f"{result}; {n_answers} answers to others")
    assert n_answers == 36
    assert result.n_errors == 0
    assert result.ratio >= 0.99
