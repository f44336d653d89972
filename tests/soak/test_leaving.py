"""Clients that leave while another client streams all the time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import models
from tests.support.figures import Figure
from tests.support.leaving import STAGES, Stage, leave, slots_for
from tests.support.stack import Stack

pytestmark = [pytest.mark.soak, pytest.mark.real, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("stage", STAGES)
async def test_the_slot_of_a_client_that_left_stops_working(
    tmp_path: Path, figure: Figure, stage: Stage
) -> None:
    """Two seconds later, or two of the server's batches, nothing is computed for it and its slot serves others."""
    model = models.dense(tmp_path, layers=4, width=256)
    async with Stack(model, tmp_path, batch=512, slots=slots_for(stage), context=20_480) as stack:
        result = await leave(stack, stage)
    figure(result)
    assert result.n_busy == 0
    assert result.n_computed_late <= 0
    if stage == "later prefill":
        assert result.n_computed <= 1024, "the later prefill had not begun"
    else:
        assert result.newcomer_s <= result.limit_s


async def test_llama_server_alone_works_for_nobody_for_long(tmp_path: Path, figure: Figure) -> None:
    """The same without llamaslot: the measure can tell the difference."""
    model = models.dense(tmp_path, layers=4, width=256)
    stage: Stage = "prefill"
    async with Stack(model, tmp_path, alone=True, batch=512, slots=slots_for(stage), context=20_480) as stack:
        result = await leave(stack, stage)
    figure(result)
    assert result.n_busy == 1
    assert result.n_computed_late > 1024
