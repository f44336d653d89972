"""A client may leave at any moment: its slot comes back, and nothing is sent to a slot that is at work."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest

from tests.support.inprocess import CHAT, NATIVE, PATIENCE_S, Served, letters, line_with, right, served, spawn

OWN_STEPS = {"prefill": {"chunk_threshold_s": 0}}
ONE, TWO, THREE = (letters(n, 800) for n in (1, 2, 3))


async def leave(task: asyncio.Task[Any]) -> None:
    """Close the client's connection."""
    task.cancel()
    await asyncio.wait({task})


async def right_again(it: Served, *texts: str) -> None:
    """Everything is given back, one client was counted, and the next requests are answered rightly."""
    await it.at_rest()
    for text in texts or (THREE,):
        assert (await it.ask(text + "more")).text == right(it.fake, text + "more")
    assert await it.count("clients_left_total") == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_in_the_queue(tmp_path: Path, stream: bool) -> None:
    """llama-server never hears of it; who is behind moves up."""
    async with served(tmp_path, slots=1) as it, it.busy():
        leaver = spawn(it.ask(ONE, stream=stream))
        await it.until(lambda: it.pool.dispatcher.n_waiting == 1)
        async with it.asking(TWO) as behind:
            await it.until(lambda: it.pool.dispatcher.n_waiting == 2)
            await leave(leaver)
            await it.until(lambda: it.pool.dispatcher.n_waiting == 1)
            it.fake.go()
            assert (await behind).text == right(it.fake, TWO)
        assert all(seen.body["prompt"] != ONE for seen in it.fake.sent(NATIVE))
        await right_again(it)


async def test_a_request_that_left_a_restarted_server_may_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """His one slot is paid back when the old one is idle, and then he is served."""
    async with served(tmp_path, {"queue": {"user_max_running": 1}}) as it:
        backend, is_asked, may_go_on = it.backend, asyncio.Event(), asyncio.Event()
        slots = backend.api.slots

        async def late() -> Any:
            infos = await slots()
            if backend.abandoned_slots._abandoned:
                is_asked.set()
                await may_go_on.wait()
            return infos

        async with it.streaming(ONE, n=4000) as answer:
            await answer.content.readany()
        monkeypatch.setattr(backend.api, "slots", late)
        await is_asked.wait()
        table = backend.leases.table
        monkeypatch.setattr(backend.api, "slots", slots)
        backend.changed("/lora-adapters was called")
        await it.until(lambda: backend.leases.table not in (None, table))
        async with it.asking(TWO) as again:
            await it.until(lambda: it.pool.dispatcher.n_waiting == 1)
            may_go_on.set()
            async with asyncio.timeout(PATIENCE_S):
                assert (await again).text == right(it.fake, TWO)


@pytest.mark.parametrize("action", ["save", "erase", "restore"])
@pytest.mark.parametrize("stream", [True, False])
async def test_during_a_slot_action(tmp_path: Path, action: str, stream: bool) -> None:
    """llama-server carries it out anyway: the slot is given back after it, and what was saved is kept."""
    async with served(tmp_path, slots=1) as it:
        await it.ask(ONE)
        await it.ask(TWO)  # ONE is on disk now
        hang = it.fake.faults.hang(action)
        leaver = spawn(it.ask(ONE + "more", stream=stream))
        await hang.reached.wait()
        await leave(leaver)
        async with it.asking(THREE) as waiting:
            await it.until(lambda: it.pool.dispatcher.n_waiting == 1)
            hang.release()
            assert (await waiting).text == right(it.fake, THREE)
        await it.saved()
        assert len(it.files()) >= 2
        answer = await it.ask(TWO + "more")
        assert (answer.source, answer.text) == ("snapshot", right(it.fake, TWO + "more"))
        await right_again(it, ONE, TWO)


@pytest.mark.parametrize("stream", [True, False])
async def test_while_waiting_to_prefill(tmp_path: Path, stream: bool) -> None:
    """The prefill before it goes on; its slot is free at once."""
    async with served(tmp_path, OWN_STEPS, batch=100) as it:
        it.fake.hold()
        async with it.asking(ONE) as first:
            await it.fake.wait_for(lambda f: any(slot.is_processing for slot in f.slots))
            leaver = spawn(it.ask(TWO, stream=stream))
            await it.until(lambda: len(it.pool.dispatcher.leases) == 2)
            await leave(leaver)
            await it.until(lambda: len(it.pool.dispatcher.leases) == 1)
            it.fake.go()
            assert (await first).text == right(it.fake, ONE)
        await right_again(it)


@pytest.mark.parametrize("stream", [True, False])
async def test_in_a_prefill(tmp_path: Path, stream: bool) -> None:
    """It stops within a batch, streaming or not; what was computed is used when the same prompt comes again."""
    async with served(tmp_path, OWN_STEPS, slots=1, batch=100) as it:
        it.fake.hold()
        leaver = spawn(it.ask(ONE, stream=stream))
        await it.fake.step(3)
        await leave(leaver)
        await it.fake.wait_for(lambda f: not f.slots[0].is_processing)
        it.fake.go()
        await it.at_rest()
        assert it.fake.slots[0].n_tokens == 300
        again = await it.ask(ONE)
        assert again.n_reused == 300
        assert again.text == right(it.fake, ONE)
        await right_again(it)


@pytest.mark.idle_clock
async def test_before_the_server_has_begun(tmp_path: Path) -> None:
    """Its request is in the server's hands, no answer has come: the slot waits until the server says it is idle."""
    async with served(tmp_path, slots=1) as it:
        it.fake.hold()
        leaver = spawn(it.ask(ONE, stream=True))
        await it.fake.wait_for(lambda f: f.slots[0].is_processing)
        await leave(leaver)
        async with it.asking(TWO) as waiting:
            await it.until(lambda: it.pool.dispatcher.n_waiting == 1)
            assert it.fake.slots[0].is_processing
            it.fake.go()
            assert (await waiting).text == right(it.fake, TWO)
        await right_again(it)


@pytest.mark.parametrize("path", [CHAT, NATIVE, "/v1/responses", "/v1/messages"])
async def test_in_the_middle_of_a_stream(tmp_path: Path, path: str) -> None:
    """The generation ends; the context stays usable."""
    async with served(tmp_path, slots=1) as it:
        it.fake.pace.token_s = 0.002
        body = {"messages": [{"role": "user", "content": ONE}], "prompt": ONE, "input": ONE, "stream": True}
        limits = {"max_tokens": 5000, "n_predict": 5000, "max_output_tokens": 5000}
        async with it.session.post(it.url + path, json={**body, **limits}) as stream:
            await line_with(stream, "data:")
            await line_with(stream, "data:")
        await it.fake.wait_for(lambda f: not f.slots[0].is_processing)
        await it.at_rest()
        if path == NATIVE:
            assert (await it.ask(ONE + "more")).n_reused == 800
        await right_again(it)


@pytest.mark.parametrize("path", [NATIVE, "/infill", "/v1/messages"])
async def test_in_the_middle_of_an_answer_in_one_piece(tmp_path: Path, path: str) -> None:
    """Of those that no stream can give. The server notices after its quiet second; nobody is sent there before."""
    async with served(tmp_path, slots=1) as it:
        it.fake.hold()
        document = [{"type": "text", "text": ONE}, {"type": "document"}]  # nobody knows its tokens
        bodies: dict[str, dict[str, Any]] = {
            NATIVE: {"prompt": ONE, "n_probs": 1, "n_predict": 50},
            "/infill": {"input_prefix": ONE, "input_suffix": "", "n_probs": 1, "n_predict": 50},
            "/v1/messages": {"messages": [{"role": "user", "content": document}], "max_tokens": 50},
        }
        leaver = spawn(it.post(path, bodies[path]))
        await it.fake.wait_for(lambda f: f.slots[0].is_processing)
        await it.fake.step(3)
        await leave(leaver)
        await it.fake.wait_for(lambda f: not f.slots[0].is_processing)
        it.fake.go()
        await right_again(it)


@pytest.mark.parametrize("body", [{"n_cmpl": 2, "prompt": ONE}, {"prompt": [ONE, TWO]}])
@pytest.mark.parametrize("stream", [True, False])
async def test_with_several_answers_under_way(tmp_path: Path, body: dict[str, Any], stream: bool) -> None:
    """Every slot that was taken for them comes back."""
    async with served(tmp_path, slots=3) as it:
        await it.ask(THREE)
        it.fake.hold()
        leaver = spawn(it.post(NATIVE, {**body, "n_predict": 50, "stream": stream}))
        await it.fake.wait_for(lambda f: any(slot.is_processing for slot in f.slots))
        await it.fake.step(3)
        await leave(leaver)
        it.fake.go()
        await it.fake.wait_for(lambda f: not any(slot.is_processing for slot in f.slots))
        await right_again(it, ONE, TWO, THREE)


async def test_while_waiting_for_its_turn(tmp_path: Path) -> None:
    """One who wants several slots waits until nobody is between two steps; leaving opens the gate again."""
    async with served(tmp_path, slots=2) as it, it.busy():
        leaver = spawn(it.ask(ONE, n_cmpl=2))
        await it.until(lambda: it.backend.leases.is_gate_shut)
        async with it.asking(TWO) as behind:
            await it.until(lambda: it.pool.dispatcher.n_waiting == 1)
            await leave(leaver)
            await it.until(lambda: it.pool.dispatcher.n_waiting == 0)
            it.fake.go()
            assert (await behind).text == right(it.fake, TWO)
        await right_again(it)


async def test_while_something_passes_through(tmp_path: Path) -> None:
    """The upstream connection is closed with it."""
    async with served(tmp_path) as it:
        hang = it.fake.faults.hang("/tokenize")
        leaver = spawn(it.post("/tokenize", {"content": "x"}))
        await hang.reached.wait()
        await leave(leaver)
        hang.release()
        await it.until(lambda: it.pool.metrics.clients_left._value.get() == 1)
        await right_again(it)


async def test_while_its_body_is_still_coming(tmp_path: Path) -> None:
    """Nothing was taken for it."""
    async with served(tmp_path) as it:
        reader, writer = await asyncio.open_connection("127.0.0.1", it.config.listen.port)
        writer.write(b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        await writer.drain()
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        del reader
        await it.at_rest()
        assert (await it.ask(ONE)).text == right(it.fake, ONE)


async def test_many_at_once_at_every_stage(tmp_path: Path) -> None:
    """Thirty clients on three slots, each leaving after another number of the server's steps; then all is as before."""
    async with served(tmp_path, OWN_STEPS, slots=3, batch=100) as it:
        it.fake.pace.step_s = 0.001

        async def come_and_go(n: int) -> None:
            client = spawn(it.ask(letters(n % 7, 300 + n), n=20, stream=bool(n % 2)))
            until = it.fake.engine.n_steps + n * 3
            with contextlib.suppress(TimeoutError):
                await it.fake.wait_for(lambda f: client.done() or f.engine.n_steps >= until, timeout_s=1.0)
            await leave(client)

        await asyncio.gather(*(come_and_go(n) for n in range(30)))
        await it.at_rest()
        assert not any(slot.is_processing for slot in it.fake.slots)
        for n in range(7):
            assert (await it.ask(letters(n, 400))).text == right(it.fake, letters(n, 400))
