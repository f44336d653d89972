"""An answer of llama-server's on its way out, as it comes.

It is read as fast as its client takes it. What lies about of it is a window of the kernel's, aiohttp's read buffer (32
KiB, and what came last), a piece of 16 KiB, and what the transport to the client has not sent yet, some 100 KiB.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
from aiohttp import web

from llamaslot.errors import BackendDown, ClientGone
from llamaslot.llama.api import next_piece
from llamaslot.web.downstream import begin, cut, error_event, send
from llamaslot.web.headers import to_client

log = logging.getLogger(__name__)

_LAST_EVENT = b'"message_stop"'  # of /v1/messages; inside a text the quotes would be escaped


async def relay(
    request: web.Request,
    upstream: aiohttp.ClientResponse,
    told: dict[str, str],
    ended: Callable[[], Awaitable[None]] | None = None,
    begun: Callable[[], None] = lambda: None,
) -> web.StreamResponse:
    """The answer. ``begun`` is called with the first of a stream. Raises BackendDown, ClientGone.

    ``ended`` is called when llama-server is through with its slot, before the client can read that: a client may hang
    up at once after it, and that must not look as if it had left the slot at work.
    """
    headers = to_client(upstream)
    headers.update(told)
    response = web.StreamResponse(status=upstream.status, reason=upstream.reason, headers=headers)
    if upstream.content_length is not None and upstream.status not in (204, 304):
        response.content_length = upstream.content_length
    is_stream = upstream.content_type == "text/event-stream"
    pieces = _as_they_come(upstream, begun, ended) if is_stream else _last_one_late(upstream, ended)
    try:
        async for piece in pieces:
            if not response.prepared:
                await begin(response, request)
            await send(response, piece)
    except BackendDown as error:
        if not response.prepared:
            raise
        log.warning("%s %s: llama-server closed the connection in the middle", request.method, request.path)
        if not is_stream:
            cut(request)  # half an answer must not look like a whole one
            raise ClientGone from error
        await send(response, error_event(request, error.body()))
    if not response.prepared:
        await begin(response, request)
    return response


async def _as_they_come(
    upstream: aiohttp.ClientResponse, begun: Callable[[], None], ended: Callable[[], Awaitable[None]] | None
) -> AsyncIterator[bytes]:
    yield b""  # the headers may go before any event
    before = b""
    while piece := await next_piece(upstream):
        begun()
        if ended is not None and _LAST_EVENT in before + piece:
            await ended()
        before = piece[1 - len(_LAST_EVENT) :]
        yield piece
    if ended is not None:
        await ended()


async def _last_one_late(
    upstream: aiohttp.ClientResponse, ended: Callable[[], Awaitable[None]] | None
) -> AsyncIterator[bytes]:
    """Each piece when the next is there, so that the last is known to be the last."""
    held = b""
    while piece := await next_piece(upstream):
        if held:
            yield held
        held = piece
    if ended is not None:
        await ended()
    if held:
        yield held
