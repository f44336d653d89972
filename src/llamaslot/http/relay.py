"""Relays an answer of llama-server as it comes.

llama-server's answer is read as fast as the client receives it. These buffers hold a part of it: the kernel's window,
aiohttp's read buffer (32 KiB, and the last piece), a piece of 16 KiB, an incomplete event (up to 32 KiB), and some
100 KiB in the transport to the client.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web

from llamaslot.errors import BackendDown, ClientGone
from llamaslot.formats.base import ErrorEvents, translated_all
from llamaslot.http.client_stream import Relayed, begin, cut, end_relayed, errors_of, send
from llamaslot.http.forwarded_headers import to_client
from llamaslot.llama.answers import Response, length_of, media_type_of, next_piece
from llamaslot.llama.sse import n_whole, without_empty_events

log = logging.getLogger(__name__)

_HELD_BYTES = 1 << 15  # of an incomplete event that are held until the rest comes
_LAST_EVENT = b'"message_stop"'  # of /v1/messages; inside a text the quotes would be escaped


async def relay(
    request: web.Request,
    upstream: Response,
    told: dict[str, str],
    ended: Callable[[], Awaitable[None]] | None = None,
    begun: Callable[[], None] = lambda: None,
) -> web.StreamResponse:
    """Relay the answer ``upstream`` to the client, with the headers ``told`` added. Raises BackendDown, ClientGone.

    A stream is sent in whole events. If it is interrupted, ``end_relayed`` can report that in one more event.

    ``begun`` is called at each piece of a stream. ``ended`` is called when llama-server has finished the answer, before
    the client can read its end: a client may close the connection immediately, and that must not look as if
    llama-server were still working in the slot.
    """
    headers = to_client(upstream, told)
    response = web.StreamResponse(status=upstream.status, reason=upstream.reason, headers=headers)
    if (length := length_of(upstream)) is not None and upstream.status not in (204, 304):
        response.content_length = length
    is_stream = media_type_of(upstream) == "text/event-stream"
    errors = errors_of(request, told.get("x-request-id", ""))
    pieces = _events(upstream, errors, begun, ended) if is_stream else _last_one_late(upstream, ended)
    relayed = Relayed(response, errors)
    try:
        async for piece in pieces:
            if not response.prepared:
                await begin(response, request)
                if is_stream and response.content_length is None:
                    relayed.begins(request)
            relayed.is_whole = not piece or n_whole(piece) == len(piece)
            await send(response, piece)
    except BackendDown as error:
        if not response.prepared:
            raise
        log.warning(
            "%s %s: llama-server closed the connection in the middle of its answer, so the client gets only a part",
            request.method, request.rel_url.raw_path,
        )  # fmt: skip
        if await end_relayed(request, error) is None:
            cut(request)  # half an answer must not look like a whole one
            raise ClientGone from error
    if not response.prepared:
        await begin(response, request)
    relayed.is_over = True
    return response


async def _events(
    upstream: Response,
    errors: ErrorEvents,
    begun: Callable[[], None],
    ended: Callable[[], Awaitable[None]] | None,
) -> AsyncIterator[bytes]:
    """Yield the events of a stream, whole and with errors translated for the client. An event larger than 32 KiB comes
    in pieces.
    """
    yield b""  # the headers may be sent before any event
    before = held = b""
    is_whole = True  # the sent bytes end with a whole event
    while piece := await next_piece(upstream):
        begun()
        if ended is not None and _LAST_EVENT in before + piece:
            await ended()
        before = piece[1 - len(_LAST_EVENT) :]
        held += piece
        n_of_events = n_whole(held)
        n = n_of_events or (len(held) if len(held) > _HELD_BYTES else 0)
        if n:
            told = held[:n]
            yield translated_all(errors, without_empty_events(told)) if is_whole and n_of_events else told
            held, is_whole = held[n:], n_of_events > 0
    if ended is not None:
        await ended()
    if held:
        yield held


async def _last_one_late(
    upstream: Response, ended: Callable[[], Awaitable[None]] | None
) -> AsyncIterator[bytes]:
    """Yield each piece of an answer when the next one has come, so that ``ended`` is called before the last piece is
    sent.
    """
    held = b""
    while piece := await next_piece(upstream):
        if held:
            yield held
        held = piece
    if ended is not None:
        await ended()
    if held:
        yield held
