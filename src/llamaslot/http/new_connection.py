"""A client's connection until its first request, and the answers to ``GET /health``, which monitors and load balancers
send on a connection each, many a second.

aiohttp takes 0.4 ms of this process for such a connection: a parser, two tasks, a timer, a request, an answer. Here it
takes 0.1 ms. Everything else is handed over to aiohttp, with its first bytes; so is a health check with a header that
might change its answer.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import NamedTuple, Protocol, cast

from aiohttp.helpers import rfc822_formatted_time

_SILENCE_S = 1.0  # then aiohttp takes it, and limits its idle time

# Headers that curl, browsers' fetch, Kubernetes, HAProxy, nginx and ab send and that do not change the answer.
_PLAIN = rb"(?:User-Agent|Accept|Accept-Encoding|Accept-Language|Cache-Control|Pragma):[\t -~]*\r\n"
_HEALTH = re.compile(
    rb"GET /(?:v1/)?health HTTP/1\.(?P<minor>[01])\r\n"
    rb"(?:Host: ?[!-~]+\r\n)(?:%b)*(?P<close>Connection: close\r\n)?(?:%b)*\r\n" % (_PLAIN, _PLAIN),
    re.IGNORECASE,
)
_LONGEST = 2048


class HealthAnswer(NamedTuple):
    status: int
    reason: str
    body: bytes


class Owner(Protocol):
    """Knows all connections. ``enter`` returns whether there may be one more; ``handler`` makes aiohttp's protocol."""

    def enter(self, connection: asyncio.Protocol) -> bool: ...
    def leave(self, connection: asyncio.Protocol) -> None: ...
    def handler(self) -> asyncio.Protocol: ...


class NewConnection(asyncio.Protocol):
    """One connection that has sent nothing but health checks."""

    def __init__(self, owner: Owner, health: Callable[[], HealthAnswer], server: str) -> None:
        """``server``: the header of that name."""
        self._owner, self._health, self._server = owner, health, server
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if self._owner.enter(self):
            self._timer = self._loop.call_later(_SILENCE_S, self.hand_over)
        else:  # one too many: aiohttp's protocol says so
            self.hand_over()

    def data_received(self, data: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        is_read = self._transport.get_write_buffer_size() == 0
        if len(data) > _LONGEST or not is_read or (check := _HEALTH.fullmatch(data)) is None:
            self.hand_over(data)
            return
        status, reason, body = self._health()
        is_last = check["minor"] == b"0" or check["close"] is not None
        head = (
            f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json; charset=utf-8\r\n"
            f"Server: {self._server}\r\nContent-Length: {len(body)}\r\nDate: {rfc822_formatted_time()}\r\n"
            f"{'Connection: close' if is_last else ''}\r\n"
        )
        self._transport.write(head.encode() + (b"\r\n" if is_last else b"") + body)
        if is_last:
            self._transport.close()

    def hand_over(self, data: bytes = b"") -> None:
        """Let aiohttp handle it from now on."""
        transport = self._leave()
        if transport is None or transport.is_closing():
            return
        protocol = self._owner.handler()
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        if data:
            protocol.data_received(data)

    def close(self) -> None:
        if (transport := self._leave()) is not None:
            transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._leave()

    def _leave(self) -> asyncio.Transport | None:
        transport, self._transport = self._transport, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._owner.leave(self)
        return transport
