"""Small requests that come at once while every slot holds a long conversation, against llama-server alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.support import burst, models
from tests.support.figures import Figure

pytestmark = [pytest.mark.soak, pytest.mark.real, pytest.mark.timeout(3600)]

N_PAIRS, N_PAIRS_SLOW = 5, 2  # models of width 256 take minutes for as many
MODELS: dict[str, Callable[[Path], Path]] = {
    "dense 2x64": models.dense,
    "dense 2x128": partial(models.dense, layers=2, width=128),
    "dense 4x256": partial(models.dense, layers=4, width=256),
    "swa 6x64": models.swa,
    "swa 6x256": partial(models.swa, width=256),
    "recurrent 2x64": models.recurrent,
    "recurrent 4x256": partial(models.recurrent, layers=4, width=256),
}


@pytest.mark.parametrize("is_alike", [True, False], ids=["alike", "unlike"])
@pytest.mark.parametrize("is_clean", [True, False], ids=["saved", "not saved"])
@pytest.mark.parametrize("kind", MODELS)
async def test_a_burst_of_small_requests_takes_little_longer_than_on_llama_server_alone(
    tmp_path: Path, figure: Figure, kind: str, is_clean: bool, is_alike: bool
) -> None:
    """Eight on four slots that hold 6,000 tokens each: from the first request to the end of the last answer at most 1.1
    times as long, and what is displaced is found again. Needs a machine with nothing else to do."""
    shape = replace(burst.ALIKE if is_alike else burst.UNLIKE, is_clean=is_clean)
    n_pairs = N_PAIRS_SLOW if kind.endswith("256") else N_PAIRS
    pairs = await burst.compare(MODELS[kind](tmp_path), tmp_path, shape, n_pairs)
    for pair in pairs:
        figure(pair)
    figure(f"median of {len(pairs)}: {burst.ratio(pairs):.2f}")
    assert max(pair.through.n_lost for pair in pairs) <= 0.01 * pairs[0].through.n_held
    assert burst.ratio(pairs) <= 1.1
