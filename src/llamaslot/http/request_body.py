"""Reads request bodies: the limits of their decompressed size and their time, and when they are requested.

A client that sends ``Expect: 100-continue`` waits with its body until it is requested: the body of a request that is
refused before is never sent. (https://www.rfc-editor.org/rfc/rfc9110#section-10.1.1)
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Final

from aiohttp import HttpVersion10, HttpVersion11, web
from msgspec import Struct

from llamaslot.errors import BadRequest, BodyTooLarge, LlamaslotError, TooSlow, Unpackable

_BYTES_PER_S = 4096  # the minimum average speed of a client, so that an upload ends some day
_IS_ASKED_FOR = web.RequestKey("is_asked_for", bool)


class Uploads(Struct, frozen=True):
    """``max_bytes`` of a decompressed body; ``timeout_s`` for it, and one second more for each 4 KiB."""

    max_bytes: int
    timeout_s: float

    async def whole(self, request: web.Request) -> bytes:
        """The body. Raises BodyTooLarge as soon as it is known to be longer, TooSlow, and BadRequest if it cannot be
        decompressed. Canceling is safe.
        """
        if (here := await self._here(request)) is not None:
            return here
        return b"".join([piece async for piece in self.pieces(request)])

    async def _here(self, request: web.Request) -> bytes | None:
        """A body that has come with its headers, as short ones do, and is not compressed; None for any other: then
        nothing is read.
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
        """The decompressed body as it comes. Raises as ``whole`` does."""
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


class Upload:
    """A body that is forwarded while it comes. ``failure``: why it is incomplete, if it is."""

    def __init__(self, uploads: Uploads, request: web.Request) -> None:
        self._uploads, self._request = uploads, request
        self.failure: LlamaslotError | None = None

    async def pieces(self) -> AsyncIterator[bytes]:
        try:
            async for piece in self._uploads.pieces(self._request):
                yield piece
        except LlamaslotError as error:  # aiohttp's client would report a broken connection
            self.failure = error
            raise


async def hold_back(request: web.Request) -> None:
    """aiohttp's ``expect_handler``: send 100 Continue only when a handler reads the body. Other expectations are
    ignored, as RFC 9110 allows.
    """


def is_held_back(request: web.Request) -> bool:
    """Whether the client still waits for 100 Continue before it sends its body."""
    expects = request.headers.get("Expect", "").lower() == "100-continue" and request.version >= HttpVersion11
    return expects and not request.get(_IS_ASKED_FOR, False)


def close_behind(request: web.Request, response: web.StreamResponse) -> None:
    """Signal ``on_response_prepare``: close a connection after the answer, if the next bytes on it could be anything.

    1. The body was not requested from the client, which may or may not send it now.
    2. Only the end of the connection ends the answer.
    3. The body was chunked: aiohttp (3.14) takes its trailers as headers of the next request, which may belong to
       another client if a proxy in front shares connections.
    """
    is_chunked_upload = "Transfer-Encoding" in request.headers
    is_clear = speaks_http(request) and not (is_chunked_upload or is_held_back(request))
    if not is_clear or _ends_with_connection(request, response):
        response.force_close()
    if not response.keep_alive:  # aiohttp sends the header to clients of HTTP/1.1 only
        response.headers["Connection"] = "close"


def speaks_http(request: web.Request) -> bool:
    """Whether its HTTP version is supported: aiohttp reads others (0.9, 2.0) as if they were."""
    return request.version in (HttpVersion10, HttpVersion11)


def _ends_with_connection(request: web.Request, response: web.StreamResponse) -> bool:
    """Whether only the end of the connection ends the body: for a client of HTTP/1.0, which does not know chunks, if
    the length is unknown. aiohttp (3.14) keeps the connection open if the client has asked for that.
    """
    return request.version < HttpVersion11 and response.content_length is None


async def _ask_for_it(request: web.Request) -> None:
    if is_held_back(request):
        request[_IS_ASKED_FOR] = True
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # aiohttp uses it to tell whether the answer has begun


_PIECE_BYTES: Final = 1 << 18  # a millisecond of work
_GZIP, _ZLIB, _RAW = 31, 15, -15  # ``wbits`` of zlib


class Unpacking:
    """One body with a ``Content-Encoding`` (https://www.rfc-editor.org/rfc/rfc9110#section-8.4.1)."""

    def __init__(self, packing: str) -> None:
        """Raises Unpackable unless the encoding is identity, gzip or deflate."""
        self._packing = packing.strip().lower()
        if self._packing not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise Unpackable(
                f"a body with Content-Encoding {packing!r} cannot be read here: send it as gzip, or plain"
            )
        self._is_plain = self._packing in ("", "identity")
        self._stream: zlib._Decompress | None = None
        self._is_over = False

    def feed(self, packed: bytes) -> Iterator[bytes]:
        """Decompress the next bytes of the body, in pieces. Raises BadRequest if they are corrupt."""
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
        """The body is over. Raises BadRequest if it is incomplete."""
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
        return BadRequest(f"the body cannot be read: it is not whole as {self._packing}")
