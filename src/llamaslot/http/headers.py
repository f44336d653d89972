"""llamaslot's own headers of an answer; which headers a proxy forwards, and which it does not."""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from llamaslot.llama.answers import Response
from llamaslot.scheduling.plan import Source
from llamaslot.scheduling.slots import SlotKey

_Headers = CIMultiDict[str] | CIMultiDictProxy[str]

#: The backend that has answered.
BACKEND = "x-llamaslot-backend"
#: Of a request that llamaslot has not placed: llama-server chooses slots by itself.
ASSIST_OFF = {"x-llamaslot-assist": "off"}

#: Of a request that is traced: headers that make what llama-server does a part of the trace.
TRACE_HEADERS = web.RequestKey("trace_headers", dict[str, str])

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


def _passed(headers: _Headers, ends_here: set[str], prefix: str) -> CIMultiDict[str]:
    """The headers that a proxy forwards: without those named in ``ends_here``, those that ``Connection`` declares as
    hop-by-hop, and those whose names begin with ``prefix``.
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
    """The client's headers for llama-server; with ``content_type`` for a body that was rewritten."""
    headers = _passed(request.headers, _NOT_TO_SERVER, "x-llamaslot-")
    headers.update(request.get(TRACE_HEADERS, ()))
    if content_type is not None:
        headers["Content-Type"] = content_type
        headers["Accept-Encoding"] = "identity"  # the events are read here
    return headers


def to_client(upstream: Response, ours: Mapping[str, str] | None = None) -> CIMultiDict[str]:
    """llama-server's headers for the client; ``ours`` replace llama-server's of the same names. Only llamaslot decides
    which web pages may read the answer.
    """
    headers = _passed(upstream.headers, _NOT_TO_CLIENT, "access-control-")
    headers.update(ours or {})
    return headers


def of_placement(slot: SlotKey, n_prompt: int) -> dict[str, str]:
    """The headers that are known before llama-server has received a request of ``n_prompt`` tokens: backend, slot,
    prompt tokens.
    """
    return {
        BACKEND: slot.backend,
        "x-llamaslot-slot": str(slot.id),
        "x-llamaslot-prompt-tokens": str(n_prompt),
    }


def of_expected_reuse(n_expected: int) -> dict[str, str]:
    """The header for the expected reuse, where llama-server reports the real one only at the end of its answer."""
    return {"x-llamaslot-expected-tokens": str(n_expected)}


def of_reuse(source: Source, n_reused: int) -> dict[str, str]:
    return {"x-llamaslot-source": source.value, "x-llamaslot-reused-tokens": str(n_reused)}
