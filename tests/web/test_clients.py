"""What the clients' own libraries make of what llamaslot adds to a stream: comments, and errors in the middle."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any, cast

import pytest

from tests.support.fake_agents import Messages
from tests.support.inprocess import CHAT, PATIENCE_S, Served, letters, served, spawn
from tests.support.sdk import Imported

pytestmark = pytest.mark.xdist_group("clients")  # imported once

anthropic, openai = Imported("anthropic"), Imported("openai")
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
TURNS: Any = [{"role": "user", "content": letters(1, 200)}]


async def read(it: Served, path: str) -> list[Any]:
    """The events of a stream, by the library of its route. Each request has a connection of its own."""
    made: dict[str, Any] = {"max_retries": 0, "timeout": PATIENCE_S, "api_key": "unused"}
    close = {"Connection": "close"}
    if path == MESSAGES:
        async with anthropic.AsyncAnthropic(base_url=it.url, default_headers=close, **made) as claude:
            stream = await claude.messages.create(model="any", messages=TURNS, max_tokens=8, stream=True)
            return [event async for event in stream]
    async with openai.AsyncOpenAI(base_url=it.url + "/v1", default_headers=close, **made) as client:
        if path == CHAT:
            chunks = await client.chat.completions.create(
                model="any", messages=TURNS, max_tokens=8, stream=True
            )
            return [chunk async for chunk in chunks]
        events = await client.responses.create(model="any", input=TURNS, max_output_tokens=8, stream=True)
        return [event async for event in events]


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
async def test_a_stream_that_breaks_off_is_an_error_of_the_client(tmp_path: Path, path: str) -> None:
    """Not an answer that is only shorter."""
    async with served(tmp_path) as it:
        it.fake.faults.disconnect_after_tokens(3, path)
        with pytest.raises((openai.APIError, anthropic.APIError), match="closed the connection"):
            await read(it, path)


@pytest.mark.parametrize("is_refused", [True, False])
@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
async def test_an_error_in_a_stream_is_raised_with_its_type(
    tmp_path: Path, path: str, is_refused: bool
) -> None:
    """A refusal that comes after comments, and llama-server's own error between two tokens."""
    async with served(tmp_path, {"stream": {"keepalive_s": 0.005}}, slots=1) as it:
        hang = it.fake.faults.hang(path)
        if is_refused:
            it.fake.faults.refuse(path, "no such luck", "invalid_request_error")
        else:
            for _ in range(1 + (path == MESSAGES)):  # whose slot is made ready by a request without an answer
                it.fake.faults.fail_stream("no such luck", after_tokens=2)
        reader = spawn(read(it, path))
        await asyncio.wait_for(hang.reached.wait(), PATIENCE_S)
        await asyncio.sleep(0.03)  # several times keepalive_s
        hang.release()
        with pytest.raises((openai.APIError, anthropic.APIError), match="no such luck") as raised:
            await reader
    error, body = raised.value, cast(dict[str, Any], raised.value.body)
    kind = "invalid_request_error" if is_refused else "api_error" if path == MESSAGES else "server_error"
    assert (body["error"]["type"] if path == MESSAGES else error.type) == kind


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
async def test_comments_disturb_no_client(tmp_path: Path, path: str) -> None:
    """A client that waits in the queue, and is told so, reads the same events as one that need not wait."""
    async with served(tmp_path, {"stream": {"keepalive_s": 0.005}}, slots=1) as it:
        n_events, many = len(await read(it, path)), itertools.count()
        async with it.busy():
            reader = spawn(read(it, path))
            await it.until(lambda: it.pool.dispatcher.n_waiting == 1)
            await it.until(lambda: next(many) > 10)  # several times keepalive_s
            it.fake.go()
            assert len(await reader) == n_events


async def test_a_stream_of_messages_has_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the first token is half a character llama-server leaves it out, and its client fails: it is put in."""
    real = Messages.token

    def token(self: Messages, *arguments: Any) -> bytes:
        told = real(self, *arguments)
        return told.partition(b"\n\n")[2] if told.startswith(b"event: message_start") else told

    async with served(tmp_path) as it:
        whole = await read(it, MESSAGES)
        monkeypatch.setattr(Messages, "token", token)
        mended = await read(it, MESSAGES)
    assert [event.type for event in mended] == [event.type for event in whole]
    counts = [event.message.usage for event in (whole[0], mended[0])]
    assert len({count.input_tokens + count.cache_read_input_tokens for count in counts}) == 1
