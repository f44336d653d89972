"""Server-sent events: splits bytes into whole events, and encodes and corrects single events; other bytes stay
unchanged.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

_ENDS = (b"\n\n", b"\r\n\r\n")
_MORE_THAN_ENDS = (b"\n\n\n", b"\n\r\n\r\n", b"\r\n\n")
_OVERLAP = max(map(len, _ENDS)) - 1  # bytes before a chunk that may belong to an end mark that ends in it


class EventSplitter:
    """Cuts a stream of bytes into whole events, each with the blank line that ends it."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that ``chunk`` completes, as a list."""
        return events_in(self.whole(chunk))

    def whole(self, chunk: bytes) -> bytes:
        """The events that ``chunk`` completes, as one piece of bytes."""
        if not self._rest and chunk.endswith(_ENDS) and not chunk.endswith(_MORE_THAN_ENDS):
            return chunk
        # Search only new bytes, or an event of 4 MB in many chunks takes seconds.
        n_searched = max(len(self._rest) - _OVERLAP, 0)
        self._rest += chunk
        n = max(_end(mark, self._rest.rfind(mark, n_searched)) for mark in _ENDS)
        events = bytes(self._rest[:n])
        if events.endswith(_MORE_THAN_ENDS):  # the last line end may begin the next event
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
    # The next position of each mark, searched again only once it is passed, or an answer in one chunk takes minutes.
    found = {mark: data.find(mark) for mark in _ENDS}
    while ends := [at + len(mark) for mark, at in found.items() if at >= 0]:
        events.append(data[start : min(ends)])
        start = min(ends)
        found = {mark: at if at < 0 or at >= start else data.find(mark, start) for mark, at in found.items()}
    return events


def last_of(events: bytes) -> bytes:
    """The last event of ``events``, which are whole and end in LF."""
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
    """An event with the JSON ``payload``, and with the event name of the event ``of``, if that has one."""
    name = of.split(b"\n", 1)[0] + b"\n" if of.startswith(b"event:") else b""
    return name + b"data: " + orjson.dumps(payload) + b"\n\n"


def comment(text: str) -> bytes:
    """A comment line between two events, without a blank line: some readers (openai-go until 2026) take each blank
    line as an event, and fail if it has no data.
    """
    return f": {text}\n".encode()


def n_commented(data: bytes) -> int:
    """The number of bytes of the comments at the beginning of ``data``, which starts between two events."""
    n = 0
    while data.startswith(b":", n) and (end := data.find(b"\n", n)) >= 0:
        n = end + 1
    return n


_COMMENT_EVENT = re.compile(rb"(?:\A|(?<=\n\n))((?::[^\n]*\n)+)\n")


def without_empty_events(events: bytes) -> bytes:
    """``events`` without the blank lines after lone comments such as llama-server's pings."""
    return _COMMENT_EVENT.sub(rb"\1", events) if events.startswith(b":") or b"\n\n:" in events else events
