"""One greedy user with 20 parallel streams does not make five others wait longer than with a single one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from llamaslot.scheduling.settings import QueueLimits
from tests.support.figures import Figure
from tests.support.greedy import N_STREAMS, Rush, Scene, Waits, rest, stage
from tests.support.speeds import SPEEDS, Kind, Speed, model_of
from tests.support.stack import Stack

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


async def in_turn(stack: Stack, rush: Rush, figure: Figure, n_runs: int) -> list[float]:
    """The median first token of the five beside twenty streams, over that beside one; who is first alternates."""
    ratios = list[float]()
    await Rush(lead_s=0.2, n_requests=1).run(stack.url, 1, "first")  # speeds are learned
    for number in range(n_runs):
        waits = {}
        for n_streams in (1, N_STREAMS) if number % 2 == 0 else (N_STREAMS, 1):
            await rest(stack)
            await asyncio.sleep(
                QueueLimits().return_grace_s + 1
            )  # else slots are left alone for the users of the last run
            waits[n_streams] = await rush.run(stack.url, n_streams, f"{number}-{n_streams}")
        ratios.append(waits[N_STREAMS].median_s / waits[1].median_s)
        figure(f"{ratios[-1]:.2f} times: with 1 stream {waits[1]}; with {N_STREAMS}: {waits[N_STREAMS]}")
    return ratios


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("kind", "speed"), [*(("dense", speed) for speed in SPEEDS), ("swa", "2x64"), ("recurrent", "2x128")]
)
async def test_a_request_beside_twenty_begun_streams_waits_as_beside_one(
    tmp_path: Path, figure: Figure, kind: Kind, speed: Speed
) -> None:
    """Five users come three seconds later, with two requests each: at most twice the median first token, in each of
    five runs."""
    async with Stack(model_of(kind, speed, tmp_path), tmp_path, slots=4, context=8192) as stack:
        ratios = await in_turn(stack, Rush(), figure, 5)
    assert max(ratios) <= 2.0, ratios


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("speed", SPEEDS)
async def test_over_a_minute_twenty_streams_are_as_one(tmp_path: Path, figure: Figure, speed: Speed) -> None:
    """The same five ask one request after the other for a minute: at most 1.3 times."""
    async with Stack(model_of("dense", speed, tmp_path), tmp_path, slots=4, context=8192) as stack:
        ratios = await in_turn(stack, Rush(for_s=60.0), figure, 1)
    assert max(ratios) <= 1.3, ratios
