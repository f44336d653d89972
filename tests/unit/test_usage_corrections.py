"""Numbers in an answer are put right where a part of the prompt was computed before its request."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaslot.formats import FORMATS
from llamaslot.http.stream_reader import Corrections, index_of
from llamaslot.scheduling.plan import PrefillStats

CORRECTIONS = Corrections(FORMATS["chat"], PrefillStats(n_reused=100, n_tokens=999, seconds=2.0))


def timings(cache: int, n: int, ms: float = 10.0) -> dict[str, Any]:
    return {"cache_n": cache, "prompt_n": n, "prompt_ms": ms, "prompt_per_token_ms": ms / n, "prompt_per_second": 1.0,
            "predicted_n": 7, "predicted_ms": 70.0}  # fmt: skip


def test_timings_tell_the_whole_request() -> None:
    """Reused is what was reused at first; computed and its time are the sum; the answer's own are left alone."""
    payload = {"timings": timings(999, 1)}
    assert CORRECTIONS.correct(payload)
    assert payload["timings"] == {
        "cache_n": 100,
        "prompt_n": 900,
        "prompt_ms": 2010.0,
        "prompt_per_token_ms": 2010 / 900,
        "prompt_per_second": 900 / 2010 * 1000,
        "predicted_n": 7,
        "predicted_ms": 70.0,
    }


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(1, 100), st.floats(0, 100))
def test_the_number_of_prompt_tokens_never_changes(reused: int, cache: int, n: int, seconds: float) -> None:
    """Only what is counted as reused and what as computed; never more reused than the server itself said."""
    payload = {"timings": timings(cache, n)}
    Corrections(FORMATS["native-completion"], PrefillStats(reused, cache, seconds)).correct(payload)
    numbers = payload["timings"]
    assert numbers["cache_n"] + numbers["prompt_n"] == cache + n
    assert numbers["cache_n"] == min(reused, cache)
    assert numbers["prompt_ms"] >= 10.0


def test_usage_tells_what_was_reused_at_first() -> None:
    """``cached_tokens`` is what OpenAI clients show; the totals are right already."""
    usage = {"prompt_tokens": 1000, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 999}}
    payload = {"choices": [], "usage": usage}
    assert CORRECTIONS.correct(payload)
    assert usage == {
        "prompt_tokens": 1000,
        "completion_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 100},
    }


def test_progress_tells_what_was_reused_at_first() -> None:
    """``processed`` and ``total`` count from the beginning already."""
    payload = {"prompt_progress": {"total": 1000, "cache": 999, "processed": 1000, "time_ms": 5}}
    assert CORRECTIONS.correct(payload)
    assert payload["prompt_progress"] == {"total": 1000, "cache": 100, "processed": 1000, "time_ms": 2005}


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n',
        b'data:  {"spaced":   true}\n\n',
        b"data: [DONE]\n\n",
        b': "timings"\n\n',
        b'data: {"content":"\\"timings\\""}\n\n',
        b'data: {"timings": {broken\n\n',
        b'data: {"timings": null, "usage": null}\n\n',
        b'data: {"usage": {"prompt_tokens": 5}}\n\n',
        b'data: [{"timings": {}}]\n\n',
    ],
)
def test_events_without_numbers_keep_their_bytes(event: bytes) -> None:
    """Also those that only look as if."""
    assert CORRECTIONS.correct_event(event) == event


def test_answers_to_further_prompts_are_left_alone() -> None:
    """The work before was for the first prompt: its ``n`` answers go on from it, the others have done theirs."""
    corrections = Corrections(FORMATS["chat"], PrefillStats(100, 999, 2.0, n_answers=2))
    for index, is_corrected in enumerate([True, True, False]):
        for payload in ({"index": index, "timings": timings(999, 1)},
                        {"choices": [{"index": index}], "timings": timings(999, 1)}):  # fmt: skip
            assert corrections.correct(payload) is is_corrected
            assert (payload["timings"]["prompt_n"] == 900) is is_corrected  # type: ignore[index]


@pytest.mark.parametrize(
    ("payload", "index"),
    [
        ({}, 0),
        ({"index": 2}, 2),
        ({"choices": []}, 0),
        ({"choices": [{"index": 3}]}, 3),
        ({"choices": ["x"]}, 0),
        ({"index": "2"}, 0),
    ],
)
def test_which_answer_an_event_is_about(payload: dict[str, Any], index: int) -> None:
    """The native format says it at the root, OpenAI's in the choice."""
    assert index_of(payload) == index
