"""A client that reads slowly holds little of its answer here, however long that is, and nobody else waits for it."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from llamaslot.http.aiohttp_connection import Connection
from llamaslot.llama.transport.connection import ServerConnection
from tests.support.inprocess import CHAT, NATIVE, PATIENCE_S, Served, letters, served, spawn
from tests.support.wire import request, upstream, wire

HELD_BYTES = 256 << 10
KERNEL_BYTES = 512 << 10  # of both connections, with windows as small as here, and of client and server
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"' + b"x" * 900 + b'"}}]}\n\n'
TOTAL = 24 << 20


def n_held() -> int:
    """What llamaslot has read of answers and not sent yet: in the buffers of both sides."""
    found = gc.get_objects()
    clients = [one.transport for one in found if isinstance(one, Connection) and one.transport is not None]
    readers = [one for one in found if isinstance(one, ServerConnection)]
    return sum(one.get_write_buffer_size() for one in clients) + sum(one._n_held for one in readers)


def narrow(transport: Any) -> None:
    """Let the kernel keep little of what this upstream has sent."""
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 15)


async def stands_still(n_sent: Callable[[], int]) -> int:
    """What was sent when nothing more is taken."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            before = n_sent()
            await asyncio.sleep(0.2)
            if n_sent() == before > 0:
                return before


def streaming(it: Served, n_sent: list[int]) -> Callable[..., Awaitable[Any]]:
    """In place of the fake's completions: a stream of many MiB."""

    async def answer(asked: web.Request, seen: Any, body: Any) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(asked)
        narrow(asked.transport)
        while n_sent[0] < TOTAL:
            await response.write(EVENT)
            n_sent[0] += len(EVENT)
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    return answer


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
async def test_a_stream_that_is_not_read(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-server is not read either; a second client is served meanwhile; and what was held back comes."""
    async with served(tmp_path) as it:
        n_sent = [0]
        quick = it.fake.routes.completions.answer
        slow = streaming(it, n_sent)

        async def answer(asked: Any, seen: Any, body: Any) -> Any:
            return await (slow if seen.path == path else quick)(asked, seen, body)

        monkeypatch.setattr(it.fake.routes.completions, "answer", answer)
        body = b'{"stream": true, "max_tokens": 9, "messages": [{"role": "user", "content": "hello"}]}'
        async with wire(it, window=1 << 15) as slow_one:
            await slow_one.send(request("POST", path, body, "Content-Type: application/json"))
            await slow_one.head()
            n_left = await stands_still(lambda: n_sent[0])
            assert n_left < HELD_BYTES + KERNEL_BYTES
            assert 0 < n_held() < HELD_BYTES
            assert (await it.ask(letters(1, 50), path=NATIVE)).status == 200
            n_read = 0
            while n_read < n_left + (4 << 20):
                async with asyncio.timeout(PATIENCE_S):
                    n_read += len(await slow_one.reader.read(1 << 16))


async def test_a_large_answer_that_passes_through_is_not_held(tmp_path: Path) -> None:
    """Embeddings, files: as they come, whether a slot is behind them or not."""
    n_sent = [0]

    async def large(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET /index.html"):
            return
        narrow(writer)
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {TOTAL}\r\n\r\n"
        writer.write(head.encode())
        while n_sent[0] < TOTAL:
            writer.write(b"x" * 4096)
            await writer.drain()
            n_sent[0] += 4096

    async with upstream(large) as url, served(tmp_path, wait=False, answers_at=url) as it:
        await it.start(wait=False)
        async with wire(it, window=1 << 15) as client:
            await client.send(request("GET", "/index.html"))
            await client.head()
            n_left = await stands_still(lambda: n_sent[0])
            assert n_left < HELD_BYTES + KERNEL_BYTES
            assert 0 < n_held() < HELD_BYTES
        received = 0
        n_sent[0] = 0
        async with aiohttp.request("GET", it.url + "/index.html") as response:
            async for piece in response.content.iter_any():
                received += len(piece)
        assert received == TOTAL


async def test_a_large_answer_does_not_stand_still(tmp_path: Path) -> None:
    """Of a server that hands the kernel as much as that takes."""
    n_pieces, piece = 8, b"x" * (1 << 20)

    async def large(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET /index.html"):
            return
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {n_pieces * len(piece)}\r\n\r\n".encode())
        for _ in range(n_pieces):
            writer.write(piece)
            await writer.drain()

    async with upstream(large) as url, served(tmp_path, wait=False, answers_at=url) as it:
        await it.start(wait=False)
        async with asyncio.timeout(PATIENCE_S):
            assert len((await it.get("/index.html")).raw) == n_pieces * len(piece)


async def test_a_whole_answer_of_a_turn_comes_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slot is given back before its last piece is sent: a client may hang up at once after that."""
    async with served(tmp_path, slots=1) as it:

        async def answer(asked: web.Request, seen: Any, body: Any) -> web.Response:
            return web.Response(body=b"[" + b"1," * (1 << 20) + b"1]", content_type="application/json")

        monkeypatch.setattr(it.fake.routes.completions, "answer", answer)
        body = {"max_tokens": 2, "messages": [{"role": "user", "content": [{"type": "what"}]}]}
        asked = spawn(it.post("/v1/messages", body))
        got = await asked
        assert len(got.raw) == (2 << 20) + 3
        assert not it.pool.dispatcher.leases
