"""A llama-server that unloads its model while nobody asks (``--sleep-idle-seconds``): its slots are empty then."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support import models
from tests.support.inprocess import CHAT, fronted
from tests.support.real import RealServer
from tests.support.users import words

pytestmark = pytest.mark.real

PATHS = {CHAT: ("timings", "cache_n"), "/v1/messages": ("usage", "cache_read_input_tokens")}


async def asleep(server: RealServer) -> None:
    """Wait until it sleeps. ``/props`` does not wake it."""
    async with asyncio.timeout(30), aiohttp.ClientSession() as session:
        while True:
            async with session.get(f"{server.url}/props") as answer:
                if (await answer.json()).get("is_sleeping"):
                    return
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("path", PATHS)
async def test_headers_tell_what_was_found_after_a_sleep(tmp_path: Path, path: str) -> None:
    """Nothing, by llama-server's own counter: neither streams nor answers in one piece are told ``resident``."""
    text = words(random.Random(5), 40)
    body: dict[str, Any] = {
        "model": "any",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 4,
        "temperature": 0,
    }
    where, name = PATHS[path]
    sleepy = RealServer(models.dense(tmp_path), tmp_path / "kv", slots=2, extra=("--sleep-idle-seconds", "1"))
    async with sleepy as server, fronted(tmp_path, server.url, tmp_path / "kv") as it:
        await it.post(path, body)
        warm = await it.post(path, body)
        assert warm.source == "resident"
        assert warm.n_reused == warm.json[where][name] > 40
        for stream in (False, True):
            await asleep(server)
            answer = await it.post(path, {**body, "stream": stream})
            assert (answer.source, answer.n_reused) == ("cold", 0)
            told = answer.events[0]["message"] if stream and path != CHAT else answer.last
            assert told[where].get(name, 0) == 0


async def test_a_sleep_empties_the_slots_and_is_not_a_disappointment(tmp_path: Path) -> None:
    """llamaslot looks at ``/props``, which does not wake the server, and believes no more in what its slots held."""
    sleepy = RealServer(models.dense(tmp_path), tmp_path / "kv", slots=2, extra=("--sleep-idle-seconds", "1"))
    async with sleepy as server, fronted(tmp_path, server.url, tmp_path / "kv") as it:
        text = words(random.Random(5), 400)
        await it.ask(text)
        await it.ask(text)
        await asleep(server)
        answer = await it.ask(text)
        assert answer.timings["cache_n"] == 0
        assert await it.count("reuse_mispredictions_total") == 0
        assert await it.count("backend_restarts_total") == 0
