"""HTTP/1.1 connections to llama-server, as an asyncio protocol: opens one, sends a request, and reads the answer piece
by piece while it arrives.

aiohttp's client takes 0.65 ms of this process for a request on a new connection, and wakes a task for each event of a
stream. Here each piece of an answer goes from the socket straight to a function (``Response.pass_to``).
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import select
import socket
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast
from urllib.parse import urlsplit

import httptools
from multidict import CIMultiDict

from llamaslot.errors import BackendDown, SlotWedged
from llamaslot.llama.answers import BROKEN_OFF, RELAYED_BYTES, Take

P = TypeVar("P", bound=asyncio.Protocol)

QUESTION_CONNECT_S = 5.0  # limit for connecting to ask a short question, which can be repeated
# Limit for connecting to send a client's request. If a burst has filled llama-server's backlog, Linux sends the first
# packet again after 1, 3 and 7 s.
REQUEST_CONNECT_S = 10.0

_HEAD_BYTES = 1 << 16  # the largest headers of an answer
_LATE_S = 0.1  # if a timer is called so much too late, this process was busy

_ODD = re.compile(r"[^!-~]")  # needs encoding


class PlainTarget(NamedTuple):
    """A server at ``http://host[:port][/prefix]``. ``prefix``: comes before each path. ``headers``: header lines for
    each request (Host, Authorization), each with its line end.
    """

    host: str
    port: int
    prefix: str
    headers: str

    @classmethod
    def of(cls, url: str, api_key: str | None) -> PlainTarget | None:
        """The target of a URL; None if only aiohttp can send to it (TLS, user names, characters that need encoding)."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or parts.username is not None:
            return None
        if _ODD.search(f"{parts.netloc}{parts.path}{api_key or ''}"):
            return None
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        return cls(parts.hostname, parts.port or 80, parts.path.rstrip("/"), f"Host: {parts.netloc}\r\n{key}")


class NotReached(ConnectionError):
    """No connection to the host is possible, for another reason than a refusal (no route, no address)."""


class Dial:
    """Opens connections to one host and port. Tries the address that worked last first, because resolving the host name
    takes a thread.
    """

    def __init__(
        self, host: str, port: int, open_socket: Callable[[int, int, int], socket.socket] = socket.socket
    ) -> None:
        """``open_socket(family, kind, protocol)`` makes a socket that is not connected."""
        self._host, self._port, self._open_socket = host, port, open_socket
        self._last: tuple[int, Any] | None = None  # family and address

    async def connect(self, make: Callable[[], P], within_s: float) -> P:
        """Open a connection, and return its asyncio protocol, which ``make`` has made.

        Raises ConnectionRefusedError or NotReached if the name cannot be resolved or no address accepts a connection,
        TimeoutError if an address does not answer for ``within_s``. Canceling closes the connection.
        """
        if self._last is not None:
            try:
                return await self._connect_to(make, *self._last, within_s)
            except TimeoutError:
                raise
            except OSError:
                self._last = None
        fault: OSError = NotReached(f"{self._host} has no address")
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                self._host, self._port, type=socket.SOCK_STREAM
            )
        except OSError as error:
            raise NotReached(str(error)) from error
        for family, _, _, _, address in found:
            try:
                protocol = await self._connect_to(make, family, address, within_s)
            except TimeoutError:
                raise
            except OSError as error:
                fault = error
            else:
                self._last = family, address
                return protocol
        raise fault if isinstance(fault, ConnectionRefusedError) else NotReached(str(fault))

    async def _connect_to(self, make: Callable[[], P], family: int, address: Any, within_s: float) -> P:
        sock = self._open_socket(family, socket.SOCK_STREAM, 0)
        try:
            sock.setblocking(False)
            await _connect_socket(sock, address, within_s)
            _, protocol = await asyncio.get_running_loop().create_connection(make, sock=sock)
        except BaseException:
            sock.close()
            raise
        return protocol


async def _connect_socket(sock: socket.socket, address: Any, within_s: float) -> None:
    """Connect ``sock`` to ``address``. Raises OSError, and TimeoutError after ``within_s``. Canceling leaves the
    socket unconnected.

    After ``within_s`` the kernel is asked whether the socket is connected: with 1,000 requests at once, this process
    notices some connections only seconds after they were opened.
    """
    # A connection to the same machine is open when the first call returns, but only a second call says so.
    for _ in range(2):
        if not (fault := sock.connect_ex(address)):
            return
        if fault not in (errno.EINPROGRESS, errno.EALREADY):
            raise OSError(fault, os.strerror(fault))
    try:
        async with asyncio.timeout(within_s):
            await asyncio.get_running_loop().sock_connect(sock, address)
    except TimeoutError:
        try:
            sock.getpeername()
        except OSError:
            raise TimeoutError from None


class BadAnswer(ConnectionError):
    """The answer is not valid HTTP, or its headers are too large."""


def _ignore(_: ServerConnection) -> None:
    pass


class ServerConnection(asyncio.Protocol):
    """A connection to the server at ``url``: one request at a time, and the ``Response`` that arrives to it."""

    def __init__(
        self,
        url: str,
        *,
        n_held_bytes: int = RELAYED_BYTES,
        silence_s: float | None = None,
        on_lost: Callable[[ServerConnection], None] = _ignore,
    ) -> None:
        """``n_held_bytes``: if more bytes of an answer than this wait for a reader, no more are received.
        ``silence_s``: limit for the time between two pieces of an answer. ``on_lost`` is called when the connection can
        carry no further request.
        """
        self._loop, self._url = asyncio.get_running_loop(), url
        self._n_held_bytes, self._silence_s, self._on_lost = n_held_bytes, silence_s, on_lost
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[bool] | None = None
        self._take: Take | None = None
        self._read: list[bytes] = []  # parts of the body in the data that the parser is reading now
        self._held: list[bytes] = []  # pieces of the body that wait for a reader
        self._n_held = self._n_head = 0
        self._is_paused = self._is_head_over = False
        self._is_over = True  # nothing was asked yet
        self._error: Exception | None = None
        self._heard_at = 0.0
        self._silence_timer: asyncio.TimerHandle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._readable: select.poll | None = None
        self.status, self.reason = 0, ""
        self.headers: CIMultiDict[str] = CIMultiDict()
        self.is_heard = False  # something of the answer to the last request has come
        self.is_reusable = True  # once the answer has ended, another request may be sent

    def ask(self, head: bytes, body: bytes | None, until: float | None = None) -> None:
        """Send a request; its answer is read next. ``until``: when the whole answer must have come, by the clock of the
        event loop. Raises ConnectionError if the connection is closed.
        """
        self.is_heard = False
        if self._transport is None or self._transport.is_closing():
            raise self._error or ConnectionError("the connection was closed")
        self.status, self.reason, self.headers = 0, "", CIMultiDict()
        self._n_head, self._is_head_over, self._is_over = 0, False, False
        self._heard_at = self._loop.time()
        self._watch()
        if until is not None:
            self._timer = self._loop.call_at(until, self._is_late, until)
        self._transport.writelines([head, body] if body else [head])

    async def head_arrives(self) -> None:
        """Wait for the headers of the answer. Raises TimeoutError, SlotWedged, and ConnectionError if the connection
        breaks (BadAnswer for an invalid answer).
        """
        if not self._is_head_over:
            await self._wait(None)

    @property
    def has_ended(self) -> bool:
        return self._is_over and not self._held

    async def pass_to(self, take: Take) -> bool:
        """As ``Response.pass_to``. Before the headers it raises as ``head_arrives``."""
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
        if self._error is not None:
            raise self._error
        if self._is_over:
            return False
        self._take, self._waiter = take, self._loop.create_future()
        try:
            return await self._waiter
        finally:
            self._take = self._waiter = None

    @property
    def is_open(self) -> bool:
        """True if neither side has closed the connection. Asks the kernel, because the event loop learns of it later.
        Only meaningful between two answers, when there is nothing to read. Takes 1 us.
        """
        if self._transport is None or self._transport.is_closing():
            return False
        if self._readable is None:  # a closed connection is readable too
            self._readable = select.poll()
            self._readable.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not self._readable.poll(0)

    def close(self) -> None:
        """Close the connection at once, so that llama-server can notice that its client has left. Idempotent."""
        self._stop_timers()
        self._parser = None  # breaks the reference cycle: the parser refers to this object
        self._abort()

    def _stop_timers(self) -> None:
        for timer in (self._timer, self._silence_timer):
            if timer is not None:
                timer.cancel()
        self._timer = self._silence_timer = None

    def _abort(self) -> None:
        self.is_reusable = False
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

    def _is_late(self, until: float) -> None:
        """Called when the answer should have come: fail with TimeoutError. If this call itself comes too late, this
        process was busy and may not have read the answer yet: wait ``_LATE_S`` more.
        """
        if (now := self._loop.time()) > until + _LATE_S:
            self._timer = self._loop.call_at(now + _LATE_S, self._is_late, now + _LATE_S)
        else:
            self._fail(TimeoutError())

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

    def _end(self) -> None:
        """The whole answer has been received."""
        self._is_over = True
        self._stop_timers()

    # -- called by asyncio ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own is no subclass of it

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._error is not None:
            return
        if self._is_over:  # nothing was asked
            self._abort()
            self._on_lost(self)
            return
        self._heard_at, self.is_heard = self._loop.time(), True
        if not self._is_head_over:
            self._n_head += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._deliver()
            if self._is_over:  # the answer is complete: ignore bytes that follow it
                self.is_reusable = False
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
        self._transport = self._parser = None
        self.is_reusable = False
        self._on_lost(self)
        if self._is_over or self._error is not None:
            return
        if error is None and self._is_head_over and self._is_open_ended:
            self._end()  # an answer without a length ends with its connection
            self._wake(False)
        else:
            self._fail(self._broken(ConnectionError("the connection was closed")))

    def _broken(self, error: ConnectionError) -> Exception:
        """The error to raise for a broken connection. Before the end of the headers: ``error`` itself, which the caller
        translates. Within the body: BackendDown.
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

    def on_message_begin(self) -> None:
        if self._is_over:  # a second answer to one request
            self.is_reusable = False

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
        if self._take is None:
            self._wake(True)

    def on_body(self, piece: bytes) -> None:
        if not self._is_over:
            self._read.append(piece)

    def on_message_complete(self) -> None:
        if self._is_head_over and not self._is_over and self._parser is not None:
            self.is_reusable = self.is_reusable and self.status < 400 and self._parser.should_keep_alive()
            self._end()
