"""Everything that llamaslot puts into a stream, held against a reader as strict as the strictest clients."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.support.answers import Answer
from tests.support.inprocess import CHAT, NATIVE, TEXT, Served, letters, served, spawn
from tests.support.strict import Event, strict

MESSAGES, RESPONSES, INFILL = "/v1/messages", "/v1/responses", "/infill"
PATHS = [CHAT, TEXT, NATIVE, INFILL, RESPONSES, MESSAGES]
SOON = {"stream": {"keepalive_s": 0.005}}
OWN_STEPS = {**SOON, "prefill": {"chunk_threshold_s": 0}}
LAST = {
    CHAT: "[DONE]", TEXT: "[DONE]", NATIVE: '"stop":true', INFILL: '"stop":true', RESPONSES: "response.completed",
    MESSAGES: "message_stop",
}  # fmt: skip


def body_of(path: str, text: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": text}]
    asked: dict[str, dict[str, Any]] = {
        CHAT: {"messages": turns, "max_tokens": 6},
        TEXT: {"prompt": text, "max_tokens": 6},
        NATIVE: {"prompt": text, "n_predict": 6},
        INFILL: {"input_prefix": text, "input_suffix": "", "n_predict": 6},
        RESPONSES: {"input": turns, "max_output_tokens": 6},
        MESSAGES: {"messages": turns, "max_tokens": 6},
    }
    return {"model": "any", **asked[path], "stream": True, **more}


@contextlib.asynccontextmanager
async def busy(it: Served, path: str) -> AsyncIterator[None]:
    """The only slot is at work for somebody else. What llamaslot finds out with a route's first request is known."""
    await it.post(path, body_of(path, letters(9, 100)))
    async with it.busy() as (other,):
        await it.fake.step()
        yield
        it.fake.go()
        await other


def check(answer: Answer, path: str) -> list[Event]:
    """It is whole, and a strict reader can read it."""
    events = strict(answer.raw)
    assert LAST[path] in events[-1].data, events[-1]
    return events


@pytest.mark.parametrize("path", PATHS)
async def test_what_a_client_hears_while_it_waits_is_no_event(tmp_path: Path, path: str) -> None:
    """In the queue, and when headers have gone before its place was known: comments, each before some event."""
    async with served(tmp_path, SOON, slots=1) as it, busy(it, path):
        reader = spawn(it.post(path, body_of(path, letters(2, 300))))
        await it.until(lambda: it.pool.dispatcher.n_waiting == 1)
        await asyncio.sleep(0.03)  # some times keepalive_s
        it.fake.go()
        answer = await reader
    events = check(answer, path)
    comments = [comment for event in events for comment in event.comments]
    assert comments[0] == "queued 1"
    assert "x-llamaslot-slot: 0" in comments
    assert answer.raw.count(b"\n\n") == len(events)


@pytest.mark.parametrize("wants_progress", [False, True])
@pytest.mark.parametrize("path", PATHS)
async def test_what_a_client_hears_of_its_prefill(tmp_path: Path, path: str, wants_progress: bool) -> None:
    """A save, a restore and a prefill of llamaslot's own, then events of llama-server's, with comments in between."""
    more = {"return_progress": True} if wants_progress else {}
    async with served(tmp_path, OWN_STEPS, slots=1, batch=100) as it:
        await it.post(path, body_of(path, letters(9, 100)))
        await it.post(path, body_of(path, letters(1, 800)))
        await it.post(path, body_of(path, letters(2, 800)))
        it.fake.hold()
        reader = spawn(it.post(path, body_of(path, letters(1, 800) + letters(3, 500), **more)))
        for _ in range(3):
            await it.fake.step()
            await asyncio.sleep(0.015)
        it.fake.go()
        events = check(await reader, path)
    comments = [comment for event in events for comment in event.comments]
    assert path == INFILL or any(
        comment.startswith("prefill ") for comment in comments
    )  # a batch of it is all
    told = any("prompt_progress" in event.data for event in events)
    assert told == (wants_progress and path not in (RESPONSES, MESSAGES))


async def test_a_list_of_prompts(tmp_path: Path) -> None:
    """Each of them waits and is computed by itself; their comments come at once."""
    prompts = [letters(1, 300), letters(2, 300)]
    async with served(tmp_path, OWN_STEPS, slots=1, batch=100) as it, it.busy():
        reader = spawn(it.post(TEXT, body_of(TEXT, "", prompt=prompts)))
        await it.until(lambda: it.pool.dispatcher.n_waiting == 1)
        await asyncio.sleep(0.03)
        it.fake.go()
        events = check(await reader, TEXT)
    indices = [orjson.loads(event.data)["choices"][0]["index"] for event in events[:-1]]
    assert set(indices) == {0, 1}
    comments = [comment for event in events for comment in event.comments]
    assert comments[0] == "queued 1"
    assert comments.count("x-llamaslot-prompt-tokens: 300") == 2


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["fails", "breaks", "waits", "refused"])
async def test_an_error_is_an_event_that_the_clients_of_its_route_know(
    tmp_path: Path, path: str, kind: str
) -> None:
    """llama-server's own in the middle, a connection that breaks, a wait that is too long, and a refusal that comes
    only when the client has been told to wait."""
    settings = {**SOON, "queue": {"max_wait_s": 0.05}} if kind == "waits" else SOON
    async with served(tmp_path, settings, slots=1) as it, busy(it, path):
        reader = spawn(it.post(path, body_of(path, letters(2, 300))))
        await it.until(lambda: it.pool.dispatcher.n_waiting == 1)
        await asyncio.sleep(0.02)
        if kind == "fails":
            for _ in range(1 + (path == MESSAGES)):  # whose slot is made ready by a request without an answer
                it.fake.faults.fail_stream("out of luck", after_tokens=2)
        elif kind == "breaks":
            it.fake.faults.disconnect_after_tokens(3, path)
        elif kind == "refused":
            it.fake.faults.fail(path, 400, "no such luck")
        if kind != "waits":
            it.fake.go()
        answer = await reader
    assert answer.status == 200
    *events, last = strict(answer.raw)
    said = {
        "fails": "out of luck",
        "breaks": "closed the connection",
        "waits": "no slot",
        "refused": "no such luck",
    }
    payload = orjson.loads(last.data)
    assert said[kind] in payload["error"]["message"]
    assert not any("error" in orjson.loads(event.data) for event in events)
    if path == RESPONSES:
        assert last.name == payload["type"] == "response.failed"
        response = payload["response"]
        assert response["status"] == "failed"
        assert response["error"]["code"] == ("invalid_prompt" if kind == "refused" else "server_error")
        assert said[kind] in response["error"]["message"]
        assert isinstance(payload["sequence_number"], int)
        created = [orjson.loads(event.data) for event in events if event.name == "response.created"]
        assert response["id"] == (created[0]["response"]["id"] if created else response["id"])
        assert bool(created) == (kind in ("fails", "breaks"))
    elif path == MESSAGES:
        assert last.name == payload["type"] == "error"
        of = {"fails": "api_error", "breaks": "overloaded_error", "waits": "overloaded_error"}
        assert payload["error"]["type"] == of.get(kind, "invalid_request_error")
    else:
        assert last.name == ""
        assert payload.keys() == {"error"}
