"""How long a request may take, and what becomes of a slot in which nothing happens any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.support.answers import Answer
from tests.support.inprocess import CHAT, NATIVE, Served, Settings, letters, right, served, spawn

pytestmark = pytest.mark.idle_clock
EMBEDDINGS, MESSAGES = "/v1/embeddings", "/v1/messages"


def limits(**timeouts: float) -> Settings:
    return {"timeouts": timeouts}


def is_told_too_late(answer: Answer, words: str) -> bool:
    """As a status while that is possible, else as an event."""
    error = answer.error if answer.status == 504 else answer.events[-1]["error"]
    return error["type"] == "timeout_error" and words in error["message"]


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_that_does_not_begin_in_time_is_given_up(tmp_path: Path, stream: bool) -> None:
    """504, in the queue as well as in the slot; the work is ended, and the next request is served."""
    async with served(tmp_path, limits(first_token_s=0.1), slots=1) as it:
        it.fake.hold()
        in_slot = await it.ask(letters(1, 300), stream=stream)
        async with it.asking(letters(2, 300)):
            in_queue = await it.ask(letters(3, 300), stream=stream)
        it.fake.go()
        await it.at_rest()
        assert is_told_too_late(in_slot, "not begun within 0.1 s")
        assert is_told_too_late(in_queue, "not begun within 0.1 s")
        assert (await it.ask(letters(4, 100))).text == right(it.fake, letters(4, 100))


async def test_an_answer_that_has_begun_may_go_on(tmp_path: Path) -> None:
    """The first limit is for the first token."""
    async with served(tmp_path, limits(first_token_s=0.5), slots=1) as it:
        it.fake.hold()
        stepping = spawn(it.fake.step(3))
        async with it.streaming(letters(1, 50), n=50) as answer:
            await stepping
            await asyncio.sleep(0.6)
            assert it.pool.dispatcher.leases
            it.fake.go()
            text = await answer.content.read()
        assert b'"stop":true' in text
        assert b"error" not in text


@pytest.mark.parametrize("stream", [True, False])
async def test_when_an_exclusive_answer_begins_is_unknown(tmp_path: Path, stream: bool) -> None:
    """So only the limit for its end holds: it is not cut off in the middle."""
    async with served(tmp_path, limits(first_token_s=0.2), slots=1, step_s=0.05) as it:
        messages = [{"role": "user", "content": [{"type": "what"}]}]
        answer = await it.post("/v1/messages", {"max_tokens": 12, "stream": stream, "messages": messages})
        assert answer.status == 200
        assert b"max_tokens" in answer.raw


async def test_when_an_unstreamed_answer_begins_is_unknown(tmp_path: Path) -> None:
    """Once it is asked for, only the whole of it is limited: of one that no stream can give."""
    async with served(tmp_path, limits(first_token_s=0.2), slots=1, step_s=0.02) as it:
        answer = await it.ask(letters(1, 50), n=20, n_probs=2)
        assert it.fake.sent(NATIVE)[-1].body.get("stream") is None
        assert (answer.status, answer.timings["predicted_n"]) == (200, 20)


async def test_nor_does_it_where_llamaslot_stands_aside(tmp_path: Path) -> None:
    """There every answer that is no stream comes in one piece. The wait for a slot is limited all the same."""
    async with served(tmp_path, limits(first_token_s=0.2), slots=2, step_s=0.02, unified=True) as it:
        assert it.backend.session is not None
        assert not it.backend.session.is_assisted
        answer = await it.ask(letters(1, 50), n=20)
        assert (answer.status, answer.timings["predicted_n"]) == (200, 20)
        async with it.busy(2):
            assert is_told_too_late(await it.ask(letters(3, 300)), "not begun within 0.2 s")


@pytest.mark.parametrize("path", [CHAT, NATIVE])
async def test_an_answer_that_does_not_end_in_time_is_given_up(tmp_path: Path, path: str) -> None:
    """A stream that has begun ends with an error event."""
    async with served(tmp_path, limits(total_s=0.2), slots=1, step_s=0.02) as it:
        if path == CHAT:
            answer = await it.chat(letters(1, 50), n=2000, stream=True)
        else:
            answer = await it.ask(letters(1, 50), n=2000, stream=True)
        assert answer.status == 200
        assert len(answer.events) > 2
        assert is_told_too_late(answer, "not ended within 0.2 s")


async def test_a_slot_in_which_nothing_happens_is_given_up_and_emptied(tmp_path: Path) -> None:
    """llama-server says nothing of a prompt: 504, counted, and what the slot holds is not believed in."""
    async with served(tmp_path, limits(watchdog_s=0.15), slots=1) as it:
        text = letters(1, 300)
        assert (await it.ask(text)).status == 200
        it.fake.hold()
        wedged = await it.ask(text + letters(2, 50), stream=True)
        assert is_told_too_late(wedged, "sent nothing for 0.15 s")
        it.fake.go()
        await it.at_rest()
        n_erased = len(it.fake.sent(action="erase"))
        assert (await it.ask(text)).n_reused == 0
        assert len(it.fake.sent(action="erase")) == n_erased + 1
        assert await it.count("slots_wedged_total") == 1


async def test_a_prefill_of_llamaslots_own_is_watched_too(tmp_path: Path) -> None:
    """The slot that it is computed in is the one that is given up."""
    settings = {**limits(watchdog_s=0.15), "prefill": {"chunk_threshold_s": 0}}
    async with served(tmp_path, settings, slots=1) as it:
        it.fake.hold()
        wedged = await it.ask(letters(1, 300))
        assert is_told_too_late(wedged, "sent nothing for 0.15 s")
        it.fake.go()
        await it.at_rest()
        assert await it.count("slots_wedged_total") == 1
        assert (await it.ask(letters(1, 300))).n_reused == 0


async def test_answers_in_one_piece_may_be_silent_until_their_end(tmp_path: Path) -> None:
    """Nothing is told of them on the way: of one that no stream can give."""
    settings = limits(watchdog_s=0.15)
    async with served(tmp_path, settings, slots=2, step_s=0.02) as it:
        answer = await it.ask(letters(1, 50), n=20, n_probs=2)
        assert it.fake.sent(NATIVE)[-1].body.get("stream") is None
        assert answer.status == 200


def unreadable(text: str, n: int = 4, **more: Any) -> dict[str, Any]:
    """A body whose tokens nobody knows: it takes a turn, and its answer is relayed."""
    content = [{"type": "text", "text": text}, {"type": "what"}]
    return {"max_tokens": n, "messages": [{"role": "user", "content": content}], **more}


def ends_with_an_error(answer: Answer, words: str) -> bool:
    """In Anthropic's words, behind whole events."""
    *before, last, rest = answer.raw.split(b"\n\n")
    begins = all(event.startswith(b"event: ") for event in before)
    return (
        begins and last.startswith(b"event: error\ndata: ") and not rest and is_told_too_late(answer, words)
    )


async def test_a_stream_that_is_relayed_ends_with_an_error_too(tmp_path: Path) -> None:
    """As the route words it; the slot is served again."""
    async with served(tmp_path, limits(total_s=0.3), slots=1, step_s=0.02) as it:
        answer = await it.post(MESSAGES, unreadable(letters(1, 50), 2000, stream=True))
        assert (answer.status, len(answer.events) > 3) == (200, True)
        assert ends_with_an_error(answer, "not ended within 0.3 s")
        await it.at_rest()
        assert (await it.ask(letters(4, 100))).text == right(it.fake, letters(4, 100))


@pytest.mark.parametrize("stream", [True, False])
async def test_what_is_relayed_is_watched(tmp_path: Path, stream: bool) -> None:
    """llama-server works at it, says nothing, and gets no further: 504, counted, and the slot is not believed in."""
    async with served(tmp_path, limits(watchdog_s=0.2), slots=1) as it:
        it.fake.hold()
        wedged = await it.post(MESSAGES, unreadable(letters(1, 50), stream=stream))
        assert wedged.status == 504
        assert is_told_too_late(wedged, "sent nothing for 0.2 s")
        assert await it.count("slots_wedged_total") == 1
        it.fake.go()
        await it.at_rest()
        assert (await it.ask(letters(4, 100))).text == right(it.fake, letters(4, 100))


async def test_a_stream_that_is_relayed_and_falls_silent_ends_with_an_error(tmp_path: Path) -> None:
    """Nothing else can tell its client."""
    async with served(tmp_path, limits(watchdog_s=0.2), slots=1) as it:
        it.fake.hold()
        asked = spawn(it.post(MESSAGES, unreadable(letters(1, 50), 50, stream=True)))
        await it.fake.step(3)
        answer = await asked
        assert answer.status == 200
        assert ends_with_an_error(answer, "sent nothing for 0.2 s")
        assert await it.count("slots_wedged_total") == 1
        it.fake.go()
        await it.at_rest()


@pytest.mark.parametrize("stream", [True, False])
async def test_what_is_relayed_may_take_long(tmp_path: Path, stream: bool) -> None:
    """Of its prompt nothing is told, but /slots shows that it is computed; the same of an answer in one piece."""
    async with served(tmp_path, limits(watchdog_s=0.4), slots=1, batch=50, step_s=0.05) as it:
        answer = await it.post(MESSAGES, unreadable(letters(1, 800), 12, stream=stream))
        assert answer.status == 200
        assert b"max_tokens" in answer.raw
        assert await it.count("slots_wedged_total") == 0


async def test_what_is_relayed_may_wait_for_its_slot(tmp_path: Path) -> None:
    """Inside llama-server, as long as others have all of them."""
    async with served(tmp_path, limits(watchdog_s=0.2), slots=1, step_s=0.02) as it:
        async with it.streaming(letters(1, 50), n=40) as other:
            await other.content.readany()
            answer = await it.post(MESSAGES, unreadable(letters(2, 50), stream=True))
            assert b'"stop":true' in await other.content.read()
        assert answer.status == 200
        assert b"message_stop" in answer.raw


@pytest.mark.parametrize("is_large", [False, True])
async def test_half_an_event_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_large: bool
) -> None:
    """It is held until it is whole. One that is too large for that is sent, and its connection cut."""

    over = asyncio.Event()

    async def events() -> AsyncIterator[bytes]:
        yield b"data: 1\n\ndata: 2"
        yield b"\r\n\r\ndata: " + b"3" * (100_000 if is_large else 10)
        await over.wait()

    async def answer(body: Any) -> web.Response:
        return web.Response(body=events(), content_type="text/event-stream")

    async with served(tmp_path, limits(total_s=0.3), slots=1) as it:
        await embeds(it, monkeypatch)
        monkeypatch.setattr(it.fake.routes, "embeddings", answer)
        if is_large:
            with pytest.raises(aiohttp.ClientPayloadError):
                await it.post(EMBEDDINGS, {"input": "x"})
        else:
            raw = (await it.post(EMBEDDINGS, {"input": "x"})).raw
            assert raw.startswith(b'data: 1\n\ndata: 2\r\n\r\ndata: {"error":')
            assert raw.endswith(b"\n\n")
        over.set()
        await it.at_rest()


async def embeds(it: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake answers embeddings, and llamaslot knows that."""

    async def answer(body: Any) -> web.Response:
        return web.json_response({"data": []})

    monkeypatch.setattr(it.fake.routes, "embeddings", answer)
    assert (await it.post(EMBEDDINGS, {"input": "x"})).status == 200


async def test_what_takes_a_turn_has_the_same_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings, for one: 504, and everybody else is served again."""
    async with served(tmp_path, limits(total_s=0.2), slots=1) as it:
        await embeds(it, monkeypatch)
        hang = it.fake.faults.hang(EMBEDDINGS)
        assert is_told_too_late(await it.post(EMBEDDINGS, {"input": "x"}), "not ended within 0.2 s")
        hang.release()
        await it.at_rest()
        assert (await it.ask(letters(4, 100))).text == right(it.fake, letters(4, 100))


async def test_the_first_token_of_an_exclusive_request_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So only the whole of it is limited."""
    async with served(tmp_path, limits(first_token_s=0.05), slots=1) as it:
        await embeds(it, monkeypatch)
        hang = it.fake.faults.hang(EMBEDDINGS)
        asked = spawn(it.post(EMBEDDINGS, {"input": "x"}))
        await hang.reached.wait()
        await asyncio.sleep(0.1)
        hang.release()
        assert (await asked).status == 200
