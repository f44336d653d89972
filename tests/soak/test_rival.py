"""llamaslot against llama-server alone with a RAM cache that holds everything."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import models
from tests.support.figures import Figure
from tests.support.rival import compare_makespans, median_ratio, median_undisturbed

pytestmark = [pytest.mark.soak, pytest.mark.real, pytest.mark.timeout(3600)]

N_PAIRS = 9


async def test_a_ram_cache_that_holds_everything_is_hardly_faster(tmp_path: Path, figure: Figure) -> None:
    """12 users of 6,500 tokens on 4 slots, from the first question to the last answer: at most 1.05 times as long.

    Needs a machine with nothing else to do; the second figure leaves out the time in which others had the CPU.
    """
    pairs = await compare_makespans(models.dense(tmp_path, layers=2, width=128), tmp_path, N_PAIRS)
    for pair in pairs:
        figure(pair)
    undisturbed = median_undisturbed(pairs)
    figure(f"median of {len(pairs)}: {median_ratio(pairs):.3f}, without waiting for a CPU {undisturbed:.3f}")
    for pair in pairs:
        assert pair.through.tally.n_errors == pair.alone.tally.n_errors == 0
        assert pair.through.tally.ratio >= 0.995
        assert pair.alone.tally.ratio >= 0.98, "the rival has everything in its RAM"
    assert median_ratio(pairs) <= 1.05
