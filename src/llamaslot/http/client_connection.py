"""One connection of a client, as aiohttp's server handles it: buffers, timeouts, answers to invalid HTTP.

Half-closed: a client that shuts down its sending side counts as gone, because a client that is gone looks the same
until data is written to it, and its slot should not wait for that. aiohttp closes such a connection, and cancels the
handler.
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
from llamaslot.http.client_errors import MISTAKE, error_response
from llamaslot.http.client_stream import Writer
from llamaslot.http.connections import NAME, ClientTimeouts, Connections, set_options

log = logging.getLogger(__name__)

_MakeRequest = Callable[
    [RawRequestMessage, StreamReader, web.RequestHandler, AbstractStreamWriter, "asyncio.Task[None]"],
    web.BaseRequest,
]

_QUOTED = re.compile(r":? (?:bytearray\()?b['\"].*")
#: With more in a transport's own buffer, the writer waits.
WRITE_BYTES = 1 << 15


class TooManyConnections(Unavailable):
    """The limit of open connections is reached."""


def serve_with(connections: Connections, server: web.Server, timeouts: ClientTimeouts) -> None:
    """Let aiohttp's server handle the connections of ``connections`` from now on."""
    server.request_factory = partial(_with_own_version, server.request_factory)
    connections.handle_with(lambda: Connection(connections, server, timeouts))


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
        # Its address is no path, so aiohttp finds no route for it, and takes what follows for the tunnel's.
        message = message._replace(url=URL("/"), should_close=True, upgrade=False)
    elif message.url.absolute and message.url.raw_path == "/":  # also without a slash at its end
        url = URL.build(path="/", query_string=message.url.raw_query_string, encoded=True)
        message = message._replace(url=url, path=str(url))
    own = Writer(protocol, asyncio.get_running_loop())
    return make(message, payload, protocol, own, task)


class Connection(web.RequestHandler):
    """One connection of a client, with llamaslot's limits of time and its own answers to invalid HTTP."""

    __slots__ = ("_all", "_has_served", "_header_timer", "_is_serving", "_timeouts")

    def __init__(self, every: Connections, server: web.Server, timeouts: ClientTimeouts) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=timeouts.idle_s,
            access_log=None,  # type: ignore[arg-type]
            auto_decompress=False,  # ``http.request_body`` does it
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
                "there are as many connections as there may be (listen.max_connections)"
            )
            self._say_and_close("503 Service Unavailable", error)

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

    def _say_and_close(self, status: str, error: LlamaslotError) -> None:
        """Answer a client that has sent no complete request, and close the connection."""
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
        """Log an error as aiohttp does and answer it in the form of all other errors; raise ConnectionError if half an
        answer is sent. Closes the connection.
        """
        super().handle_error(request, status, exc, message)
        response = error_response(_wording(exc) if status < 500 else LlamaslotError(MISTAKE), NAME)
        response.force_close()
        response.headers["Connection"] = "close"
        return response


class _TooLong(BadRequest):
    status = 431


def _wording(error: BaseException | None) -> LlamaslotError:
    """What is wrong with a request that aiohttp cannot read, without words of the request."""
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
    """Shorten aiohttp's traceback for a client that sends no valid HTTP, or a corrupt body, to one line."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError | web.RequestPayloadError):
        # It quotes the invalid text, which may be a key or a part of a prompt.
        said = _QUOTED.sub("", " ".join(str(error).split()))
        record.msg, record.args = "%s: %s", (record.getMessage(), said)
        record.exc_info, record.levelno, record.levelname = None, logging.INFO, "INFO"
    return True
