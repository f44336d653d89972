"""llamaslot against llama-server alone with a RAM cache that holds everything."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from tests.support import models
from tests.support.agents import think_and_go_on
from tests.support.figures import Figure
from tests.support.jobs import take_turns, take_turns_over_restarts
from tests.support.rival import (
    RAM_CACHE,
    compare_makespans,
    median_ratio,
    median_undisturbed,
    take_turns_alone,
)
from tests.support.stack import Stack

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


async def test_a_ram_cache_is_lost_with_its_process(tmp_path: Path, figure: Figure) -> None:
    """What llamaslot finds again after a restart of llama-server is what the rival computes again."""
    async with Stack(models.dense(tmp_path), tmp_path, alone=True, extra=RAM_CACHE) as stack:
        results = await take_turns_over_restarts(stack, whats=("llama-server",))
    figure(results["llama-server"])
    assert results["llama-server"].ratio < 0.05


@pytest.mark.parametrize("kind", ["swa", "recurrent", "hybrid"])
async def test_a_ram_cache_does_not_find_what_dropped_reasoning_leaves(
    tmp_path: Path, figure: Figure, kind: str
) -> None:
    """llama-server's own checkpoint lies in front of the last question."""
    model = models.of_kind(kind, tmp_path)
    async with Stack(model, tmp_path, alone=True, slots=3, extra=RAM_CACHE) as stack:
        result = await think_and_go_on(stack, n_slots=3, n_question=6000, n_thoughts=3000)
    figure(result)
    assert result.ratio < 0.5


@pytest.mark.parametrize("mib", [12, 24])
async def test_too_little_room_is_used_about_as_well(tmp_path: Path, figure: Figure, mib: int) -> None:
    """12 contexts of 3.4 MiB, on disk or in RAM; RAM holds only those that are in no slot. Means of three seeds."""
    model, through, alone = models.dense(tmp_path), [], []
    for seed in (1, 2, 3):
        alone.append(await take_turns_alone(model, tmp_path / f"alone-{seed}", cache_mib=mib, seed=seed))
        async with Stack(model, tmp_path / f"through-{seed}", quota=f"{mib}MiB") as stack:
            through.append(await take_turns(stack, seed=seed))
    with_disk, with_ram = (statistics.mean(run.ratio for run in runs) for runs in (through, alone))
    figure(f"{mib} MiB: reused {with_disk:.2f} through llamaslot, {with_ram:.2f} alone with a RAM cache")
    assert not any(run.n_errors for run in (*through, *alone))
    assert with_disk >= with_ram - 0.2
