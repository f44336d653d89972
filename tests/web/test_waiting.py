"""What a client hears while it waits: headers and comments early, and an event for what fails after them."""

from __future__ import annotations

import asyncio
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.support.answers import Answer, without_progress
from tests.support.inprocess import CHAT, NATIVE, TEXT, Served, letters, line_with, right, served, spawn

SOON = {"stream": {"keepalive_s": 0.02}}
OWN_STEPS = {**SOON, "prefill": {"chunk_threshold_s": 0}}


async def test_the_queue_tells_its_places(tmp_path: Path) -> None:
    """``: queued 1`` for the one who is next, ``: queued 2`` behind it; who moves up is told so."""
    async with served(tmp_path, SOON, slots=1) as it, it.busy() as (first,):
        async with it.streaming(letters(2, 200)) as second, it.streaming(letters(3, 200)) as third:
            await line_with(second, ": queued 1")
            await line_with(third, ": queued 2")
            it.fake.go()
            await line_with(third, '"stop":true')
            await line_with(second, '"stop":true')
        assert (await first).status == 200


async def test_headers_that_went_early_are_told_again_as_comments(tmp_path: Path) -> None:
    """The HTTP headers carry the request's id only; what was found out later comes as comments."""
    async with served(tmp_path, SOON, slots=1) as it, it.busy(), it.streaming(letters(2, 200)) as stream:
        assert stream.status == 200
        assert stream.content_type == "text/event-stream"
        assert stream.headers["Cache-Control"] == "no-cache"
        assert "x-request-id" in stream.headers
        assert "x-llamaslot-slot" not in stream.headers
        await line_with(stream, ": queued 1")
        it.fake.go()
        assert await line_with(stream, "x-llamaslot-slot") == ": x-llamaslot-slot: 0"
        assert await line_with(stream, "x-llamaslot-prompt") == ": x-llamaslot-prompt-tokens: 200"
        assert await line_with(stream, "x-llamaslot-source") == ": x-llamaslot-source: cold"
        assert await line_with(stream, "x-llamaslot-reused") == ": x-llamaslot-reused-tokens: 0"
        await line_with(stream, '"stop":true')


async def test_headers_come_at_once_where_no_request_waits(tmp_path: Path) -> None:
    """As HTTP headers, on streams and on answers in one piece, and no comment at all."""
    async with served(tmp_path) as it:
        for stream in (True, False):
            answer = await it.ask(letters(1, 200), stream=stream)
            assert answer.comments == [] or not stream
            assert answer.headers["x-llamaslot-prompt-tokens"] == "200"
            assert answer.headers["x-request-id"].startswith("req-")
            assert answer.slot in (0, 1)
        assert answer.source == "resident"
        assert answer.n_reused == 199


async def test_the_clients_own_request_id_is_told(tmp_path: Path) -> None:
    """So that both logs can be read together."""
    async with served(tmp_path) as it:
        answer = await it.post(NATIVE, {"prompt": "hello", "n_predict": 1}, **{"X-Request-Id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"


async def hot_and_saved(it: Served) -> None:
    """User 1's context is on disk, user 2's in the only slot."""
    await it.ask(letters(1, 800))
    await it.ask(letters(2, 800))
    await it.saved()
    assert len(it.files()) == 1


@pytest.mark.parametrize(
    ("action", "said"), [("save", "saving"), ("erase", "restoring"), ("restore", "restoring")]
)
async def test_a_restore_is_told(tmp_path: Path, action: str, said: str) -> None:
    """``: saving`` while the victim is saved, ``: restoring`` until the context is back."""
    async with served(tmp_path, SOON, slots=1) as it:
        await hot_and_saved(it)
        hang = it.fake.faults.hang(action)
        async with it.streaming(letters(1, 800) + "more") as stream:
            await line_with(stream, f": {said}")
            hang.release()
            assert await line_with(stream, "x-llamaslot-source") == ": x-llamaslot-source: snapshot"
            await line_with(stream, '"stop":true')
        assert it.fake.sent(NATIVE)[-1].tasks[0].n_cache >= 800


async def test_a_prefill_tells_how_far_it_is(tmp_path: Path) -> None:
    """``: prefill 100 of 1000`` after the first batch, and so on."""
    async with served(tmp_path, OWN_STEPS, slots=1, batch=100) as it:
        it.fake.hold()
        async with it.streaming(letters(1, 1000)) as stream:
            await it.fake.wait_for(lambda f: f.slots[0].is_processing)
            for n in (100, 200, 300):
                await it.fake.step()
                await line_with(stream, f": prefill {n} of 1000")
            it.fake.go()
            await line_with(stream, '"stop":true')


async def test_the_later_of_two_prefills_waits_for_its_turn(tmp_path: Path) -> None:
    """One at a time per backend."""
    async with served(tmp_path, OWN_STEPS, batch=100) as it:
        it.fake.hold()
        async with it.streaming(letters(1, 1000)) as first, it.streaming(letters(2, 1000)) as second:
            await it.fake.wait_for(lambda f: any(slot.is_processing for slot in f.slots))
            await line_with(second, ": waiting to prefill 1000 tokens")
            assert sum(slot.is_processing for slot in it.fake.slots) == 1
            it.fake.go()
            await line_with(first, '"stop":true')
            await line_with(second, '"stop":true')


async def test_a_slow_server_is_told_too(tmp_path: Path) -> None:
    """The request has been sent, and nothing comes."""
    async with served(tmp_path, SOON) as it:
        it.fake.hold()
        async with it.streaming(letters(1, 100)) as stream:
            await line_with(stream, ": waiting for llama-server")
            it.fake.go()
            await line_with(stream, '"stop":true')


@pytest.mark.parametrize("path", [CHAT, TEXT, NATIVE])
async def test_what_follows_the_comments_is_what_the_server_sent(tmp_path: Path, path: str) -> None:
    """Byte by byte; its progress is what the comments tell."""
    text = letters(1, 300)
    async with served(tmp_path, SOON, slots=1) as it:
        asked = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
        body = {**asked, "stream": True, "n_predict": 8, "max_tokens": 8}
        async with it.busy(), it.session.post(it.url + path, json=body) as stream:
            await line_with(stream, ": queued 1")
            it.fake.go()
            rest = await stream.read()
    kept = b"".join(line for line in rest.splitlines(keepends=True) if not line.startswith(b": "))
    assert kept == without_progress(bytes(it.fake.sent(path)[-1].answer))


async def test_comments_can_be_switched_off(tmp_path: Path) -> None:
    """Then headers wait for the answer, and tell everything."""
    silent = {"stream": {"keepalive_s": 0.01, "comments": False}}
    text = letters(2, 200)
    async with (
        served(tmp_path, silent, slots=1) as it,
        it.busy() as (first,),
        it.asking(text, stream=True) as second,
    ):
        await it.until(lambda: it.pool.dispatcher.n_waiting == 1)
        many = itertools.count()
        await it.until(lambda: next(many) > 10)  # several times keepalive_s
        it.fake.go()
        await first
        answer = await second
    assert answer.comments == []
    assert answer.slot == 0
    assert answer.text == right(it.fake, text)


async def test_answers_in_one_piece_wait_without_a_word(tmp_path: Path) -> None:
    """JSON has no comments."""
    async with served(tmp_path, SOON, slots=1) as it, it.busy(), it.asking(letters(2, 200)) as second:
        await it.until(lambda: it.pool.dispatcher.n_waiting == 1)
        it.fake.go()
        answer = await second
    assert answer.text == right(it.fake, letters(2, 200))


async def test_what_fails_after_early_headers_is_an_event(tmp_path: Path) -> None:
    """llama-server's own error, with its own status in it; then the stream ends."""
    async with served(tmp_path, SOON) as it:
        it.fake.hold()
        it.fake.faults.fail_stream("out of luck")
        async with it.streaming(letters(1, 100)) as stream:
            await line_with(stream, ": waiting for llama-server")
            it.fake.go()
            assert "out of luck" in await line_with(stream, '"error"')
            assert await stream.read() == b"\n"


async def test_waiting_too_long_after_early_headers_is_an_event(tmp_path: Path) -> None:
    """What would have been a 503."""
    impatient = {**SOON, "queue": {"max_wait_s": 0.15}}
    async with served(tmp_path, impatient, slots=1) as it, it.busy():
        answer = await it.ask(letters(2, 100), stream=True)
        it.fake.go()
    assert answer.status == 200
    assert answer.comments[0] == "queued 1"
    assert answer.error["code"] == 503
    assert "no slot became free" in answer.error["message"]


async def test_what_fails_before_any_headers_is_a_status(tmp_path: Path) -> None:
    """Also of a streaming request."""
    async with served(tmp_path) as it:
        it.fake.faults.fail("/v1/completions", 418, "no tea")
        answer = await it.ask("hello", path=TEXT, stream=True)
    assert answer.status == 418
    assert answer.error["message"] == "no tea"


async def test_a_client_that_does_not_read_its_comments_does_not_hold_up_others(tmp_path: Path) -> None:
    """Its own buffer fills; everybody else is served."""
    async with served(tmp_path, {"stream": {"keepalive_s": 0.001}}, slots=2) as it:
        it.fake.hold()
        async with it.streaming(letters(1, 100)) as lazy:
            await it.fake.wait_for(lambda f: any(slot.is_processing for slot in f.slots))
            other = spawn(it.ask(letters(2, 100)))
            await it.fake.wait_for(lambda f: all(slot.is_processing for slot in f.slots))
            it.fake.go()
            assert (await asyncio.wait_for(other, 10)).status == 200
            await lazy.read()


# -- what is told before it is known -------------------------------------------------------------------------------

LOST = letters(7, 30)  # so little that another place is not looked for
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"


def asked_of(path: str, text: str, *, stream: bool) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    match path:
        case "/v1/messages":
            return {"model": "any", "messages": messages, "max_tokens": 4, "stream": stream}
        case "/v1/responses":
            return {"input": text, "max_output_tokens": 4, "stream": stream}
        case _:
            return {"messages": messages, "max_tokens": 4, "stream": stream}


@pytest.mark.parametrize("how", ["whole", "stream", "early stream"])
@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
async def test_what_is_told_of_reuse_is_what_was_reused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, path: str, how: str
) -> None:
    """A slot was emptied behind llamaslot's back, as it is after a sleep: header and comment do not say what was
    expected of it, but what llama-server has found. Headers that go before it says so call it expected."""
    caplog.set_level(logging.INFO)
    body, is_early = asked_of(path, LOST, stream=how != "whole"), how == "early stream"
    async with served(tmp_path, SOON if is_early else {}, slots=1) as it:
        await it.post(path, asked_of(path, LOST, stream=False))
        await it.at_rest()
        caplog.clear()
        await it.send("POST", "/slots/0?action=erase", to=it.fake.url)
        if is_early:
            it.fake.hold()
        async with it.session.post(it.url + path, json=body) as response:  # the headers have come
            it.fake.go()
            answer = Answer(response.status, response.headers, await response.read())
    if (
        path == RESPONSES and how != "whole"
    ):  # tells at its end only what was reused, as builds without progress do
        assert int(answer.told["x-llamaslot-expected-tokens"]) > 0
    else:
        assert (answer.source, answer.n_reused) == ("cold", 0)
    assert "resident" not in str(answer.told)
    assert "(resident)" not in caplog.text
