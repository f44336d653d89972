"""What llamaslot is measured by on the real llama.cpp, small: the same runs as in ``tests/soak``, in seconds.

Tokens are counted here; how long it takes is measured there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import models
from tests.support.agents import think_and_go_on
from tests.support.figures import Figure
from tests.support.rival import compare_makespans
from tests.support.stack import Stack

pytestmark = pytest.mark.real

PREFILLS_ITSELF: dict[str, Any] = {
    "prefill": {"chunk_threshold_s": 0.001}
}  # also what these models compute in no time


async def test_follow_ups_find_what_a_ram_cache_would_hold(tmp_path: Path, figure: Figure) -> None:
    """Six users on a few slots, in the same workload as llama-server alone with --cache-ram."""
    model = models.dense(tmp_path, layers=2, width=128)
    [pair] = await compare_makespans(
        model, tmp_path, 1, n_users=6, n_context=1600, n_turns=3, at_a_time=3, seed=0
    )
    figure(pair)
    assert pair.through.tally.n_errors == pair.alone.tally.n_errors == 0
    assert pair.through.tally.ratio >= 0.98
    assert pair.alone.tally.ratio >= 0.98, "the rival has everything in its RAM"


@pytest.mark.parametrize("kind", ["recurrent", "swa"])
async def test_dropped_reasoning_costs_no_more_than_it_must(
    tmp_path: Path, figure: Figure, kind: str
) -> None:
    """A prefill of llamaslot's own stops at the end of the last user message, and the next turn goes on from there,
    also when others have had every slot meanwhile (in the slot itself: tests/real/test_costs.py)."""
    model = models.recurrent(tmp_path) if kind == "recurrent" else models.swa(tmp_path)
    async with Stack(model, tmp_path, slots=2, settings=PREFILLS_ITSELF) as stack:
        result = await think_and_go_on(stack, n_slots=2, is_evicted=True)
    figure(result)
    assert result.ratio >= 0.97
