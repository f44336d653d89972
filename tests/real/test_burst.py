"""Small requests that come at once while every slot holds a conversation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import burst, models
from tests.support.stack import Stack

pytestmark = [pytest.mark.real, pytest.mark.alone]


SAVES_SOON = {"store": {"idle_save_s": 0.3}}


async def test_small_requests_at_once_use_more_than_one_slot_and_lose_nothing(tmp_path: Path) -> None:
    """Eight titles that begin alike: they do not all wait in one slot, and the owners of the four conversations find
    again what they had, by llama-server's own counter."""
    shape = replace(burst.ALIKE, n_context=2500, n_answer=40, n_users=0)
    async with (
        Stack(models.dense(tmp_path), tmp_path, context=8192, settings=SAVES_SOON) as stack,
        burst.scene(stack, shape) as scene,
    ):
        await scene.fill(100)
        result = await scene.burst(is_last=True)
    assert len(set(result.slots)) >= 3, result
    assert result.n_lost <= 64, result
