"""Server-sent events: bytes to whole events and back, without touching what need not be touched."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

_MARKS = (b'"timings"', b'"usage"', b'"prompt_progress"')
_ENDS = (b"\n\n", b"\r\n\r\n")
_OVERLAP = max(map(len, _ENDS)) - 1  # of the bytes before a chunk may belong to a mark that ends in it


class EventSplitter:
    """Cuts a byte stream into whole events. Each one that ``feed`` returns ends with its blank line."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        # Only what is new, or an event of 4 MB in many chunks takes seconds.
        n_searched = max(len(self._rest) - _OVERLAP, 0)
        self._rest += chunk
        events: list[bytes] = []
        start = 0
        # Where each mark is next: looked for again only once it is behind us, or an answer in one chunk takes minutes.
        found = {mark: self._rest.find(mark, n_searched) for mark in _ENDS}
        while ends := [at + len(mark) for mark, at in found.items() if at >= 0]:
            end = min(ends)
            events.append(bytes(self._rest[start:end]))
            start = end
            found = {mark: self._next(mark, at, start) for mark, at in found.items()}
        del self._rest[:start]
        return events

    def _next(self, mark: bytes, at: int, start: int) -> int:
        return at if at < 0 or at >= start else self._rest.find(mark, start)

    @property
    def rest(self) -> bytes:
        """What came after the last whole event."""
        return bytes(self._rest)


def n_whole(data: bytes) -> int:
    """Bytes up to the end of the last event that is whole in ``data``; 0 where none is."""
    return max(data.rfind(mark) + len(mark) if mark in data else 0 for mark in _ENDS)


def data_of(event: bytes) -> Any:
    """The JSON value of an event's data lines; None for comments, ``[DONE]`` and what is not JSON."""
    lines = [line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")]
    if not lines:
        return None
    try:
        return orjson.loads(b"\n".join(lines))
    except orjson.JSONDecodeError:
        return None


def event_of(payload: Any, of: bytes = b"") -> bytes:
    """The event with this JSON, and the name that ``of`` has, if any."""
    name = of.split(b"\n", 1)[0] + b"\n" if of.startswith(b"event:") else b""
    return name + b"data: " + orjson.dumps(payload) + b"\n\n"


def usages(payload: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where an answer or an event of any format has its ``usage``: at its root, or in its message or response."""
    parts = [payload, payload.get("message"), payload.get("response")]
    found = [part.get("usage") for part in parts if isinstance(part, Mapping)]
    return [usage for usage in found if isinstance(usage, dict)]


def comment(text: str) -> bytes:
    """A line between two events. No blank line ends it: some readers (openai-go until 2026) take each blank line for an
    event, and fail where it has no data."""
    return f": {text}\n".encode()


def n_commented(data: bytes) -> int:
    """Bytes of the comments with which ``data``, that stands between two events, begins."""
    n = 0
    while data.startswith(b":", n) and (end := data.find(b"\n", n)) >= 0:
        n = end + 1
    return n


_COMMENT_EVENT = re.compile(rb"(?:\A|(?<=\n\n))((?::[^\n]*\n)+)\n")


def without_empty_events(events: bytes) -> bytes:
    """Whole events: the blank line behind comments that stand alone, such as llama-server's pings, is left out."""
    return _COMMENT_EVENT.sub(rb"\1", events) if events.startswith(b":") or b"\n\n:" in events else events


@dataclass(frozen=True, slots=True)
class PrefillStats:
    """Work done for a request before llama-server saw it: of ``n_tokens`` that are there now ``n_reused`` were reused,
    and the rest took ``seconds``.

    llama-server then reports ``cache_n`` n - 1 and ``prompt_n`` 1; the client must read what its whole request cost.
    ``n_answers``: how many answers go on from that work (``n``); those to further prompts have done all of theirs.
    """

    n_reused: int
    n_tokens: int
    seconds: float
    n_answers: int = 1

    def then(self, later: PrefillStats) -> PrefillStats:
        """This, and what was done after it for the same request: what it left there itself was not reused."""
        is_own = self.n_reused <= later.n_reused <= self.n_tokens
        n_reused = self.n_reused if is_own else later.n_reused
        return PrefillStats(n_reused, later.n_tokens, self.seconds + later.seconds, later.n_answers)

    def correct(self, payload: dict[str, Any]) -> bool:
        """Put the numbers of one JSON answer or event right, in place. True when something was changed."""
        if index_of(payload) >= self.n_answers:
            return False
        changed = False
        if isinstance(timings := payload.get("timings"), dict) and "prompt_n" in timings:
            self._correct_timings(timings)
            changed = True
        for usage in usages(payload):
            changed = self._correct_usage(usage) or changed
        if isinstance(progress := payload.get("prompt_progress"), dict):
            progress["cache"] = min(self.n_reused, int(progress["cache"]))
            progress["time_ms"] = progress["time_ms"] + round(self.seconds * 1000)
            changed = True
        return changed

    def _correct_timings(self, timings: dict[str, Any]) -> None:
        total = int(timings.get("cache_n", 0)) + int(timings["prompt_n"])
        reused = min(self.n_reused, int(timings.get("cache_n", 0)))
        computed, ms = total - reused, float(timings["prompt_ms"]) + self.seconds * 1000
        timings |= {"cache_n": reused, "prompt_n": computed, "prompt_ms": ms}
        if computed and ms > 0:
            timings |= {"prompt_per_token_ms": ms / computed, "prompt_per_second": computed / ms * 1000}

    def _correct_usage(self, usage: dict[str, Any]) -> bool:
        """The number of reused tokens; Anthropic's ``input_tokens`` are those that were computed."""
        if "cache_read_input_tokens" in usage:
            total = int(usage["cache_read_input_tokens"]) + int(usage.get("input_tokens", 0))
            reused = min(self.n_reused, int(usage["cache_read_input_tokens"]))
            usage |= {"cache_read_input_tokens": reused, "input_tokens": total - reused}
            return True
        for name in ("prompt_tokens_details", "input_tokens_details"):
            details = usage.get(name)
            if isinstance(details, dict) and "cached_tokens" in details:
                details["cached_tokens"] = min(self.n_reused, int(details["cached_tokens"]))
                return True
        return False

    def correct_event(self, event: bytes) -> bytes:
        """The event with its numbers put right; the very same bytes when it carries none."""
        if not any(mark in event for mark in _MARKS):
            return event
        payload = data_of(event)
        if not isinstance(payload, dict) or not self.correct(payload):
            return event
        return event_of(payload, event)


def index_of(payload: Mapping[str, Any]) -> int:
    """Which of several answers it is about: ``n`` for each prompt, prompt by prompt. 0 where it does not say."""
    choices = payload.get("choices")
    part = choices[0] if isinstance(choices, list) and choices else payload
    index = part.get("index") if isinstance(part, dict) else None
    return index if isinstance(index, int) else 0
