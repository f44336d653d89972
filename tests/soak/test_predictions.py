"""What is predicted to be reused, and what is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import models
from tests.support.figures import Figure
from tests.support.predicting import predict
from tests.support.stack import Stack

pytestmark = [pytest.mark.soak, pytest.mark.real, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("kind", ["dense", "swa", "recurrent"])
@pytest.mark.parametrize("reworded", [0.0, 0.5], ids=["as they were", "reworded"])
async def test_what_is_predicted_is_reused(
    tmp_path: Path, figure: Figure, kind: str, reworded: float
) -> None:
    """With answers of up to 1,000 tokens, whether or not clients send them back as they were."""
    model = models.of_kind(kind, tmp_path)
    async with Stack(model, tmp_path) as stack:
        result = await predict(stack, n_users=12, n_context=2500, n_turns=10, reworded=reworded)
    figure(result)
    assert result.ratio >= (0.99 if kind == "dense" else 0.95), result.wrong
