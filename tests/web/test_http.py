"""HTTP as RFC 9110 and 9112 say it, also to clients that say it badly, slowly or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from llamaslot.http.aiohttp_connection import Connection
from llamaslot.http.connections import raise_file_limit
from llamaslot.http.request_body import Unpacking
from tests.support.inprocess import CHAT, NATIVE, PATIENCE_S, letters, right, served
from tests.support.keys import KeyFile
from tests.support.wire import request, upstream, wire

JSON = "Content-Type: application/json"
EXPECT = "Expect: 100-continue"
BODY = b'{"prompt": "hello there", "n_predict": 4}'
CLOSE, KEEP = "Connection: close", "Connection: keep-alive"
STREAMED = b', "stream": true'


def error_of(raw: bytes) -> dict[str, Any]:
    error = dict(orjson.loads(raw)["error"])
    assert error["message"]
    assert error["type"]
    return error


async def test_a_body_is_asked_for_when_it_is_wanted(tmp_path: Path) -> None:
    """``Expect: 100-continue``: for completions and for what passes through."""
    async with served(tmp_path) as it:
        for path, body in ((NATIVE, BODY), ("/tokenize", b'{"content": "hi"}')):
            async with wire(it) as client:
                head = request("POST", path, body, JSON, EXPECT).removesuffix(body)
                await client.send(head)
                assert await client.head() == "HTTP/1.1 100 Continue\r\n\r\n"
                await client.send(body)
                assert (await client.head()).startswith("HTTP/1.1 200")


@pytest.mark.parametrize(
    ("path", "length", "status"),
    [("/slots/0?action=erase", 10, 403), ("/props", 10, 403), (CHAT, 10**9, 413)],
)
async def test_what_is_refused_by_its_header_is_not_sent(
    tmp_path: Path, path: str, length: int, status: int
) -> None:
    """The answer comes in place of ``100 Continue``, and closes the connection: the client may leave its body out."""
    async with served(tmp_path) as it, wire(it) as client:
        await client.send(request("POST", path, b"", JSON, EXPECT, f"Content-Length: {length}"))
        head, raw = await client.answer()
        assert head.startswith(f"HTTP/1.1 {status}")
        assert "connection: close" in head.lower()
        error_of(raw)
        client.writer.close()


async def test_http_1_0_is_served_without_chunks(tmp_path: Path) -> None:
    """A stream ends with the connection, also where the client would keep it; ``Expect`` means nothing there."""
    async with served(tmp_path) as it:
        for more, wish in (b"", ()), (STREAMED, ()), (STREAMED, (KEEP,)), (STREAMED, (CLOSE,)):
            body = BODY[:-1] + more + b"}"
            async with wire(it) as client:
                await client.send(request("POST", NATIVE, body, JSON, EXPECT, *wish, version="1.0"))
                head, rest = await client.head(), await client.rest()
                assert head.startswith("HTTP/1.1 200")
                assert "chunked" not in head.lower()
                assert "connection: close" in head.lower()
                assert right(it.fake, "hello there").encode()[:1] in rest
                assert rest.startswith(b"data: {" if more else b"{")


@pytest.mark.parametrize("wish", [KEEP, CLOSE, "X-None: x"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("kind", ["waits", "fails", "breaks"])
async def test_a_stream_with_an_error_in_it_has_an_end(
    tmp_path: Path, kind: str, version: str, wish: str
) -> None:
    """In every version, whatever is wished for the connection: one that only its end can end is closed, another one
    takes the next request if that was wished."""
    settings = {"stream": {"keepalive_s": 0.01}, "queue": {"max_wait_s": 0.05}}
    body = BODY[:-1] + STREAMED + b"}"
    is_kept = version == "1.1" and wish != CLOSE
    async with served(tmp_path, settings, slots=1) as it, contextlib.AsyncExitStack() as stack:
        if kind == "waits":
            await stack.enter_async_context(it.busy())
        elif kind == "fails":
            it.fake.faults.fail_stream("out of luck", after_tokens=2)
        else:
            it.fake.faults.disconnect_after_tokens(2)
        async with wire(it) as client:
            await client.send(request("POST", NATIVE, body, JSON, wish, version=version))
            head = await client.head()
            assert ("chunked" in head.lower()) == (version == "1.1")
            assert ("connection: close" in head.lower()) != is_kept
            if is_kept:
                await client.reader.readuntil(b"\r\n0\r\n\r\n")
                await client.send(request("GET", "/health", b"", CLOSE))
                assert (await client.head()).startswith("HTTP/1.1 200")
            else:
                assert b'data: {"error":' in await client.rest()
        it.fake.go()


@pytest.mark.parametrize("version", ["2.0", "1.2", "0.9"])
async def test_other_versions_are_not_spoken(tmp_path: Path, version: str) -> None:
    """They are refused as llama-server does it, in a version that is spoken."""
    async with served(tmp_path) as it, wire(it) as client:
        await client.send(request("GET", "/v1/models", version=version))
        head, raw = await client.answer()
        assert head.startswith("HTTP/1.1 400")
        assert "connection: close" in head.lower()
        error_of(raw)
        assert await client.rest() == b""


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chunked_upload_is_read_and_its_trailers_are_not(tmp_path: Path, stream: bool) -> None:
    """The connection is closed behind it: aiohttp takes trailers for headers of the next request, who may be another's
    where a proxy in front shares connections."""
    async with served(tmp_path) as it:
        for path in (NATIVE, "/tokenize"):
            async with wire(it) as client:
                chunked = ("Transfer-Encoding: chunked", "Trailer: X-Trailer")
                body = BODY[:-1] + b', "stream": true}' if stream else BODY
                await client.send(request("POST", path, b"", JSON, *chunked))
                await client.send(b"9\r\n" + body[:9] + b"\r\n%x;ext=1\r\n" % len(body[9:]) + body[9:])
                await client.send(
                    b"\r\n0\r\nX-Trailer: yes\r\n\r\n" + request("GET", "/v1/models", b"", CLOSE)
                )
                assert "connection: close" in (await client.head()).lower()
                await client.rest()
            assert it.fake.sent(path)[-1].body["prompt"] == "hello there"
        assert not any("X-Trailer" in seen.headers for seen in it.fake.requests)
        assert not it.fake.sent("/v1/models")[1:]


@pytest.mark.parametrize(
    "headers",
    [
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        ("Content-Length: 5", "Content-Length: 6"),
        ("Content-Length: -1",),
        ("Content-Length: 1e3",),
        ("Transfer-Encoding: chunked, gzip",),
        (" folded: x",),
        ("no colon",),
        ("bad name: x",),
    ],
)
async def test_what_could_be_read_in_two_ways_is_refused(tmp_path: Path, headers: tuple[str, ...]) -> None:
    """400 of the usual shape, and the connection is closed: nothing behind it is taken for a request."""
    async with served(tmp_path) as it, wire(it) as client:
        n_before = len(it.fake.sent("/tokenize"))
        await client.send(
            request("POST", "/tokenize", b"", JSON, *headers) + b"0\r\n\r\n" + request("GET", "/health")
        )
        head, raw = await client.answer()
        assert head.split()[1] == "400"
        assert head.lower().count("content-length") == 1
        assert "application/json" in head
        error_of(raw)
        assert await client.rest() == b""
        assert len(it.fake.sent("/tokenize")) == n_before


async def test_pipelined_requests_are_answered_in_their_order(tmp_path: Path) -> None:
    """With bodies, one behind the other."""
    async with served(tmp_path) as it, wire(it) as client:
        asked = [b'{"prompt": "%s", "n_predict": 2}' % letters(n, 30).encode() for n in range(4)]
        await client.send(b"".join(request("POST", NATIVE, body, JSON) for body in asked))
        for n in range(4):
            head, raw = await client.answer()
            assert head.startswith("HTTP/1.1 200")
            assert orjson.loads(raw)["content"] == right(it.fake, letters(n, 30), 2)


async def test_an_absolute_target_is_the_same_path(tmp_path: Path) -> None:
    """As to a proxy. Another host in it is not asked."""
    async with served(tmp_path) as it, wire(it) as client:
        await client.send(request("GET", "http://elsewhere.example/v1/models?a=1", b"", CLOSE))
        assert (await client.head()).startswith("HTTP/1.1 200")
        assert (it.fake.requests[-1].path, it.fake.requests[-1].query) == ("/v1/models", {"a": "1"})


@pytest.mark.parametrize("end", ["", "?a=1"])
async def test_an_absolute_target_without_a_path_is_the_root(tmp_path: Path, end: str) -> None:
    """llama-server answers it."""
    async with served(tmp_path) as it, wire(it) as client:
        await client.send(request("GET", f"http://elsewhere.example{end}", b"", CLOSE))
        await client.head()
        assert (it.fake.requests[-1].path, bool(it.fake.requests[-1].query)) == ("/", bool(end))


@pytest.mark.parametrize("line", ["CONNECT example.org:443", "TRACE /health", "OPTIONS *"])
async def test_methods_of_other_proxies(tmp_path: Path, line: str) -> None:
    """There is no way through to other servers."""
    async with served(tmp_path) as it, wire(it) as client:
        last = it.fake.requests[-1]
        method, target = line.split()
        await client.send(request(method, target, b"", CLOSE))
        head, raw = await client.answer()
        assert head.split()[1] == "501"
        assert f"{method} {target} is not served" in error_of(raw)["message"]
        assert it.fake.requests[-1] is last


async def test_a_line_feed_in_a_path_is_a_path(tmp_path: Path) -> None:
    """It goes the way of all others: to llama-server, and not without a key. No body is asked for before."""
    file = KeyFile(tmp_path / "keys.json", "ada")
    async with served(tmp_path, {"auth": {"keys_file": str(file.path)}}) as it:
        async with wire(it) as client:
            await client.send(request("POST", "/v1/%0amodels", b"", EXPECT, "Content-Length: 2"))
            head, raw = await client.answer()
            assert head.startswith("HTTP/1.1 401")
            error_of(raw)
        n_before = len(it.fake.requests)
        answer = await it.send("GET", "/v1/%0amodels", headers={"x-api-key": file.keys["ada"]})
        assert (answer.status, answer.error["type"]) == (404, "not_found_error")
        assert "/v1/\nmodels" in [seen.path for seen in it.fake.requests[n_before:]]


@pytest.mark.parametrize(
    "sent",
    [
        request("GET", "/health"),
        request("GET", "/v1/models"),
        request("CONNECT", "example.org:443"),
        request("POST", NATIVE, BODY, JSON),
        request("POST", NATIVE, BODY[:-1] + b', "stream": true}', JSON),
        request("POST", NATIVE, b"{", JSON),
        b"hello\r\n\r\n",
    ],
)
async def test_no_versions_are_told(tmp_path: Path, sent: bytes) -> None:
    """Neither llamaslot's nor those of what it is made of."""
    async with served(tmp_path) as it, wire(it) as client:
        await client.send(sent)
        assert [line for line in (await client.head()).split("\r\n") if line.startswith("Server:")] == [
            "Server: llamaslot"
        ]


async def test_headers_for_one_hop_end_here(tmp_path: Path) -> None:
    """Those that ``Connection`` names too, in both directions; what is there twice stays there twice."""
    answer = (
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\n"
        b"Set-Cookie: a=1\r\nSet-Cookie: b=2\r\nX-End: 1\r\n\r\nok"
    )
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET /index.html"):
            seen.append(head.lower())
        writer.write(answer)
        await writer.drain()

    async with upstream(serve) as url, served(tmp_path, wait=False, answers_at=url) as it:
        await it.start(wait=False)
        async with wire(it) as client:
            more = (
                "Connection: X-Mine",
                "connection: keep-alive, te",
                "X-Mine: 1",
                "TE: trailers",
                "X-Conversation-Id: 7",
            )
            await client.send(
                request("GET", "/index.html", b"", *more, "X-Twice: 1", "X-Twice: 2", "Upgrade: h2c")
            )
            head, body = await client.answer()
    assert body == b"ok"
    assert "x-hop" not in head.lower()
    assert "keep-alive" not in head.lower()
    assert head.count("Set-Cookie") == 2
    assert "X-End: 1" in head
    for name in (b"x-mine", b"te:", b"upgrade", b"x-conversation-id"):
        assert b"\r\n" + name not in seen[0], name
    assert seen[0].count(b"x-twice") == 2


@pytest.mark.parametrize("path", [NATIVE, "/tokenize"])
@pytest.mark.parametrize("packing", ["gzip", "deflate"])
async def test_a_body_counts_unpacked(tmp_path: Path, path: str, packing: str) -> None:
    """413 for one that unpacks to more than the limit, on every route; little of it is ever there."""
    async with served(tmp_path, {"listen": {"max_body": 1 << 20}}) as it:
        large = b'{"content": "' + b"x" * (64 << 20) + b'"}'
        data = gzip.compress(large, 1) if packing == "gzip" else zlib.compress(large, 1)
        answer = await it.send("POST", path, data=data, headers={"Content-Encoding": packing})
        assert answer.status == 413
        assert "1048576 bytes" in answer.error["message"]


@pytest.mark.parametrize(("has_key", "status"), [(False, 401), (True, 413)])
async def test_what_is_refused_is_not_unpacked(
    tmp_path: Path, has_key: bool, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A MiB that unpacks to a GiB would take a second of everybody's time, also from who has no key."""
    file = KeyFile(tmp_path / "keys.json", "ada")
    settings = {"auth": {"keys_file": str(file.path)}, "listen": {"max_body": 1 << 20}}
    n_bytes = 0
    feed = Unpacking.feed

    def counted(unpacking: Unpacking, packed: bytes) -> Iterator[bytes]:
        nonlocal n_bytes
        for piece in feed(unpacking, packed):
            n_bytes += len(piece)
            yield piece

    monkeypatch.setattr(Unpacking, "feed", counted)
    key = [f"x-api-key: {file.keys['ada']}"] if has_key else []
    async with served(tmp_path, settings) as it, wire(it) as client:
        bomb = gzip.compress(bytes(256 << 20), 1)
        await client.send(
            request("POST", NATIVE, b"", JSON, f"Content-Length: {len(bomb)}", "Content-Encoding: gzip", *key)
        )
        await client.send(bomb)
        head, raw = await client.answer()
        assert head.startswith(f"HTTP/1.1 {status}")
        error_of(raw)
        await client.send(request("GET", "/health"))
        assert (await client.answer())[0].startswith("HTTP/1.1 200"), "the rest of it was thrown away"
        assert n_bytes <= (2 << 20) * has_key


@pytest.mark.parametrize(
    ("packing", "status"),
    [("compress", 415), ("gzip, gzip", 415), ("br", 415), ("gzip", 400), ("identity", 200)],
)
async def test_a_packing_that_is_not_known(tmp_path: Path, packing: str, status: int) -> None:
    """It is not passed on as if it were no packing."""
    async with served(tmp_path) as it:
        answer = await it.send(
            "POST", "/tokenize", data=b'{"content": "hi"}', headers={"Content-Encoding": packing}
        )
        assert answer.status == status
        assert answer.status == 200 or answer.error["code"] == status


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 9000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 200 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"hello, is anybody there?\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\nHost: x\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"GET http:///x HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ],
)
async def test_what_is_no_request_is_told_so(
    tmp_path: Path, data: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """In the usual shape, and without what was in it; one line in the log."""
    async with served(tmp_path) as it, wire(it) as client:
        await client.send(data)
        head, raw = await client.answer()
        assert head.split()[1] == str(status)
        message = error_of(raw)["message"]
        assert "aaaa" not in message
        assert len(message.splitlines()) == 1
        assert await client.rest() == b""
    lines = [record.getMessage() for record in caplog.records if record.name == "aiohttp.server"]
    assert all("\n" not in line and "aaaa" not in line for line in lines)


async def test_a_header_that_does_not_end(tmp_path: Path) -> None:
    """A byte now and then does not keep the connection: 408, while an idle one beside it stays."""
    async with (
        served(tmp_path, {"listen": {"read_timeout_s": 0.2}}) as it,
        wire(it) as idle,
        wire(it) as client,
    ):
        for byte in b"GET /he":
            if client.reader.at_eof():
                break
            await client.send(bytes([byte]))
            await asyncio.sleep(0.02)
        head, raw = await client.answer()
        assert head.startswith("HTTP/1.1 408")
        error_of(raw)
        assert await client.rest() == b""
        await idle.send(request("GET", "/health"))
        assert (await idle.head()).startswith("HTTP/1.1 200")


@pytest.mark.parametrize("path", [NATIVE, "/tokenize", "/v1/embeddings"])
async def test_a_body_that_does_not_end(tmp_path: Path, path: str) -> None:
    """408; no slot was taken for it."""
    async with served(tmp_path, {"listen": {"read_timeout_s": 0.2}}) as it, wire(it) as client:
        await client.send(request("POST", path, b"", JSON, "Content-Length: 100") + b'{"')
        head, raw = await client.answer()
        assert head.startswith("HTTP/1.1 408")
        assert "listen.read_timeout_s" in error_of(raw)["message"]
        assert not it.pool.dispatcher.leases
        client.writer.close()


async def test_a_large_body_may_take_longer(tmp_path: Path) -> None:
    """A second for each 4 KiB that have come: a slow line is no attack."""
    body = b'{"content": "' + b"x" * (16 << 10) + b'"}'
    async with served(tmp_path, {"listen": {"read_timeout_s": 0.2}}) as it, wire(it) as client:
        await client.send(request("POST", "/tokenize", body, JSON).removesuffix(b'"}'))
        later = it.backend.now() + 0.4
        await it.until(lambda: it.backend.now() > later)
        await client.send(b'"}')
        assert (await client.answer())[0].startswith("HTTP/1.1 200")


async def test_a_header_that_begins_at_once_must_end_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among many connections the first bytes are there before the task that waits for them."""
    made = Connection.connection_made

    def made_with_data(connection: Connection, transport: asyncio.BaseTransport) -> None:
        made(connection, transport)
        connection.data_received(b"GET /he")

    async with served(tmp_path, {"listen": {"read_timeout_s": 0.1}}) as it:
        monkeypatch.setattr(Connection, "connection_made", made_with_data)
        async with wire(it) as client, asyncio.timeout(PATIENCE_S):
            assert (await client.answer())[0].startswith("HTTP/1.1 408")
            assert await client.rest() == b""


async def test_the_rest_of_a_body_is_no_header(tmp_path: Path) -> None:
    """What a client still sends of a body that was not wanted does not end its connection with a 408 later."""
    file = KeyFile(tmp_path / "keys.json", "ada")
    settings = {"auth": {"keys_file": str(file.path)}, "listen": {"read_timeout_s": 0.1}}
    async with served(tmp_path, settings) as it, wire(it) as client:
        await client.send(request("POST", NATIVE, b"", JSON, f"Content-Length: {len(BODY)}"))
        assert (await client.answer())[0].startswith("HTTP/1.1 401")
        for piece in (BODY[:10], BODY[10:]):
            await client.send(piece)
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.3)
        await client.send(request("GET", "/health"))
        assert (await client.answer())[0].startswith("HTTP/1.1 200")


async def test_a_connection_goes_on_after_an_answer(tmp_path: Path) -> None:
    """The time for a header does not count while an answer is made."""
    async with served(tmp_path, {"listen": {"read_timeout_s": 0.1}}, slots=1) as it, wire(it) as client:
        async with it.busy():
            await client.send(request("POST", NATIVE, BODY, JSON))
            await it.until(lambda: it.pool.dispatcher.n_waiting)
            await asyncio.sleep(0.3)
            it.fake.go()
            assert (await client.answer())[0].startswith("HTTP/1.1 200")
        await asyncio.sleep(0.3)
        await client.send(request("POST", NATIVE, BODY, JSON))
        assert (await client.answer())[0].startswith("HTTP/1.1 200")


async def test_an_idle_connection_is_not_taken_for_a_slow_one(tmp_path: Path) -> None:
    """The time for a header ends with the header, also where the answer was there at once."""
    async with served(tmp_path, {"listen": {"read_timeout_s": 0.2}}) as it, wire(it) as client:
        await client.send(request("GET", "/health"))
        assert (await client.answer())[0].startswith("HTTP/1.1 200")
        later = it.backend.now() + 0.3
        await it.until(lambda: it.backend.now() > later)
        await client.send(request("GET", "/health"))
        assert (await client.answer())[0].startswith("HTTP/1.1 200")


async def test_a_half_closed_connection_has_left(tmp_path: Path) -> None:
    """Nobody can tell it from one that is gone: its place in the queue is free."""
    async with served(tmp_path, slots=1) as it, it.busy(), wire(it) as client:
        await client.send(request("POST", NATIVE, BODY, JSON))
        await it.until(lambda: it.pool.dispatcher.n_waiting)
        client.writer.write_eof()
        await it.until(lambda: not it.pool.dispatcher.n_waiting)
        it.fake.go()


async def test_there_may_be_so_many_connections(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One more gets a 503 that says when to come again; it is said once in the log; one that goes makes room."""
    async with served(tmp_path, {"listen": {"max_connections": 2}}) as it, wire(it) as first:
        await first.send(request("GET", "/health"))
        await first.answer()
        async with wire(it) as second:
            await second.send(request("GET", "/health"))
            await second.answer()
            for _ in range(3):
                async with wire(it) as third:
                    head, raw = await third.answer()
                    assert head.startswith("HTTP/1.1 503")
                    assert "retry-after" in head.lower()
                    assert "listen.max_connections" in error_of(raw)["message"]

        async def is_let_in() -> bool:
            async with wire(it) as again:
                await again.send(request("GET", "/health"))
                return (await again.head()).startswith("HTTP/1.1 200")

        async with asyncio.timeout(PATIENCE_S):
            while not await is_let_in():  # noqa: ASYNC110  # llamaslot has no event for it
                await asyncio.sleep(0.01)
    assert caplog.text.count("2 client connections are open") == 1


async def test_an_upgrade_that_is_not_wanted_is_a_plain_request(tmp_path: Path) -> None:
    """There are no web sockets behind it."""
    more = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: 13")
    async with served(tmp_path) as it, wire(it) as client:
        await client.send(request("GET", "/health", b"", *more))
        assert (await client.answer())[0].startswith("HTTP/1.1 200")


def test_as_many_files_as_may_be(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The limit is raised to the hard one; where that is low too, it is said."""
    import resource

    limits = [(1024, 2000)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.append(new))
    raise_file_limit()
    assert limits[-1] == (2000, 2000)
    assert "may open 2000 files" in caplog.text
