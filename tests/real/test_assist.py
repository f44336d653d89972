"""In front of servers as people start them llamaslot is never worse than no llamaslot: the real llama.cpp."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from llamaslot.backend.probes import Probes
from llamaslot.llama.client import LlamaServer
from llamaslot.scheduling.rates import Rates
from tests.support import models
from tests.support.harm import DEFAULTS, KINDS, RAM_ONLY, Flags, front
from tests.support.jobs import team_of
from tests.support.real import RealServer
from tests.support.rival import run
from tests.support.stack import Stack
from tests.support.users import tally

pytestmark = pytest.mark.real

SIZES = {"n_users": 6, "n_context": 1200, "n_turns": 3, "at_a_time": 3, "seed": 1}
# One of each reason; the others are in tests/soak/test_harm.py.
OFF = [kind for kind in KINDS if kind.name in ("defaults", "a RAM cache", "defaults, --no-slots")]


@pytest.mark.parametrize("kind", ["dense", "swa", "recurrent", "hybrid"])
@pytest.mark.parametrize("cache_mib", [0, 8192])
async def test_a_ram_cache_shows_by_what_it_does(tmp_path: Path, kind: str, cache_mib: int) -> None:
    """Whether a displaced context comes back tells it; no route does."""
    model = models.of_kind(kind, tmp_path)
    flags = ("--cache-ram", str(cache_mib))
    async with RealServer(model, tmp_path / "kv", slots=2, context=4096, saves=False, extra=flags) as server:
        api = LlamaServer(server.url, None)
        assert await Probes(api, None, Rates()).has_ram_cache() is (cache_mib > 0)
        await api.close()


@pytest.mark.parametrize("flags", OFF, ids=lambda flags: flags.name)
async def test_contexts_are_found_again_as_directly(tmp_path: Path, flags: Flags) -> None:
    """6 users on 4 slots in front of a server whose own memory works: llamaslot stands aside, and all is reused."""
    async with front(models.dense(tmp_path), tmp_path, flags, alone=False, context=8192) as stack:
        result = await run(stack, **SIZES)
        assist = (await stack.status())["backends"][0]["assist"]
    assert assist["is_on"] is False
    assert result.tally.n_errors == 0
    assert result.tally.ratio >= 0.98


@pytest.mark.parametrize("is_default_first", [True, False])
async def test_an_exchange_of_flags_is_noticed(tmp_path: Path, is_default_first: bool) -> None:
    """The server is restarted with other flags while llamaslot runs, in both directions: assist follows, and what each
    can find again is found again."""
    flags = [DEFAULTS, ()] if is_default_first else [(), DEFAULTS]
    async with Stack(models.dense(tmp_path), tmp_path, context=8192, extra=flags[0]) as stack:
        other = RealServer(
            stack.server.model, stack.server.save_dir, context=8192, port=stack.server.port, extra=flags[1]
        )
        try:
            assert (await stack.status())["backends"][0]["assist"]["is_on"] is not is_default_first
            await stack.server.stop()
            await other.start()
            await _connected(stack, is_on=is_default_first)
            async with team_of(stack, 6, 1200, seed=2) as (team, meter):
                turns = await team.run(2, at_a_time=3)
                result = tally(turns, await meter.total())
        finally:
            await other.__aexit__(None, None, None)
    assert result.n_errors == 0
    assert result.ratio >= 0.97


async def test_two_slots_of_which_one_is_filled_show_it_too(tmp_path: Path) -> None:
    """After a request to a server with default flags one slot holds something, and of two just one is empty."""
    async with Stack(models.dense(tmp_path), tmp_path, slots=2, context=4096, extra=DEFAULTS) as stack:
        await stack.server.post("/completion", {"prompt": "a " * 300, "n_predict": 1})
        await stack.llamaslot.stop()
        await stack.llamaslot.start()
        assert (await stack.status())["backends"][0]["assist"]["is_on"] is False


async def _connected(stack: Stack, *, is_on: bool) -> None:
    """Wait until llamaslot has noticed the other server."""
    deadline = time.monotonic() + 30
    while True:
        assist = (await stack.status())["backends"][0]["assist"]
        if assist is not None and assist["is_on"] is is_on:
            return
        assert time.monotonic() < deadline, assist


async def test_nothing_is_overwritten_where_llamaslot_stands_aside(tmp_path: Path) -> None:
    """What slots held before llamaslot was started, in front of a server that keeps it in RAM: reused all the same."""
    async with RealServer(
        models.dense(tmp_path), tmp_path / "kv", context=8192, saves=False, extra=RAM_ONLY
    ) as server:
        texts = [f"{n} " * 600 for n in range(4)]
        for text in texts:
            await server.post("/completion", {"prompt": text, "n_predict": 1})
        api = LlamaServer(server.url, None)
        assert await Probes(api, None, Rates()).has_ram_cache()
        await api.close()
        for text in texts:
            answer = await server.post("/completion", {"prompt": text, "n_predict": 1})
            assert answer["timings"]["prompt_n"] <= 4
