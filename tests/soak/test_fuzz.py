"""A hundred thousand bodies that nobody would send. ``make fuzz`` runs these; in the environment ``FUZZ_BODIES`` is how
many, ``FUZZ_SEED`` which."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from tests.support import models
from tests.support.described import examine
from tests.support.figures import Figure
from tests.support.fuzzing import Bodies, forgiving, fuzz
from tests.support.inprocess import fronted, served
from tests.support.leftovers import tasks
from tests.support.real import RealServer

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

N_BODIES = int(os.environ.get("FUZZ_BODIES", "100000"))
SEED = int(os.environ.get("FUZZ_SEED") or time.time())
SETTINGS = {"prefill": {"chunk_threshold_s": 0.05}, "routing": {"small_prompt_tokens": 20}}


async def test_bodies_in_front_of_the_fake(tmp_path: Path, figure: Figure) -> None:
    """Each is answered, none by a failure of llamaslot's; then it is as it was before."""
    before = len(tasks())
    figure(f"seed {SEED}, {N_BODIES} bodies")
    async with served(tmp_path, SETTINGS, slots=3, context=512, answer_tokens=2) as it:
        forgiving(it.fake)
        statuses = await fuzz(it, Bodies(SEED), range(N_BODIES), figure)
        await it.at_rest()
        assert (await it.ask("hello")).status == 200
        assert it.fake.violations == []
    assert len(tasks()) == before
    assert statuses.total() == N_BODIES


@pytest.mark.real
async def test_bodies_in_front_of_llama_server(tmp_path: Path, figure: Figure) -> None:
    """Some, for it computes. What it answers itself is passed on."""
    model = models.dense(tmp_path)
    async with (
        RealServer(model, tmp_path / "kv", slots=3, context=3 * 1024) as server,
        fronted(tmp_path, server.url, tmp_path / "kv", SETTINGS) as it,
    ):
        statuses = await fuzz(it, Bodies(SEED), range(N_BODIES // 50), figure)
        assert (await it.ask("hello")).status == 200
    figure(dict(sorted(statuses.items())))


async def test_own_routes_are_as_they_are_described(tmp_path: Path, figure: Figure) -> None:
    """As in the small version, many times over."""
    async with served(tmp_path) as it:
        description = (await it.get("/llamaslot/openapi.json")).json
        n_asked = await asyncio.to_thread(examine, it.url, description, max(N_BODIES // 500, 5))
    figure(f"{n_asked} requests")
