"""Reads llama-server's answer to one request, event by event: which events to relay, and which figures to record. If
llamaslot has computed a part of the prompt ahead, the numbers in the answer are corrected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from llamaslot.formats.base import LAST_EVENTS, ErrorEvents, Format, is_error
from llamaslot.formats.stream_to_json import Assembly
from llamaslot.llama.answers import Response, whole
from llamaslot.llama.sse import EventSplitter, data_of, event_of, events_in, last_of, without_empty_events
from llamaslot.scheduling.plan import PrefillStats

_NOTED = (b'"timings"', b'"error"', b'"prompt_progress"', b'"usage"')
_CREATED, _IN_PROGRESS = b"event: response.created", b"event: response.in_progress"
_BEFORE_TOKENS = (_CREATED, _IN_PROGRESS)
#: An event without any of these, and without those of its format, is neither read nor changed. A search takes 0.1 us.
_MARKS = (b'"timings"', b'"usage"', b"error", b"prompt_progress", b"\n:")
_CORRECTED = (b'"timings"', b'"usage"', b'"prompt_progress"')  # events that have numbers of a prompt

#: Sends whole events to the client at once; False if it cannot.
Put = Callable[[bytes], bool]


class Reading:
    """One answer of llama-server in ``format_``, as far as it was read.

    ``timings``: those of the first prompt. ``n_found``: how many tokens of the first prompt were in the slot, by its
    first progress event. ``has_token``: the first token has come. ``is_over``: the last event has come; in the native
    format the last of ``n_answers`` final events.

    Progress events are relayed only if ``wants_progress``. With an ``assembly``, which makes a JSON answer from the
    stream, no event is relayed. ``start``: the event that a stream of /v1/messages begins with; llama-server omits it
    if the first token is half a character (measured), and clients fail then.
    """

    def __init__(
        self,
        upstream: Response,
        format_: Format,
        prefill_stats: PrefillStats | None,
        errors: ErrorEvents,
        *,
        n_answers: int = 1,
        wants_progress: bool = False,
        assembly: Assembly | None = None,
        start: bytes = b"",
    ) -> None:
        self.timings: dict[str, Any] | None = None
        self.n_found: int | None = None
        self.n_cached: int | None = None  # reused tokens by ``usage``, the only figure of some formats
        self.n_prompt: int | None = None  # tokens of the prompt by ``usage``, of messages and responses
        self.n_predicted = 0
        self.n_events = 0  # events of the answer so far: llama-server sends one for each token
        self.n_processed = 0  # tokens of the prompt that are in the slot, by the last progress event
        self.has_failed = False
        self.is_over = False
        self.has_token = False
        self.assembly = assembly
        self._upstream, self._format, self._errors = upstream, format_, errors
        self._corrections = Corrections(format_, prefill_stats) if prefill_stats is not None else None
        self._wants_progress = wants_progress
        self._n_left, self._start = n_answers, start
        self._created, self._is_in_progress = b"", False
        self._splitter = EventSplitter()
        own = (
            format_.last_events
            if format_.last_events == LAST_EVENTS
            else (*format_.last_events, *_BEFORE_TOKENS)
        )
        self._marks = (*_MARKS, *(mark for mark in own if b"error" not in mark))
        self._is_followed = type(errors).saw is not ErrorEvents.saw
        self._put: Put | None = None
        self._events = b""  # whole events that ``next`` will handle

    async def next(self, put: Put | None = None) -> list[bytes] | None:
        """Return the next events to relay, perhaps none; None at the end of the answer.

        After the first token, an event that must be neither read nor changed is passed to ``put`` at once. This task is
        not woken for it, which saves most of the time that an event takes. With an ``assembly`` nothing is passed to
        ``put``: the assembly takes the events, and only the last one wakes this task.

        Raises BackendDown if the connection breaks, and UpstreamError for an error event while a JSON answer is
        assembled.
        """
        self._put = put
        if not await self._upstream.pass_to(self._take):
            return None
        events, self._events = self._events, b""
        return [passed for event in events_in(events) if (passed := self._event(event))]

    def _take(self, piece: bytes) -> bool:
        """Called with each piece of the answer. Returns True if all of its events were passed to ``put`` or to the
        assembly; False if ``next`` must handle them.
        """
        events = self._splitter.whole(piece)
        if (put := self._put) is not None and self.has_token and not (self.is_over or self.has_failed):
            if not events:
                return True
            if self.assembly is not None:
                for event in events_in(events):
                    self._event(event)
                return not (self.is_over or self.has_failed)
            if self._is_plain(events) and put(events):
                self.n_events += events.count(b"\n\n")
                if self._is_followed:
                    self._errors.saw(last_of(events))
                return True
        self._events = events
        return False

    def _is_plain(self, events: bytes) -> bool:
        if self._created or self._start or events.startswith(b":"):
            return False
        return not any(map(events.__contains__, self._marks))

    @property
    def n_reused(self) -> int | None:
        """How many tokens of the first prompt llama-server has found in the slot, by the most reliable figure so far;
        None before any has come.
        """
        told = (self.timings or {}).get("cache_n"), self.n_found, self.n_cached
        return next((int(n) for n in told if n is not None), None)

    @property
    def has_ended(self) -> bool:
        """True if the whole answer has come, so that ``next`` has nothing more."""
        return self._upstream.has_ended

    @property
    def rest(self) -> bytes:
        """The bytes after the last whole event."""
        return b"" if self.assembly is not None else self._created + self._splitter.rest

    async def whole(self) -> bytes:
        """Read the JSON answer to a request without a stream, and return it. The reused and computed tokens of the
        prompt, and the seconds for these, are corrected by what llamaslot has computed ahead.
        """
        payload = await whole(self._upstream)
        try:
            answer = orjson.loads(payload)
        except orjson.JSONDecodeError:
            return payload
        return orjson.dumps(answer) if self._answer(answer) else payload

    def assembled(self) -> bytes:
        """Return the JSON answer assembled from a stream, corrected as in ``whole``. Raises Incomplete if events are
        missing.
        """
        assert self.assembly is not None
        answer = self.assembly.answer()
        self._answer(answer)
        return orjson.dumps(answer)

    def _answer(self, answer: Any) -> bool:
        changed = False
        for part in answer if isinstance(answer, list) else [answer]:
            self._note(part)
            if self._corrections is not None and isinstance(part, dict):
                changed = self._corrections.correct(part) or changed
        return changed

    def _event(self, event: bytes) -> bytes:
        is_answer = self.has_token and self.assembly is None and not (self.is_over or self.has_failed)
        if is_answer and self._is_plain(event):
            self.n_events += 1
            if self._is_followed:
                self._errors.saw(event)
            return event
        payload: Any = None
        if event.startswith(self._format.last_events):
            self.is_over = True
            self.has_failed = self.has_failed or event.startswith(b"event: error")
        if self.assembly is not None or any(map(event.__contains__, _NOTED)):
            payload = data_of(event)
            self._note(payload)
        is_progress = isinstance(payload, dict) and "prompt_progress" in payload
        is_token = b"data:" in event[:64] and not event.startswith(_BEFORE_TOKENS)
        self.has_token = self.has_token or (is_token and not is_progress)
        self.n_events += self.has_token and not is_progress
        if self.assembly is not None:
            if isinstance(payload, dict):
                self.assembly.feed(payload)
            return b""
        if event.startswith(_CREATED):
            # Sent with the next event. If the request loses its slot before that, its next slot's event is sent.
            created, self._created, self._is_in_progress = self._created, event, False
            return created
        if is_progress and not self._wants_progress:
            if not (_has_text(payload) or self._is_first_in_progress(event)):
                return b""
            event = event_of(_without_progress(payload), event)
        start, self._start = self._start, b""
        if event.startswith((b"event: message_start", b"event: error")):
            start = b""
        created, self._created = self._created, b""
        for told in (created, start, event):
            if told:
                self._errors.saw(told)
        if self.has_failed and is_error(event):
            return created + start + self._errors.translated(event)
        if event.startswith(b":"):
            return created + start + without_empty_events(event)
        corrections = self._corrections
        return created + start + (corrections.correct_event(event) if corrections is not None else event)

    def _is_first_in_progress(self, event: bytes) -> bool:
        """True if ``event`` is the first ``response.in_progress``. llama-server sends one if no progress was requested,
        otherwise one for each batch.
        """
        is_first = event.startswith(_IN_PROGRESS) and not self._is_in_progress
        self._is_in_progress = self._is_in_progress or is_first
        return is_first

    def _note(self, payload: Any) -> None:
        if not isinstance(payload, dict):
            return
        timings = payload.get("timings")
        if isinstance(timings, dict) and not index_of(payload):
            self.timings = timings if self._corrections is None else dict(timings)  # kept uncorrected
        for usage in self._format.usages(payload):
            counts = self._format.counts(usage)
            self.n_cached = counts.n_cached if self.n_cached is None else self.n_cached
            self.n_prompt = counts.n_prompt if self.n_prompt is None else self.n_prompt
            self.n_predicted = counts.n_predicted
        progress = payload.get("prompt_progress")
        if isinstance(progress, dict):
            self.n_processed = int(progress["processed"])
            self.n_found = int(progress["cache"]) if self.n_found is None else self.n_found
        self.has_failed = self.has_failed or "error" in payload
        if payload.get("stop") is True:
            self._n_left -= 1
            self.is_over = self._n_left <= 0


def _has_text(payload: dict[str, Any]) -> bool:
    """True if a progress event has text. A beginning of the answer that the template or the client gives comes in one
    (measured: ``reasoning_format: none``, and a last message of the assistant with ``echo``).
    """
    choices = payload.get("choices") or [{}]
    delta = choices[0].get("delta") or {}
    return any(delta.get(name) for name in ("content", "reasoning_content", "tool_calls"))


def _without_progress(payload: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in payload.items() if name != "prompt_progress"}


class Corrections:
    """Corrects the numbers about the prompt in one answer in ``format_``. ``prefill_stats``: what llamaslot has
    computed of the prompt before the request was sent.
    """

    def __init__(self, format_: Format, prefill_stats: PrefillStats) -> None:
        self._format, self._prefill_stats = format_, prefill_stats

    def correct(self, payload: dict[str, Any]) -> bool:
        """Correct the numbers of one JSON answer or event, in place. Returns True if something was changed."""
        if index_of(payload) >= self._prefill_stats.n_answers:
            return False
        changed = False
        if isinstance(timings := payload.get("timings"), dict) and "prompt_n" in timings:
            self._correct_timings(timings)
            changed = True
        for usage in self._format.usages(payload):
            changed = self._format.correct_usage(usage, self._prefill_stats.n_reused) or changed
        if isinstance(progress := payload.get("prompt_progress"), dict):
            progress["cache"] = min(self._prefill_stats.n_reused, int(progress["cache"]))
            progress["time_ms"] = progress["time_ms"] + round(self._prefill_stats.seconds * 1000)
            changed = True
        return changed

    def _correct_timings(self, timings: dict[str, Any]) -> None:
        total = int(timings.get("cache_n", 0)) + int(timings["prompt_n"])
        reused = min(self._prefill_stats.n_reused, int(timings.get("cache_n", 0)))
        computed, ms = total - reused, float(timings["prompt_ms"]) + self._prefill_stats.seconds * 1000
        timings |= {"cache_n": reused, "prompt_n": computed, "prompt_ms": ms}
        if computed and ms > 0:
            timings |= {"prompt_per_token_ms": ms / computed, "prompt_per_second": computed / ms * 1000}

    def correct_event(self, event: bytes) -> bytes:
        """Return ``event`` with corrected numbers; the same bytes if it has none."""
        if not any(mark in event for mark in _CORRECTED):
            return event
        payload = data_of(event)
        if not isinstance(payload, dict) or not self.correct(payload):
            return event
        return event_of(payload, event)


def index_of(payload: Mapping[str, Any]) -> int:
    """Return the index of the answer to which an event belongs, 0 if the event has none. The ``n`` answers to the first
    prompt come first, then those to the second, and so on.
    """
    choices = payload.get("choices")
    part = choices[0] if isinstance(choices, list) and choices else payload
    index = part.get("index") if isinstance(part, dict) else None
    return index if isinstance(index, int) else 0
