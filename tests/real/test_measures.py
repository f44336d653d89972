"""What llamaslot is measured by on the real llama.cpp, small: the same runs as in ``tests/soak``, in seconds.

The clocks here stand still while llama-server waits for a CPU; what other processes still add is met by trying again:
a rule that is broken is broken in every pair.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import models
from tests.support.agents import think_and_go_on
from tests.support.bystander import compare_gaps
from tests.support.figures import Figure
from tests.support.rival import compare_makespans
from tests.support.stack import Stack

pytestmark = pytest.mark.real

N_TRIES = 3
PREFILLS_ITSELF: dict[str, Any] = {
    "prefill": {"own_above_s": 0.001}
}  # also what these models compute in no time


async def test_a_ram_cache_that_holds_everything_is_hardly_faster(tmp_path: Path, figure: Figure) -> None:
    """The workload through llamaslot takes about as long as on llama-server alone with --cache-ram."""
    model = models.dense(tmp_path, layers=2, width=128)
    for seed in range(N_TRIES):
        [pair] = await compare_makespans(
            model, tmp_path / str(seed), 1, n_users=6, n_context=2500, n_turns=3, at_a_time=3, seed=seed
        )
        figure(pair)
        assert pair.through.tally.n_errors == pair.alone.tally.n_errors == 0
        assert pair.through.tally.ratio >= 0.98
        assert pair.alone.tally.ratio >= 0.98, "the rival has everything in its RAM"
        if pair.undisturbed_ratio <= 1.15:
            return
    pytest.fail(f"slower in each of {N_TRIES} pairs")


async def test_evictions_stop_the_stream_of_a_bystander_for_one_transfer_at_most(
    tmp_path: Path, figure: Figure
) -> None:
    """The longest gap between its tokens is that of a server with a slot for everybody, and one save or restore."""
    model = models.dense(tmp_path, layers=2, width=128)
    for seed in range(N_TRIES):
        [pair] = await compare_gaps(
            model,
            tmp_path / str(seed),
            1,
            slots=3,
            n_users=5,
            n_context=2500,
            n_turns=2,
            at_a_time=2,
            seed=seed,
        )
        figure(pair)
        assert pair.tight.n_errors == pair.roomy.n_errors == 0
        assert pair.tight.n_restores >= 5
        assert pair.roomy.n_restores == 0
        if pair.excess_s <= 0:
            return
    pytest.fail(f"longer in each of {N_TRIES} pairs")


@pytest.mark.parametrize("is_evicted", [False, True])
@pytest.mark.parametrize("kind", ["recurrent", "swa"])
async def test_dropped_reasoning_costs_no_more_than_it_must(
    tmp_path: Path, figure: Figure, kind: str, is_evicted: bool
) -> None:
    """A prefill of llamaslot's own stops at the end of the last user message, and the next turn goes on from there."""
    model = models.recurrent(tmp_path) if kind == "recurrent" else models.swa(tmp_path)
    async with Stack(model, tmp_path, slots=2, settings=PREFILLS_ITSELF) as stack:
        result = await think_and_go_on(stack, n_slots=2, is_evicted=is_evicted)
    figure(result)
    assert result.ratio >= 0.97
