"""Another model under the same path."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support import models
from tests.support.figures import Figure
from tests.support.jobs import exchange_model
from tests.support.real import RealServer
from tests.support.stack import Stack

pytestmark = [pytest.mark.soak, pytest.mark.real, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("seed", [2, 3])
async def test_an_exchanged_model_never_answers_from_the_old_ones_snapshots(
    tmp_path: Path, figure: Figure, seed: int
) -> None:
    """Every answer is that of the new model asked cold."""
    path = tmp_path / "model.gguf"
    shutil.copyfile(models.dense(tmp_path), path)
    other = models.dense(tmp_path, seed=seed)
    async with Stack(path, tmp_path) as stack, RealServer(other, tmp_path / "cold") as cold:
        result = await exchange_model(stack, path, other, cold, n_users=12, n_context=6500)
    figure(result)
    assert result.n_all == 24
    assert result.are_right
