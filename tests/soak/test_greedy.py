"""One greedy user with 20 parallel streams does not make five others wait longer than with a single one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.figures import Figure
from tests.support.greedy import N_STREAMS, Scene, Waits, stage

pytestmark = [pytest.mark.real, pytest.mark.soak]

N_ROUNDS, N_TURNS = 3, 10


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("think_s", [0.0, 0.5], ids=["always", "thinking"])
async def test_twenty_streams_of_one_user_are_to_others_as_one_is(
    tmp_path: Path, figure: Figure, think_s: float
) -> None:
    """Of five users with one stream each on four slots, each gets its first token within twice the median that all have
    beside a single stream. In turns, in one run."""
    single, many = Waits(), Waits()
    async with stage(tmp_path, Scene(think_s=think_s)) as (_, team):
        for _ in range(N_ROUNDS):
            single.add(await team.round(1, N_TURNS))
            many.add(await team.round(N_STREAMS, N_TURNS))
    figure(f"with 1 stream {single}; with {N_STREAMS}: {many}")
    assert max(many.medians_s) <= 2 * single.median_s
