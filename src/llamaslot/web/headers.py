"""Which headers go through a proxy, and which end at it."""

from __future__ import annotations

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

# https://www.rfc-editor.org/rfc/rfc9110#section-7.6.1
_HOP_BY_HOP = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade",
}  # fmt: skip
# A generation with an X-Conversation-Id survives its client, and a second one with the same id cancels the first.
# A compressed body arrives here unpacked.
_NOT_TO_SERVER = _HOP_BY_HOP | {"host", "content-length", "content-encoding", "x-conversation-id", "expect"}
_NOT_TO_CLIENT = _HOP_BY_HOP | {"content-length", "server", "date"}


def to_server(request: web.Request, *, content_type: str | None = None) -> CIMultiDict[str]:
    """The client's headers as llama-server gets them; with ``content_type`` for a body that was written anew."""
    headers = CIMultiDict(
        (name, value) for name, value in request.headers.items() if name.lower() not in _NOT_TO_SERVER
    )
    if content_type is not None:
        headers["Content-Type"] = content_type
        headers["Accept-Encoding"] = "identity"  # events are read in passing
    return headers


def to_client(upstream: aiohttp.ClientResponse) -> CIMultiDict[str]:
    return CIMultiDict(
        (name, value) for name, value in upstream.headers.items() if name.lower() not in _NOT_TO_CLIENT
    )


async def allow_origin(request: web.Request, response: web.StreamResponse) -> None:
    """What llama-server says to every web page, for answers and early headers that are not its own.

    Signal ``on_response_prepare``. llamaslot's own pages are no part of that: no web page may read them.
    (tools/server/server-http.cpp: ``Access-Control-Allow-Origin`` is the request's ``Origin``)
    """
    origin = request.headers.get("Origin")
    if origin is not None and not request.path.startswith("/llamaslot"):
        response.headers.setdefault("Access-Control-Allow-Origin", origin)
