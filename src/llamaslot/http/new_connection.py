"""A client's connection until its first request, and the answers to ``GET /health``, which monitors and load balancers
send on a connection each, many a second.

aiohttp takes 0.4 ms of this process for such a connection: a parser, two tasks, a timer, a request, an answer. Here it
takes 0.1 ms. Everything else is handed over to aiohttp, with its first bytes; so is a health check with a header that
might change its answer. While aiohttp is not imported yet, such a connection is not read any further.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol, cast

NAME = {"Server": "llamaslot"}  # without versions

_SILENCE_S = 1.0  # then aiohttp takes it, and limits its idle time

# Headers that curl, browsers' fetch, Kubernetes, HAProxy, nginx and ab send and that do not change the answer.
_PLAIN = rb"(?:User-Agent|Accept|Accept-Encoding|Accept-Language|Cache-Control|Pragma):[\t -~]*\r\n"
_HEALTH = re.compile(
    rb"GET /(?:v1/)?health HTTP/1\.(?P<minor>[01])\r\n"
    rb"(?:Host: ?[!-~]+\r\n)(?:%b)*(?P<close>Connection: close\r\n)?(?:%b)*\r\n" % (_PLAIN, _PLAIN),
    re.IGNORECASE,
)
_LONGEST = 2048


_DAYS = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]
_MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]


class HealthAnswer(NamedTuple):
    status: int
    reason: str
    body: bytes


class Owner(Protocol):
    """Knows all connections. ``enter`` returns whether there may be one more; ``handler`` makes aiohttp's protocol, or
    returns None and calls ``hand_over`` again when it can.
    """

    def enter(self, connection: asyncio.Protocol) -> bool: ...
    def leave(self, connection: asyncio.Protocol) -> None: ...
    def handler(self, connection: NewConnection) -> asyncio.Protocol | None: ...


class NewConnection(asyncio.Protocol):
    """One connection that has sent nothing but health checks."""

    def __init__(self, owner: Owner, health: Callable[[], HealthAnswer] | None) -> None:
        """``health``: None if aiohttp answers."""
        self._owner, self._health = owner, health
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._held = b""  # for aiohttp
        self._is_waiting = False  # for aiohttp

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if self._owner.enter(self):
            self._timer = self._loop.call_later(_SILENCE_S, self.hand_over)
        else:  # one too many: aiohttp's protocol says so
            self.hand_over()

    def data_received(self, data: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if self._health is None or self._is_waiting:
            self.hand_over(data)
            return
        is_read = self._transport.get_write_buffer_size() == 0
        if len(data) > _LONGEST or not is_read or (check := _HEALTH.fullmatch(data)) is None:
            self.hand_over(data)
            return
        status, reason, body = self._health()
        is_last = check["minor"] == b"0" or check["close"] is not None
        head = (
            f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json; charset=utf-8\r\n"
            f"Server: {NAME['Server']}\r\nContent-Length: {len(body)}\r\nDate: {_date()}\r\n"
            f"{'Connection: close' if is_last else ''}\r\n"
        )
        self._transport.write(head.encode() + (b"\r\n" if is_last else b"") + body)
        if is_last:
            self._transport.close()

    def hand_over(self, data: bytes = b"") -> None:
        """Let aiohttp handle it from now on, or as soon as it can."""
        self._held += data
        if self._transport is None or self._transport.is_closing():
            self._leave()
            return
        if (protocol := self._owner.handler(self)) is None:
            self._is_waiting = True
            self._transport.pause_reading()
            return
        transport = self._leave()
        assert transport is not None, "looked at above"
        if self._is_waiting:
            transport.resume_reading()
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        if self._held:
            protocol.data_received(self._held)

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


def _date() -> str:
    """Now, as a header has it, in any locale."""
    now = time.gmtime()
    day, month = _DAYS[now.tm_wday], _MONTHS[now.tm_mon - 1]
    clock = f"{now.tm_hour:02}:{now.tm_min:02}:{now.tm_sec:02}"
    return f"{day}, {now.tm_mday:02} {month} {now.tm_year} {clock} GMT"
