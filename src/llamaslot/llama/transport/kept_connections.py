"""Sends short questions to llama-server, which may run twice, on kept connections (keep-alive): HTTP/1.1, one request
at a time on each connection.

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
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from llamaslot.llama.transport.connection import QUESTION_CONNECT_S, Dial, PlainTarget, ServerConnection

_IDLE_S = 4.0  # a kept connection is closed after this time; llama-server closes it after 5 s
_SLOW_S = 4.0  # no reuse after an answer that took longer: llama-server may close the connection
_N_IDLE = 2  # so many connections are kept for _IDLE_S
# So many are kept for _BURST_S: llama-server has as many threads more than slots.
_N_BURST, _BURST_S = 4, 0.05
# If _N_BURST connections are busy, a request waits so long for one of them: a kept connection costs a quarter of a new
# one, but may be busy for a long time.
_WAIT_S = 0.05
# And so much longer, in which this process reads answers that came while it was busy. Otherwise, of 1,000 requests at
# once up to 430 opened a connection.
_READ_S = 0.01


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


_Question = tuple[bytes, bytes]  # a request: head and body


class KeptConnections:
    """Kept connections to one server. One event loop owns them; call ``close`` in that loop."""

    def __init__(self, url: str, target: PlainTarget) -> None:
        self._url, self._target, self._dial = url, target, Dial(target.host, target.port)
        # With the time since when each is idle. The most recently used last; it is reused first.
        self._idle: dict[ServerConnection, float] = {}
        self._busy: set[ServerConnection] = set()
        # Requests that wait for a busy connection to become free, and since when.
        self._waiting: deque[tuple[float, asyncio.Future[ServerConnection | None]]] = deque()
        self._look_at: asyncio.TimerHandle | None = None
        self._freed_at, self._n_opening = 0.0, 0
        self._sweep_at: asyncio.TimerHandle | None = None

    @classmethod
    def of(cls, url: str, api_key: str | None) -> KeptConnections | None:
        """Kept connections to the server at a URL; None if the URL is not supported (see ``PlainTarget.of``)."""
        target = PlainTarget.of(url, api_key)
        return cls(url, target) if target is not None else None

    def __len__(self) -> int:
        """The number of open connections."""
        return len(self._idle) + len(self._busy)

    async def ask(self, method: str, path: str, body: bytes | None, timeout_s: float) -> Answer:
        """Send one request and return its whole answer. ``body``: JSON, or None. The request may be sent twice, see the
        module's docstring.

        Raises TimeoutError if no answer came ``timeout_s`` after the request had its connection; ConnectionError if no
        connection can be opened; ConnectionError (BadAnswer for an invalid answer) or BackendDown if it breaks.
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
            except ConnectionError:
                if kept.is_heard:
                    raise
                self.drop_idle()  # the other kept connections are probably closed too
        return await self._ask_on(await self._connect(deadline), question, deadline)

    def _take(self) -> ServerConnection:
        connection, _ = self._idle.popitem()
        self._busy.add(connection)
        return connection

    async def _next_free(self) -> ServerConnection | None:
        """Wait for a busy connection to become free, and return it. None if the caller should open a new one: a busy
        connection was closed, or none became free for ``_WAIT_S``. That time starts again whenever one becomes free,
        also for another request.
        """
        loop = asyncio.get_running_loop()
        free: asyncio.Future[ServerConnection | None] = loop.create_future()
        self._waiting.append((loop.time(), free))
        if self._look_at is None:
            self._look_at = loop.call_later(_WAIT_S, self._read_first)
        try:
            return await free
        except asyncio.CancelledError:
            is_given = free.done() and not free.cancelled() and free.exception() is None
            if is_given and (connection := free.result()) is not None:
                self._keep(connection)
            raise

    def _read_first(self) -> None:
        self._look_at = asyncio.get_running_loop().call_later(_READ_S, self._look)

    def _look(self) -> None:
        """Let requests that have waited for ``_WAIT_S`` open new connections if none has become free meanwhile. One
        timer for all: with one for each, a burst of 1,000 requests made 20,000 calls.
        """
        loop = asyncio.get_running_loop()
        self._look_at, latest = None, loop.time() - _WAIT_S
        if self._freed_at <= latest:
            while self._waiting and self._waiting[0][0] <= latest:
                if not (free := self._waiting.popleft()[1]).done():
                    free.set_result(None)
        if self._waiting:
            since = max(self._freed_at, self._waiting[0][0])
            self._look_at = loop.call_later(since - latest, self._read_first)

    async def _connect(self, deadline: float) -> ServerConnection:
        loop = asyncio.get_running_loop()
        self._n_opening += 1
        try:
            connection = await self._dial.connect(
                lambda: ServerConnection(self._url, on_lost=self._lost),
                max(min(QUESTION_CONNECT_S, deadline - loop.time()), 0.0),
            )
        finally:
            self._n_opening -= 1
        self._busy.add(connection)
        return connection

    async def _ask_on(self, connection: ServerConnection, question: _Question, deadline: float) -> Answer:
        loop, body = asyncio.get_running_loop(), list[bytes]()

        def take(piece: bytes) -> bool:
            body.append(piece)
            return True

        asked_at = loop.time()
        try:
            connection.ask(*question, deadline)
            await connection.pass_to(take)
        except BaseException:
            connection.close()
            self._keep(connection)
            raise
        if loop.time() - asked_at >= _SLOW_S:
            connection.is_reusable = False
        self._keep(connection)
        content_type = connection.headers.get("Content-Type", "")
        return Answer(connection.status, content_type, b"".join(body), lambda: connection.is_open)

    def _keep(self, connection: ServerConnection) -> None:
        """Take back a connection after a request. If it can be reused, give it to the first request that waits; if none
        waits, keep it, or close it if ``_N_BURST`` are kept. If it cannot be reused, close it, and let the first
        request that waits open a new one.
        """
        self._busy.discard(connection)
        if connection.is_reusable:
            self._freed_at = asyncio.get_running_loop().time()
        while self._waiting:
            if not (first := self._waiting.popleft()[1]).done():
                first.set_result(connection if connection.is_reusable else None)
                if connection.is_reusable:
                    self._busy.add(connection)
                    return
                break
        if connection.is_reusable and len(self._idle) < _N_BURST:
            self._idle[connection] = self._freed_at
            if self._sweep_at is None:
                self._sweep_at = asyncio.get_running_loop().call_later(_BURST_S, self._sweep)
        else:
            connection.close()

    def _lost(self, connection: ServerConnection) -> None:
        """Called when a connection was lost: remove it from the kept ones."""
        self._idle.pop(connection, None)

    def _sweep(self) -> None:
        """Close connections that have been idle for too long. Runs every ``_BURST_S`` while any is kept."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for n_newer, (connection, since) in enumerate(reversed(list(self._idle.items()))):
            if now - since >= (_IDLE_S if n_newer < _N_IDLE else _BURST_S):
                del self._idle[connection]
                connection.close()
        self._sweep_at = loop.call_later(_BURST_S, self._sweep) if self._idle else None

    def drop_idle(self) -> None:
        """Close all connections that no request uses."""
        idle, self._idle = self._idle, {}
        for connection in idle:
            connection.close()

    def close(self) -> None:
        """Close all connections; running requests raise ConnectionError. Idempotent; a later request opens a new
        connection.
        """
        for timer in (self._sweep_at, self._look_at):
            if timer is not None:
                timer.cancel()
        self._sweep_at = self._look_at = None
        self.drop_idle()
        for connection in list(self._busy):
            connection.close()
        while self._waiting:
            if not (free := self._waiting.popleft()[1]).done():
                free.set_exception(ConnectionError("closed"))
