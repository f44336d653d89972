"""HTTP written by hand, for what no good client sends; and an upstream server that is not a llama-server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from llamaslot.llama.transport.kept_connections import KeptConnections
from tests.support.inprocess import PATIENCE_S, Front

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Wire:
    """One connection to llamaslot."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> str:
        """Read the next status line and headers."""
        async with asyncio.timeout(PATIENCE_S):
            return (await self.reader.readuntil(b"\r\n\r\n")).decode()

    async def rest(self) -> bytes:
        """Read what comes until the connection is closed."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.read()

    async def answer(self) -> tuple[str, bytes]:
        """Read the next status line and headers, and the body of the length that they announce."""
        head = await self.head()
        lengths = [line for line in head.lower().split("\r\n") if line.startswith("content-length:")]
        async with asyncio.timeout(PATIENCE_S):
            return head, await self.reader.readexactly(int(lengths[0].split(":")[1]))


@contextlib.asynccontextmanager
async def wire(front: Front, *, window: int | None = None) -> AsyncIterator[Wire]:
    """A connection. With ``window`` (bytes) the kernel buffers no more than about that for a client that
    does not read.
    """
    sock = socket.socket()
    sock.setblocking(False)
    if window is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", front.config.listen.port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 16)
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def request(method: str, path: str, body: bytes = b"", *headers: str, version: str = "1.1") -> bytes:
    lines = [f"{method} {path} HTTP/{version}", "Host: localhost", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


@contextlib.asynccontextmanager
async def upstream(serve: Serve) -> AsyncIterator[str]:
    """A server that answers by ``serve``. Gives its address."""

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await serve(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(served, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def until_open(pool: KeptConnections, n: int) -> None:
    """Wait until no more than ``n`` connections are open."""
    async with asyncio.timeout(PATIENCE_S):
        while len(pool) > n:  # noqa: ASYNC110  # no event comes for it
            await asyncio.sleep(0.005)


def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The host names that the running loop looks up from now on."""
    names: list[str] = []
    loop = asyncio.get_running_loop()
    look_up = loop.getaddrinfo

    async def counting(host: str, *args: Any, **more: Any) -> Any:
        names.append(host)
        return await look_up(host, *args, **more)

    monkeypatch.setattr(loop, "getaddrinfo", counting)
    return names
