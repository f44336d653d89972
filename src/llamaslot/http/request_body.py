"""Reads request bodies and parses them: limits of size, time and number of parts; 100 Continue; added fields.

A client that sends ``Expect: 100-continue`` waits with its body until the server requests it. If the request is refused
before, its body is never sent. (https://www.rfc-editor.org/rfc/rfc9110#section-10.1.1)
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Final

import orjson
from aiohttp import HttpVersion10, HttpVersion11, web
from msgspec import Struct

from llamaslot.errors import BadRequest, BodyTooLarge, TooSlow, Unpackable
from llamaslot.tasks import give_way

_BYTES_PER_S = 4096  # the minimum average speed of a client's upload, so that every upload ends
_IS_ASKED_FOR = web.RequestKey("is_asked_for", bool)


class Uploads(Struct, frozen=True):
    """The limits of request bodies. ``max_bytes``: the size of a decompressed body. ``timeout_s``: the seconds in which
    a body must come, and one second more for each 4 KiB that has come.
    """

    max_bytes: int
    timeout_s: float

    async def whole(self, request: web.Request) -> bytes:
        """Read the whole body, and return it decompressed. Raises BodyTooLarge as soon as it is known to be too long,
        TooSlow, Unpackable, and BadRequest if it is corrupt. Canceling is safe.
        """
        if (here := await self._here(request)) is not None:
            return here
        raw = b"".join([piece async for piece in self.pieces(request)])
        await give_way(len(raw))
        return raw

    async def _here(self, request: web.Request) -> bytes | None:
        """Return the body if all of it has come with the headers, as with short ones, and it is not compressed. Else
        return None, and read nothing.
        """
        content = request.content
        if not content.is_eof() or content.exception() is not None or "Content-Encoding" in request.headers:
            return None
        await _ask_for_it(request)
        body = b""
        while not content.at_eof():
            body += content.read_nowait()
        if len(body) > self.max_bytes:
            raise self._too_large()
        return body

    async def pieces(self, request: web.Request) -> AsyncIterator[bytes]:
        """Yield the decompressed body in pieces, as they come. Raises as ``whole`` does."""
        if (request.content_length or 0) > self.max_bytes:
            raise self._too_large()
        unpacking, n_bytes = Unpacking(request.headers.get("Content-Encoding", "")), 0
        await _ask_for_it(request)
        async for received in self._received(request):
            for piece in unpacking.feed(received):
                n_bytes += len(piece)
                if n_bytes > self.max_bytes:
                    raise self._too_large()
                yield piece
                if len(piece) == _PIECE_BYTES:  # 65 kB may become 64 MiB: 0.14 s of work
                    await asyncio.sleep(0)
        unpacking.end()

    async def _received(self, request: web.Request) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        n_bytes, deadline = 0, loop.time() + self.timeout_s
        while True:
            try:
                async with asyncio.timeout_at(deadline + n_bytes / _BYTES_PER_S):
                    piece = await request.content.readany()
            except TimeoutError:
                raise TooSlow(
                    f"only {n_bytes} bytes of the body arrived within {self.timeout_s + n_bytes / _BYTES_PER_S:.0f} s;"
                    " the operator may raise listen.read_timeout_s"
                ) from None
            except web.RequestPayloadError as error:
                raise BadRequest(f"the body cannot be read: {' '.join(str(error).split())}") from error
            if not piece:
                return
            n_bytes += len(piece)
            yield piece

    def _too_large(self) -> BodyTooLarge:
        text = f"the body is larger than {self.max_bytes} bytes; the operator may raise listen.max_body"
        return BodyTooLarge(text)


async def hold_back(request: web.Request) -> None:
    """aiohttp's ``expect_handler``. It does nothing, so aiohttp sends no 100 Continue: ``Uploads`` sends it when a
    handler reads the body. Other expectations are ignored, as RFC 9110 allows.
    """


def is_held_back(request: web.Request) -> bool:
    """True if the client waits for 100 Continue, and sends no body until then."""
    expects = request.headers.get("Expect", "").lower() == "100-continue" and request.version >= HttpVersion11
    return expects and not request.get(_IS_ASKED_FOR, False)


def close_behind(request: web.Request, response: web.StreamResponse) -> None:
    """Handler of the signal ``on_response_prepare``: close the connection after the answer if llamaslot cannot tell
    what the next bytes on it belong to. There are four cases:

    1. The body was not requested from the client, which may or may not send it now.
    2. Only the end of the connection ends the answer.
    3. The body was chunked: aiohttp (3.14) takes its trailers as headers of the next request, which may belong to
       another client if a proxy in front shares connections.
    4. llamaslot does not support the request's HTTP version.
    """
    is_chunked_upload = "Transfer-Encoding" in request.headers
    is_clear = speaks_http(request) and not (is_chunked_upload or is_held_back(request))
    if not is_clear or _ends_with_connection(request, response):
        response.force_close()
    if not response.keep_alive:  # aiohttp sends the header to clients of HTTP/1.1 only
        response.headers["Connection"] = "close"


def speaks_http(request: web.Request) -> bool:
    """True if llamaslot supports the HTTP version of the request. aiohttp reads requests of other versions (0.9, 2.0)
    as if they were HTTP/1.
    """
    return request.version in (HttpVersion10, HttpVersion11)


def _ends_with_connection(request: web.Request, response: web.StreamResponse) -> bool:
    """True if only the end of the connection ends the answer: its length is not known, and the client speaks HTTP/1.0,
    which has no chunks. aiohttp (3.14) would keep the connection open if the client has asked for that.
    """
    return request.version < HttpVersion11 and response.content_length is None


async def _ask_for_it(request: web.Request) -> None:
    if is_held_back(request):
        request[_IS_ASKED_FOR] = True
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # aiohttp takes another number as a sign that the answer has begun


_PIECE_BYTES: Final = 1 << 18  # a millisecond of work
_GZIP, _ZLIB, _RAW = 31, 15, -15  # ``wbits`` of zlib


class Unpacking:
    """Decompresses one body with a ``Content-Encoding`` (https://www.rfc-editor.org/rfc/rfc9110#section-8.4.1)."""

    def __init__(self, packing: str) -> None:
        """``packing``: the Content-Encoding of the body. Raises Unpackable unless it is identity, gzip or deflate."""
        self._packing = packing.strip().lower()
        if self._packing not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise Unpackable(
                f"a body with Content-Encoding {packing!r} cannot be read here: send it as gzip, or plain"
            )
        self._is_plain = self._packing in ("", "identity")
        self._stream: zlib._Decompress | None = None
        self._is_over = False

    def feed(self, packed: bytes) -> Iterator[bytes]:
        """Yield the next bytes of the body, decompressed, in pieces of 256 KiB at most. Raises BadRequest if they are
        corrupt.
        """
        if self._is_plain:
            yield packed
            return
        is_full = False
        while packed or is_full:
            stream = self._begun(packed)
            try:
                piece = stream.decompress(packed, _PIECE_BYTES)
            except zlib.error as error:
                raise self._broken() from error
            is_full, packed = len(piece) == _PIECE_BYTES, stream.unconsumed_tail
            if piece:
                yield piece
            if stream.eof:
                is_full, packed = False, stream.unused_data
                # gzip may have further members; after deflate there is nothing.
                self._stream, self._is_over = None, self._packing == "deflate"

    def end(self) -> None:
        """Called at the end of the body. Raises BadRequest if the body is incomplete."""
        if self._stream is not None:
            raise self._broken()

    def _begun(self, packed: bytes) -> zlib._Decompress:
        if self._is_over:
            raise self._broken()
        if self._stream is None:
            # Some clients send deflate without zlib's header, which begins with an 8.
            wbits = _GZIP if self._packing != "deflate" else _ZLIB if packed[0] & 15 == 8 else _RAW
            self._stream = zlib.decompressobj(wbits)
        return self._stream

    def _broken(self) -> BadRequest:
        return BadRequest(f"the body cannot be read: its {self._packing} data is incomplete or damaged")


# Limits of one body. Parsing more on the event loop would delay all requests by seconds. A million tokens of text
# have a quarter of these brackets, and 200 tools with 1,000 messages have some 40,000 items.
_COMMAS, _BRACKETS, _NUMBERS, _ITEMS = 8_000_000, 1_000_000, 4_000_000, 100_000
_LOOKED_THROUGH = ("messages", "system", "tools", "prompt", "input", "input_extra", "lora")
_CONTAINERS = frozenset((dict, list))
_DEPTH = 254  # levels that orjson writes; it reads 1,024
_TOO_DEEP = f"the body is nested more than {_DEPTH} levels deep"
_MARK = b"\xef\xbb\xbf"  # the byte order mark, which some editors write and llama-server skips
_TOO_MANY = (
    f"the body has too many parts: {_ITEMS} at most, of messages, prompts and tools and what is in them"
)


class NoObject(BadRequest):
    """The body is no JSON object, and llama-server cannot parse it either, on any route."""


def parse_object(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises BadRequest with the position of the fault, and NoObject (a BadRequest) if
    llama-server cannot parse the body either.

    llama-server's parser accepts more in two points only: it stops at a NUL, and has no limit of depth.
    """
    *_, body = _parsing(raw)
    assert body is not None, "the last step"
    return body


async def read_object(raw: bytes) -> dict[str, Any]:
    """As ``parse_object``, but other tasks run between the steps with a long body: at once, 16 MiB of text take 50 ms.
    Canceling is safe.
    """
    body = None
    for step in _parsing(raw):
        body = step
        await give_way(len(raw))
    assert body is not None, "the last step"
    return body


def _parsing(raw: bytes) -> Iterator[dict[str, Any] | None]:
    """The steps of ``parse_object``. Yields None after each but the last, and the body after the last one."""
    raw = raw.removeprefix(_MARK)
    if not raw.strip():
        raise NoObject("the body is empty; it should be a JSON object")
    if len(raw) > _BRACKETS:
        if _n_brackets(raw) > _BRACKETS or raw.count(b",") > _COMMAS:
            raise BadRequest(_TOO_MANY)
        yield None
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        if error.msg.startswith("depth limit"):  # orjson's own, of 1,024
            raise BadRequest(_TOO_DEEP) from None
        is_broken = b"\0" not in raw and _n_brackets(raw) <= _DEPTH
        raise (NoObject if is_broken else BadRequest)(f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise NoObject("the body should be a JSON object")
    yield None
    if len(raw) > 2 * _DEPTH:  # a level takes two characters, and an item at least one
        _check_size(body)
    yield body


def written(new: Mapping[str, Any], body: Mapping[str, Any], raw: bytes) -> bytes:
    """Return ``new``, a changed copy of ``body``, as JSON. ``raw``: the client's bytes, from which ``parse_object`` has
    made ``body``.

    If ``new`` has all fields of ``body`` unchanged, its new fields are put at the end of the client's own bytes. If
    not, all of ``new`` is encoded. A name that the client has sent twice stays so in its bytes: llama-server takes the
    last one at every depth, as orjson does (measured; tests/real/test_bodies.py).
    """
    missing = object()
    added = {name: value for name, value in new.items() if body.get(name, missing) is not value}
    if not body or len(body) + len(added) != len(new) or not body.keys().isdisjoint(added):
        return orjson.dumps(new)
    raw = raw.removeprefix(_MARK).rstrip()
    return raw if not added else b"".join((memoryview(raw)[:-1], b",", memoryview(orjson.dumps(added))[1:]))


def _n_brackets(raw: bytes) -> int:
    return raw.count(b"[") + raw.count(b"{")


def _check_size(body: dict[str, Any]) -> None:
    """Raise BadRequest if the body is nested too deeply, or the fields that llamaslot looks through have too many
    items. A list of numbers (tokens) is one item. Looking through these fields is most of the work for a body.

    The fields are walked level by level: 0.05 ms for 46 messages of 270 kB. Counting brackets in the bytes takes
    0.4 ms.
    """
    level, others, n_items, depth = list[Any](), dict[str, Any](), 0, 1
    for name, value in body.items():
        if type(value) in _CONTAINERS:
            if name in _LOOKED_THROUGH:
                level.append(value)
            else:
                others[name] = value
    if others and not _can_be_written(others):
        raise BadRequest(_TOO_DEEP)
    while level:
        depth += 1
        if depth > _DEPTH:
            raise BadRequest(_TOO_DEEP)
        below = list[Any]()
        for one in level:
            if type(one) is list and len(one) <= _NUMBERS and {int, float}.issuperset(map(type, one)):
                continue
            n_items += len(one)
            if n_items > _ITEMS:
                raise BadRequest(_TOO_MANY)
            inner = one.values() if type(one) is dict else one
            below += [item for item in inner if type(item) in _CONTAINERS]
        level = below


def _can_be_written(body: dict[str, Any]) -> bool:
    try:
        orjson.dumps(body)
    except TypeError:  # "Recursion limit reached"
        return False
    return True
