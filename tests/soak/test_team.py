"""A team of more users than slots."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import models
from tests.support.figures import Figure
from tests.support.jobs import take_turns
from tests.support.stack import Stack

pytestmark = [pytest.mark.soak, pytest.mark.real, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_twelve_users_on_four_slots_find_their_contexts_again(
    tmp_path: Path, figure: Figure, seed: int
) -> None:
    """Of what an unlimited cache would reuse on follow-up turns 0.99 is reused, and nothing fails."""
    async with Stack(models.dense(tmp_path), tmp_path) as stack:
        result = await take_turns(stack, seed=seed)
    figure(result)
    assert result.n_errors == 0
    assert result.ratio >= 0.995


async def test_so_they_do_with_a_draft_model(tmp_path: Path, figure: Figure) -> None:
    """The draft model's context is not saved; restores go on all the same."""
    async with Stack(models.dense(tmp_path), tmp_path, draft=models.draft(tmp_path)) as stack:
        result = await take_turns(stack)
    figure(result)
    assert result.n_errors == 0
    assert result.ratio >= 0.98


@pytest.mark.parametrize("kind", ["swa", "recurrent", "hybrid"])
async def test_so_they_do_with_models_that_cannot_go_back(tmp_path: Path, figure: Figure, kind: str) -> None:
    """On models that go on only from a checkpoint a follow-up turn parts from its context near its end."""
    model = models.of_kind(kind, tmp_path)
    async with Stack(model, tmp_path) as stack:
        result = await take_turns(stack)
    figure(result)
    assert result.n_errors == 0
    assert result.ratio >= 0.97


async def test_llama_server_alone_finds_a_third_at_most(tmp_path: Path, figure: Figure) -> None:
    """The same team without llamaslot: the measure can tell the difference."""
    async with Stack(models.dense(tmp_path), tmp_path, alone=True) as stack:
        result = await take_turns(stack)
    figure(result)
    assert result.n_errors == 0
    assert result.ratio < 0.5
