"""Opens TCP connections to one host and port, and takes these from a URL."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import socket
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

P = TypeVar("P", bound=asyncio.Protocol)

QUESTION_CONNECT_S = 5.0  # limit for connecting to ask a short question, which can be repeated
# Limit for connecting to send a client's request. If a burst has filled llama-server's backlog, Linux sends the first
# packet again after 1, 3 and 7 s.
REQUEST_CONNECT_S = 10.0


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
    """No address of the host accepts a connection."""


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

    async def connect(self, make: Callable[[], P], within_s: float) -> P | None:
        """Open a connection, and return its asyncio protocol, which ``make`` has made. None if the name cannot be
        resolved or no address accepts a connection.

        Raises TimeoutError if an address does not answer for ``within_s``. Canceling closes the connection.
        """
        if self._last is not None and (protocol := await self._connect_to(make, *self._last, within_s)):
            return protocol
        self._last = None
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                self._host, self._port, type=socket.SOCK_STREAM
            )
        except OSError:
            return None
        for family, _, _, _, address in found:
            if protocol := await self._connect_to(make, family, address, within_s):
                self._last = family, address
                return protocol
        return None

    async def _connect_to(
        self, make: Callable[[], P], family: int, address: Any, within_s: float
    ) -> P | None:
        sock = None
        try:
            sock = self._open_socket(family, socket.SOCK_STREAM, 0)
            sock.setblocking(False)
            await _connect_socket(sock, address, within_s)
            _, protocol = await asyncio.get_running_loop().create_connection(make, sock=sock)
        except BaseException as error:
            if sock is not None:
                sock.close()
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                return None
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
