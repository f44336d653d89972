"""Sends a client's request, or any other that must not run twice, to llama-server on a new connection.

A request must never run twice, so kept connections are not used: llama-server closes a connection after an answer of
more than 5 seconds, without notice. It is unknown whether it has read a request that was on its way then. A new
connection takes 0.1 ms more.

``aiohttp_fallback`` sends the requests that cannot be sent here (``FreshConnections.of`` and ``send`` return None):
over TLS, with other methods than GET and POST, with characters outside of printable ASCII.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from types import TracebackType
from typing import Any

from llamaslot.errors import BackendDown
from llamaslot.llama.answers import RELAYED_BYTES, Response
from llamaslot.llama.transport.connection import REQUEST_CONNECT_S, Dial, PlainTarget, ServerConnection

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


class FreshConnections:
    """Sends requests to one server over plain HTTP, each on a new connection."""

    def __init__(self, url: str, target: PlainTarget) -> None:
        self._url, self._target = url, target
        self._dial = Dial(target.host, target.port, narrow_socket)

    @classmethod
    def of(cls, url: str, api_key: str | None) -> FreshConnections | None:
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
    ) -> ServerConnection | None:
        """Send a request, and wait for the headers of its answer. The caller must close the response. None if nothing
        was sent, because the request is not supported here: then the caller lets aiohttp send it.

        ``timeout_s``: limit for the whole answer, once the request was sent. ``silence_s``, ``n_held_bytes``: as for
        ``ServerConnection``. ``check()`` is called when the connection is open, before anything is sent; an awaitable
        that it returns is awaited.

        Raises what ``check`` raises, TimeoutError, SlotWedged after ``silence_s``, and ConnectionError if no connection
        can be opened or it breaks (BadAnswer for an invalid answer). Canceling closes the connection.
        """
        if (head := self._head(method, path, headers, body)) is None:
            return None
        response = ServerConnection(self._url, n_held_bytes=n_held_bytes, silence_s=silence_s)
        try:
            await self._dial.connect(lambda: response, REQUEST_CONNECT_S)
            if check is not None and (asking := check()) is not None:
                await asking
            until = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
            response.ask(head, body, until)
            await response.head_arrives()
        except BaseException:
            response.close()
            raise
        return response


class Sending(contextlib.AbstractAsyncContextManager[Response]):
    """The context manager that ``LlamaServer.request`` returns. Its exit is idempotent. A class, because a generator
    takes 10 us more.
    """

    __slots__ = ("_fresh", "_is_down", "_otherwise", "_over_aiohttp", "_response")

    def __init__(
        self,
        fresh: Callable[[], Coroutine[Any, Any, ServerConnection | None]] | None,
        otherwise: Callable[[], contextlib.AbstractAsyncContextManager[Response]],
        is_down: Callable[[BaseException], BackendDown],
    ) -> None:
        """``fresh()`` sends the request, and returns None if it cannot; then ``otherwise`` sends it. ``is_down`` turns
        an error of the connection into the BackendDown to raise.
        """
        self._fresh, self._otherwise, self._is_down = fresh, otherwise, is_down
        self._response: ServerConnection | None = None
        self._over_aiohttp: contextlib.AbstractAsyncContextManager[Response] | None = None

    async def __aenter__(self) -> Response:
        try:
            if self._fresh is not None and (response := await self._fresh()) is not None:
                self._response = response
                return response
            self._over_aiohttp = self._otherwise()
            return await self._over_aiohttp.__aenter__()
        except (ConnectionError, TimeoutError) as error:
            raise self._is_down(error) from error

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        over_aiohttp, self._over_aiohttp = self._over_aiohttp, None
        try:
            if over_aiohttp is not None:
                await over_aiohttp.__aexit__(kind, error, trace)
            elif self._response is not None:
                self._response.close()
        except (ConnectionError, TimeoutError) as found:
            raise self._is_down(found) from found
        if isinstance(error, ConnectionError | TimeoutError):
            raise self._is_down(error) from error
