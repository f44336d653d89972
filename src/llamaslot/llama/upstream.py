"""Sends a request to llama-server on a new connection, and reads its answer piece by piece while it arrives: HTTP/1.1
as an asyncio protocol.

aiohttp's client takes 0.65 ms of this process for a request on a new connection, and wakes a task for each event of a
stream. Here each piece of an answer goes from the socket straight to a function (``Response.pass_to``).

A request must never run twice, so kept connections are not used: llama-server closes a connection after an answer of
more than 5 seconds, without notice. Nobody knows whether it has read a request that was on its way then. A new
connection takes 0.1 ms more.

aiohttp sends the requests that cannot be sent here (``PlainServer.of`` and ``send`` return None): over TLS, with other
methods than GET and POST, with characters outside of printable ASCII.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from types import TracebackType
from typing import Any, cast

import httptools
from multidict import CIMultiDict

from llamaslot.errors import BackendDown, SlotWedged
from llamaslot.llama.answers import BROKEN_OFF, RELAYED_BYTES, Response, Take
from llamaslot.llama.dial import REQUEST_CONNECT_S, Dial, PlainTarget
from llamaslot.llama.keep_alive import BadAnswer

_HEAD_BYTES = 1 << 16  # the largest headers of an answer

# The size of the receive buffer to request from the kernel, which allocates twice as much. It limits how many bytes of
# an answer wait in the kernel for their reader.
_WINDOW_BYTES = 1 << 15

_METHODS = ("GET", "POST")

Check = Callable[[], Awaitable[None] | None]
_ODD_IN_TARGET = re.compile(r"[^!-~]")
_ODD_IN_HEADERS = re.compile(r"[^\t -~]")  # above all line ends, which would begin another header


def narrow_socket(family: int, kind: int, protocol: int) -> socket.socket:
    """A new socket with a small receive buffer, so that the kernel holds few bytes of an unread answer, and the event
    loop receives few at once: uvloop reads up to 256 kB.

    The size is set before the socket is connected: when the window of an open connection shrinks, Linux drops data that
    is on its way, and large answers stalled for minutes.
    """
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _WINDOW_BYTES)
    return sock


class PlainServer:
    """Sends requests to one server over plain HTTP, each on a new connection."""

    def __init__(self, url: str, target: PlainTarget) -> None:
        self._url, self._target = url, target
        self._dial = Dial(target.host, target.port, narrow_socket)

    @classmethod
    def of(cls, url: str, api_key: str | None) -> PlainServer | None:
        """A sender to the server at a URL; None if the URL is not supported (see ``PlainTarget.of``)."""
        target = PlainTarget.of(url, api_key)
        return cls(url, target) if target is not None else None

    def _head(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None) -> bytes | None:
        """The request line and headers of a request, as bytes; None if a method or character is not supported here.
        ``headers``: without Host, Authorization, lengths and connection, which are added.
        """
        items = headers.items()
        is_odd = _ODD_IN_HEADERS.search("".join([part for item in items for part in item]))
        if method not in _METHODS or is_odd or _ODD_IN_TARGET.search(path):
            return None
        lines = "".join([f"{name}: {value}\r\n" for name, value in items])
        more = "" if "Accept" in headers else "Accept: */*\r\n"
        if body is not None or method == "POST":
            more += f"Content-Length: {len(body or b'')}\r\n"
        if body is not None and "Content-Type" not in headers:
            more += "Content-Type: application/octet-stream\r\n"
        line = f"{method} {self._target.prefix}{path} HTTP/1.1\r\n"
        return f"{line}{self._target.headers}{lines}{more}Connection: close\r\n\r\n".encode("ascii")

    async def send(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        *,
        timeout_s: float | None = None,
        silence_s: float | None = None,
        n_held_bytes: int = RELAYED_BYTES,
        check: Check | None = None,
    ) -> PlainResponse | None:
        """Send a request, and wait for the headers of its answer. The caller must close the response. None if nothing
        was sent, because the request is not supported here or no connection could be opened: then the caller lets
        aiohttp send it, which may succeed or raises an error with the reason.

        ``timeout_s``: limit for the whole answer. ``silence_s``: limit for the time between two pieces of it.
        ``n_held_bytes``: if more bytes than this wait for a reader, no more are received. ``check()`` is called when
        the connection is open, before anything is sent; an awaitable that it returns is awaited.

        Raises what ``check`` raises, TimeoutError, SlotWedged after ``silence_s``, and ConnectionError if the
        connection breaks (BadAnswer for an invalid answer). Canceling closes the connection.
        """
        if (head := self._head(method, path, headers, body)) is None:
            return None
        response = PlainResponse(self._url, n_held_bytes, silence_s, timeout_s)
        try:
            if await self._dial.connect(lambda: response, REQUEST_CONNECT_S) is not None:
                if check is not None and (asking := check()) is not None:
                    await asking
                await response.ask(head, body)
                return response
        except BaseException:
            response.close()
            raise
        response.close()
        return None


class Sending(contextlib.AbstractAsyncContextManager[Response]):
    """The context manager that ``LlamaServer.request`` returns. A class, because a generator takes 10 us more."""

    __slots__ = ("_is_down", "_otherwise", "_over_aiohttp", "_plain", "_response")

    def __init__(
        self,
        plain: Callable[[], Coroutine[Any, Any, PlainResponse | None]] | None,
        otherwise: Callable[[], contextlib.AbstractAsyncContextManager[Response]],
        is_down: Callable[[BaseException], BackendDown],
    ) -> None:
        """``plain()`` sends the request, and returns None if it cannot; then ``otherwise`` sends it. ``is_down`` turns
        an error of the connection into the BackendDown to raise.
        """
        self._plain, self._otherwise, self._is_down = plain, otherwise, is_down
        self._response: PlainResponse | None = None
        self._over_aiohttp: contextlib.AbstractAsyncContextManager[Response] | None = None

    async def __aenter__(self) -> Response:
        try:
            if self._plain is not None and (response := await self._plain()) is not None:
                self._response = response
                return response
            self._over_aiohttp = self._otherwise()
            return await self._over_aiohttp.__aenter__()
        except (ConnectionError, TimeoutError) as error:
            raise self._is_down(error) from error

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._over_aiohttp is not None:
                await self._over_aiohttp.__aexit__(kind, error, trace)
            elif self._response is not None:
                self._response.close()
        except (ConnectionError, TimeoutError) as found:
            raise self._is_down(found) from found
        if isinstance(error, ConnectionError | TimeoutError):
            raise self._is_down(error) from error


class PlainResponse(asyncio.Protocol):
    """One connection to llama-server, and the ``Response`` that arrives on it."""

    def __init__(self, url: str, n_held_bytes: int, silence_s: float | None, timeout_s: float | None) -> None:
        self.status, self.reason = 0, ""
        self.headers: CIMultiDict[str] = CIMultiDict()
        self._loop, self._url = asyncio.get_running_loop(), url
        self._n_held_bytes, self._silence_s = n_held_bytes, silence_s
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[bool] | None = None
        self._take: Take | None = None
        self._read: list[bytes] = []  # parts of the body in the data that the parser is reading now
        self._held: list[bytes] = []  # pieces of the body that wait for a reader
        self._n_held = self._n_head = 0
        self._is_paused = self._is_head_over = self._is_over = False
        self._error: Exception | None = None
        self._heard_at = 0.0
        self._silence_timer: asyncio.TimerHandle | None = None
        self._timer = (
            None if timeout_s is None else self._loop.call_later(timeout_s, self._fail, TimeoutError())
        )

    async def ask(self, head: bytes, body: bytes | None) -> None:
        """Send a request on the open connection, and wait for the headers of the answer. Raises as ``PlainServer.send``
        does.
        """
        assert self._transport is not None, "connected"
        self._heard_at = self._loop.time()
        self._watch()
        self._transport.writelines([head, body] if body else [head])
        await self._wait(None)

    @property
    def has_ended(self) -> bool:
        return self._is_over and not self._held

    async def pass_to(self, take: Take) -> bool:
        """As ``Response.pass_to``."""
        while self._held:
            held = self._held
            piece = held[0] if len(held) == 1 else b"".join(held)
            self._held, self._n_held = [], 0
            self._go_on()
            if not take(piece):
                return True
        return await self._wait(take)

    async def _wait(self, take: Take | None) -> bool:
        """Wait until ``take`` has returned False, or, if it is None, until the headers have arrived: then returns True.
        Returns False at the end of the answer.
        """
        if take is None and self._is_head_over:
            return True
        if self._error is not None:
            raise self._error
        if self._is_over:
            return False
        self._take, self._waiter = take, self._loop.create_future()
        try:
            return await self._waiter
        finally:
            self._take = self._waiter = None

    def close(self) -> None:
        """Close the connection at once, so that llama-server can notice that its client has left. Idempotent."""
        for timer in (self._timer, self._silence_timer):
            if timer is not None:
                timer.cancel()
        self._timer = self._silence_timer = None
        self._parser = None  # breaks the reference cycle: the parser refers to this object
        self._abort()

    def _abort(self) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()

    def _go_on(self) -> None:
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._heard_at = self._loop.time()
            self._transport.resume_reading()

    def _watch(self) -> None:
        """Fail with SlotWedged if nothing was received for ``silence_s``; else call this again when that time may be
        over. Time in which reading is paused does not count.
        """
        if (silence_s := self._silence_s) is None:
            return
        now = self._loop.time()
        if self._is_paused:
            self._heard_at = now
        elif now >= self._heard_at + silence_s:
            text = f"llama-server at {self._url} has sent nothing for {silence_s:g} s; its slot is given up"
            self._fail(SlotWedged(text))
            return
        self._silence_timer = self._loop.call_at(self._heard_at + silence_s, self._watch)

    def _wake(self, goes_on: bool) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(goes_on)

    def _fail(self, error: Exception) -> None:
        """Close the connection. A reader gets ``error`` after the pieces that arrived before."""
        if self._error is None and not self._is_over:
            self._error = error
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_exception(error)
        self._abort()

    # -- called by asyncio ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own is no subclass of it

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._is_over or self._error is not None:
            return
        self._heard_at = self._loop.time()
        if not self._is_head_over:
            self._n_head += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._deliver()
            if self._is_over:  # the answer is complete: ignore bytes that follow it
                self._wake(False)
            else:
                self._fail(self._broken(BadAnswer(f"no answer in HTTP: {error!r}")))
            return
        if not self._is_head_over:
            if self._n_head > _HEAD_BYTES:
                self._fail(BadAnswer(f"headers of more than {_HEAD_BYTES} bytes"))
            return
        self._deliver()
        if self._is_over:
            self._wake(False)

    def _deliver(self) -> None:
        """Pass the part of the body that the parser has read to ``take``; if there is none now, hold it, and pause
        reading if too much is held.
        """
        if not self._read:
            return
        piece = self._read[0] if len(self._read) == 1 else b"".join(self._read)
        self._read.clear()
        if self._take is not None:
            try:
                goes_on = self._take(piece)
            except Exception as error:
                self._take = None
                if self._waiter is not None and not self._waiter.done():
                    self._waiter.set_exception(error)
                return
            if not goes_on:
                self._take = None
                self._wake(True)
            return
        self._held.append(piece)
        self._n_held += len(piece)
        if self._n_held > self._n_held_bytes and not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._is_over or self._error is not None:
            return
        if error is None and self._is_head_over and self._is_open_ended:
            self._is_over = True  # an answer without a length ends with its connection
            self._wake(False)
        else:
            self._fail(self._broken(ConnectionError("the connection was closed")))

    def _broken(self, error: ConnectionError) -> Exception:
        """The error to raise for a broken connection. Before the end of the headers: ``error`` itself, which
        ``Sending`` translates. Within the body: BackendDown.
        """
        if not self._is_head_over:
            return error
        down = BackendDown(BROKEN_OFF)
        down.__cause__ = error
        return down

    @property
    def _is_open_ended(self) -> bool:
        return "Content-Length" not in self.headers and "Transfer-Encoding" not in self.headers

    # -- called by the parser ------------------------------------------------------------------------------------

    def on_status(self, reason: bytes) -> None:
        self.reason += reason.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_head_over:  # headers after the body are trailers: ignore them
            self.headers.add(name.decode("latin-1"), value.decode("utf-8", "surrogateescape"))

    def on_headers_complete(self) -> None:
        if self._is_over or self._parser is None:  # of a second answer: ignore it
            return
        self.status = self._parser.get_status_code()
        if self.status < 200:  # an interim answer (100): the answer follows
            self.headers.clear()
            self.reason = ""
            return
        self._is_head_over = True
        self._wake(True)

    def on_body(self, piece: bytes) -> None:
        if not self._is_over:
            self._read.append(piece)

    def on_message_complete(self) -> None:
        if self._is_head_over:
            self._is_over = True
