"""Bodies of which a conversion was wrong are known by what they are made of."""

from __future__ import annotations

from typing import Any

import pytest

from llamaslot.llama.shapes import WrongShapes, shape_of


def asked(*parts: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}], **more}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


CALL = {"type": "tool_use", "id": "x", "name": "read", "input": {"path": "/a"}}


def test_what_is_said_makes_no_difference() -> None:
    """Neither texts, nor how many of them, nor what a call is given, nor how a tool is described."""
    tool = {"name": "read", "input_schema": {"properties": {"path": {"type": "string"}}}}
    other = {"name": "list", "input_schema": {"properties": {"n": {"type": "integer"}}}}
    assert shape_of(asked(text("a"), CALL, tools=[tool])) == shape_of(
        asked(text("b"), text("c"), {**CALL, "input": {"n": 1}}, tools=[other])
    )


def test_kinds_of_parts_and_fields_do() -> None:
    """Each for itself."""
    shapes = [
        asked(text("a")),
        asked(text("a"), CALL),
        asked({**text("a"), "cache_control": {}}),
        asked(text("a"), system="x"),
    ]
    assert len({shape_of(body) for body in shapes}) == len(shapes)
    assert shape_of({"input": [{"role": "user", "content": "x"}]}) != shape_of({"input": "x"})


@pytest.mark.timeout(20)
def test_a_type_that_is_no_name_is_looked_at_once() -> None:
    """However deep it is and whatever is in it: written out at each of 250 levels this would take a minute."""
    body: dict[str, Any] = {"a": ["x" * 1000] * 20_000}
    for _ in range(250):
        body = {"type": body}
    assert shape_of(body) == {(" ", "type"), (" ", "a")}


def test_wrong_ones_are_known_until_the_server_is_another() -> None:
    """The last 256 of them."""
    wrong = WrongShapes()
    assert not wrong.has(asked(text("a")))
    wrong.add(asked(text("a")))
    assert wrong.has(asked(text("b")))
    assert not wrong.has(asked(text("b"), CALL))
    for n in range(256):
        wrong.add({f"field {n}": 1})
    assert not wrong.has(asked(text("a")))
    assert wrong.has({"field 0": 2})
    wrong.forget()
    assert not wrong.has({"field 0": 2})
