"""One greedy user with 20 parallel streams does not make five others wait longer than with a single one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.figures import Figure
from tests.support.greedy import Scene, Waits, play, stage

pytestmark = [pytest.mark.real, pytest.mark.soak]

N_ROUNDS = 3


def merged(rounds: list[Waits]) -> Waits:
    waits = Waits()
    for one in rounds:
        waits.ttft_s |= one.ttft_s
        waits.n_greedy += one.n_greedy
    return waits


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("think_s", [0.0, 0.5], ids=["always", "thinking"])
async def test_twenty_streams_of_one_user_are_to_others_as_one_is(
    tmp_path: Path, figure: Figure, think_s: float
) -> None:
    """Of five users with one stream each on four slots, each gets its first token within twice the median that all have
    beside a single stream. In turns, in one run."""
    scene = Scene(think_s=think_s)
    one, twenty = [], []
    async with stage(tmp_path) as stack:
        for seed in range(N_ROUNDS):
            one.append(await play(stack.url, 1, scene, seed))
            twenty.append(await play(stack.url, 20, scene, 100 + seed))
    single, many = merged(one), merged(twenty)
    figure(f"with 1 stream {single}; with 20: {many}")
    assert max(many.medians_s) <= 2 * single.median_s
