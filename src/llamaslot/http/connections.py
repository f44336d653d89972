"""All connections of clients: their number, the options of their sockets, and the limit of open files.

A client's connection is a ``NewConnection`` first. It is handed over to aiohttp as soon as the client sends anything
else than a health check. aiohttp takes 0.2 s to import; connections that need it before that wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
from collections.abc import Callable
from typing import cast

from llamaslot.fleet.registry import Registry
from llamaslot.http.health_check import answer_to

log = logging.getLogger(__name__)

_UNSENT_BYTES = 1 << 16  # of an answer that the kernel holds before it has sent them
_FEW_FILES = 4096
_RESERVED_FILES = 2048  # for connections to llama-server, snapshots, the index
# TCP_USER_TIMEOUT (ms): the connection ends if the client acknowledges no data, or keeps its window full, for so long.
# The others (s, s, number): probes while nothing is sent.
_KEEP_ALIVE = {"TCP_USER_TIMEOUT": 60_000, "TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
_OPTIONS = {**_KEEP_ALIVE, "TCP_NOTSENT_LOWAT": _UNSENT_BYTES}

_HAND_OVER_S = 1.0  # after so long without a request aiohttp handles the connection, and limits its idle time


class NewConnection(asyncio.Protocol):
    """A connection whose client has sent only health checks so far. It answers them itself.

    Monitors and load balancers send many health checks a second, each on a new connection. aiohttp takes 0.4 ms of this
    process for one: a parser, two tasks, a timer, a request, an answer. Here it takes 0.1 ms.

    At any other request the connection is handed over to aiohttp, with the bytes received so far; also at a health
    check with a header that might change its answer. If aiohttp is not imported yet, the connection waits, and is not
    read.
    """

    def __init__(self, owner: Connections, registry: Registry) -> None:
        self._owner, self._registry = owner, registry
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._held = b""  # bytes received that aiohttp will handle
        self._is_waiting = False  # for aiohttp to be imported

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if self._owner.enter(self):
            self._timer = self._loop.call_later(_HAND_OVER_S, self.hand_over)
        else:  # too many connections: aiohttp's protocol tells the client
            self.hand_over()

    def data_received(self, data: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if self._is_waiting:
            self.hand_over(data)
            return
        is_read = self._transport.get_write_buffer_size() == 0
        if not is_read or (answer := answer_to(data, self._registry)) is None:
            self.hand_over(data)
            return
        written, is_last = answer
        self._transport.write(written)
        if is_last:
            self._transport.close()

    def hand_over(self, data: bytes = b"") -> None:
        """Let aiohttp handle this connection, with ``data`` as the last bytes received: now, or as soon as aiohttp is
        imported.
        """
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


class Connections:
    """Makes the protocol object for each client's connection, and limits their number to ``n_max``, or to what the
    limit of open files allows. ``is_wanted`` is set when a connection waits for aiohttp.
    """

    def __init__(self, n_max: int | None, registry: Registry) -> None:
        """``registry``: the health checks of connections that aiohttp does not handle yet are answered from it."""
        self._registry = registry
        self._make: Callable[[], asyncio.Protocol] | None = None
        self._n_max = n_max if n_max is not None else _n_for_clients()
        self._open: set[asyncio.Protocol] = set()
        self._waiting: dict[NewConnection, None] = {}
        self._is_full = False
        self.is_wanted = asyncio.Event()

    def __call__(self) -> asyncio.Protocol:
        return NewConnection(self, self._registry)

    def handle_with(self, make: Callable[[], asyncio.Protocol]) -> None:
        """Let ``make`` make aiohttp's protocol object for a connection: at once for the connections that wait for
        aiohttp, and for all later ones.
        """
        self._make = make
        for connection in list(self._waiting):
            connection.hand_over()

    def handler(self, connection: NewConnection) -> asyncio.Protocol | None:
        """Return aiohttp's protocol object for ``connection``. None while aiohttp is not imported: ``handle_with`` will
        then call ``connection.hand_over`` again.
        """
        if self._make is not None:
            return self._make()
        self._waiting[connection] = None
        self.is_wanted.set()
        return None

    def close_new(self) -> None:
        """Close all connections that aiohttp does not handle yet."""
        for connection in [*self._open, *self._waiting]:
            if isinstance(connection, NewConnection):
                connection.close()

    def enter(self, connection: asyncio.Protocol) -> bool:
        """Count ``connection`` as open. Returns False, and does not count it, if ``n_max`` connections are open."""
        if len(self._open) >= self._n_max:
            if not self._is_full:
                log.warning(
                    "%d client connections are open (listen.max_connections): further connections get 503",
                    self._n_max,
                )
            self._is_full = True
            return False
        self._open.add(connection)
        return True

    def leave(self, connection: asyncio.Protocol) -> None:
        if isinstance(connection, NewConnection):
            self._waiting.pop(connection, None)
        self._open.discard(connection)
        self._is_full = self._is_full and len(self._open) > 0.9 * self._n_max


def _n_for_clients() -> int:
    """Return how many clients may connect: at least half of the limit of open files, because each running request also
    has a connection to llama-server.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1_000_000 if limit < 0 else max(limit - _RESERVED_FILES, limit // 2)


def set_options(listener: asyncio.Server) -> None:
    """Set the options of clients' sockets, which these inherit from the sockets of ``listener``. The kernel then closes
    the connection of a client that has gone without notice (a laptop asleep, a broken network) or receives nothing any
    more, and keeps little data for a slow one. Without them the request of such a client would keep its slot for two
    hours, or for ever.

    Only Linux has all of these options, and a sandbox may refuse some; then sockets keep their defaults.
    """
    for sock in listener.sockets:
        for name, value in _OPTIONS.items():
            if (option := getattr(socket, name, None)) is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.IPPROTO_TCP, option, value)


def raise_file_limit() -> None:
    """Raise this process's limit of open files to its hard limit. Logs a warning if that is below 4,096."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # In some containers an unlimited hard limit is more than the kernel allows.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    now = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= now < _FEW_FILES:
        log.warning(
            "this process may open %d files only: each client connection takes one, each running request two; raise"
            " LimitNOFILE (systemd) or ulimit -n", now,
        )  # fmt: skip
