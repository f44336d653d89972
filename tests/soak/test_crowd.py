"""More agents than slots that begin at the same moment, against llama-server alone with a RAM cache."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from tests.support import crowd, models
from tests.support.figures import Figure

pytestmark = [pytest.mark.soak, pytest.mark.real, pytest.mark.timeout(3600)]

N_PAIRS = 5


async def test_six_agents_that_begin_at_once_take_little_longer(tmp_path: Path, figure: Figure) -> None:
    """8,000 tokens each, four turns: the whole run takes at most 1.1 times as long. Needs a machine with nothing else
    to do."""
    pairs = await crowd.compare(models.dense(tmp_path), tmp_path, N_PAIRS)
    for through, alone in pairs:
        figure(f"through: {through}")
        figure(f"alone: {alone}")
    ratio = statistics.median(through.makespan_s / alone.makespan_s for through, alone in pairs)
    figure(f"whole runs, median of {len(pairs)}: {ratio:.2f}")
    assert ratio <= 1.1
