"""Bodies are parsed once; faults are said."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaslot.errors import BadRequest
from llamaslot.http.json_body import parse_object


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
    "body",
    [
        {"prompt": list(range(1_000_000))},
        {"prompt": "x", "logit_bias": [[n, -100] for n in range(150_000)]},
        {"prompt": "{[,]}" * 200_000},
        {"messages": [{"role": "user", "content": "a"}] * 25_000, "tools": [{"a": {"b": {}}}] * 5_000},
    ],
    ids=["tokens", "bias", "text", "messages"],
)
def test_many_items_are_read(body: dict[str, Any]) -> None:
    """Token ids, and what llamaslot does not look at."""
    assert parse_object(orjson.dumps(body)) == body


KEYS = st.sampled_from(["messages", "tools", "x"])


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
