"""Server-sent events: splits a stream of bytes into whole events, and parses and makes single events. Never changes the
bytes of an event.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

_ENDS = (b"\n\n", b"\r\n\r\n")
_MORE_THAN_ENDS = (b"\n\n\n", b"\n\r\n\r\n", b"\r\n\n")
_OVERLAP = max(map(len, _ENDS)) - 1  # most bytes of an end mark that can precede the chunk in which it ends


class EventSplitter:
    """Splits a stream of bytes into whole events, each with the blank line that ends it."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """Add ``chunk``, and return the events that it completes, as a list."""
        return events_in(self.whole(chunk))

    def whole(self, chunk: bytes) -> bytes:
        """Add ``chunk``, and return the events that it completes, joined."""
        if not self._rest and chunk.endswith(_ENDS) and not chunk.endswith(_MORE_THAN_ENDS):
            return chunk
        # Search only the new bytes: else an event of 4 MB in many chunks would take seconds.
        n_searched = max(len(self._rest) - _OVERLAP, 0)
        self._rest += chunk
        n = max(_end(mark, self._rest.rfind(mark, n_searched)) for mark in _ENDS)
        events = bytes(self._rest[:n])
        if events.endswith(_MORE_THAN_ENDS):  # the last line end may belong to the next event
            events = b"".join(events_in(events))
            n = len(events)
        del self._rest[:n]
        return events

    @property
    def rest(self) -> bytes:
        """The bytes after the last whole event."""
        return bytes(self._rest)


def _end(mark: bytes, at: int) -> int:
    return at + len(mark) if at >= 0 else 0


def events_in(data: bytes) -> list[bytes]:
    """Split bytes that are whole events into single events."""
    if b"\r\n\r\n" not in data:
        return [part + b"\n\n" for part in data.split(b"\n\n")[:-1]]
    events: list[bytes] = []
    start = 0
    # The next position of each end mark. It is searched again only after it is passed: else a long answer in one chunk
    # would take minutes.
    found = {mark: data.find(mark) for mark in _ENDS}
    while ends := [at + len(mark) for mark, at in found.items() if at >= 0]:
        events.append(data[start : min(ends)])
        start = min(ends)
        found = {mark: at if at < 0 or at >= start else data.find(mark, start) for mark, at in found.items()}
    return events


def last_of(events: bytes) -> bytes:
    """The last event in ``events``, which are whole and have LF line ends."""
    return events[_end(b"\n\n", events.rfind(b"\n\n", 0, -2)) :]


def n_whole(data: bytes) -> int:
    """The number of bytes up to the end of the last whole event in ``data``; 0 if it has none."""
    return max(data.rfind(mark) + len(mark) if mark in data else 0 for mark in _ENDS)


def data_of(event: bytes) -> Any:
    """The JSON value of an event's data lines; None for comments, ``[DONE]`` and data that is not JSON."""
    if event.startswith(b"data: {") and event.find(b"\n") == len(event) - 2:  # one line, as nearly always
        try:
            return orjson.loads(event[6:])
        except orjson.JSONDecodeError:
            return None
    lines = [line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")]
    if not lines or lines == [b"[DONE]"]:
        return None
    try:
        return orjson.loads(b"\n".join(lines))
    except orjson.JSONDecodeError:
        return None


def event_of(payload: Any, of: bytes = b"") -> bytes:
    """An event with ``payload`` as JSON data. If the event ``of`` begins with an event name, the new event gets the
    same name.
    """
    name = of.split(b"\n", 1)[0] + b"\n" if of.startswith(b"event:") else b""
    return name + b"data: " + orjson.dumps(payload) + b"\n\n"


def comment(text: str) -> bytes:
    """A comment line to send between two events. No blank line follows it: some clients (openai-go until 2026) take
    each blank line for an event, and fail if that has no data.
    """
    return f": {text}\n".encode()


def n_commented(data: bytes) -> int:
    """The number of bytes of the comment lines with which ``data`` begins. ``data`` must begin between two events."""
    n = 0
    while data.startswith(b":", n) and (end := data.find(b"\n", n)) >= 0:
        n = end + 1
    return n


_COMMENT_EVENT = re.compile(rb"(?:\A|(?<=\n\n))((?::[^\n]*\n)+)\n")


def without_empty_events(events: bytes) -> bytes:
    """``events`` without the blank line after comments that stand alone, such as llama-server's pings: some clients
    take that line for an event.
    """
    return _COMMENT_EVENT.sub(rb"\1", events) if events.startswith(b":") or b"\n\n:" in events else events
