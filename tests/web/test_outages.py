"""llama-server down, slow, dying and coming back, as its clients see it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llamaslot.backend.health import Health
from tests.support.answers import without_progress
from tests.support.fake import FakeModel
from tests.support.inprocess import CHAT, NATIVE, TEXT, Served, letters, line_with, right, served, spawn

OWN_STEPS = {"prefill": {"chunk_threshold_s": 0}}
SOON = {"stream": {"keepalive_s": 0.02}}
ONE, TWO = letters(1, 800), letters(2, 800)


def asked(path: str) -> dict[str, Any]:
    """A body for 8 tokens about ``ONE``."""
    messages = [{"role": "user", "content": ONE}]
    return {
        CHAT: {"messages": messages, "max_tokens": 8},
        TEXT: {"prompt": ONE, "max_tokens": 8},
        NATIVE: {"prompt": ONE, "n_predict": 8},
        "/v1/messages": {"messages": messages, "max_tokens": 8},
        "/v1/responses": {"input": ONE, "max_output_tokens": 8},
    }[path]


async def works(it: Served) -> None:
    """The next request is answered rightly."""
    text = letters(99, 150)
    assert (await it.ask(text)).text == right(it.fake, text)


# -- not there ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", [CHAT, TEXT, NATIVE, "/v1/messages", "/v1/responses", "/v1/models", "/tokenize"]
)
async def test_a_server_that_is_not_there_is_said_at_once(tmp_path: Path, path: str) -> None:
    """503 of the OpenAI shape, with the address and when to come again."""
    async with served(tmp_path, wait=False) as it:
        await it.start(wait=False)
        body = {"messages": [{"role": "user", "content": "x"}], "prompt": "x", "stream": True}
        answer = await it.get(path) if path == "/v1/models" else await it.post(path, body)
        health = await it.get("/health")
    assert answer.status == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert it.fake.url in answer.error["message"]
    assert answer.error["type"] == "unavailable_error"
    assert (health.status, health.json) == (503, {"status": "down"})


async def test_service_begins_by_itself_when_the_server_is_up(tmp_path: Path) -> None:
    """llamaslot starts first and waits."""
    async with served(tmp_path, wait=False) as it:
        await it.start(wait=False)
        assert (await it.ask("hi")).status == 503
        await it.fake.start()
        await it.until(lambda: it.backend.health is Health.UP)
        assert (await it.get("/health")).json == {"status": "ok"}
        await works(it)


async def test_a_server_that_loads_its_model_is_waited_for(tmp_path: Path) -> None:
    """503 on everything for as long as it takes."""
    async with served(tmp_path, wait=False) as it:
        it.fake.loading = True
        await it.fake.start()
        await it.start(wait=False)
        await it.fake.wait_for(lambda f: len(f.requests) >= 2)
        assert (await it.ask("hi")).status == 503
        it.fake.loading = False
        await it.until(lambda: it.backend.health is Health.UP)
        await works(it)


async def test_a_server_that_ends_is_said_and_its_return_noticed(tmp_path: Path) -> None:
    """Nobody has to start llamaslot again."""
    async with served(tmp_path) as it:
        await works(it)
        await it.fake.kill()
        assert (await it.ask("hi")).status == 503
        await it.until(lambda: it.backend.health is Health.DOWN)
        assert (await it.get("/health")).status == 503
        await it.fake.start()
        await it.until(lambda: it.backend.health is Health.UP)
        await works(it)


async def test_an_outage_has_a_beginning_and_an_end(tmp_path: Path) -> None:
    """In the status. To connect again for llamaslot's own reasons is none; a restart is one."""
    async with served(tmp_path) as it:

        async def outage() -> Any:
            return (await it.get("/llamaslot/status")).json["backends"][0]["outage"]

        assert await outage() is None
        it.backend.changed("a test wants it")
        await it.until(lambda: it.backend.health is Health.UP)
        assert await outage() is None
        began = time.time()
        await it.fake.kill()
        it.backend.doubt()
        await it.until(lambda: it.backend.health is Health.DOWN)
        first = await outage()
        assert began <= first["began"] <= time.time()
        assert first["ended"] is None
        await it.fake.start()
        await it.until(lambda: it.backend.health is Health.UP)
        first = await outage()
        assert first["began"] < first["ended"] <= time.time()
        assert it.backend.session is not None
        it.backend.lost(it.backend.session.table)
        await it.until(lambda: it.backend.health is Health.UP)
        second = await outage()
        assert first["ended"] <= second["began"] <= second["ended"]


async def test_those_who_wait_are_told_when_the_server_ends(tmp_path: Path) -> None:
    """Nobody waits for what may never come."""
    async with served(tmp_path, slots=1) as it, it.busy() as (first,):
        async with it.asking(ONE) as waiting:
            await it.until(lambda: it.pool.dispatcher.n_waiting == 1)
            await it.fake.kill()
            assert (await first).status == 503
            assert (await waiting).status == 503
        await it.fake.start()
        it.fake.go()
        await it.until(lambda: it.backend.health is Health.UP)
        await works(it)


# -- in the middle -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, TEXT, NATIVE, "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("n_tokens", [1, 4])
async def test_a_stream_that_breaks_off_ends_with_an_error(tmp_path: Path, path: str, n_tokens: int) -> None:
    """What came before it is passed on; the slot comes back."""
    async with served(tmp_path) as it:
        it.fake.faults.disconnect_after_tokens(n_tokens, path)
        answer = await it.post(path, {**asked(path), "stream": True})
        sent = without_progress(bytes(it.fake.sent(path)[-1].answer))
        assert answer.status == 200
        assert answer.raw.startswith(sent) or path == "/v1/messages"  # whose numbers are put right
        assert len(answer.events) == sent.count(b"data: ") + 1 > n_tokens
        assert answer.error["code"] == 503
        assert "closed the connection" in answer.error["message"]
        await it.at_rest()
        await works(it)


@pytest.mark.parametrize("path", [CHAT, TEXT, NATIVE])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_stream_that_breaks_off_before_its_first_token_is_a_503(
    tmp_path: Path, path: str, stream: bool
) -> None:
    """Nothing but progress has come: there is a status left to tell it by, and when to come again."""
    async with served(tmp_path, batch=100) as it:
        it.fake.faults.disconnect_after_events(3)
        answer = (
            await it.chat(ONE, stream=stream) if path == CHAT else await it.ask(ONE, path=path, stream=stream)
        )
        assert (answer.status, answer.error["code"]) == (503, 503)
        assert "closed the connection" in answer.error["message"]
        assert int(answer.headers["Retry-After"]) >= 1
        await it.at_rest()
        await works(it)


@pytest.mark.parametrize("path", [CHAT, TEXT, NATIVE])
async def test_a_stream_that_breaks_off_is_no_answer_in_one_piece(tmp_path: Path, path: str) -> None:
    """Half of it was there; who does not stream gets a status and none of it."""
    async with served(tmp_path) as it:
        it.fake.faults.disconnect_after_tokens(4, path)
        answer = await it.post(path, asked(path))
        assert (answer.status, answer.error["code"]) == (503, 503)
        await it.at_rest()
        await works(it)


@pytest.mark.parametrize("path", [CHAT, NATIVE, "/v1/responses", "/v1/messages"])
async def test_an_answer_that_never_comes_is_a_503(tmp_path: Path, path: str) -> None:
    """The work was done, the answer lost: of one that no stream can give, for there it comes with the work."""
    whole: dict[str, Any] = {CHAT: {"logprobs": True}, NATIVE: {"n_probs": 1}}
    async with served(tmp_path) as it:
        it.fake.faults.disconnect_after_work(path)
        answer = await it.post(path, asked(path) | whole.get(path, {}))
        assert answer.status == 503
        await it.at_rest()
        await works(it)


async def test_half_an_answer_in_one_piece_never_looks_whole(tmp_path: Path) -> None:
    """What passes through and breaks off breaks off for the client too."""
    text = "x" * 200_000

    async def cut_short(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 400000\r\n\r\n" + text.encode()
        )
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(cut_short, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, served(tmp_path, wait=False, answers_at=url) as it:
        await it.start(wait=False)
        async with it.session.get(it.url + "/index.html") as response:
            assert response.status == 200
            received = bytearray()

            async def read() -> None:
                async for chunk in response.content.iter_any():
                    received.extend(chunk)

            with pytest.raises(aiohttp.ClientError):
                await read()
    assert bytes(received) == text.encode()[: len(received)]


@pytest.mark.parametrize("stream", [True, False])
async def test_the_servers_own_failure_is_passed_on(tmp_path: Path, stream: bool) -> None:
    """500 in its words; what the slot holds is not believed any more, and the next request is right."""
    async with served(tmp_path, slots=1) as it:
        await it.ask(ONE)
        it.fake.faults.fail_stream("failed to process speculative batch")
        answer = await it.ask(ONE + "more", stream=stream)
        assert answer.status == 500
        assert answer.error["message"] == "failed to process speculative batch"
        assert (await it.ask(ONE + "more")).text == right(it.fake, ONE + "more")


async def test_a_failure_after_some_tokens_is_the_servers_own_event(tmp_path: Path) -> None:
    """Passed on as it came, behind the tokens that were there."""
    async with served(tmp_path, slots=1) as it:
        it.fake.faults.fail_stream("failed to decode", after_tokens=2)
        answer = await it.ask(ONE, stream=True, n=8)
        assert answer.raw == without_progress(bytes(it.fake.sent(NATIVE)[-1].answer))
        assert len(answer.events) == 3
        assert answer.error["message"] == "failed to decode"
        assert (await it.ask(ONE + "more")).text == right(it.fake, ONE + "more")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_server_that_dies_in_a_prefill_is_said(tmp_path: Path, stream: bool) -> None:
    """One of llamaslot's own steps: the client hears of it at once, and later requests are served."""
    async with served(tmp_path, OWN_STEPS, batch=100) as it:
        it.fake.hold()
        async with it.asking(ONE, stream=stream) as asked:
            await it.fake.step(2)
            await it.fake.kill()
            answer = await asked
        assert answer.status == 503
        it.fake.go()
        await it.fake.start()
        await it.until(lambda: it.backend.health is Health.UP)
        await works(it)


# -- another process ---------------------------------------------------------------------------------------------------


async def test_a_restart_between_requests_is_noticed(tmp_path: Path) -> None:
    """What the slots held is gone: nothing is expected of them, and nobody notices but by time."""
    async with served(tmp_path) as it:
        await it.ask(ONE)
        await it.fake.restart()
        answer = await it.ask(ONE + "more")
        assert answer.text == right(it.fake, ONE + "more")
        assert answer.source == "cold"
        assert answer.n_reused == 0
        assert await it.count("backend_restarts_total") == 1
        assert await it.count("reuse_mispredictions_total") == 0


async def test_what_was_saved_survives_a_restart(tmp_path: Path) -> None:
    """It comes back from disk."""
    async with served(tmp_path, slots=1) as it:
        await it.ask(ONE)
        await it.ask(TWO)  # which saves ONE
        await it.saved()
        await it.fake.restart()
        answer = await it.ask(ONE + "more")
        assert answer.text == right(it.fake, ONE + "more")
        assert (answer.source, answer.timings["cache_n"]) == ("snapshot", answer.n_reused)
        assert answer.n_reused >= 800


@pytest.mark.idle_clock  # on a busy machine it would be found to be down before it is there again
async def test_those_who_wait_are_served_by_the_new_process(tmp_path: Path) -> None:
    """The one under way is told; the queue is not."""
    async with served(tmp_path, slots=1) as it, it.busy() as (first,), it.asking(ONE) as waiting:
        await it.until(lambda: it.pool.dispatcher.n_waiting == 1)
        await it.fake.restart()
        assert (await first).status == 503
        assert (await waiting).text == right(it.fake, ONE)
        assert await it.count("backend_restarts_total") == 1, "the new process is not taken for a lost one"


@pytest.mark.parametrize("chunk_threshold_s", [0, 3600])
async def test_a_restart_between_restore_and_run_gives_the_right_answer(
    tmp_path: Path, chunk_threshold_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slot that was restored is another process's now: nothing wrong is used, and the next one is right too."""
    async with served(tmp_path, {"prefill": {"chunk_threshold_s": chunk_threshold_s}}, slots=1) as it:
        await it.ask(ONE)
        await it.ask(TWO)
        restore = it.backend.executor._restore

        async def then_restart(*arguments: Any) -> bool:
            monkeypatch.undo()  # once: after a third restart the request would fail
            is_restored = await restore(*arguments)
            await it.fake.restart()
            return is_restored

        monkeypatch.setattr(it.backend.executor, "_restore", then_restart)
        answer = await it.ask(ONE + "more")
        assert answer.text == right(it.fake, ONE + "more")
        again = await it.ask(TWO + "more")
        assert again.text == right(it.fake, TWO + "more")
        assert await it.count("backend_restarts_total") == 1


@pytest.mark.parametrize("action", ["save", "erase", "restore"])
async def test_a_restart_in_the_middle_of_a_step_is_survived(tmp_path: Path, action: str) -> None:
    """The client is served by the new process or told to come again; what comes after is right."""
    async with served(tmp_path, slots=1) as it:
        await it.ask(ONE)
        await it.ask(TWO)
        hang = it.fake.faults.hang(action)
        async with it.asking(ONE + "more") as asked:
            await hang.reached.wait()
            hang.release()
            await it.fake.restart()
            answer = await asked
        assert answer.status in (200, 503)
        if answer.status == 200:
            assert answer.text == right(it.fake, ONE + "more")
        await it.until(lambda: it.backend.health is Health.UP)
        for text in (ONE, TWO):
            assert (await it.ask(text + "more")).text == right(it.fake, text + "more")


async def test_an_exchanged_model_never_uses_the_old_ones_snapshots(tmp_path: Path) -> None:
    """Same path, same shape, other weights: every answer is that of the new model, and the old one finds its own."""
    texts = [letters(n, 500) for n in range(4)]
    async with served(tmp_path, slots=1) as it:
        for model in (FakeModel(), FakeModel(weights="B"), FakeModel()):
            await it.fake.restart(model)
            await it.saved()
            before = {file.name for file in it.files()}
            answers = [await it.ask(text + "more") for text in texts]
            assert [answer.text for answer in answers] == [right(it.fake, text + "more") for text in texts]
            restored = {seen.body["filename"] for seen in it.fake.sent(action="restore")}
            if model.weights == "B":
                assert not restored & before
                assert {answer.source for answer in answers} == {"cold"}
            it.fake.requests.clear()
        assert restored & before


async def test_what_the_slots_hold_is_adopted_after_a_crash_of_llamaslot(tmp_path: Path) -> None:
    """Contexts that nobody had saved are read back out of the slots."""
    async with served(tmp_path, {"shutdown": {"save_s": 0}}) as it:
        slots = {(await it.ask(text)).slot for text in (ONE, TWO)}
        assert slots == {0, 1}
        assert it.files() == []
        await it.restart()
        for text in (ONE, TWO):
            answer = await it.ask(text + "more")
            assert answer.text == right(it.fake, text + "more")
            assert answer.n_reused >= 800


async def test_a_clean_stop_saves_what_is_not_saved(tmp_path: Path) -> None:
    """And the next llamaslot, in front of the next llama-server, finds it."""
    async with served(tmp_path) as it:
        for text in (ONE, TWO):
            await it.ask(text)
        await it.stop()
        assert len(it.files()) == 2
        await it.fake.restart()
        await it.start()
        for text in (ONE, TWO):
            answer = await it.ask(text + "more")
            assert (answer.source, answer.text) == ("snapshot", right(it.fake, text + "more"))


async def test_an_idle_backend_saves_by_itself(tmp_path: Path) -> None:
    """After ``store.idle_save_s`` without a request."""
    async with served(tmp_path, {"store": {"idle_save_s": 0.05}}) as it:
        await it.ask(ONE)
        await it.until(lambda: len(it.files()) == 1)
        await it.at_rest()
        answer = await it.ask(ONE + "more")
        assert (answer.source, answer.n_reused) == ("resident", 800)


async def test_a_running_answer_is_finished_when_llamaslot_stops(tmp_path: Path) -> None:
    """New ones are not taken; the stream that runs gets its end."""
    async with served(tmp_path, slots=1) as it:
        it.fake.hold()
        stepping = spawn(it.fake.step(3))
        async with it.streaming(ONE, n=8) as stream:
            await stepping
            await line_with(stream, "data:")
            stopping = spawn(it.stop())
            it.fake.go()
            await line_with(stream, '"stop":true')
        await stopping
        await it.start()
        await works(it)
