"""One connection of a client, as aiohttp's server handles it: buffers, timeouts, answers to invalid HTTP.

A client that closes only its sending side counts as gone. One that has gone altogether looks the same until data is
written to it, and its slot should not wait for that. aiohttp closes such a connection, and cancels the handler. Then
``completion`` ends the request to llama-server.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from functools import partial

import orjson
from aiohttp import StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import BadHttpMethod, BadStatusLine, HttpProcessingError, LineTooLong
from yarl import URL

from llamaslot.errors import BadRequest, LlamaslotError, TooSlow, Unavailable
from llamaslot.http.client_stream import MISTAKE, Writer, error_response
from llamaslot.http.connections import Connections
from llamaslot.http.response_headers import NAME

log = logging.getLogger(__name__)

_MakeRequest = Callable[
    [RawRequestMessage, StreamReader, web.RequestHandler, AbstractStreamWriter, "asyncio.Task[None]"],
    web.BaseRequest,
]

_QUOTED = re.compile(r":? (?:bytearray\()?b['\"].*")
_IDLE_S = 75.0  # between two requests
#: With more bytes than this in the transport's buffer, writing an answer waits for the client.
WRITE_BYTES = 1 << 15


class TooManyConnections(Unavailable):
    """As many connections are open as ``listen.max_connections`` allows."""


def serve_with(connections: Connections, server: web.Server, read_timeout_s: float) -> None:
    """From now on let aiohttp's ``server`` handle the connections of ``connections``. A header must come within
    ``read_timeout_s`` seconds of its first byte.
    """
    server.request_factory = partial(_with_own_version, server.request_factory)
    connections.handle_with(lambda: Connection(connections, server, read_timeout_s))


def _with_own_version(
    make: _MakeRequest,
    message: RawRequestMessage,
    payload: StreamReader,
    protocol: web.RequestHandler,
    writer: AbstractStreamWriter,
    task: asyncio.Task[None],
) -> web.BaseRequest:
    """Make aiohttp's request object, with llamaslot's ``Writer`` for the answer."""
    if message.method == "CONNECT":
        # The target of CONNECT is no path, so aiohttp finds no route for it, and takes the bytes that follow for the
        # data of a tunnel.
        message = message._replace(url=URL("/"), should_close=True, upgrade=False)
    elif message.url.absolute and message.url.raw_path == "/":  # ``http://host`` as ``http://host/``
        url = URL.build(path="/", query_string=message.url.raw_query_string, encoded=True)
        message = message._replace(url=url, path=str(url))
    own = Writer(protocol, asyncio.get_running_loop())
    return make(message, payload, protocol, own, task)


class Connection(web.RequestHandler):
    """One connection of a client, with llamaslot's time limits and its own answers to invalid HTTP."""

    __slots__ = ("_all", "_has_served", "_header_timer", "_is_serving", "_read_timeout_s")

    def __init__(self, every: Connections, server: web.Server, read_timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=_IDLE_S,
            access_log=None,  # type: ignore[arg-type]
            auto_decompress=False,  # ``http.request_body`` does it
        )
        self._all, self._read_timeout_s = every, read_timeout_s
        self._is_serving = self._has_served = False
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self.transport is not None
        self.transport.set_write_buffer_limits(high=WRITE_BYTES)
        if not self._all.enter(self):
            error = TooManyConnections(
                "too many connections are open (listen.max_connections); try again later"
            )
            self._say_and_close("503 Service Unavailable", error)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._all.leave(self)
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # Data after an answer may be the rest of an unread request body. aiohttp waits for the rest by itself, and
        # not for long. The first data of a connection may come before aiohttp's task waits for it (``_waiter``).
        is_header = self._waiter is not None or not self._has_served
        if is_header and not self._is_serving and self._header_timer is None:
            self._header_timer = self._loop.call_later(self._read_timeout_s, self._is_too_slow)
        super().data_received(data)

    def serving(self, is_serving: bool) -> None:
        """Called with True when the header of a request is complete, and with False when its answer is done."""
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
            "a client sent no complete request header within %g s, so its connection is closed",
            self._read_timeout_s,
        )
        self._say_and_close(
            "408 Request Timeout",
            TooSlow("the request header did not arrive completely in time (listen.read_timeout_s)"),
        )

    def _say_and_close(self, status: str, error: LlamaslotError) -> None:
        """Send ``error`` to a client that has sent no complete request, and close the connection."""
        assert self.transport is not None
        body = orjson.dumps(error.body())
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
        if error.retry_after_s is not None:
            head += f"Retry-After: {error.retry_after_s:.0f}\r\n"
        self.transport.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Log an error as aiohttp does, and return the error answer in llamaslot's usual form. Closes the connection.
        Raises ConnectionError if a part of another answer has been sent.
        """
        super().handle_error(request, status, exc, message)
        response = error_response(_wording(exc) if status < 500 else LlamaslotError(MISTAKE), NAME)
        response.force_close()
        response.headers["Connection"] = "close"
        return response


class _TooLong(BadRequest):
    status = 431


def _wording(error: BaseException | None) -> LlamaslotError:
    """Return the error for a request that aiohttp cannot read. Its message quotes nothing of the request, which may
    contain a key.
    """
    said = error.message if isinstance(error, HttpProcessingError) else ""
    if isinstance(error, LineTooLong):
        return _TooLong("the request's address or one of its headers is longer than 8190 bytes")
    if said.startswith("Too many headers"):
        return _TooLong("the request has more than 128 headers")
    if isinstance(error, BadHttpMethod | BadStatusLine):
        hint = ", but TLS: this port takes http:// only" if "HTTPS" in said else ""
        return BadRequest(f"this is no HTTP request{hint}")
    return BadRequest(f"the request is not valid HTTP: {said.partition(':')[0].partition(chr(10))[0]}")


def in_one_line(record: logging.LogRecord) -> bool:
    """A filter of log records. It shortens aiohttp's traceback, for a client that sends invalid HTTP or a corrupt body,
    to one line. Always True: no record is dropped.
    """
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError | web.RequestPayloadError):
        # The traceback quotes the invalid text, which may be a key or a part of a prompt.
        said = _QUOTED.sub("", " ".join(str(error).split()))
        record.msg, record.args = "%s: %s", (record.getMessage(), said)
        record.exc_info, record.levelno, record.levelname = None, logging.INFO, "INFO"
    return True
