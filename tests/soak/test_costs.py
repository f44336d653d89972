"""Whether a stop, a shared prefix or a request more is worth its price, on models of three speeds and three kinds.

With the settings as they are when nobody sets any: no number of seconds says what is long.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.agents import think_and_go_on
from tests.support.figures import Figure
from tests.support.prefilling import both, compare_undisturbed, median_ratio
from tests.support.speeds import KINDS, SPEEDS, Kind, Speed, model_of
from tests.support.stack import Stack
from tests.support.together import PLACES, Place, begin_together

pytestmark = [pytest.mark.soak, pytest.mark.real, pytest.mark.timeout(3600)]

BATCH: dict[str, Any] = {"batch": 512, "ubatch": 512}
N_COMMON, N_OWN = 9000, 500
N_RUNS: dict[Speed, int] = {"2x64": 3, "2x128": 3, "4x256": 1}
N_PAIRS: dict[Speed, int] = {"2x64": 15, "2x128": 11, "4x256": 3}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("speed", SPEEDS)
async def test_what_four_begin_with_is_computed_once(
    tmp_path: Path, figure: Figure, speed: Speed, kind: Kind, place: Place
) -> None:
    """Four conversations at once, 9,000 tokens in common: at most 1.08 of the distinct ones are computed, and the mean
    first token comes after 0.55 of the time directly."""
    model, pairs = model_of(kind, speed, tmp_path), []
    for number in range(N_RUNS[speed]):
        pair = await both(
            partial(begin_together, place=place, n_common=N_COMMON, n_own=N_OWN, seed=1 + number),
            model,
            tmp_path / str(number),
            is_through_first=number % 2 == 1,
            **BATCH,
        )
        pairs.append(pair)
        figure(pair)
    share = statistics.median(pair.through.share for pair in pairs)
    mean = median_ratio(pairs, lambda run: run.mean_s)
    figure(f"computed {share:.3f} of the distinct tokens, mean first token {mean:.3f} of directly")
    assert share <= 1.08
    assert mean <= 0.55


@pytest.mark.parametrize("is_evicted", [False, True], ids=["in its slot", "from disk"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("speed", SPEEDS)
async def test_dropped_reasoning_costs_no_more_than_it_must(
    tmp_path: Path, figure: Figure, speed: Speed, kind: Kind, is_evicted: bool
) -> None:
    """A question of 7,500 tokens, 2,500 of reasoning that the next turn drops: at least 0.97 of what is common is
    reused, in the slot and when others have had it meanwhile."""
    async with Stack(model_of(kind, speed, tmp_path), tmp_path, slots=3, **BATCH) as stack:
        result = await think_and_go_on(
            stack, n_slots=3, is_evicted=is_evicted, n_question=7500, n_thoughts=2500
        )
    figure(result)
    assert result.ratio >= 0.97


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("speed", SPEEDS)
async def test_who_is_alone_waits_no_longer_than_directly(
    tmp_path: Path, figure: Figure, speed: Speed, kind: Kind
) -> None:
    """A prompt of 9,000 tokens and three follow-ups at once, in turn with the same directly: in all at most 1.05 times
    as long until their first tokens."""
    pairs = await compare_undisturbed(
        model_of(kind, speed, tmp_path), tmp_path, N_PAIRS[speed], n_context=N_COMMON, **BATCH
    )
    cold = median_ratio(pairs, lambda run: run.cold.undisturbed_s)
    hot = median_ratio(pairs, lambda run: run.hot.undisturbed_s)
    total = median_ratio(pairs, lambda run: run.cold.undisturbed_s + 3 * run.hot.undisturbed_s)
    figure(f"medians of {len(pairs)}: cold {cold:.3f}, hot {hot:.3f}, in all {total:.3f}; {pairs[-1]}")
    assert total <= 1.05
