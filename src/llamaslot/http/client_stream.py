"""The client's side of a request: headers and bytes of the answer, comments while the client waits, errors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.http import StreamWriter
from msgspec import Struct
from multidict import CIMultiDict

from llamaslot.backend.long_prompt import Prefilling
from llamaslot.config.sections import StreamConfig
from llamaslot.errors import ClientGone, LlamaslotError, NotAllowed, Unauthorized, UpstreamError
from llamaslot.formats import format_named
from llamaslot.formats.base import ErrorEvents
from llamaslot.formats.comments import Comment
from llamaslot.http.in_flight import note_error
from llamaslot.http.response_headers import NAME
from llamaslot.llama.routes import classify
from llamaslot.llama.sse import comment
from llamaslot.tasks import TaskOwner

log = logging.getLogger(__name__)

MISTAKE = "internal error in llamaslot; its log has the traceback"
HAS_BEGUN = web.RequestKey("has_begun", bool)  # whether headers of an answer have been sent
_NOTHING_TO_SAY = contextlib.nullcontext()
SSE_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Writer(StreamWriter):
    """Writes an answer, always as HTTP/1.1, as llama-server and RFC 9110 (section 2.5) do. aiohttp repeats the client's
    version, even one that it does not support, and sends 1.0 in answer to invalid requests.
    """

    #: True if the first part of the body follows at once: headers are sent with it, in one packet.
    holds_headers = False
    n_put = 0  # successful calls of ``put``: in a stream about one for each token

    async def write_headers(self, status_line: str, headers: CIMultiDict[str]) -> None:
        await super().write_headers("HTTP/1.1 " + status_line.partition(" ")[2], headers)

    def send_headers(self) -> None:
        if not self.holds_headers:
            super().send_headers()

    def put(self, data: bytes) -> bool:
        """Send ``data`` at once, as a part of the body. Returns False, and sends nothing, if the bytes would have to
        wait: the headers are not sent yet, the client receives too slowly, or it has left.
        """
        protocol = self._protocol
        transport = protocol.transport
        is_ready = self._headers_written and self.length is None and self._compress is None
        if not is_ready or transport is None or protocol.writing_paused or transport.is_closing():
            return False
        transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)
        self.n_put += 1
        return True


@dataclass(slots=True)
class Downstream:
    """The client's side of one answer.

    ``headers`` may be added until something is sent; later ones are sent as comments. ``progress`` makes an event that
    reports the progress of the prefill, None if the client has not requested such events. ``state``: its text is the
    next comment.
    """

    request: web.Request
    config: StreamConfig
    is_streaming: bool
    headers: dict[str, str] = field(default_factory=dict)
    progress: Callable[[Prefilling], bytes] | None = None
    state: object = Comment.TOKENIZING
    response: web.StreamResponse | None = None
    is_answered: bool = False  # a part of llama-server's answer was sent, or is about to be
    told: dict[str, Any] = field(default_factory=dict)  # values that later parts of the answer must repeat
    errors: ErrorEvents = field(init=False)
    _has_moved: asyncio.Event | None = None  # while a task sends comments

    def __post_init__(self) -> None:
        self.errors = errors_of(self.request, self.headers.get("x-request-id", ""))

    def say(self, state: object) -> None:
        """Set what comments tell from now on: ``str(state)`` at the time of each comment. A ``Prefilling`` also makes a
        progress event at once, if the client has requested such events.
        """
        self.state = state
        if isinstance(state, Prefilling) and self.progress is not None and self._has_moved is not None:
            self._has_moved.set()

    def note(self, state: object) -> None:
        """As ``say``, but without a progress event: llama-server's own progress events are relayed meanwhile."""
        self.state = state

    @property
    def has_answer(self) -> bool:
        """True if any byte of llama-server's answer was sent, or is about to be, by this object or by ``relay``."""
        return self.is_answered or (self.response is None and bool(self.request.get(HAS_BEGUN)))

    @property
    def has_begun(self) -> bool:
        """True if the headers have been sent. After that an error can only be reported in an event."""
        return self.response is not None

    def add_headers(self, headers: Mapping[str, str]) -> bytes:
        """Add headers to the answer. If the headers have been sent, return comments to send instead of them; else no
        bytes.
        """
        if not self.has_begun:
            self.headers.update(headers)
            return b""
        if not self.config.comments:
            return b""
        return b"".join(comment(f"{name}: {value}") for name, value in headers.items())

    async def begin(
        self, status: int = 200, headers: Mapping[str, str] | None = None, *, is_more: bool = False
    ) -> web.StreamResponse:
        """Send status and headers if they have not been sent, and return the response. ``is_more``: the caller sends a
        part of the body, or its end, directly afterwards, and the headers go with that. Raises ClientGone.
        """
        if self.response is None:
            told = CIMultiDict(headers or {})
            told.update(self.headers)
            self.response = web.StreamResponse(status=status, headers=told)
            writer = self.request.writer
            if is_more and isinstance(writer, Writer):
                writer.holds_headers = True
            await begin(self.response, self.request)
        return self.response

    async def write(self, data: bytes) -> None:
        """Send bytes to the client, and wait until it takes them. Raises ClientGone."""
        if data:
            await send(await self.begin(headers=SSE_HEADERS, is_more=True), data)

    def put(self, data: bytes) -> bool:
        """Send bytes at once. Returns False, and sends nothing, if that is not possible; then call ``write``, which
        waits for a slow client, and raises ClientGone for one that has left.
        """
        writer = self.request.writer
        return self.has_begun and isinstance(writer, Writer) and writer.put(data)

    def waiting(self) -> contextlib.AbstractAsyncContextManager[None]:
        """A context manager. Within its block a streaming client gets headers and a comment every ``keepalive_s``
        seconds, and the progress events that it has requested. A client that does not stream gets nothing.
        """
        if not (self.is_streaming and (self.config.comments or self.progress is not None)):
            return _NOTHING_TO_SAY
        return self._commented()

    @contextlib.asynccontextmanager
    async def _commented(self) -> AsyncIterator[None]:
        ticker: asyncio.Task[None] | None = None

        def begin(wait_s: float) -> None:
            nonlocal ticker
            # The task ends with the block.
            self._has_moved = asyncio.Event()
            ticker = TaskOwner().spawn(self._tick(self._has_moved, wait_s), "comments")

        # A request that waits for less than the interval, as most do, needs no task.
        keepalive_s = self.config.keepalive_s
        timer = None
        if self.progress is None:
            timer = asyncio.get_running_loop().call_later(keepalive_s, begin, 0.0)
        else:
            begin(keepalive_s)
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()
            if ticker is not None:
                ticker.cancel()
                # ``await ticker`` would raise CancelledError, which means that the client has left.
                await asyncio.wait({ticker})

    async def _tick(self, has_moved: asyncio.Event, wait_s: float) -> None:
        """Send comments and progress events until the client has left. A comment is sent after the first ``wait_s``
        seconds, and whenever nothing was sent for ``keepalive_s`` seconds. Progress events are sent at once.
        """
        loop = asyncio.get_running_loop()
        at = loop.time() + wait_s
        while True:
            try:
                async with asyncio.timeout_at(at):
                    await has_moved.wait()
            except TimeoutError:
                said = comment(str(self.state)) if self.config.comments else b""
            else:
                has_moved.clear()
                if not (said := self._progress_event()):
                    continue  # the API has no such event: comments are all that it gets
            at = loop.time() + self.config.keepalive_s
            try:
                await self.write(said)
            except ClientGone:
                return  # aiohttp notices too, and cancels the handler

    def _progress_event(self) -> bytes:
        """Return the event that tells the client how much of its prompt is computed, in the format of its API. Returns
        no bytes if the request is not in prefill now, or its API has no such event.
        """
        state = self.state
        return self.progress(state) if self.progress is not None and isinstance(state, Prefilling) else b""

    async def fail(self, error: LlamaslotError) -> web.StreamResponse:
        """End the answer with an error, and return the response. If no headers have been sent, the client gets an error
        answer with the error's status; else an error event. Raises ClientGone.
        """
        if not self.has_begun:
            if (relayed := await end_relayed(self.request, error)) is not None:
                return relayed
            return error_instead(self.request, error, self.headers)
        note_error(self.request, error)
        await self.write(self.errors.event(error.inner))
        return await self.end()

    async def end(self, last: bytes = b"") -> web.StreamResponse:
        """Send the bytes ``last`` and the end of the answer. Raises ClientGone."""
        response = await self.begin(is_more=True)
        with _translated():
            await response.write_eof(last)
        return response


class Relayed(Struct):
    """A stream that ``relay`` sends to a client as it comes from llama-server. ``is_whole``: the bytes sent so far end
    with a whole event. ``is_over``: its end was sent or is on its way.
    """

    response: web.StreamResponse
    errors: ErrorEvents
    is_whole: bool = True
    is_over: bool = False

    def begins(self, request: web.Request) -> None:
        """Register this stream with its request, so that ``end_relayed`` finds it."""
        request[_RELAYED] = self


_RELAYED = web.RequestKey("relayed", Relayed)


async def end_relayed(request: web.Request, error: LlamaslotError) -> web.StreamResponse | None:
    """End the stream that ``relay`` sends to this client, with an error event unless its end was sent already. Returns
    None, and does nothing, if there is no such stream, or only half of an event was sent. Raises ClientGone.
    """
    relayed: Relayed | None = request.get(_RELAYED)
    if relayed is None or not (relayed.is_whole or relayed.is_over):
        return None
    note_error(request, error)
    if not relayed.is_over:
        relayed.is_over = True
        await send(relayed.response, relayed.errors.event(error.inner))
    with _translated():
        await relayed.response.write_eof()
    return relayed.response


def name_itself(request: web.Request, response: web.StreamResponse) -> None:
    """Handler of the signal ``on_response_prepare``: set the Server header, instead of aiohttp's and Python's
    versions.
    """
    response.headers.update(NAME)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Raise ClientGone instead of aiohttp's error for a client that has left. That error is one of aiohttp's *client*
    errors too, so it would look like an error of the connection to llama-server.
    """
    try:
        yield
    except ConnectionError as error:
        raise ClientGone from error


async def begin(response: web.StreamResponse, request: web.Request) -> None:
    """Send the headers of ``response``. Raises ClientGone."""
    request[HAS_BEGUN] = True
    with _translated():
        await response.prepare(request)


async def send(response: web.StreamResponse, data: bytes) -> None:
    """Send bytes of the body of ``response``. Raises ClientGone."""
    with _translated():
        await response.write(data)


# -- errors -------------------------------------------------------------------------------------------------------


def cut(request: web.Request) -> None:
    """Close a client's connection in the middle of an answer, so that the client detects that the answer is
    incomplete.
    """
    if request.transport is not None:
        request.transport.abort()


def error_instead(
    request: web.Request, error: LlamaslotError, headers: Mapping[str, str] | None = None
) -> web.Response:
    """Return the error answer to a failed request. If the headers of another answer have been sent, close the
    connection and raise ClientGone instead: half an answer must not look like a whole one.
    """
    note_error(request, error)
    if request.get(HAS_BEGUN):
        cut(request)
        raise ClientGone from error
    return error_response(error, headers)


def errors_of(request: web.Request, id_: str) -> ErrorEvents:
    """Return the encoder for errors in a stream, in the form that the clients of the request's route understand.
    ``id_``: the id of the request.
    """
    format_ = format_named(classify(request.method, request.raw_path).format)
    return format_.errors(id_) if format_ is not None else ErrorEvents(id_)


def error_response(error: LlamaslotError, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return the answer for ``error``: ``{"error": {"message", "type", "code"}}``, or llama-server's own body if the
    error is llama-server's.
    """
    headers = dict(headers or {})
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    if isinstance(error, NotAllowed):
        headers["Allow"] = ", ".join(error.methods)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, UpstreamError):
        headers["Content-Type"] = error.content_type
        return web.Response(status=error.status, body=error.payload, headers=headers)
    return web.json_response(error.body(), status=error.status, headers=headers)
