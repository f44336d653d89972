"""Sends those requests to llama-server with aiohttp's client that ``fresh_connections`` cannot send: over TLS, for
example, or with a body in pieces. ``client`` imports this module when it needs it, because importing aiohttp takes
0.15 s. aiohttp's errors are translated here and nowhere else.
"""

from __future__ import annotations

import contextlib
import errno
import io
import socket
import ssl
from collections.abc import AsyncIterator, Mapping

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from llamaslot.errors import BackendDown, SlotWedged
from llamaslot.llama.answers import BROKEN_OFF, RELAYED_BYTES, Response, Take
from llamaslot.llama.transport.connection import REQUEST_CONNECT_S, NotReached
from llamaslot.llama.transport.fresh_connections import narrow_socket

_PIECE_BYTES = 1 << 20


class AiohttpFallback:
    """Sends requests to the server ``url``, each on a new connection."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = url
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # aiohttp's default context has no certificates, because of ``quick_import``.
        tls = ssl.create_default_context() if url.startswith("https:") else True
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(force_close=True, limit=0, socket_factory=_narrow, ssl=tls),
            skip_auto_headers=("Accept-Encoding", "User-Agent"),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        await self.session.close()

    @contextlib.asynccontextmanager
    async def request(
        self,
        method: str,
        path: str,
        data: bytes | AsyncIterator[bytes] | None,
        headers: Mapping[str, str],
        *,
        timeout_s: float | None,
        silence_s: float | None,
        n_held_bytes: int,
    ) -> AsyncIterator[Response]:
        """Send a request; the context yields its response and closes it at the end. Parameters are those of
        ``FreshConnections.send``. Raises ConnectionError, TimeoutError and SlotWedged, also where the body of the block
        reads the response.
        """
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=REQUEST_CONNECT_S, sock_read=silence_s)
        merged = CIMultiDict(headers)
        merged.update(self._headers)  # llamaslot's API key instead of the client's
        try:
            async with self.session.request(
                method,
                URL(self._url + path, encoded=True),
                # aiohttp warns about bytes over 1 MiB, because it writes them in one piece.
                data=io.BytesIO(data) if isinstance(data, bytes) and len(data) > _PIECE_BYTES else data,
                headers=merged,
                timeout=timeout,
                allow_redirects=False,
                read_bufsize=n_held_bytes,
            ) as response:
                yield _Response(response)
        except aiohttp.SocketTimeoutError as error:
            raise SlotWedged(
                f"llama-server at {self._url} has sent nothing for {silence_s:g} s; its slot is given up"
            ) from error
        except aiohttp.ClientConnectorError as error:
            is_refused = error.os_error.errno == errno.ECONNREFUSED
            raise (ConnectionRefusedError if is_refused else NotReached)(str(error)) from error
        except aiohttp.ClientError as error:
            if isinstance(error, ConnectionError | TimeoutError):
                raise
            raise ConnectionError(str(error)) from error


def _narrow(address: aiohttp.AddrInfoType) -> socket.socket:
    family, kind, protocol, *_ = address
    return narrow_socket(family, kind, protocol)


class _Response:
    """A ``Response`` that aiohttp's client reads."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status, self.reason, self.headers = response.status, response.reason, response.headers

    @property
    def has_ended(self) -> bool:
        return self._response.content.at_eof()

    async def pass_to(self, take: Take) -> bool:
        """As ``Response.pass_to``. If nothing comes for too long, it raises aiohttp's error, which
        ``AiohttpFallback.request`` translates to SlotWedged.
        """
        while piece := await self._piece():
            if not take(piece):
                return True
        return False

    async def _piece(self) -> bytes:
        try:
            return await self._response.content.read(RELAYED_BYTES)
        except aiohttp.SocketTimeoutError:
            raise
        except (aiohttp.ClientError, RuntimeError) as error:  # the latter is aiohttp's "Connection closed."
            raise BackendDown(BROKEN_OFF) from error
