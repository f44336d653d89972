"""An error in a stream that has begun, in the words that the clients of its format understand.

A status cannot be sent any more. What was looked up in the clients, and is tested with them:

- chat, completions, native, infill: ``data: {"error": {"message", "type", "code"}}``, as llama-server sends it itself.
  OpenAI's libraries and Vercel's raise on an ``error`` at the root.
- responses: Codex passes over events whose ``type`` it does not know, says "stream closed before response.completed"
  and asks five times more. It wants ``response.failed``, with ``code`` a string: ``context_length_exceeded`` and
  ``invalid_prompt`` are final, ``server_error`` and ``rate_limit_exceeded`` are tried again; all but the first show the
  message. OpenAI's libraries do not raise on it, and an answer that breaks off would look like a short one: for them
  ``error`` stands at the root too. Vercel's wants a ``sequence_number``.
- messages: Anthropic's libraries look at ``event: error`` only, and read ``error.type`` and ``error.message`` in it;
  llama-server leaves that envelope out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from llamaslot.llama.routes import Format
from llamaslot.llama.sse import EventSplitter, data_of, event_of

_CREATED = b"event: response.created"
_ANTHROPIC = {
    "invalid_request_error", "authentication_error", "permission_error", "not_found_error", "rate_limit_error",
    "timeout_error", "api_error", "overloaded_error",
}  # fmt: skip


class ErrorEvents:
    """Makes the errors of one stream. ``id_``: of the request."""

    def __init__(self, kind: Format | None, id_: str) -> None:
        self._kind, self._id = kind, id_
        self._created = self._last = b""

    def saw(self, event: bytes) -> None:
        """The client is being told ``event``: a later error goes on from there."""
        if self._kind == "responses":
            self._last = event
            if event.startswith(_CREATED):
                self._created = event

    def event(self, error: Mapping[str, Any]) -> bytes:
        """``error``: message, type and code, as in the body of an answer."""
        if self._kind == "responses":
            return event_of(self._failed(error), b"event: response.failed\n")
        if self._kind == "messages":
            said = {**error, "type": _type_for_anthropic(error)}
            return event_of({"type": "error", "error": said}, b"event: error\n")
        return event_of({"error": error})

    def translated(self, event: bytes) -> bytes:
        """An error event of llama-server's; the very same bytes where its clients understand it."""
        payload = data_of(event)
        if self._kind not in ("responses", "messages") or not isinstance(payload, dict):
            return event
        error = payload.get("error", payload)
        return self.event(error) if isinstance(error, dict) and "message" in error else event

    def _failed(self, error: Mapping[str, Any]) -> dict[str, Any]:
        created, last = data_of(self._created), data_of(self._last)
        begun = created["response"] if isinstance(created, dict) else {"id": f"resp_{self._id}", "output": []}
        n_last = last.get("sequence_number") if isinstance(last, dict) else None
        code = {"code": _code_for_codex(error), "message": error["message"]}
        response = {
            "object": "response",
            "created_at": int(time.time()),
            **begun,
            "status": "failed",
            "error": code,
        }
        number = n_last + 1 if isinstance(n_last, int) else 0
        return {"type": "response.failed", "sequence_number": number, "response": response, "error": error}


def translated_all(errors: ErrorEvents, events: bytes) -> bytes:
    """Whole events, of which some may be errors."""
    if b"error" not in events:
        return events
    splitter = EventSplitter()
    told = b"".join(errors.translated(event) if is_error(event) else event for event in splitter.feed(events))
    return told + splitter.rest


def is_error(event: bytes) -> bool:
    """Whether this is llama-server's error: named so, or with nothing but that in it."""
    return event.startswith((b"event: error", b'data: {"error":'))


def _code_for_codex(error: Mapping[str, Any]) -> str:
    if error.get("type") == "exceed_context_size_error":
        return "context_length_exceeded"
    status = error.get("code")
    if not isinstance(status, int) or not 400 <= status < 500:
        return "server_error"
    return "rate_limit_exceeded" if status == 429 else "invalid_prompt"


def _type_for_anthropic(error: Mapping[str, Any]) -> str:
    kind, status = error.get("type"), error.get("code")
    if kind in _ANTHROPIC:
        return str(kind)
    if kind == "unavailable_error":
        return "overloaded_error"
    return "invalid_request_error" if isinstance(status, int) and 400 <= status < 500 else "api_error"
