"""A pool of kept connections (keep-alive) for requests to llama-server that may run twice: HTTP/1.1, one request at a
time on each connection.

A request on a new connection of aiohttp's takes 0.65 ms of this process; here it takes 0.05 ms on a kept connection
and 0.19 ms on a new one (bench: 1,500 of 400 bytes each, in turns, on one run of a shared core).

What llama-server does with a kept connection, measured on xllamacpp 2026.10.11549:

1. It closes the connection after 5 idle seconds, after 100 requests and after an error. The last answer before the
   latter two announces it.
2. It closes the connection after an answer that took longer than 5 seconds, without notice.
3. Each open connection has a thread of its own in llama-server. Builds from before March 2026 have n_parallel + 2
   threads, so an idle connection blocks others. Later builds have n_parallel + 4 and make new threads as needed. But if
   several connections are opened at once, one of them may wait until another one is closed. With 16 connections kept
   for half a second, eight requests at once had their first tokens 0.8 s late, in one burst of five.

So llamaslot does not reuse a connection after 4 idle seconds, after a slow answer or after an error, and keeps only a
few. If a kept connection turns out to be closed before the first byte of an answer, the request is sent once more on a
new one. So only send requests that may run twice.
"""

from __future__ import annotations

import asyncio
import select
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import httptools

from llamaslot.llama.dial import QUESTION_CONNECT_S, Dial, PlainTarget

_LATE_S = 0.1  # if a timer is called so much too late, this process was busy
_IDLE_S = 4.0  # a kept connection is closed after this time; llama-server closes it after 5 s
_SLOW_S = 4.0  # no reuse after an answer that took longer: llama-server may close the connection
_N_IDLE = 2  # so many connections are kept for _IDLE_S
# So many are kept for _BURST_S: llama-server has as many threads more than slots.
_N_BURST, _BURST_S = 4, 0.05
# If _N_BURST connections are busy, a request waits so long for one of them: a kept connection costs a quarter of a new
# one, but may be busy for a long time.
_WAIT_S = 0.05
_HEAD_BYTES = 1 << 16  # the largest headers of an answer
_ANSWER_BYTES = 1 << 30
_LENGTHS = (b"content-length", b"transfer-encoding")


@dataclass(frozen=True, slots=True)
class Answer:
    """The whole answer to a request. ``content_type``: as the server sent it; "" if it sent none. ``is_connected()``:
    True while the connection on which the answer came is open. Then the process that sent it is alive, or a proxy in
    front of it.
    """

    status: int
    content_type: str
    body: bytes
    is_connected: Callable[[], bool] = field(default=lambda: False, compare=False)


class NotConnected(Exception):
    """No connection could be opened, so nothing was sent."""


_Question = tuple[bytes, bytes]  # a request: head and body


class BadAnswer(ConnectionError):
    """The answer is not valid HTTP, or is larger than the limit."""


class _Gone(ConnectionError):
    """The server has closed the connection. ``may_repeat``: it was a kept connection and no byte of the answer had
    arrived, so the request should be sent again on a new connection.
    """

    def __init__(self, *, may_repeat: bool) -> None:
        super().__init__("the connection was closed")
        self.may_repeat = may_repeat


class KeepAlivePool:
    """Kept connections to one server. One event loop owns the pool; call ``close`` in that loop."""

    def __init__(self, target: PlainTarget, max_bytes: int) -> None:
        """``max_bytes``: the limit of one answer, headers included."""
        self._target, self._dial, self._max_bytes = target, Dial(target.host, target.port), max_bytes
        self._idle: list[_Connection] = []  # the most recently used last; it is reused first
        self._busy: set[_Connection] = set()
        # Requests that wait for a busy connection to become free.
        self._waiting: deque[asyncio.Future[_Connection | None]] = deque()
        self._freed_at, self._n_opening = 0.0, 0
        self._sweep_at: asyncio.TimerHandle | None = None

    @classmethod
    def of(cls, url: str, api_key: str | None, *, max_bytes: int = _ANSWER_BYTES) -> KeepAlivePool | None:
        """A pool for the server at a URL; None if the URL is not supported (see ``PlainTarget.of``)."""
        target = PlainTarget.of(url, api_key)
        return cls(target, max_bytes) if target is not None else None

    def __len__(self) -> int:
        """The number of open connections."""
        return len(self._idle) + len(self._busy)

    async def ask(self, method: str, path: str, body: bytes | None, timeout_s: float) -> Answer:
        """Send one request and return its whole answer. ``body``: JSON, or None. The request may be sent twice, see the
        module's docstring.

        Raises NotConnected if no connection can be opened; TimeoutError if no answer came ``timeout_s`` after the
        request had its connection; ConnectionError if the connection breaks (BadAnswer for an invalid answer).
        Canceling closes the connection; llama-server still handles the request.
        """
        length = "" if body is None else f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        head = f"{method} {self._target.prefix}{path} HTTP/1.1\r\n{self._target.headers}{length}\r\n"
        question = (head.encode("ascii"), body or b"")
        kept = self._take() if self._idle else None
        if kept is None and len(self._busy) + self._n_opening >= _N_BURST:
            kept = await self._next_free()
        # Only from here on: in a burst, the time of waiting for a connection does not count.
        deadline = asyncio.get_running_loop().time() + timeout_s
        if kept is not None:
            try:
                return await self._ask_on(kept, question, deadline)
            except _Gone as error:
                if not error.may_repeat:
                    raise
                self.drop_idle()  # the other kept connections are probably closed too
        return await self._ask_on(await self._connect(deadline), question, deadline)

    def _take(self) -> _Connection:
        connection = self._idle.pop()
        self._busy.add(connection)
        return connection

    async def _next_free(self) -> _Connection | None:
        """Wait for a busy connection to become free, and return it. None if the caller should open a new one: a busy
        connection was closed, or none became free for ``_WAIT_S``. That time starts again whenever one becomes free,
        also for another request.
        """
        loop = asyncio.get_running_loop()
        free: asyncio.Future[_Connection | None] = loop.create_future()
        timers = list[asyncio.TimerHandle]()  # with the timer that is running
        timers.append(loop.call_later(_WAIT_S, self._look, free, timers))
        self._waiting.append(free)
        try:
            return await free
        except asyncio.CancelledError:
            is_given = free.done() and not free.cancelled() and free.exception() is None
            if is_given and (connection := free.result()) is not None:
                self._keep(connection)
            raise
        finally:
            timers[0].cancel()

    def _look(self, free: asyncio.Future[_Connection | None], timers: list[asyncio.TimerHandle]) -> None:
        """Let a request open a new connection if none has become free for ``_WAIT_S``; else look again later."""
        loop = asyncio.get_running_loop()
        if free.done():
            return
        if loop.time() < self._freed_at + _WAIT_S:
            timers[0] = loop.call_later(_WAIT_S, self._look, free, timers)
        else:
            free.set_result(None)

    async def _connect(self, deadline: float) -> _Connection:
        loop = asyncio.get_running_loop()
        self._n_opening += 1
        try:
            connection = await self._dial.connect(
                lambda: _Connection(loop, self._lost, self._max_bytes),
                max(min(QUESTION_CONNECT_S, deadline - loop.time()), 0.0),
            )
        finally:
            self._n_opening -= 1
        if connection is None:
            raise NotConnected
        self._busy.add(connection)
        return connection

    async def _ask_on(self, connection: _Connection, question: _Question, deadline: float) -> Answer:
        try:
            answer = await connection.ask(question, deadline)
        except BaseException:
            connection.abort()
            self._keep(connection)
            raise
        self._keep(connection)
        return answer

    def _keep(self, connection: _Connection) -> None:
        """Take back a connection after a request. If it can be reused, give it to the first request that waits; if none
        waits, keep it, or close it if ``_N_BURST`` are kept. If it cannot be reused, close it, and let the first
        request that waits open a new one.
        """
        self._busy.discard(connection)
        if connection.is_reusable:
            self._freed_at = asyncio.get_running_loop().time()
        while self._waiting:
            if not (first := self._waiting.popleft()).done():
                first.set_result(connection if connection.is_reusable else None)
                if connection.is_reusable:
                    self._busy.add(connection)
                    return
                break
        if connection.is_reusable and len(self._idle) < _N_BURST:
            self._idle.append(connection)
            if self._sweep_at is None:
                self._sweep_at = asyncio.get_running_loop().call_later(_BURST_S, self._sweep)
        else:
            connection.abort()

    def _lost(self, connection: _Connection) -> None:
        """Called when a connection was lost: remove it from the kept ones."""
        if connection in self._idle:
            self._idle.remove(connection)

    def _sweep(self) -> None:
        """Close connections that have been idle for too long. Runs every ``_BURST_S`` while any is kept."""
        loop = asyncio.get_running_loop()
        now, spared = loop.time(), []
        for n_newer, connection in enumerate(reversed(self._idle)):
            idle_s = now - connection.idle_since
            if idle_s < (_IDLE_S if n_newer < _N_IDLE else _BURST_S):
                spared.append(connection)
            else:
                connection.abort()
        self._idle = spared[::-1]
        self._sweep_at = loop.call_later(_BURST_S, self._sweep) if spared else None

    def drop_idle(self) -> None:
        """Close all connections that no request uses."""
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.abort()

    def close(self) -> None:
        """Close all connections; running requests raise ConnectionError. Idempotent; a later request opens a new
        connection.
        """
        if self._sweep_at is not None:
            self._sweep_at.cancel()
            self._sweep_at = None
        self.drop_idle()
        for connection in list(self._busy):
            connection.abort()
        while self._waiting:
            if not (free := self._waiting.popleft()).done():
                free.set_exception(ConnectionError("closed"))


class _Connection(asyncio.Protocol):
    """One connection to the server: one request at a time, and its answer."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, on_lost: Callable[[_Connection], None], max_bytes: int
    ) -> None:
        self._loop, self._on_lost, self._max_bytes = loop, on_lost, max_bytes
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Answer] | None = None
        self._n_asked = 0
        self._is_over = False
        self._readable = select.poll()
        self.is_reusable = True
        self.idle_since = 0.0

    async def ask(self, question: _Question, deadline: float) -> Answer:
        """Send a request, and return its whole answer. Raises _Gone, BadAnswer, and TimeoutError after ``deadline``.
        Canceling leaves the connection in the middle of an answer: the caller must abort it then.
        """
        if self._transport is None or self._transport.is_closing():
            raise _Gone(may_repeat=self._n_asked > 0)
        self._n_asked += 1
        self._body: list[bytes] = []
        self._n_bytes = 0
        self._content_type, self._has_length, self._is_head_over = "", False, False
        answer: asyncio.Future[Answer] = self._loop.create_future()
        self._answer, asked_at = answer, self._loop.time()
        self._timer = self._loop.call_at(deadline, self._is_late, deadline)
        self._transport.writelines(question)
        try:
            return await answer
        finally:
            self._timer.cancel()
            self._answer, self.idle_since = None, self._loop.time()
            self.is_reusable = self.is_reusable and self.idle_since - asked_at < _SLOW_S

    @property
    def is_open(self) -> bool:
        """True if neither side has closed the connection. Asks the kernel, because the event loop learns of it later.
        Only meaningful between two answers, when there is nothing to read. Takes 1 us.
        """
        if self._transport is None or self._is_over or self._transport.is_closing():
            return False
        return not self._readable.poll(0)

    def abort(self) -> None:
        """Close the connection at once. Idempotent."""
        self.is_reusable = False
        if self._transport is not None:
            self._transport.abort()

    def _is_late(self, deadline: float) -> None:
        """Called at the deadline of an answer: raise TimeoutError in ``ask``. If this call itself comes too late, this
        process was busy and may not have read the answer yet: wait ``_LATE_S`` more.
        """
        if (now := self._loop.time()) > deadline + _LATE_S:
            self._timer = self._loop.call_at(now + _LATE_S, self._is_late, now + _LATE_S)
        else:
            self._fail(TimeoutError())

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
        self.abort()

    # -- called by asyncio ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own is no subclass of it
        # A closed connection is readable too.
        self._readable.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            self._fail(BadAnswer("something came that was not asked for"))
            self._on_lost(self)
            return
        self._n_bytes += len(data)
        if self._n_bytes > self._max_bytes:
            self._fail(BadAnswer(f"an answer of more than {self._max_bytes} bytes"))
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(BadAnswer(f"no answer in HTTP: {error!r}"))
            return
        if not self._is_head_over and self._n_bytes > _HEAD_BYTES:
            self._fail(BadAnswer(f"headers of more than {_HEAD_BYTES} bytes"))

    def eof_received(self) -> None:
        """The server has closed its side; asyncio then closes the transport."""
        self._is_over = True

    def connection_lost(self, error: Exception | None) -> None:
        self.is_reusable, self._is_over = False, True
        self._on_lost(self)
        if self._answer is not None and not self._answer.done():
            if error is None and self._is_head_over and not self._has_length:
                self._complete()  # an answer without a length ends with its connection
            else:
                self._answer.set_exception(_Gone(may_repeat=self._n_asked > 1 and not self._n_bytes))
        # It refers to this object: else the 500 connections of a burst are 10 MB until the garbage is collected.
        del self._parser

    # -- called by the parser ------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._answer is None or self._answer.done():  # a second answer to one question
            self.is_reusable = False

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-type":
            self._content_type = value.decode("latin-1")
        elif name in _LENGTHS:
            self._has_length = True

    def on_headers_complete(self) -> None:
        self._is_head_over = self._parser.get_status_code() >= 200

    def on_body(self, piece: bytes) -> None:
        self._body.append(piece)

    def on_message_complete(self) -> None:
        if self._is_head_over:  # otherwise it was an interim answer (100), and the answer follows
            self._complete()

    def _complete(self) -> None:
        if self._answer is None or self._answer.done():
            return
        status = self._parser.get_status_code()
        self.is_reusable = self.is_reusable and status < 400 and self._parser.should_keep_alive()
        body, is_connected = b"".join(self._body), lambda: self.is_open
        self._answer.set_result(Answer(status, self._content_type, body, is_connected))
