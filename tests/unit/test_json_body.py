"""Bodies are parsed once; faults are said."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaslot.errors import BadRequest
from llamaslot.http.request_body import parse_object, read_object, written
from tests.support.turns import with_turns


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"{", "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"[1]", "JSON object"),
        (b'"text"', "JSON object"),
        (b"null", "JSON object"),
        (b"[" * 2000, "more than 254 levels deep"),
    ],
)
def test_what_is_no_object_is_refused(raw: bytes, said: str) -> None:
    """With what is wrong, as a 400 of the OpenAI shape."""
    with pytest.raises(BadRequest, match=said) as caught:
        parse_object(raw)
    assert caught.value.status == 400
    assert caught.value.body()["error"]["type"] == "invalid_request_error"


def test_an_object_is_read() -> None:
    """Unknown fields included: they are llama-server's business."""
    assert parse_object(b' {"a": [1, {"b": null}]}\n') == {"a": [1, {"b": None}]}


@given(st.binary(max_size=60))
def test_no_bytes_raise_anything_else(raw: bytes) -> None:
    """Whatever a client sends."""
    try:
        parsed: Any = parse_object(raw)
    except BadRequest:
        return
    assert isinstance(parsed, dict)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"messages": [' + b'{"role": "user", "content": "a"},' * 60_000 + b"{}]}",
        b'{"messages": [{"content": [' + b'"a",' * 200_000 + b'"a"]}]}',
        b'{"prompt": [' + b"[1]," * 200_000 + b"[1]]}",
        b'{"prompt": [' + b'1,"a",' * 100_000 + b"1]}",
        b'{"prompt": [' + b"1," * 4_000_001 + b"1]}",
        b'{"x": [' + b"[]," * 1_000_001 + b"1]}",
        b'{"x": [' + b"1," * 8_000_001 + b"1]}",
    ],
    ids=["messages", "texts", "prompts", "mixed", "tokens", "brackets", "commas"],
)
def test_too_many_items_are_refused(raw: bytes) -> None:
    """All of them would be looked at, and nobody else served meanwhile."""
    with pytest.raises(BadRequest, match="too many parts"):
        parse_object(raw)


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"prompt": list(range(1_000_000))},
        lambda: {"prompt": "x", "logit_bias": [[n, -100] for n in range(150_000)]},
        lambda: {"prompt": "{[,]}" * 200_000},
        lambda: {
            "messages": [{"role": "user", "content": "a"}] * 25_000,
            "tools": [{"a": {"b": {}}}] * 5_000,
        },
    ],
    ids=["tokens", "bias", "text", "messages"],
)
def test_many_items_are_read(make: Callable[[], dict[str, Any]]) -> None:
    """Token ids, and what llamaslot does not look at."""
    body = make()
    assert parse_object(orjson.dumps(body)) == body


async def test_other_tasks_run_between_the_steps_with_a_long_body() -> None:
    """Else 16 MiB would hold up all streams for 50 ms; with a short one none runs, as that would cost it time."""
    n_turns = list[int]()
    for n_chars in (100, 1 << 20):
        body = {"prompt": "a" * n_chars}
        read, n = await with_turns(read_object(orjson.dumps(body)))
        assert read == body
        n_turns.append(n)
    assert n_turns == [0, 3]
    with pytest.raises(BadRequest, match="not valid JSON"):
        await read_object(b"{" * 5)


KEYS = st.sampled_from(["messages", "tools", "x"])


@settings(max_examples=15)
@given(KEYS, st.lists(st.booleans(), min_size=250, max_size=256), st.sampled_from([b"1", b"[]", b'{"a": 1}']))
def test_what_is_too_deep_is_what_cannot_be_written(key: str, shape: list[bool], inner: bytes) -> None:
    """In whatever field, of whatever mixture of lists and objects."""
    raw = inner
    for is_list in shape:
        raw = b"[0, %b]" % raw if is_list else b'{"a": [], "b": %b}' % raw
    raw = b'{"model": "m", "%b": %b}' % (key.encode(), raw)
    body = orjson.loads(raw)
    try:
        orjson.dumps(body)
    except TypeError:
        with pytest.raises(BadRequest, match="levels deep"):
            parse_object(raw)
    else:
        assert parse_object(raw) == body


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
SWITCHES = ("id_slot", "stream", "cache_prompt", "return_progress")
VALUES = st.sampled_from([True, False, None, 3])
OBJECTS = st.dictionaries(st.sampled_from(["model", "messages", "x", *SWITCHES]), JSON | VALUES)
STYLES = st.sampled_from(
    [
        {},
        {"ensure_ascii": False},
        {"indent": 2},
        {"separators": (",", ":")},
        {"separators": (" ,\t", " :\r\n")},
    ]
)


@given(
    OBJECTS, STYLES, st.sampled_from([b"", b"\xef\xbb\xbf"]), st.sampled_from(["", " \r\n\t"]),
    st.dictionaries(st.sampled_from(SWITCHES), VALUES), st.sets(st.sampled_from(["x", "stream"])),
)  # fmt: skip
def test_a_body_with_more_fields_is_written_as_if_anew(
    given_: dict[str, Any],
    style: dict[str, Any],
    mark: bytes,
    blank: str,
    added: dict[str, Any],
    removed: set[str],
) -> None:
    """However the client has written it: the same object comes out, with each name once, so that no reader of it can
    see another value than the one that is meant. What only grows keeps the client's own bytes.
    """
    raw = mark + (blank + json.dumps(given_, **style) + blank).encode()
    body = parse_object(raw)
    wanted = {name: value for name, value in body.items() if name not in removed} | added
    out = written(wanted, body, raw)
    pairs: list[tuple[str, Any]] = json.loads(out, object_pairs_hook=lambda pairs: pairs)
    assert len(dict(pairs)) == len(pairs)
    assert parse_object(out) == wanted
    if body and body.keys() <= wanted.keys() and all(wanted[name] is body[name] for name in body):
        assert out.startswith(raw.removeprefix(mark).rstrip()[:-1])


def test_names_that_a_client_has_sent_twice_stay() -> None:
    """llama-server reads the last one, as here. What llamaslot changes is written once."""
    raw = b'{"stream": false, "prompt": "a", "stream": true}'
    body = parse_object(raw)
    assert written({**body, "id_slot": 1}, body, raw) == raw[:-1] + b',"id_slot":1}'
    changed = {**body, "stream": False}
    assert written(changed, body, raw) == orjson.dumps(changed)
