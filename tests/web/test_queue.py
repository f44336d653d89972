"""Who waits for a slot, for how long, and who is served first."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import pytest

from tests.support.inprocess import NATIVE, Served, letters, right, served, spawn


@pytest.mark.parametrize("stream", [True, False])
async def test_one_too_many_is_told_when_to_come_again(tmp_path: Path, stream: bool) -> None:
    """503 with Retry-After at once; those who wait already are served."""
    short, text = {"queue": {"max_waiting": 1}}, letters(1, 200)
    async with served(tmp_path, short, slots=1) as it, it.busy(), it.asking(text) as waiting:
        await it.until(lambda: it.pool.dispatcher.n_waiting == 1)
        refused = await it.ask(letters(2, 200), stream=stream)
        it.fake.go()
        assert (await waiting).text == right(it.fake, text)
    assert refused.status == 503
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.error["type"] == "unavailable_error"
    assert "1 requests are waiting" in refused.error["message"]


async def test_waiting_has_an_end(tmp_path: Path) -> None:
    """503 with Retry-After after ``queue.max_wait_s``."""
    async with served(tmp_path, {"queue": {"max_wait_s": 0.05}}, slots=1) as it, it.busy():
        refused = await it.ask(letters(2, 200))
        it.fake.go()
    assert refused.status == 503
    assert int(refused.headers["Retry-After"]) >= 1
    assert "within 0.05 s" in refused.error["message"]


def _are_waiting(it: Served, n: int) -> bool:
    return it.pool.dispatcher.n_waiting == n


async def test_the_first_to_come_is_the_first_served(tmp_path: Path) -> None:
    """In the order in which they came."""
    texts = [letters(n, 150 + n) for n in range(6)]
    async with served(tmp_path, slots=1) as it, it.busy():
        asked = []
        for n, text in enumerate(texts, 1):
            asked.append(spawn(it.ask(text)))
            await it.until(partial(_are_waiting, it, n))
        it.fake.go()
        answers = await asyncio.gather(*asked)
        sent = [seen.body["prompt"] for seen in it.fake.sent(NATIVE) if seen.body["prompt"] in texts]
    assert [answer.text for answer in answers] == [right(it.fake, text) for text in texts]
    assert sent == texts


async def test_many_clients_at_once_are_all_answered(tmp_path: Path) -> None:
    """More than aiohttp's 100 connections, on two slots."""
    async with served(tmp_path) as it:
        texts = [letters(n, 20 + n) for n in range(150)]
        answers = await asyncio.gather(*(it.ask(text, n=1) for text in texts))
    assert {answer.status for answer in answers} == {200}
    assert [answer.text for answer in answers] == [right(it.fake, text, 1) for text in texts]


async def test_a_context_waits_for_its_busy_slot_when_that_is_cheaper(tmp_path: Path) -> None:
    """The same conversation asked twice at once: the second waits and finds everything, the other slot stays free."""
    text = letters(1, 6000)
    async with served(tmp_path) as it:
        await it.ask(text)
        it.backend.rates.answer.n_tokens = 4.0  # answers are known to be short, so the wait is
        it.fake.hold()
        async with it.asking(text + "a", n=8) as first:
            await it.fake.wait_for(lambda f: any(slot.is_processing for slot in f.slots))
            async with it.asking(text + "b", n=8) as second:
                await it.until(lambda: it.pool.dispatcher.n_waiting == 1)
                async with it.asking(letters(2, 200)) as third:  # it reserves that slot only
                    await it.fake.wait_for(lambda f: all(slot.is_processing for slot in f.slots))
                    it.fake.go()
                    assert (await third).slot != (await first).slot
                assert (await second).slot == (await first).slot
                assert (await second).n_reused == 6000
