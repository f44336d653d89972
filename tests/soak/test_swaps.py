"""Hundreds of swaps of three models in one store, as llama-swap makes them, among them kills: five minutes."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path

import pytest

from tests.support import models
from tests.support.figures import Figure
from tests.support.inprocess import letters
from tests.support.supervised import Supervised, tagged

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]

N_SWAPS, N_USERS, QUOTA = 90, 2, 40 << 20
Messages = list[dict[str, str]]


def saved_bytes(store: Path) -> int:
    return sum(file.stat().st_size for file in store.glob("*/ls-*.kv"))


async def none_left(tag: str) -> None:
    async with asyncio.timeout(15):
        while tagged(tag):  # noqa: ASYNC110 - no event comes for it
            await asyncio.sleep(0.05)


async def test_swaps_and_kills(tmp_path: Path, figure: Figure) -> None:
    """After a SIGTERM a follow-up finds all of its context; a kill costs no more than what was not saved yet; nothing
    is left of any process, the quota holds, and no llamaslot is refused its part."""
    rng, store = random.Random(5), tmp_path / "store"
    running = [
        Supervised.of(models.dense(tmp_path, seed), store, "--quota", str(QUOTA)) for seed in (1, 2, 3)
    ]
    talks: dict[tuple[int, int], Messages] = {}
    is_kept: dict[tuple[int, int], bool] = {}
    n_prompt = n_computed = 0
    n_ends = dict.fromkeys(("stop", "kill", "engine dies"), 0)
    for swap in range(N_SWAPS):
        model = rng.randrange(3)
        it = running[model]
        await it.start()
        await it.healthy()
        for user in rng.sample(range(N_USERS), rng.randint(1, N_USERS)):
            key = model, user
            messages = talks.setdefault(key, [{"role": "user", "content": letters(100 * model + user, 6000)}])
            answer = await it.chat(messages)
            if is_kept.get(key):
                n_prompt += answer["usage"]["prompt_tokens"]
                n_computed += answer["timings"]["prompt_n"]
            said = answer["choices"][0]["message"]["content"]
            messages += [
                {"role": "assistant", "content": said},
                {"role": "user", "content": letters(swap, 40)},
            ]
            is_kept[key] = True
            if len(messages) > 12:
                del talks[key], is_kept[key]
        how = rng.choices(list(n_ends), (6, 1, 1))[0]
        n_ends[how] += 1
        if how == "stop":
            assert await it.stop() == 0
        else:
            for user in range(N_USERS):
                is_kept[model, user] = False
            if how == "kill":
                await it.kill()
            else:
                os.kill(max(it.offspring), signal.SIGKILL)
                assert await it.ended() == 128 + signal.SIGKILL
        await none_left(it.tag)
        assert saved_bytes(store) <= QUOTA
        assert "keeps its contexts apart" not in it.output
        assert "Traceback" not in it.output, it.output[-3000:]
    figure(
        f"{n_ends}; {n_computed} of {n_prompt} prompt tokens computed, reused {1 - n_computed / n_prompt:.4f}"
    )
    assert n_computed <= 0.02 * n_prompt
