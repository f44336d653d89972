"""``GET /health`` on a connection of its own, without aiohttp: the same answers, and everything else is handed over."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from copy import copy
from pathlib import Path

import pytest

from llamaslot.backend.health import Health
from llamaslot.http import connections
from llamaslot.http.aiohttp_connection import Connection
from llamaslot.http.serve import Front as ServeFront
from llamaslot.http.serve import listening
from tests.support.inprocess import PATIENCE_S, Front, served
from tests.support.real import free_port
from tests.support.wire import Wire, request, wire

CLOSE = "Connection: close"
COUNTER = 'llamaslot_requests_total{kind="own",status="200"}'
AB = "User-Agent: ApacheBench/2.3", "Accept: */*"


def undated(head: str) -> list[str]:
    """The lines of a head, in any order, without the time."""
    return sorted(re.sub(r"Date: [^\r]*", "Date", head).strip().split("\r\n"))


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[Connection]:
    """The connections that aiohttp gets."""
    made, theirs = list[Connection](), Connection.connection_made

    def counting(connection: Connection, transport: asyncio.BaseTransport) -> None:
        made.append(connection)
        theirs(connection, transport)

    monkeypatch.setattr(Connection, "connection_made", counting)
    return made


async def answer(
    client: Wire, *headers: str, version: str = "1.1", path: str = "/health"
) -> tuple[str, bytes]:
    await client.send(request("GET", path, b"", *headers, version=version))
    return await client.answer()


@pytest.mark.parametrize(
    ("version", "headers"), [("1.0", AB), ("1.1", ()), ("1.1", (*AB, CLOSE)), ("1.1", (CLOSE, *AB))]
)
@pytest.mark.parametrize("path", ["/health", "/v1/health"])
async def test_an_answer_is_the_same(
    tmp_path: Path, handed_over: list[Connection], path: str, version: str, headers: tuple[str, ...]
) -> None:
    """As aiohttp gives it to a request that it must handle; counted, and the connection kept or closed."""
    async with served(tmp_path) as it:
        n_before = (await it.metrics()).get(COUNTER, 0)
        handed_over.clear()
        async with wire(it) as client, wire(it) as other:
            quick = await answer(client, *headers, version=version, path=path)
            assert handed_over == []
            plain = await answer(other, *headers, "X-Other: x", version=version, path=path)
            assert len(handed_over) == 1
            assert (undated(quick[0]), quick[1]) == (undated(plain[0]), plain[1])
            if version == "1.0" or CLOSE in headers:
                assert await client.rest() == b""
            else:
                again = await answer(client, *headers)
                assert (undated(again[0]), again[1]) == (undated(quick[0]), quick[1])
                assert (await answer(client, "X-Other: x"))[1] == quick[1]
        n_after = (await it.metrics())[COUNTER]
    assert n_after - n_before >= 3, "with the one for the metrics"


async def test_a_server_that_is_down(tmp_path: Path, handed_over: list[Connection]) -> None:
    """503, as aiohttp says it."""
    async with served(tmp_path) as it:
        await it.fake.kill()
        await it.until(lambda: it.backend.health is not Health.UP)
        async with wire(it) as client, wire(it) as other:
            quick, plain = await answer(client), await answer(other, "X-Other: x")
        assert quick[0].startswith("HTTP/1.1 503 Service Unavailable")
        assert (undated(quick[0]), quick[1]) == (undated(plain[0]), plain[1])


@pytest.mark.parametrize(
    "data",
    [
        request("HEAD", "/health", b""),
        request("GET", "/health?x", b""),
        request("GET", "/health", b"", "Origin: http://x"),
        request("GET", "/health", b"", "Content-Length: 2") + b"{}",
        request("GET", "/health", b"", "Connection: keep-alive"),
        request("GET", "/health", b"", "User-Agent: " + "x" * 4000),
        request("GET", "/health", b"") + request("GET", "/health", b""),
        request("GET", "/llamaslot/status", b""),
    ],
)
async def test_what_is_handed_over(tmp_path: Path, handed_over: list[Connection], data: bytes) -> None:
    """Whatever might change the answer, with all of its bytes."""
    async with served(tmp_path) as it:
        handed_over.clear()
        async with wire(it) as client:
            await client.send(data)
            assert (await client.head()).startswith("HTTP/1.1 200")
            assert len(handed_over) == 1


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET /health HTTP/2.0\r\nHost: x\r\n\r\n", 400),
        (request("GET", "/health", b"", "x-llamaslot-user: /"), 400),
    ],
)
async def test_what_is_wrong_with_it_is_said(tmp_path: Path, data: bytes, status: int) -> None:
    """By aiohttp."""
    async with served(tmp_path) as it, wire(it) as client:
        await client.send(data)
        assert (await client.head()).split()[1] == str(status)


async def test_a_request_in_pieces(tmp_path: Path) -> None:
    """The first of them goes to aiohttp."""
    async with served(tmp_path) as it, wire(it) as client:
        data = request("GET", "/health", b"")
        for byte in data:
            await client.send(bytes([byte]))
            await asyncio.sleep(0)
        assert (await client.head()).startswith("HTTP/1.1 200")


async def test_a_silent_connection_is_aiohttps_soon(
    tmp_path: Path, handed_over: list[Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which closes it some day; until then it takes requests."""
    monkeypatch.setattr(connections, "_HAND_OVER_S", 0.01)
    async with served(tmp_path) as it:
        handed_over.clear()
        async with wire(it) as client:
            await it.until(lambda: handed_over)
            assert (await answer(client))[0].startswith("HTTP/1.1 200")


async def test_new_connections_end_with_llamaslot(tmp_path: Path) -> None:
    """Also those that have said nothing yet."""
    async with served(tmp_path) as it, wire(it) as silent, wire(it) as checked:
        await answer(checked)
        await it.stop()
        async with asyncio.timeout(PATIENCE_S):
            for client in (silent, checked):
                with contextlib.suppress(ConnectionResetError):
                    assert await client.rest() == b""


async def test_pages_of_other_origins_are_answered_by_aiohttp(
    tmp_path: Path, handed_over: list[Connection]
) -> None:
    """With the headers that let them read it."""
    async with served(tmp_path, {"listen": {"cors": ["http://x"]}}) as it, wire(it) as client:
        await client.send(request("GET", "/health", b"", "Origin: http://x"))
        assert "access-control-allow-origin: http://x" in (await client.head()).lower()
        assert handed_over


@contextlib.asynccontextmanager
async def not_loaded(it: Front) -> AsyncIterator[tuple[Front, ServeFront]]:
    """The same llamaslot on a second port, as it is right after its start."""
    other = copy(it)
    listen = it.config.listen.model_copy(update={"port": free_port()})
    other.config = it.config.model_copy(update={"listen": listen})
    async with listening(other.config, it.registry) as front:
        yield other, front


async def test_before_the_application_is_loaded(tmp_path: Path) -> None:
    """Health checks are answered; what needs the application waits for it, and is answered then."""
    data = request("GET", "/llamaslot/status", b"")
    async with served(tmp_path) as it, not_loaded(it) as (other, front), wire(other) as early:
        assert (await answer(early))[0].startswith("HTTP/1.1 200")
        assert not front.connections.is_wanted.is_set()
        async with wire(other) as gone:
            await gone.send(data)
            await front.connections.is_wanted.wait()
        await early.send(data[:20])
        await front.load()
        await early.send(data[20:])
        assert (await early.head()).startswith("HTTP/1.1 200")
        async with wire(other) as late:
            assert (await answer(late, "X-Other: x"))[0].startswith("HTTP/1.1 200")


async def test_it_ends_before_the_application_is_loaded(tmp_path: Path) -> None:
    """Connections that wait for it are closed."""
    async with served(tmp_path) as it, contextlib.AsyncExitStack() as stack:
        other, front = await stack.enter_async_context(not_loaded(it))
        async with wire(other) as client:
            await client.send(request("GET", "/llamaslot/status", b""))
            await front.connections.is_wanted.wait()
            await stack.aclose()
            with contextlib.suppress(ConnectionResetError):
                assert await client.rest() == b""
