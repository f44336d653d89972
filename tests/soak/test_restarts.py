"""Restarts and kills of llama-server, and restarts of llamaslot, between turns of a team."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import models
from tests.support.figures import Figure
from tests.support.jobs import kill_server, take_turns_over_restarts
from tests.support.stack import Stack

pytestmark = [pytest.mark.soak, pytest.mark.real, pytest.mark.timeout(3600)]


async def test_clean_restarts_lose_nothing(tmp_path: Path, figure: Figure) -> None:
    """llama-server, llamaslot and both restart between turns; the users come in another order after each."""
    async with Stack(models.dense(tmp_path), tmp_path) as stack:
        results = await take_turns_over_restarts(stack)
    for what, result in results.items():
        figure(f"{what}: {result}")
    for what, result in results.items():
        assert result.n_errors == 0, what
        assert result.ratio >= 0.98, what


async def test_a_clean_stop_saves_what_is_not_saved_yet(tmp_path: Path, figure: Figure) -> None:
    """llamaslot, then both, restart at once after the last answer."""
    async with Stack(models.dense(tmp_path), tmp_path) as stack:
        results = await take_turns_over_restarts(stack, whats=("llamaslot", "both"), quiet_s=0.0)
    for what, result in results.items():
        figure(f"{what}: {result}")
    for what, result in results.items():
        assert result.n_errors == 0, what
        assert result.ratio >= 0.98, what


async def test_contexts_survive_a_kill_of_llama_server_five_seconds_after_the_last_answer(
    tmp_path: Path, figure: Figure
) -> None:
    """Everything worth keeping is on disk by then."""
    async with Stack(models.dense(tmp_path), tmp_path) as stack:
        result = await kill_server(stack, quiet_s=5.0)
    figure(result)
    assert result.tally.n_errors == 0
    assert result.tally.ratio >= 0.95


@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
async def test_what_is_on_disk_survives_a_kill_of_llama_server_at_any_moment(
    tmp_path: Path, figure: Figure, seed: int
) -> None:
    """Killed while everybody is asking; requests that die with it are asked again."""
    async with Stack(models.dense(tmp_path), tmp_path) as stack:
        result = await kill_server(stack, is_asking=True, seed=seed)
    figure(result)
    assert result.tally.n_errors == 0
    assert result.of_disk >= 0.95
