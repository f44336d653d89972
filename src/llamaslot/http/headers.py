"""Which headers go through a proxy, and which end at it."""

from __future__ import annotations

from collections.abc import Mapping

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

#: Which backend has answered.
BACKEND = "x-llamaslot-backend"

# https://www.rfc-editor.org/rfc/rfc9110#section-7.6.1
_HOP_BY_HOP = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade",
}  # fmt: skip
# Keys are llamaslot's own: llama-server gets the one that the configuration has for it.
_KEYS = {"authorization", "x-api-key", "api-key"}
# A generation with an X-Conversation-Id survives its client, and a second one with the same id cancels the first.
# A compressed body arrives here unpacked.
_NOT_TO_SERVER = (
    _HOP_BY_HOP | _KEYS | {"host", "content-length", "content-encoding", "x-conversation-id", "expect"}
)
_NOT_TO_CLIENT = _HOP_BY_HOP | {"content-length", "server", "date"}


def _named(headers: Mapping[str, str]) -> set[str]:
    """What ``Connection`` says is for this hop only."""
    values = [value for name, value in headers.items() if name.lower() == "connection"]
    return {token.strip().lower() for value in values for token in value.split(",")}


def to_server(request: web.Request, *, content_type: str | None = None) -> CIMultiDict[str]:
    """The client's headers as llama-server gets them; with ``content_type`` for a body that was written anew."""
    ends_here = _NOT_TO_SERVER | _named(request.headers)
    headers = CIMultiDict(
        (name, value)
        for name, value in request.headers.items()
        if name.lower() not in ends_here and not name.lower().startswith("x-llamaslot-")
    )
    if content_type is not None:
        headers["Content-Type"] = content_type
        headers["Accept-Encoding"] = "identity"  # events are read in passing
    return headers


def to_client(upstream: aiohttp.ClientResponse, ours: Mapping[str, str] | None = None) -> CIMultiDict[str]:
    """llama-server's headers as the client gets them, with ``ours`` in place of its own of these names. Which web pages
    may read them is said by llamaslot alone."""
    ends_here = _NOT_TO_CLIENT | _named(upstream.headers)
    headers = CIMultiDict(
        (name, value)
        for name, value in upstream.headers.items()
        if name.lower() not in ends_here and not name.lower().startswith("access-control-")
    )
    headers.update(ours or {})
    return headers
