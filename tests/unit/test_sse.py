"""Events are cut and put together without touching what need not be touched; numbers are put right."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaslot.llama.sse import EventSplitter, PrefillStats, comment, data_of, event_of, index_of, n_whole

EVENTS = [
    b'data: {"content":"a"}\n\n',
    b": a comment\n\n",
    b'event: message_start\ndata: {"type":"message_start"}\n\n',
    b'data: {"content":"two\\n\\nlines"}\n\n',
    'data: {"content":"ä€𝄞"}\n\n'.encode(),
    b"data: one\ndata: two\n\n",
    b'data: {"content":"b"}\r\n\r\n',
    b"data: [DONE]\n\n",
    b"\n\n",
]

pieces = st.lists(st.sampled_from(EVENTS), max_size=8)
cuts = st.lists(st.integers(0, 250), max_size=12)


def chunks(data: bytes, at: list[int]) -> list[bytes]:
    ends = sorted({0, *(min(n, len(data)) for n in at), len(data)})
    return [data[start:end] for start, end in itertools.pairwise(ends)]


@given(pieces, cuts, st.sampled_from([b"", b"data: {", b": no end\n", b"\n"]))
def test_events_come_out_whole_however_the_bytes_are_cut(
    events: list[bytes], at: list[int], rest: bytes
) -> None:
    """Every event once, in order, none before its blank line; what follows the last one stays."""
    splitter = EventSplitter()
    data = b"".join(events) + rest
    found: list[bytes] = []
    for chunk in chunks(data, at):
        found += splitter.feed(chunk)
    assert b"".join(found) + splitter.rest == data
    assert all(event.endswith((b"\n\n", b"\r\n\r\n")) for event in found)
    one_piece = EventSplitter()
    assert one_piece.feed(data) == found
    assert one_piece.rest == splitter.rest


class _Searched(bytearray):
    """Counts the bytes in which something was looked for."""

    n = 0

    def find(self, *given: Any) -> int:
        self.n += len(self) - (given[1] if len(given) > 1 else 0)
        return super().find(*given)


def test_nothing_is_searched_twice() -> None:
    """An event in many chunks costs as much as one in a single chunk, for each kind of line end."""
    splitter, searched = EventSplitter(), _Searched()
    splitter._rest = searched
    for _ in range(100):
        assert splitter.feed(b"x" * 1000) == []
    assert len(splitter.feed(b"\n\n")) == 1
    assert searched.n < 3 * 100_000


@given(pieces)
def test_bytes_one_by_one_give_the_same_events(events: list[bytes]) -> None:
    """The smallest chunks there are: a blank line may arrive in four of them."""
    splitter = EventSplitter()
    found = [event for byte in b"".join(events) for event in splitter.feed(bytes([byte]))]
    assert found == EventSplitter().feed(b"".join(events))


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b'data: {"a": 1}\n\n', {"a": 1}),
        (b'data:{"a": 1}\r\n\r\n', {"a": 1}),
        (b'event: x\ndata: {"a":\ndata: 1}\n\n', {"a": 1}),
        (b"data: [DONE]\n\n", None),
        (b": comment\n\n", None),
        (b"data: null\n\n", None),
        (b"data: {broken\n\n", None),
        (b"", None),
    ],
)
def test_data_of_an_event(event: bytes, data: Any) -> None:
    """Several data lines are one value; what is no JSON is no value."""
    assert data_of(event) == data


@given(
    st.dictionaries(st.text(), st.integers() | st.text(), max_size=4).filter(
        lambda d: all(not isinstance(v, int) or abs(v) < 2**63 for v in d.values())
    )
)
def test_an_event_made_here_is_one_event_and_reads_back(payload: dict[str, Any]) -> None:
    """Line ends in strings are escaped by JSON."""
    event = event_of(payload)
    assert EventSplitter().feed(event) == [event]
    assert data_of(event) == payload


def test_a_comment_is_an_event_without_data() -> None:
    """Clients skip it."""
    assert comment("queued 2") == b": queued 2\n"
    assert data_of(comment("queued 2")) is None


EARLIER = PrefillStats(n_reused=100, n_tokens=999, seconds=2.0)


def timings(cache: int, n: int, ms: float = 10.0) -> dict[str, Any]:
    return {"cache_n": cache, "prompt_n": n, "prompt_ms": ms, "prompt_per_token_ms": ms / n, "prompt_per_second": 1.0,
            "predicted_n": 7, "predicted_ms": 70.0}  # fmt: skip


def test_timings_tell_the_whole_request() -> None:
    """Reused is what was reused at first; computed and its time are the sum; the answer's own are left alone."""
    payload = {"timings": timings(999, 1)}
    assert EARLIER.correct(payload)
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
    PrefillStats(reused, cache, seconds).correct(payload)
    numbers = payload["timings"]
    assert numbers["cache_n"] + numbers["prompt_n"] == cache + n
    assert numbers["cache_n"] == min(reused, cache)
    assert numbers["prompt_ms"] >= 10.0


def test_usage_tells_what_was_reused_at_first() -> None:
    """``cached_tokens`` is what OpenAI clients show; the totals are right already."""
    usage = {"prompt_tokens": 1000, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 999}}
    payload = {"choices": [], "usage": usage}
    assert EARLIER.correct(payload)
    assert usage == {
        "prompt_tokens": 1000,
        "completion_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 100},
    }


def test_progress_tells_what_was_reused_at_first() -> None:
    """``processed`` and ``total`` count from the beginning already."""
    payload = {"prompt_progress": {"total": 1000, "cache": 999, "processed": 1000, "time_ms": 5}}
    assert EARLIER.correct(payload)
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
    assert EARLIER.correct_event(event) == event


def test_answers_to_further_prompts_are_left_alone() -> None:
    """The work before was for the first prompt: its ``n`` answers go on from it, the others have done theirs."""
    prefill_stats = PrefillStats(100, 999, 2.0, n_answers=2)
    for index, is_corrected in enumerate([True, True, False]):
        for payload in ({"index": index, "timings": timings(999, 1)},
                        {"choices": [{"index": index}], "timings": timings(999, 1)}):  # fmt: skip
            assert prefill_stats.correct(payload) is is_corrected
            assert (payload["timings"]["prompt_n"] == 900) is is_corrected  # type: ignore[index, call-overload]


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


@pytest.mark.parametrize(
    ("data", "n"),
    [(b"", 0), (b"data: 1\n", 0), (b"data: 1\n\n", 9), (b"data: 1\n\ndata", 9), (b"a\n\nb\r\n\r\nc", 8)],
)
def test_how_much_of_a_stream_is_whole_events(data: bytes, n: int) -> None:
    """Up to the last blank line, however lines end."""
    assert n_whole(data) == n
