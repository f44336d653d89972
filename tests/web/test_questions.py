"""Which questions llama-server is asked for a short request, and which not."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path

import pytest

from llamaslot.backend import health, process_check
from tests.support.inprocess import Served, served

pytestmark = pytest.mark.idle_clock


@pytest.fixture(autouse=True)
def no_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The poll every two seconds is no question of a request."""
    monkeypatch.setattr(health, "_WATCH_S", 60.0)
    monkeypatch.setattr(process_check, "_AWAKE_S", 60.0)


async def asked(it: Served, text: str) -> Counter[str]:
    """The requests to llama-server for one of a client's, by path."""
    n_before = len(it.fake.requests)
    assert (await it.chat(text)).status == 200
    return Counter(seen.path for seen in it.fake.requests[n_before:])


async def test_a_short_request_costs_three(tmp_path: Path) -> None:
    """Its text, its tokens, itself: not whether the process is the same, nor what the slots hold."""
    async with served(tmp_path) as it:
        await asked(it, "one")
        await asked(it, "two")
        assert await asked(it, "three") == {"/apply-template": 1, "/tokenize": 1, "/v1/chat/completions": 1}


async def test_the_process_is_asked_for_after_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have fallen asleep."""
    async with served(tmp_path) as it:
        await asked(it, "one")
        assert (await asked(it, "two"))["/props"] == 0
        later = time.monotonic() + 120.0
        monkeypatch.setattr(it.backend.leases, "now", lambda: later)
        assert (await asked(it, "three"))["/props"] == 1


async def test_a_burst_asks_once_for_the_process(tmp_path: Path) -> None:
    """The answer to one request's question is an answer to all."""
    async with served(tmp_path, slots=8) as it:
        await asked(it, "one")
        it.backend.process.clear()  # and not ``doubt``, after which the task that watches the server asks first
        n_before = len(it.fake.requests)
        answers = await asyncio.gather(*(it.chat(f"burst {i}") for i in range(8)))
        assert [answer.status for answer in answers] == [200] * 8
        paths = Counter(seen.path for seen in it.fake.requests[n_before:])
        assert paths["/props"] == 1


async def test_another_process_is_noticed_before_anything_is_placed(tmp_path: Path) -> None:
    """The connection to the old one has closed."""
    async with served(tmp_path) as it:
        await asked(it, "one")
        await asked(it, "two")
        assert it.backend.process.use_if_proved()
        await it.fake.restart()
        answer = await it.chat("two")
        assert answer.status == 200
        assert await it.count("backend_restarts_total") == 1
        assert answer.headers["x-llamaslot-source"] == "cold"


async def test_a_failure_is_followed_by_a_question(tmp_path: Path) -> None:
    """Whatever broke, the next request asks."""
    async with served(tmp_path) as it:
        await asked(it, "one")
        it.backend.doubt()
        assert not it.backend.process.use_if_proved()
