"""Events are cut and put together without touching what need not be touched."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaslot.llama.sse import EventSplitter, comment, data_of, event_of, n_whole

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


@pytest.mark.parametrize(
    ("data", "n"),
    [(b"", 0), (b"data: 1\n", 0), (b"data: 1\n\n", 9), (b"data: 1\n\ndata", 9), (b"a\n\nb\r\n\r\nc", 8)],
)
def test_how_much_of_a_stream_is_whole_events(data: bytes, n: int) -> None:
    """Up to the last blank line, however lines end."""
    assert n_whole(data) == n
