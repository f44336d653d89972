"""An error in a stream that has begun, in a form that the clients of its format understand.

A status can no longer be sent. The forms were taken from the clients' sources, and are tested with the clients: see
the files of the formats. This is the most common one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamaslot.llama.sse import EventSplitter, data_of, event_of


class ErrorEvents:
    """Encodes the errors of one stream: ``data: {"error": {"message", "type", "code"}}``, as llama-server does.
    OpenAI's libraries and Vercel's raise on an ``error`` at the root. ``id``: of the request.
    """

    #: Whether llama-server's own error events are converted to the form of ``event`` too.
    is_translated = False

    def __init__(self, id_: str) -> None:
        self.id = id_

    def saw(self, event: bytes) -> None:
        """The client receives ``event``: a later error continues from there."""

    def event(self, error: Mapping[str, Any]) -> bytes:
        """``error``: message, type and code, as in the body of an answer."""
        return event_of({"error": error})

    def translated(self, event: bytes) -> bytes:
        """An error event of llama-server in the form of this format; the same bytes if its clients understand it."""
        payload = data_of(event)
        if not self.is_translated or not isinstance(payload, dict):
            return event
        error = payload.get("error", payload)
        return self.event(error) if isinstance(error, dict) and "message" in error else event


def translated_all(errors: ErrorEvents, events: bytes) -> bytes:
    """Whole events, of which some may be errors."""
    if b"error" not in events:
        return events
    splitter = EventSplitter()
    told = b"".join(errors.translated(event) if is_error(event) else event for event in splitter.feed(events))
    return told + splitter.rest


def is_error(event: bytes) -> bool:
    """Whether this is llama-server's error: an event of that name, or one with nothing else in it."""
    return event.startswith((b"event: error", b'data: {"error":'))
