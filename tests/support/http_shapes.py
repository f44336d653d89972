"""Requests written byte for byte, and what comes back on the connection, to compare two servers.

``SHAPES`` has what differs between HTTP clients: versions, kept connections, chunks, methods, expectations, forms of an
address, several requests at once, a half-closed connection. ``look`` sends one shape and returns what a client sees.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.support.http_api import FIRM, ReportedCounts

PATIENCE_S = 5.0
JSON = "Content-Type: application/json"
KEEP, CLOSE = "Connection: keep-alive", "Connection: close"
Framing = Literal["length", "chunks", "close", "none"]
_PROBE = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Shape:
    """A sequence of bytes to send. ``sends``: its pieces; each is sent when the piece before has got an answer, a
    ``100 Continue`` included.
    """

    name: str
    sends: Sequence[bytes]
    method: str = "POST"
    half_closes: bool = False  # behind the last piece
    n_answers: int = 1  # besides any ``100 Continue``

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Got:
    """One answer as a client sees it. ``value``: its body without what depends on the time."""

    version: str
    status: int
    framing: Framing
    value: Any = None
    says_close: bool = field(default=False, compare=False)


@dataclass(slots=True)
class Seen:
    """All answers to a shape. ``ending``: what happens to one more request on the same connection."""

    answers: list[Got] = field(default_factory=list)
    ending: Literal["kept", "closed", "hangs"] = "hangs"

    @property
    def brief(self) -> str:
        """A short form, such as ``200 chunks; kept``."""
        answers = ", ".join(f"{got.status} {got.framing}" for got in self.answers)
        return f"{answers}; {self.ending}"


async def look(port: int, shape: Shape) -> Seen:
    """Send a shape, and return what comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    seen = Seen()
    try:
        async with asyncio.timeout(PATIENCE_S):
            await _exchange(reader, writer, shape, seen)
    except TimeoutError:
        seen.ending = "hangs"
    except (ConnectionError, asyncio.IncompleteReadError):
        seen.ending = "closed"
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    return seen


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, shape: Shape, seen: Seen
) -> None:
    for n, piece in enumerate(shape.sends, 1):
        writer.write(piece)
        await writer.drain()
        if n < len(shape.sends):
            seen.answers.append(await _answer(reader, shape.method))
    if shape.half_closes:
        writer.write_eof()
    while sum(got.status >= 200 for got in seen.answers) < shape.n_answers:
        seen.answers.append(await _answer(reader, shape.method))
    seen.ending = "closed"
    if seen.answers[-1].framing == "close" or shape.half_closes:
        assert await reader.read() == b""
        return
    writer.write(_PROBE)
    if (await _answer(reader, "GET")).status:
        seen.ending = "kept"


async def _answer(reader: asyncio.StreamReader, method: str) -> Got:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    line, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    version, status = line.split(" ")[:2]
    framing, raw = await _body(reader, headers, is_empty=method == "HEAD" or status[0] == "1")
    titled = {name.title(): value for name, value in headers.items()}
    value = ReportedCounts(int(status), titled, raw).value
    value = value.decode() if isinstance(value, bytes) else value
    return Got(version, int(status), framing, value, headers.get("connection", "").lower() == "close")


async def _body(
    reader: asyncio.StreamReader, headers: dict[str, str], *, is_empty: bool
) -> tuple[Framing, bytes]:
    if is_empty:
        return "none", b""
    if headers.get("transfer-encoding") == "chunked":
        raw = b""
        while n := int(await reader.readuntil(b"\r\n"), 16):
            raw += (await reader.readexactly(n + 2))[:-2]
        await reader.readuntil(b"\r\n")
        return "chunks", raw
    if "content-length" in headers:
        return "length", await reader.readexactly(int(headers["content-length"]))
    return "close", await reader.read()


def request(
    target: str = "/completion",
    *headers: str,
    method: str = "POST",
    version: str = "HTTP/1.1",
    host: str = "Host: x",
    body: bytes = b"",
    chunked: bool = False,
) -> bytes:
    lines = [f"{method} {target} {version}", host, *headers]
    if body and not chunked:
        lines.append(f"Content-Length: {len(body)}")
    if chunked:
        lines.append("Transfer-Encoding: chunked")
        body = (
            b"%x\r\n" % 5 + body[:5] + b"\r\n" + b"%x;ext=1\r\n" % len(body[5:]) + body[5:] + b"\r\n0\r\n\r\n"
        )
    return "\r\n".join([*filter(None, lines), "", ""]).encode() + body


def _body_of(**more: Any) -> bytes:
    return json.dumps({"prompt": "hi", "n_predict": 3, **FIRM, **more}).encode()


WHOLE, STREAM, BROKEN, TOO_LONG = (
    _body_of(),
    _body_of(stream=True),
    b'{"a":',
    _body_of(prompt="a" * 3000, stream=True),
)
ENDLESS = _body_of(stream=True, n_predict=1500)  # a client that has left is noticed long before its end
_BODIES = {"in one piece": WHOLE, "streamed": STREAM, "no JSON": BROKEN, "too long": TOO_LONG}
_CONNECTIONS = {"": (), ", keep-alive": (KEEP,), ", close": (CLOSE,)}


def _combined() -> list[Shape]:
    """Shapes with every HTTP version, every Connection header and every kind of answer."""
    return [
        Shape(
            f"{version}{wish}, {kind}", [request("/completion", JSON, *headers, version=version, body=body)]
        )
        for version in ("HTTP/1.0", "HTTP/1.1")
        for wish, headers in _CONNECTIONS.items()
        for kind, body in _BODIES.items()
    ]


def _get(target: str, *headers: str, method: str = "GET", **more: Any) -> bytes:
    return request(target, *headers, method=method, **more)


_EXPECT = "Expect: 100-continue"
_LENGTH = f"Content-Length: {len(WHOLE)}"

SHAPES: list[Shape] = [
    *_combined(),
    Shape("GET, HTTP/1.0", [_get("/v1/models", version="HTTP/1.0")], "GET"),
    Shape("GET, HTTP/1.0, keep-alive", [_get("/v1/models", KEEP, version="HTTP/1.0")], "GET"),
    Shape("GET, HTTP/1.0, no Host", [_get("/v1/models", version="HTTP/1.0", host="")], "GET"),
    Shape("unknown path, HTTP/1.0, keep-alive", [_get("/nothing", KEEP, version="HTTP/1.0")], "GET"),
    Shape("GET, HTTP/1.1", [_get("/v1/models")], "GET"),
    Shape("GET, no Host", [_get("/v1/models", host="")], "GET"),
    Shape("GET, HTTP/2.0", [_get("/v1/models", version="HTTP/2.0")], "GET"),
    Shape("GET, HTTP/1.2", [_get("/v1/models", version="HTTP/1.2")], "GET"),
    Shape("GET, HTTP/0.9", [b"GET /v1/models\r\n\r\n"], "GET"),
    Shape("HEAD", [_get("/v1/models", method="HEAD")], "HEAD"),
    Shape("HEAD, HTTP/1.0, keep-alive", [_get("/v1/models", KEEP, method="HEAD", version="HTTP/1.0")], "HEAD"),
    Shape("HEAD of what is posted to", [_get("/completion", method="HEAD")], "HEAD"),
    Shape("OPTIONS", [_get("/completion", method="OPTIONS")], "OPTIONS"),
    Shape("a method that is none", [_get("/v1/models", method="BREW")], "BREW"),
    Shape("a method in lower case", [_get("/v1/models", method="get")], "get"),
    Shape("chunked", [request("/completion", JSON, body=WHOLE, chunked=True)]),
    Shape("chunked, streamed", [request("/completion", JSON, body=STREAM, chunked=True)]),
    Shape("100-continue", [request("/completion", JSON, _EXPECT, _LENGTH), WHOLE]),
    Shape("100-continue, the body at once", [request("/completion", JSON, _EXPECT, body=WHOLE)]),
    Shape("100-continue, refused", [request("/nothing", JSON, _EXPECT, _LENGTH), WHOLE]),
    Shape("an expectation that is none", [request("/completion", JSON, "Expect: coffee", body=WHOLE)]),
    Shape("no length", [request("/completion", JSON)]),
    Shape("a length of 0", [request("/completion", JSON, "Content-Length: 0")]),
    Shape("absolute address", [request("http://x/completion", JSON, body=WHOLE)]),
    Shape("absolute address, GET", [_get("http://x/v1/models")], "GET"),
    Shape("an address with a fragment", [_get("/v1/models#part")], "GET"),
    Shape("GET with a body", [_get("/v1/models", "Content-Length: 2") + b"{}"], "GET"),
    Shape("two at once", [_get("/v1/models") + _get("/v1/models")], "GET", n_answers=2),
    Shape("two completions at once", [2 * request("/completion", JSON, body=WHOLE)], n_answers=2),
    Shape("two streams at once", [2 * request("/completion", JSON, body=STREAM)], n_answers=2),
    Shape("a request behind a stream", [request("/completion", JSON, body=STREAM), _get("/v1/models")], n_answers=2),
    Shape("half-closed, GET", [_get("/v1/models")], "GET", half_closes=True),
    Shape("half-closed, in one piece", [request("/completion", JSON, body=WHOLE)], half_closes=True),
    Shape("half-closed, streamed", [request("/completion", JSON, body=ENDLESS)], half_closes=True),
    Shape("half-closed within a body", [request("/completion", JSON, "Content-Length: 999")], half_closes=True),
    Shape("bare line feeds", [_get("/v1/models").replace(b"\r\n", b"\n")], "GET"),
    Shape("blank lines before it", [b"\r\n" + _get("/v1/models")], "GET"),
    Shape("two lengths that differ", [request("/completion", JSON, "Content-Length: 5", body=WHOLE)]),
    Shape("length and chunks", [request("/completion", JSON, "Content-Length: 5", body=WHOLE, chunked=True)]),
    Shape("a header that goes on in the next line", [_get("/v1/models", "X-A: b", " c")], "GET"),
    Shape("no HTTP", [b"hello\r\n\r\n"], "hello"),
]  # fmt: skip

#: Where llamaslot's answer is another one on purpose. For each row of docs/http-api.md ("What is different on purpose")
#: the shapes that it is about, with what comes back: (llama-server's, ours), as ``brief`` has it.
DIFFERENT: dict[str, dict[str, tuple[str, str]]] = {
    "A stream to a client of HTTP/1.0": {
        f"HTTP/1.0{wish}, streamed": ("200 chunks; closed", "200 close; closed") for wish in _CONNECTIONS
    },
    "A connection behind an error or a stream": {
        **{
            f"{kept}, {kind}": ("400 length; closed", "400 length; kept")
            for kept in ("HTTP/1.0, keep-alive", "HTTP/1.1", "HTTP/1.1, keep-alive")
            for kind in ("no JSON", "too long")
        },
        "HTTP/1.1, streamed": ("200 chunks; closed", "200 chunks; kept"),
        "HTTP/1.1, keep-alive, streamed": ("200 chunks; closed", "200 chunks; kept"),
        "unknown path, HTTP/1.0, keep-alive": ("404 length; closed", "404 length; kept"),
        "HEAD of what is posted to": ("404 none; closed", "404 none; kept"),
        "no length": ("400 length; closed", "400 length; kept"),
        "a length of 0": ("400 length; closed", "400 length; kept"),
        "two streams at once": ("200 chunks; closed", "200 chunks, 200 chunks; kept"),
        "a request behind a stream": ("200 chunks; closed", "200 chunks, 200 length; kept"),
    },
    "A connection behind a body in chunks": {
        "chunked": ("200 length; kept", "200 length; closed"),
    },
    "`Expect: 100-continue`": {
        "100-continue, refused": ("404 length; closed", "100 none, 404 length; kept"),
    },
    "An address with scheme and host": {
        "absolute address": ("404 length; closed", "200 length; kept"),
        "absolute address, GET": ("404 length; closed", "200 length; kept"),
    },
    "Requests that aiohttp reads otherwise": {
        "GET, no Host": ("200 length; kept", "400 length; closed"),
        "bare line feeds": ("; hangs", "400 length; closed"),
    },
    "What is no HTTP": dict.fromkeys(
        ("GET, HTTP/2.0", "GET, HTTP/1.2", "GET, HTTP/0.9", "a method that is none", "a method in lower case",
         "two lengths that differ", "length and chunks", "a header that goes on in the next line", "no HTTP"),
        ("400 length; closed", "400 length; closed"),
    ),
    "A client that closes its half of the connection": {
        "half-closed, GET": ("200 length; closed", "; closed"),
        "half-closed, in one piece": ("200 length; closed", "; closed"),
        "half-closed within a body": ("400 length; closed", "; closed"),
    },
}  # fmt: skip
