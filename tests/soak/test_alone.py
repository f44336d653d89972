"""A user alone: what llamaslot costs where it cannot help."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import models
from tests.support.figures import Figure
from tests.support.jobs import compare_alone, median_ratio, ratio_of
from tests.support.real import RealServer
from tests.support.stack import Stack

pytestmark = [pytest.mark.soak, pytest.mark.real, pytest.mark.timeout(3600)]


@pytest.mark.parametrize(("layers", "width", "n_turns"), [(2, 64, 30), (4, 256, 10)])
async def test_a_follow_up_at_once_takes_little_longer_than_asked_directly(
    tmp_path: Path, figure: Figure, layers: int, width: int, n_turns: int
) -> None:
    """Median time to first token at 30,000 tokens, two llama-servers of the same model, asked in turn.

    The small model is the harder case: most of its 90 ms are llama-server's own template and tokenizing, and 15 % of
    them are all that llamaslot may take. Needs a machine with nothing else to do.
    """
    model = models.dense(tmp_path, layers=layers, width=width)
    async with (
        Stack(model, tmp_path / "front", context=40_960) as stack,
        RealServer(model, tmp_path / "direct", context=40_960) as direct,
    ):
        pairs = await compare_alone(stack, direct, n_turns=n_turns)
    figure(ratio_of(pairs))
    assert max(pair.n_computed for pair in pairs) < 200, "each follow-up finds its context"
    assert median_ratio(pairs) <= 1.15
