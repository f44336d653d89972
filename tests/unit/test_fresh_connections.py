"""A request on a connection of its own: what is sent, what comes, and every way in which it does not."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from llamaslot.errors import BackendDown, SlotWedged
from llamaslot.llama.answers import (
    RELAYED_BYTES,
    content_type_of,
    length_of,
    media_type_of,
    next_piece,
    whole,
)
from llamaslot.llama.transport import fresh_connections as module
from llamaslot.llama.transport.connection import BadAnswer, NotReached, ServerConnection
from llamaslot.llama.transport.fresh_connections import FreshConnections
from tests.support.inprocess import PATIENCE_S
from tests.support.leftovers import nothing_left
from tests.support.real import free_port
from tests.support.wire import looked_up, upstream

__all__ = ["nothing_left"]

OK = b"HTTP/1.1 200 OK\r\nContent-Type: Application/JSON; charset=utf-8\r\nContent-Length: 7\r\n\r\nabcdefg"
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNKED = HEAD + b"4\r\nabcd\r\n3;x=y\r\nefg\r\n0\r\n\r\n"


class Server:
    """Reads one request per connection, and says ``replies`` to it, each when ``more`` is set; then it closes, or waits
    until the other side has.
    """

    def __init__(self) -> None:
        self.replies, self.closes, self.url = [OK], False, ""
        self.requests: list[bytes] = []
        self.asked, self.more, self.is_left = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.more.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        body = await reader.readexactly(int(lengths[0].split(b":")[1])) if lengths else b""
        self.requests.append(head + body)
        self.asked.set()
        with contextlib.suppress(ConnectionError):
            for reply in self.replies:
                await self.more.wait()
                writer.write(reply)
                await writer.drain()
                await asyncio.sleep(0)
            if not self.closes:
                await reader.read()
        self.is_left.set()


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    async with upstream(server.serve) as server.url:
        yield server


@contextlib.asynccontextmanager
async def sent(
    server: Server, method: str = "POST", path: str = "/completion", body: bytes | None = b"{}", **more: Any
) -> AsyncIterator[ServerConnection]:
    """A request, up to the headers of its answer."""
    plain = FreshConnections.of(server.url + "/", "secret")
    assert plain is not None
    headers = more.pop("headers", {"Content-Type": "application/json"})
    async with asyncio.timeout(PATIENCE_S):
        response = await plain.send(method, path, body, headers, **more)
    assert response is not None
    with contextlib.closing(response):
        yield response


async def test_what_is_sent(server: Server) -> None:
    """As aiohttp would write it: the host, the key, the client's headers, a length; each on a connection of its own."""
    async with sent(server, headers={"X-Two": "a, b", "Content-Type": "application/json"}) as response:
        assert await whole(response) == b"abcdefg"
    async with sent(server, "GET", "/props?x=%20", None, headers={"Accept": "text/html"}):
        pass
    async with sent(server, body=None, headers={}):
        pass
    host = server.url.removeprefix("http://")
    fixed = f"Host: {host}\r\nAuthorization: Bearer secret\r\n"
    first = "X-Two: a, b\r\nContent-Type: application/json\r\nAccept: */*\r\nContent-Length: 2\r\n"
    assert [one.decode() for one in server.requests] == [
        f"POST /completion HTTP/1.1\r\n{fixed}{first}Connection: close\r\n\r\n{{}}",
        f"GET /props?x=%20 HTTP/1.1\r\n{fixed}Accept: text/html\r\nConnection: close\r\n\r\n",
        f"POST /completion HTTP/1.1\r\n{fixed}Accept: */*\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    ]


async def test_what_is_told(server: Server) -> None:
    """Status, reason and headers, names in any case, and twice if they came twice."""
    server.replies = [OK.replace(b"200 OK", b"418 No tea").replace(b"\r\n\r\n", b"\r\nX: 1\r\nx: 2\r\n\r\n")]
    async with sent(server) as response:
        assert (response.status, response.reason) == (418, "No tea")
        assert (content_type_of(response), media_type_of(response)) == (
            "Application/JSON; charset=utf-8",
            "application/json",
        )
        assert length_of(response) == 7
        assert response.headers.getall("X") == ["1", "2"]


@pytest.mark.parametrize(
    "replies",
    [
        [OK],
        [CHUNKED],
        [HEAD + b"7\r\nabcdefg\r\n0\r\nTrailer: x\r\n\r\n"],
        [b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\n" + OK],
        [b"HTTP/1.1 103 Early\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", OK],
        [bytes([byte]) for byte in OK],
        [bytes([byte]) for byte in CHUNKED],
        [OK + OK],
        [OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + b"garbage"],
        [CHUNKED + b"garbage"],
    ],
    ids=["a length", "chunks", "a trailer", "an interim answer", "two of them", "single bytes", "chunks in bytes",
         "a second answer", "garbage behind", "garbage behind chunks"],
)  # fmt: skip
async def test_answers_in_many_shapes(server: Server, replies: list[bytes]) -> None:
    """What follows an answer is not looked at."""
    server.replies = replies
    async with sent(server) as response:
        assert (response.status, await whole(response)) == (200, b"abcdefg")
        assert await whole(response) == b""
        assert "X" not in response.headers


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_answers_without_a_body(server: Server, status: bytes) -> None:
    """Whatever length they announce."""
    server.replies = [b"HTTP/1.1 " + status + b"\r\nContent-Length: 7\r\n\r\n"]
    async with sent(server) as response:
        assert await whole(response) == b""


async def test_an_answer_without_a_length_ends_with_its_connection(server: Server) -> None:
    """As HTTP/1.0 has it."""
    server.replies, server.closes = [b"HTTP/1.1 200 OK\r\n\r\n", b"abc", b"def"], True
    async with sent(server) as response:
        assert await whole(response) == b"abcdef"


async def test_pieces_come_as_they_are_sent(server: Server) -> None:
    """To a function that is called from the socket: its task sleeps until it says no, or the end."""
    server.replies = [HEAD, b"1\r\na\r\n", b"1\r\nb\r\n", b"1\r\nc\r\n", b"1\r\nd\r\n0\r\n\r\n"]
    taken: list[bytes] = []

    def take(piece: bytes) -> bool:
        taken.append(piece)
        return b"c" not in piece

    async with sent(server) as response:
        assert await response.pass_to(take)
        assert b"".join(taken) in (b"abc", b"abcd")
        assert not await response.pass_to(take)
        assert b"".join(taken) == b"abcd"


async def test_an_error_of_the_taker_is_its_own(server: Server) -> None:
    """What comes later is still there."""
    server.replies = [HEAD, b"1\r\na\r\n", b"1\r\nb\r\n0\r\n\r\n"]
    server.more.clear()

    def refuse(piece: bytes) -> bool:
        raise ValueError(piece)

    asyncio.get_running_loop().call_soon(server.more.set)
    async with sent(server) as response:
        with pytest.raises(ValueError, match="a"):
            await response.pass_to(refuse)
        assert await whole(response) in (b"b", b"")


async def test_cancelling_loses_nothing(server: Server) -> None:
    """Whoever comes next gets what has come since."""
    server.replies = [HEAD, b"1\r\na\r\n0\r\n\r\n"]
    async with sent(server) as response:
        assert await next_piece(response) == b"a"
    server.replies = [HEAD]
    async with sent(server) as response:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await next_piece(response)
        assert response._take is None


async def test_an_answer_that_is_not_read_waits(server: Server) -> None:
    """In the server, but for what is held here; then all of it comes."""
    n = 8 << 20
    server.replies = [f"HTTP/1.1 200 OK\r\nContent-Length: {n}\r\n\r\n".encode(), b"x" * n]
    async with sent(server) as response:
        async with asyncio.timeout(PATIENCE_S):
            while not response._is_paused:  # noqa: ASYNC110  # no event comes for it
                await asyncio.sleep(0)
        assert RELAYED_BYTES < response._n_held < 1 << 18
        received = 0
        while piece := await next_piece(response):
            received += len(piece)
            await asyncio.sleep(0)
        assert received == n


@pytest.mark.parametrize("n", [0, 1, 20, OK.index(b"\r\n\r\n") + 3])
async def test_half_of_the_headers_is_no_answer(server: Server, n: int) -> None:
    """For the sender of the request to translate. It is not sent again."""
    server.replies, server.closes = [OK[:n]] if n else [], True
    with pytest.raises(ConnectionError):
        async with sent(server):
            pass
    assert len(server.requests) == 1


@pytest.mark.parametrize("reply", [OK[:-1], CHUNKED[:-3], CHUNKED[:-8], HEAD])
async def test_half_of_a_body(server: Server, reply: bytes) -> None:
    """What has come is given; then the error, again and again."""
    server.replies, server.closes = [reply], True
    async with sent(server) as response:
        with pytest.raises(BackendDown, match="before the end of its answer"):
            await whole(response)
        with pytest.raises(BackendDown):
            await next_piece(response)


@pytest.mark.parametrize(
    "reply",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n{}",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * (1 << 17),
    ],
    ids=["another protocol", "no length", "an upgrade", "endless headers"],
)
async def test_garbage_is_no_answer(server: Server, reply: bytes) -> None:
    """The connection is closed."""
    server.replies = [reply]
    with pytest.raises(BadAnswer):
        async with sent(server):
            pass
    async with asyncio.timeout(PATIENCE_S):
        await server.is_left.wait()


async def test_garbage_in_a_body(server: Server) -> None:
    """What came before it is given."""
    server.replies = [HEAD + b"2\r\nab\r\nzz\r\n"]
    async with sent(server) as response:
        assert await next_piece(response) == b"ab"
        with pytest.raises(BackendDown, match="before the end of its answer"):
            await next_piece(response)


async def test_closing_is_leaving(server: Server) -> None:
    """The server notices at once, before the answer and in the middle of it."""
    server.replies = [HEAD]
    async with sent(server):
        pass
    async with asyncio.timeout(PATIENCE_S):
        await server.is_left.wait()
    server.is_left.clear()
    server.asked.clear()
    server.replies = []
    asking = asyncio.get_running_loop().create_task(sent(server).__aenter__())
    await server.asked.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    async with asyncio.timeout(PATIENCE_S):
        await server.is_left.wait()


async def test_a_server_that_falls_silent(server: Server) -> None:
    """Before its headers, or in the middle of the answer: its slot is given up."""
    server.replies = []
    with pytest.raises(SlotWedged, match=r"at http://.* has sent nothing for 0.01 s"):
        async with sent(server, silence_s=0.01):
            pass
    server.replies = [HEAD + b"1\r\na\r\n"]
    async with sent(server, silence_s=0.01) as response:
        assert await next_piece(response) == b"a"
        with pytest.raises(SlotWedged):
            await next_piece(response)


async def test_a_reader_that_is_busy_is_no_silence(server: Server) -> None:
    """What the server cannot send is not waited for."""
    n = 8 << 20
    server.replies = [f"HTTP/1.1 200 OK\r\nContent-Length: {n}\r\n\r\n".encode(), b"x" * n]
    async with sent(server, silence_s=0.02) as response:
        async with asyncio.timeout(PATIENCE_S):
            while not response._is_paused:  # noqa: ASYNC110  # no event comes for it
                await asyncio.sleep(0)
        for _ in range(4):
            response._watch()
            response._heard_at -= 1.0
        assert len(await whole(response)) == n


async def test_a_whole_answer_may_be_limited(server: Server) -> None:
    """The time counts from the connection to the end of the body."""
    server.replies = []
    with pytest.raises(TimeoutError):
        async with sent(server, timeout_s=0.01):
            pass
    server.replies = [HEAD]
    with pytest.raises(TimeoutError):  # before the headers, on a busy machine
        async with sent(server, timeout_s=0.05) as response:
            await whole(response)


async def test_what_needs_care_is_left_to_aiohttp(server: Server) -> None:
    """Nothing was sent."""
    plain = FreshConnections.of(server.url, None)
    assert plain is not None
    assert await plain.send("PUT", "/", None, {}) is None
    assert await plain.send("HEAD", "/", None, {}) is None
    for path in ("/a b", "/ä", "/\r\nX: y", "/\udcff"):
        assert await plain.send("GET", path, None, {}) is None
    for name, value in (
        ("X", "ä"),
        ("X", "a\r\nY: b"),
        ("X", "\0"),
        ("X\n", "y"),
        ("X", "a\rb"),
        ("X\r\n", ""),
    ):
        assert await plain.send("GET", "/", None, {name: value}) is None
    assert server.requests == []


@pytest.mark.parametrize(
    ("url", "error"),
    [("http://127.0.0.1:%d", ConnectionRefusedError), ("http://llama.invalid:%d", NotReached)],
)
async def test_where_nothing_listens_the_error_says_why(url: str, error: type[Exception]) -> None:
    """A refused connection is told apart from a name without an address."""
    plain = FreshConnections.of(url % free_port(), None)
    assert plain is not None
    with pytest.raises(error):
        await plain.send("GET", "/", None, {}, timeout_s=5.0)


async def test_a_name_is_looked_up_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as something listens at the address that it had."""
    names = looked_up(monkeypatch)
    plain = FreshConnections.of(server.url.replace("127.0.0.1", "localhost") + "/llama/", None)
    assert plain is not None
    for _ in range(3):
        response = await plain.send("GET", "/props", None, {})
        assert response is not None
        response.close()
    assert names == ["localhost"]
    assert server.requests[0].startswith(b"GET /llama/props HTTP/1.1\r\nHost: localhost:")


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("https://127.0.0.1:8080", None),
        ("http://user:pass@127.0.0.1:8080", None),
        ("http://exämple.org", None),
        ("http://127.0.0.1:8080", "two\r\nlines"),
        ("http://127.0.0.1:8080", "a key"),
    ],
)
def test_urls_that_are_left_to_aiohttp(url: str, key: str | None) -> None:
    """TLS, and what would need care to write."""
    assert FreshConnections.of(url, key) is None


async def test_the_kernel_decides_whether_a_connection_is_late(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not this process, which may have been too busy to see it. A server that accepts none counts as down."""
    monkeypatch.setattr(module, "REQUEST_CONNECT_S", 0.01)
    monkeypatch.setattr(socket.socket, "connect_ex", lambda *_: errno.EINPROGRESS)  # as from another machine
    loop = asyncio.get_running_loop()
    connect = loop.sock_connect

    async def seen_late(sock: socket.socket, address: Any) -> None:
        await connect(sock, address)
        await loop.create_future()

    monkeypatch.setattr(loop, "sock_connect", seen_late)
    async with sent(server) as response:
        assert await whole(response) == b"abcdefg"

    async def silent(*_: Any) -> None:
        await loop.create_future()

    monkeypatch.setattr(loop, "sock_connect", silent)
    with pytest.raises(TimeoutError):
        async with sent(server):
            pass
