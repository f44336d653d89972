"""In front of servers as people start them: never worse than without llamaslot."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import models
from tests.support.figures import Figure
from tests.support.harm import KINDS, Flags, compare
from tests.support.rival import median_ratio, median_undisturbed

pytestmark = [pytest.mark.soak, pytest.mark.real, pytest.mark.timeout(3600)]

N_PAIRS = 7  # single ones differ by 8 % where nothing else runs
SIZES = {"n_users": 8, "n_context": 4000, "n_turns": 3, "at_a_time": 4, "seed": 1}


@pytest.mark.parametrize("kind", ["dense", "swa"])
@pytest.mark.parametrize("flags", KINDS, ids=lambda flags: flags.name)
async def test_users_are_served_as_without(tmp_path: Path, figure: Figure, flags: Flags, kind: str) -> None:
    """8 users on 4 slots, 3 turns of some 4,000 tokens: all is reused that is reused directly, as fast."""
    model = models.dense(tmp_path) if kind == "dense" else models.swa(tmp_path)
    pairs = await compare(model, tmp_path, flags, N_PAIRS, **SIZES)
    ratios = median_ratio(pairs), median_undisturbed(pairs)
    figure(
        f"{flags.name}, {kind}: reused {min(pair.through.tally.ratio for pair in pairs):.4f} through, "
        f"{min(pair.alone.tally.ratio for pair in pairs):.4f} directly; makespan {ratios[0]:.3f} of direct, "
        f"{ratios[1]:.3f} without waiting for a CPU (medians of {N_PAIRS} pairs)"
    )
    for pair in pairs:
        assert pair.through.tally.n_errors == pair.alone.tally.n_errors == 0
        assert pair.through.tally.ratio >= min(0.98, pair.alone.tally.ratio - 0.01)
    assert ratios[1] <= 1.05
