"""Which headers of a client's request go on to llama-server, and which headers of its answer go on to the client."""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from llamaslot.llama.answers import Response

_Headers = CIMultiDict[str] | CIMultiDictProxy[str]

#: For a traced request: the headers to llama-server that name its trace.
TRACE_HEADERS = web.RequestKey("trace_headers", dict[str, str])

# https://www.rfc-editor.org/rfc/rfc9110#section-7.6.1
_HOP_BY_HOP = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade",
}  # fmt: skip
# A client's key is for llamaslot. llama-server gets the configured one instead.
_KEYS = {"authorization", "x-api-key", "api-key"}
# A generation with an X-Conversation-Id survives its client, and a second one with the same id cancels the first. A
# compressed body is decompressed here. A Range that the answer does not reach is refused with 416 (measured), although
# the prompt was computed.
_NOT_TO_SERVER = (
    _HOP_BY_HOP
    | _KEYS
    | {"host", "content-length", "content-encoding", "x-conversation-id", "expect", "range", "if-range"}
)
_NOT_TO_CLIENT = _HOP_BY_HOP | {"content-length", "server", "date"}


def _passed(headers: _Headers, ends_here: set[str], prefix: str) -> CIMultiDict[str]:
    """Return the headers that a proxy forwards: all except those named in ``ends_here``, those that ``Connection``
    declares as hop-by-hop, and those whose names begin with ``prefix``.
    """
    if declared := headers.getall("Connection", ()):
        ends_here = ends_here | {token.strip().lower() for value in declared for token in value.split(",")}
    return CIMultiDict(
        [
            (name, value)
            for name, value in headers.items()
            if (lower := name.lower()) not in ends_here and not lower.startswith(prefix)
        ]
    )


def to_server(request: web.Request, *, content_type: str | None = None) -> CIMultiDict[str]:
    """Return the client's headers for llama-server. ``content_type`` replaces the client's Content-Type. It is given
    where llamaslot reads the answer, so then llama-server is asked not to compress the answer.
    """
    headers = _passed(request.headers, _NOT_TO_SERVER, "x-llamaslot-")
    headers.update(request.get(TRACE_HEADERS, ()))
    if content_type is not None:
        headers["Content-Type"] = content_type
        headers["Accept-Encoding"] = "identity"  # the events are read here
    return headers


def to_client(upstream: Response, ours: Mapping[str, str] | None = None) -> CIMultiDict[str]:
    """Return llama-server's headers for the client; ``ours`` replace those of the same names. llama-server's CORS
    headers are left out, because llamaslot alone decides which web pages may read the answer.
    """
    headers = _passed(upstream.headers, _NOT_TO_CLIENT, "access-control-")
    headers.update(ours or {})
    return headers
