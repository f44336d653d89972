"""Which headers a proxy forwards, and which it does not."""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web
from multidict import CIMultiDict

from llamaslot.llama.response import Response

#: The backend that has answered.
BACKEND = "x-llamaslot-backend"

# https://www.rfc-editor.org/rfc/rfc9110#section-7.6.1
_HOP_BY_HOP = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade",
}  # fmt: skip
# Keys are llamaslot's own: llama-server gets the configured one.
_KEYS = {"authorization", "x-api-key", "api-key"}
# A generation with an X-Conversation-Id survives its client, and a second one with the same id cancels the first. A
# compressed body is decompressed here.
_NOT_TO_SERVER = (
    _HOP_BY_HOP | _KEYS | {"host", "content-length", "content-encoding", "x-conversation-id", "expect"}
)
_NOT_TO_CLIENT = _HOP_BY_HOP | {"content-length", "server", "date"}


def _named(headers: Mapping[str, str]) -> set[str]:
    """The headers that ``Connection`` declares as hop-by-hop."""
    values = [value for name, value in headers.items() if name.lower() == "connection"]
    return {token.strip().lower() for value in values for token in value.split(",")}


def to_server(request: web.Request, *, content_type: str | None = None) -> CIMultiDict[str]:
    """The client's headers for llama-server; with ``content_type`` for a body that was rewritten."""
    ends_here = _NOT_TO_SERVER | _named(request.headers)
    headers = CIMultiDict(
        (name, value)
        for name, value in request.headers.items()
        if name.lower() not in ends_here and not name.lower().startswith("x-llamaslot-")
    )
    if content_type is not None:
        headers["Content-Type"] = content_type
        headers["Accept-Encoding"] = "identity"  # the events are read here
    return headers


def to_client(upstream: Response, ours: Mapping[str, str] | None = None) -> CIMultiDict[str]:
    """llama-server's headers for the client; ``ours`` replace its own of the same names. Only llamaslot decides which
    web pages may read them.
    """
    ends_here = _NOT_TO_CLIENT | _named(upstream.headers)
    headers = CIMultiDict(
        (name, value)
        for name, value in upstream.headers.items()
        if name.lower() not in ends_here and not name.lower().startswith("access-control-")
    )
    headers.update(ours or {})
    return headers
