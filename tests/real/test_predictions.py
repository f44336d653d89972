"""What is predicted to be reused on the real llama.cpp, small: the same as in ``tests/soak``, in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import models
from tests.support.figures import Figure
from tests.support.predicting import predict
from tests.support.stack import Stack

pytestmark = pytest.mark.real


@pytest.mark.parametrize("kind", ["dense", "swa", "recurrent"])
async def test_what_is_predicted_is_reused(tmp_path: Path, figure: Figure, kind: str) -> None:
    """Within 1 % of the prompt, and beyond it by no more than the last answer; and that is nearly all of what an
    unlimited cache would reuse.

    Of so few requests one may be off where checkpoints decide; the shares are for the long version.
    """
    model = {"dense": models.dense, "swa": models.swa, "recurrent": models.recurrent}[kind](tmp_path)
    async with Stack(model, tmp_path) as stack:
        result = await predict(stack, n_users=6, n_context=1500, n_turns=3, n_answer=150)
    figure(result)
    assert result.tally.ratio >= 0.95, "a context would be 0.08"
    assert len(result.wrong) <= (0 if kind == "dense" else 1), result.wrong
