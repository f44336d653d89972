"""Connections of clients: buffers, timeouts, answers to invalid HTTP, and the limit of open files.

Half-closed: a client that shuts down its sending side counts as gone, because a client that is gone looks the same
until data is written to it, and its slot should not wait for that. aiohttp closes such a connection, and cancels the
handler.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import orjson
from aiohttp import StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import (
    BadHttpMethod,
    BadStatusLine,
    HttpProcessingError,
    LineTooLong,
)

from llamaslot.errors import BadRequest, LlamaslotError, QueueFull, TooSlow
from llamaslot.http.client_errors import MISTAKE, error_response
from llamaslot.http.client_stream import NAME, Writer
from llamaslot.http.new_connection import HealthAnswer, NewConnection

log = logging.getLogger(__name__)

_MakeRequest = Callable[
    [RawRequestMessage, StreamReader, web.RequestHandler, AbstractStreamWriter, "asyncio.Task[None]"],
    web.BaseRequest,
]

#: With more in a transport's own buffer, the writer waits.
WRITE_BYTES = 1 << 15
_UNSENT_BYTES = 1 << 16  # requested from the kernel, for data that a client has not received yet
_FEW_FILES = 4096
_RESERVED_FILES = 2048  # for connections to llama-server, snapshots, the index
# TCP_USER_TIMEOUT is in ms: for data that is not acknowledged, or waits for a full window. The others are in s: while
# nothing is sent.
_SILENCE = {"TCP_USER_TIMEOUT": 60_000, "TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
_OPTIONS = {**_SILENCE, "TCP_NOTSENT_LOWAT": _UNSENT_BYTES}


@dataclass(frozen=True, slots=True)
class ClientTimeouts:
    """The timeouts of one client: ``read_s`` for a header, once it has begun; ``idle_s`` between two requests."""

    read_s: float
    idle_s: float = 75.0


class TooManyConnections(QueueFull):
    """The limit of open connections is reached."""


class Connections:
    """Makes a connection for each client; at most ``n_max``, or as many as this process may have files for."""

    def __init__(
        self,
        server: web.Server,
        timeouts: ClientTimeouts,
        n_max: int | None,
        health: Callable[[], HealthAnswer] | None = None,
    ) -> None:
        """``health`` answers health checks before aiohttp has a connection; None: aiohttp has all of them."""
        self._server, self._timeouts, self._health = server, timeouts, health
        server.request_factory = partial(_with_own_version, server.request_factory)
        self._n_max = n_max if n_max is not None else _n_for_clients()
        self._open: set[asyncio.Protocol] = set()
        self._is_full = False

    def __call__(self) -> asyncio.Protocol:
        if self._health is None:
            return self.handler()
        return NewConnection(self, self._health, NAME["Server"])

    def handler(self) -> Connection:
        return Connection(self, self._server, self._timeouts)

    def close_new(self) -> None:
        """Close the connections that aiohttp does not have yet."""
        for connection in list(self._open):
            if isinstance(connection, NewConnection):
                connection.close()

    def enter(self, connection: asyncio.Protocol) -> bool:
        if len(self._open) >= self._n_max:
            if not self._is_full:
                log.warning(
                    "%d connections are open (listen.max_connections): no more are accepted", self._n_max
                )
            self._is_full = True
            return False
        self._open.add(connection)
        return True

    def leave(self, connection: asyncio.Protocol) -> None:
        self._open.discard(connection)
        self._is_full = self._is_full and len(self._open) > 0.9 * self._n_max


def _with_own_version(
    make: _MakeRequest,
    message: RawRequestMessage,
    payload: StreamReader,
    protocol: web.RequestHandler,
    writer: AbstractStreamWriter,
    task: asyncio.Task[None],
) -> web.BaseRequest:
    """aiohttp's request, with a writer of our own."""
    own = Writer(protocol, asyncio.get_running_loop())
    return make(message, payload, protocol, own, task)


def _n_for_clients() -> int:
    """At least half of the files: a running request uses a second one, to llama-server."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1_000_000 if limit < 0 else max(limit - _RESERVED_FILES, limit // 2)


class Connection(web.RequestHandler):
    """One connection of a client."""

    __slots__ = ("_all", "_has_served", "_header_timer", "_is_serving", "_timeouts")

    def __init__(self, every: Connections, server: web.Server, timeouts: ClientTimeouts) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=timeouts.idle_s,
            access_log=None,  # type: ignore[arg-type]
            auto_decompress=False,  # ``http.decompress`` does it
        )
        self._all, self._timeouts = every, timeouts
        self._is_serving = self._has_served = False
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self.transport is not None
        self.transport.set_write_buffer_limits(high=WRITE_BYTES)
        set_options(self.transport)
        if not self._all.enter(self):
            error = TooManyConnections(
                "there are as many connections as there may be (listen.max_connections)", 5
            )
            self._say_and_close("503 Service Unavailable", error, "Retry-After: 5\r\n")

    def connection_lost(self, exc: BaseException | None) -> None:
        self._all.leave(self)
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # Data after an answer may be the rest of an unread request body: aiohttp waits for that by itself, and not
        # for long. The first data may come before the task that waits for it.
        is_header = self._waiter is not None or not self._has_served
        if is_header and not self._is_serving and self._header_timer is None:
            self._header_timer = self._loop.call_later(self._timeouts.read_s, self._is_too_slow)
        super().data_received(data)

    def serving(self, is_serving: bool) -> None:
        """Called when a request's header is complete, and when its answer is done."""
        self._is_serving, self._has_served = is_serving, True
        self._stop_timer()

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _is_too_slow(self) -> None:
        self._header_timer = None
        if self.transport is None or self._is_serving:
            return
        log.info(
            "a client sent no complete request header within %g s: connection closed", self._timeouts.read_s
        )
        self._say_and_close(
            "408 Request Timeout", TooSlow("the header of the request has not come to its end in time")
        )

    def _say_and_close(self, status: str, error: LlamaslotError, more: str = "") -> None:
        """Answer a client that has sent no complete request, and close the connection."""
        assert self.transport is not None
        body = orjson.dumps(error.body())
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{more}"
        self.transport.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """As aiohttp, which logs it, raises ConnectionError if half an answer is sent, and closes the connection; but
        in the form of all other errors.
        """
        super().handle_error(request, status, exc, message)
        response = error_response(_wording(exc) if status < 500 else LlamaslotError(MISTAKE), NAME)
        response.force_close()
        response.headers["Connection"] = "close"
        return response


class _TooLong(BadRequest):
    status = 431


def _wording(error: BaseException | None) -> LlamaslotError:
    """What is wrong with a request that aiohttp cannot read, without its content."""
    said = error.message if isinstance(error, HttpProcessingError) else ""
    if isinstance(error, LineTooLong):
        return _TooLong("the request's address or one of its headers is longer than 8190 bytes")
    if said.startswith("Too many headers"):
        return _TooLong("the request has more than 128 headers")
    if isinstance(error, BadHttpMethod | BadStatusLine):
        hint = ", but TLS: this port takes http:// only" if "HTTPS" in said else ""
        return BadRequest(f"this is no HTTP request{hint}")
    return BadRequest(f"the request is not valid HTTP: {said.partition(':')[0].partition(chr(10))[0]}")


def set_options(transport: asyncio.BaseTransport) -> None:
    """Let the kernel close the connection of a client that has gone without notice (a laptop asleep, a network that
    is gone) or does not receive its answer any more, and keep the buffers of a slow client small. Otherwise it would
    keep its slot for two hours, or for ever.

    The options are Linux'; elsewhere the defaults hold.
    """
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError):  # closed already
        for name, value in _OPTIONS.items():
            if (option := getattr(socket, name, None)) is not None:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)


def raise_file_limit() -> None:
    """Raise this process's limit of open files as far as allowed."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # In some containers an unlimited hard limit is more than the kernel allows.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    now = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= now < _FEW_FILES:
        log.warning(
            "this process may open %d files only: each client takes one, each running request two; raise LimitNOFILE"
            " (systemd) or ulimit -n", now,
        )  # fmt: skip
