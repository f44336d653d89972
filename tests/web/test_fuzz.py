"""No body makes llamaslot fail."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.fuzzing import Bodies, forgiving, fuzz
from tests.support.inprocess import served

N_BODIES = int(os.environ.get("FUZZ_BODIES", "300"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))
SETTINGS = {"prefill": {"chunk_threshold_s": 0.05}, "routing": {"small_prompt_tokens": 20}}


async def test_odd_bodies(tmp_path: Path) -> None:
    """Each is answered, by llama-server's own error or llamaslot's, and no slot is lost."""
    async with served(tmp_path, SETTINGS, slots=3, context=512, answer_tokens=2) as it:
        forgiving(it.fake)
        statuses = await fuzz(it, Bodies(SEED), range(N_BODIES), print)
        await it.at_rest()
        assert (await it.ask("hello")).status == 200
        print(it.fake.violations, dict(statuses))
    assert statuses[200] > N_BODIES / 10
    assert statuses[400] > N_BODIES / 10
