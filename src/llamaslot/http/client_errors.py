"""The answer to a request that failed: status, headers and body, or an event of its stream."""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web

from llamaslot.errors import ClientGone, LlamaslotError, NotAllowed, Unauthorized, UpstreamError
from llamaslot.formats.base import ErrorEvents
from llamaslot.formats.registry import format_named
from llamaslot.http.in_flight import note_error
from llamaslot.llama.routes import classify

MISTAKE = "internal error in llamaslot; its log has the traceback"
HAS_BEGUN = web.RequestKey("has_begun", bool)  # whether headers of an answer have been sent


def cut(request: web.Request) -> None:
    """Close a client's connection in the middle of an answer, so that the client detects that the answer is
    incomplete.
    """
    if request.transport is not None:
        request.transport.abort()


def error_instead(
    request: web.Request, error: LlamaslotError, headers: Mapping[str, str] | None = None
) -> web.Response:
    """Return the error answer to a failed request. If the headers of another answer have been sent, close the
    connection and raise ClientGone instead: half an answer must not look like a whole one.
    """
    note_error(request, error)
    if request.get(HAS_BEGUN):
        cut(request)
        raise ClientGone from error
    return error_response(error, headers)


def errors_of(request: web.Request, id_: str) -> ErrorEvents:
    """Return the encoder for errors in a stream, in the form that the clients of the request's route understand.
    ``id_``: the id of the request.
    """
    format_ = format_named(classify(request.method, request.raw_path).format)
    return format_.errors(id_) if format_ is not None else ErrorEvents(id_)


def error_response(error: LlamaslotError, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return the answer for ``error``: ``{"error": {"message", "type", "code"}}``, or llama-server's own body if the
    error is llama-server's.
    """
    headers = dict(headers or {})
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    if isinstance(error, NotAllowed):
        headers["Allow"] = ", ".join(error.methods)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, UpstreamError):
        headers["Content-Type"] = error.content_type
        return web.Response(status=error.status, body=error.payload, headers=headers)
    return web.json_response(error.body(), status=error.status, headers=headers)
