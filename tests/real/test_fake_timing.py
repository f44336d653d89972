"""What takes time: the same behaviour shown by the fake and by the real server, one after the other."""

# ruff: noqa: ASYNC110 - what a server does can only be polled

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.real.test_fake import text
from tests.support import models
from tests.support.fake import FakeServer
from tests.support.real import RealServer

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="class")]

Server = FakeServer | RealServer
BATCH = 256


async def wait_until_idle(server: Server) -> None:
    while any(slot["is_processing"] for slot in await server.slots()):
        await asyncio.sleep(1.2)


async def when_idle(server: Server, slot: int) -> dict[str, Any]:
    """The slot as GET /slots tells it, once it is idle."""
    async with asyncio.timeout(30):
        while (told := (await server.slots())[slot])["is_processing"]:
            await asyncio.sleep(0.05)
    return told


def prefill(n_tokens: int, slot: int, *, stream: bool = True) -> dict[str, Any]:
    body = {"prompt": text(slot, n_tokens), "n_predict": 0, "id_slot": slot, "cache_prompt": True}
    return {**body, "stream": stream, "return_progress": stream}


def answer(n_tokens: int, slot: int, n_prompt: int = 20) -> dict[str, Any]:
    return {"prompt": text(slot + 5, n_prompt), "n_predict": n_tokens, "id_slot": slot, "stream": True}


class Streaming:
    """A streaming request: ``async with`` it, then take its events one by one."""

    def __init__(self, server: Server, body: dict[str, Any]) -> None:
        self._request = aiohttp.request("POST", server.url + "/completion", json=body)

    async def __aenter__(self) -> Streaming:
        self._answer = await self._request.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        self._answer.close()
        await self._request.__aexit__(None, None, None)

    async def next(self) -> dict[str, Any]:
        async for line in self._answer.content:
            if line.startswith(b"data: "):
                event: dict[str, Any] = json.loads(line[6:])
                return event
        raise AssertionError("the stream has ended")

    async def end(self) -> None:
        await self._answer.read()


async def deferred(server: Server, n: int) -> None:
    while (await server.metrics())["llamacpp:requests_deferred"] != n:
        await asyncio.sleep(0.02)


async def http_slots(server: Server) -> list[dict[str, Any]]:
    async with aiohttp.request("GET", server.url + "/slots") as response:
        slots: list[dict[str, Any]] = await response.json()
        return slots


@pytest_asyncio.fixture(scope="class", loop_scope="class")
async def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Server]:
    room = tmp_path_factory.mktemp("timing")
    server: Server
    if request.cls is TestFake:
        server = FakeServer(room / "kv", batch=BATCH, ubatch=BATCH)
        server.pace.prompt_token_s, server.pace.token_s = 1 / 1500, 1 / 800
    else:
        model = models.dense(room, layers=4, width=256)
        server = RealServer(model, room / "kv", batch=BATCH, ubatch=BATCH)
    async with server:
        yield server


@pytest_asyncio.fixture(loop_scope="class")
async def server(running: Server) -> Server:
    """With empty idle slots."""
    await wait_until_idle(running)
    for slot in range(4):
        await running.post(f"/slots/{slot}?action=erase", {})
    return running


class Timing:
    """What both servers do."""

    async def test_a_save_for_a_busy_slot_captures_the_next_conversation(self, server: Server) -> None:
        """A request for a busy slot waits without headers; a save behind it runs after it and saves what it left."""
        async with asyncio.TaskGroup() as group, Streaming(server, answer(400, 0)) as first:
            await first.next()
            second = group.create_task(server.post("/completion", prefill(70, 0, stream=False)))
            await deferred(server, 1)
            save = group.create_task(server.post("/slots/0?action=save", {"filename": "next.kv"}))
            await deferred(server, 2)
            assert not second.done()
            await first.end()
        assert second.result()["tokens_evaluated"] == 70
        assert save.result()["n_saved"] == 70

    async def test_a_completion_overtakes_slot_actions(self, server: Server) -> None:
        """The release of a slot wakes a completion pinned to it first, even if an erase had come before."""
        async with asyncio.TaskGroup() as group, Streaming(server, answer(400, 0)) as first:
            await first.next()
            erase = group.create_task(server.post("/slots/0?action=erase", {}))
            await deferred(server, 1)
            second = group.create_task(server.post("/completion", prefill(70, 0, stream=False)))
            await deferred(server, 2)
            await first.end()
        assert second.result()["timings"]["cache_n"] == 0
        assert erase.result()["n_erased"] == 70

    async def test_a_slot_action_releases_no_request(self, server: Server) -> None:
        """Of two actions queued on a busy slot the second one hangs, the slot being idle, until another is released."""
        async with asyncio.TaskGroup() as group, Streaming(server, answer(400, 0)) as first:
            await first.next()
            erase = group.create_task(server.post("/slots/0?action=erase", {}))
            await deferred(server, 1)
            save = group.create_task(server.post("/slots/0?action=save", {"filename": "hung.kv"}))
            await deferred(server, 2)
            await first.end()
            await erase
            assert not any(slot["is_processing"] for slot in await server.slots())
            await deferred(server, 1)
            assert not save.done()
            await server.post("/completion", prefill(10, 3, stream=False))
        assert save.result()["n_saved"] == 0

    async def test_a_stream_that_is_left_frees_its_slot_at_once(self, server: Server) -> None:
        """A write fails, the task is cancelled, and the slot keeps what it holds."""
        async with Streaming(server, answer(8000, 1)) as stream:
            for _ in range(3):
                await stream.next()
        slot = await when_idle(server, 1)
        assert 20 < slot["n_prompt_tokens"] < 8000

    async def test_a_prefill_that_is_left_resumes_at_its_batch(self, server: Server) -> None:
        """With progress events an abandoned prefill ends within a batch or two; sent again it goes on from there."""
        body = prefill(10_000, 2)
        async with Streaming(server, body) as stream:
            for _ in range(4):
                event = await stream.next()
        assert event["prompt_progress"]["processed"] == 3 * BATCH
        slot = await when_idle(server, 2)
        kept = slot["n_prompt_tokens"]
        assert kept % BATCH == 0
        assert 3 * BATCH <= kept <= 9 * BATCH
        async with Streaming(server, body) as again:
            assert (await again.next())["prompt_progress"]["cache"] == kept

    async def test_an_abandoned_prefill_lives_as_long_as_slots_are_asked(self, server: Server) -> None:
        """Without events nobody notices that the client has gone, until a second passes without a result."""
        body = prefill(14_000, 1, stream=False)
        async with aiohttp.ClientSession() as session:
            asked = asyncio.get_running_loop().create_task(
                session.post(server.url + "/completion", json=body)
            )
            while not (await server.slots())[1]["is_processing"]:
                await asyncio.sleep(0.05)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
        for _ in range(5):
            await asyncio.sleep(0.3)
            assert (await http_slots(server))[1]["is_processing"]
        async with asyncio.timeout(30):  # a batch of a busy machine takes long, too
            await asyncio.sleep(1.6)
            while (slot := (await http_slots(server))[1])["is_processing"]:
                await asyncio.sleep(1.6)
        assert 0 < slot["n_prompt_tokens"] < 14_000

    async def test_the_lower_slot_prefills_first(self, server: Server) -> None:
        """Of two prefills the one in the higher slot gets no further until the lower is through.

        If it had begun before, it repeats its last event at each batch; else it has none.
        """
        async with Streaming(server, answer(4000, 3)) as beside:
            # It keeps the server busy, so that both prefills are there before a batch is filled.
            await beside.next()
            order: list[int] = []

            async def watch(slot: int) -> None:
                async with Streaming(server, prefill(8 * BATCH, slot)) as stream:
                    n_processed = -1
                    while True:
                        event = await stream.next()
                        if event["stop"]:
                            return
                        now = event.get("prompt_progress", {}).get("processed", n_processed)
                        if now > n_processed:
                            order.append(slot)
                            n_processed = now

            async with asyncio.TaskGroup() as group:
                group.create_task(watch(1))
                await asyncio.sleep(0)
                group.create_task(watch(0))
        last_of_lower = max(i for i, slot in enumerate(order) if slot == 0)
        between = [slot for slot in order[order.index(0) : last_of_lower] if slot == 1]
        assert len(between) <= 2, order  # one that was on its way, and the rest of a batch


@pytest.mark.idle_clock
class TestFake(Timing):
    """On a clock that stands while anything happens."""


@pytest.mark.alone
class TestReal(Timing):
    """Whose own clock is the wall's."""
