"""llamaslot killed at random moments."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import models
from tests.support.figures import Figure
from tests.support.killing import TELLS, kill_llamaslot
from tests.support.real import RealServer
from tests.support.stack import Stack

pytestmark = [pytest.mark.soak, pytest.mark.real, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("seed", [1, 2])
async def test_twenty_kills_with_a_quota_that_is_much_too_small(
    tmp_path: Path, figure: Figure, seed: int
) -> None:
    """It starts again each time, every snapshot can be restored, the quota holds at every moment."""
    model, quota_mib = models.dense(tmp_path), 6
    settings = TELLS | {"store": {"idle_save_s": 0.3}}
    async with (
        Stack(model, tmp_path, quota=f"{quota_mib}MiB", settings=settings) as stack,
        RealServer(model, stack.server.save_dir) as other,
    ):
        result = await kill_llamaslot(stack, other, quota_bytes=quota_mib << 20, seed=seed)
    figure(result)
    assert len(result.start_s) == 20
    assert result.faults == []
    assert result.n_restored > 20
    assert result.n_restored + result.n_gone == result.n_listed
    assert result.n_unlisted == 0
    assert result.n_saved > 20
    assert result.n_answers > 20
