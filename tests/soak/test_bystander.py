"""A stream beside evictions and restores."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from tests.support import models
from tests.support.bystander import compare_gaps
from tests.support.figures import Figure

pytestmark = [pytest.mark.soak, pytest.mark.real, pytest.mark.timeout(3600)]

N_PAIRS = 7


async def test_evictions_stop_the_stream_of_a_bystander_for_one_transfer_at_most(
    tmp_path: Path, figure: Figure
) -> None:
    """7 users of 6,500 tokens and a stream, on 4 slots and on 8; of some pairs of runs the median.

    The longest gap between its tokens is at most that with a slot for everybody and the longest single save or restore.
    """
    pairs = await compare_gaps(models.dense(tmp_path, layers=2, width=128), tmp_path, N_PAIRS)
    for pair in pairs:
        figure(pair)
        assert pair.tight.n_errors == pair.roomy.n_errors == 0
        assert pair.tight.n_restores > 0
        assert pair.roomy.n_restores == 0
    excess_s = statistics.median(pair.excess_s for pair in pairs)
    later_s = statistics.median(pair.later_excess_s for pair in pairs)
    figure(f"median above what may be: {excess_s:.3f} s, of follow-up turns {later_s:.3f} s")
    assert excess_s <= 0
