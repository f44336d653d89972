"""Corrects the numbers in an answer where llamaslot has computed a part of the prompt before its request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamaslot.formats.base import Format
from llamaslot.llama.sse import data_of, event_of
from llamaslot.scheduling.plan import PrefillStats

_MARKS = (b'"timings"', b'"usage"', b'"prompt_progress"')


class Corrections:
    """For one answer in ``format_``. ``prefill_stats``: what was computed before its own request was sent."""

    def __init__(self, format_: Format, prefill_stats: PrefillStats) -> None:
        self._format, self._prefill_stats = format_, prefill_stats

    def correct(self, payload: dict[str, Any]) -> bool:
        """Correct the numbers of one JSON answer or event, in place. True if something was changed."""
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
        """The event with corrected numbers; the same bytes if it has none."""
        if not any(mark in event for mark in _MARKS):
            return event
        payload = data_of(event)
        if not isinstance(payload, dict) or not self.correct(payload):
            return event
        return event_of(payload, event)


def index_of(payload: Mapping[str, Any]) -> int:
    """The index of the answer that it belongs to: ``n`` for each prompt, prompt by prompt. 0 if it has none."""
    choices = payload.get("choices")
    part = choices[0] if isinstance(choices, list) and choices else payload
    index = part.get("index") if isinstance(part, dict) else None
    return index if isinstance(index, int) else 0
