"""Bodies of requests on their way in: how large they may be unpacked, how long they may take, and when they begin.

A client that sends ``Expect: 100-continue`` waits with its body until it is wanted: what is refused before never comes.
(https://www.rfc-editor.org/rfc/rfc9110#section-10.1.1)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from aiohttp import HttpVersion10, HttpVersion11, web

from llamaslot.errors import BadRequest, BodyTooLarge, LlamaslotError, TooSlow
from llamaslot.http.decompress import Unpacking

_BYTES_PER_S = 4096  # what a slow client has to send on average, so that an upload ends some day
_IS_ASKED_FOR = web.RequestKey("is_asked_for", bool)


@dataclass(frozen=True, slots=True)
class Uploads:
    """``max_bytes`` of a body, unpacked; ``timeout_s`` for it, and one second more for each 4 KiB of it."""

    max_bytes: int
    timeout_s: float

    async def whole(self, request: web.Request) -> bytes:
        """The body. Raises BodyTooLarge as soon as it is known to be longer, TooSlow, and BadRequest for one that
        cannot be unpacked. Cancelling is safe."""
        return b"".join([piece async for piece in self.pieces(request)])

    async def pieces(self, request: web.Request) -> AsyncIterator[bytes]:
        """The body as it comes, unpacked. Raises as ``whole`` does."""
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
    """A body that is passed on while it comes. ``failure``: why it has not come to its end, if that is so."""

    def __init__(self, uploads: Uploads, request: web.Request) -> None:
        self._uploads, self._request = uploads, request
        self.failure: LlamaslotError | None = None

    async def pieces(self) -> AsyncIterator[bytes]:
        try:
            async for piece in self._uploads.pieces(self._request):
                yield piece
        except LlamaslotError as error:  # aiohttp's client would make a broken connection of it
            self.failure = error
            raise


async def hold_back(request: web.Request) -> None:
    """aiohttp's ``expect_handler``: nothing is said until somebody wants the body. Other expectations mean nothing here
    and, as RFC 9110 allows, are not looked at."""


def is_held_back(request: web.Request) -> bool:
    """Whether the client still waits for a word before it sends its body."""
    expects = request.headers.get("Expect", "").lower() == "100-continue" and request.version >= HttpVersion11
    return expects and not request.get(_IS_ASKED_FOR, False)


async def close_behind(request: web.Request, response: web.StreamResponse) -> None:
    """Signal ``on_response_prepare``: take no further request from a connection where nobody knows what comes next.

    That is a body that the client was not asked for, and may leave out now, and an answer that nothing but its end can
    end. And aiohttp (3.14) takes what stands behind
    a chunked body, its trailers, for headers of the next request: where a proxy in front shares connections, that may
    be somebody else's.
    """
    is_chunked_upload = "Transfer-Encoding" in request.headers
    is_clear = speaks_http(request) and not (is_chunked_upload or is_held_back(request))
    if not is_clear or _ends_with_connection(request, response):
        response.force_close()
    if not response.keep_alive:  # aiohttp says it to clients of HTTP/1.1 only
        response.headers["Connection"] = "close"


def speaks_http(request: web.Request) -> bool:
    """Whether its version is one that is spoken here: aiohttp reads others (0.9, 2.0) as if they were."""
    return request.version in (HttpVersion10, HttpVersion11)


def _ends_with_connection(request: web.Request, response: web.StreamResponse) -> bool:
    """Whether only the end of the connection tells where the body ends: to a client of HTTP/1.0, which knows no chunks,
    where its length is not known. aiohttp (3.14) keeps the connection open if the client has asked for that."""
    return request.version < HttpVersion11 and response.content_length is None


async def _ask_for_it(request: web.Request) -> None:
    if is_held_back(request):
        request[_IS_ASKED_FOR] = True
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # aiohttp's measure of whether the answer has begun
