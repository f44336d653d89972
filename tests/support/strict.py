"""A reader of server-sent events that is as strict as the strictest clients: openai-go before its 2026 releases takes
each blank line for the end of an event, and fails if that event has no data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Event:
    """One event. ``comments``: the comments that came before it."""

    data: str
    name: str = ""
    comments: list[str] = field(default_factory=list)


def strict(raw: bytes) -> list[Event]:
    """The events of a stream. After the last blank line only comments may follow, or half an event that was never
    finished. Raises AssertionError for an event without data, and for a comment inside an event.
    """
    return list(_events(raw.decode()))


def _events(text: str) -> Iterator[Event]:
    name, data, comments = "", list[str](), list[str]()
    for line in text.split("\n")[:-1]:
        if line.startswith(":"):
            assert not name + "".join(data), (
                f"a comment in the middle of an event: {line!r} behind {name!r} {data}"
            )
            comments.append(line[2:])
        elif line.startswith("event: "):
            assert not name + "".join(data), (
                f"a name in the middle of an event: {line!r} behind {name!r} {data}"
            )
            name = line[7:]
        elif line.startswith("data: "):
            data.append(line[6:])
        else:
            assert line == "", f"neither field nor comment: {line!r}"
            assert data, f"a blank line without data, behind {comments[-1:]} {name!r}"
            yield Event("\n".join(data), name, comments)
            name, data, comments = "", [], []
