"""Bodies of which a conversion was wrong are known by what they are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from llamaslot.fleet.model_context import ConversionChecks, shape_of


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
    conversion_checks = [
        asked(text("a")),
        asked(text("a"), CALL),
        asked({**text("a"), "cache_control": {}}),
        asked(text("a"), system="x"),
    ]
    assert len({shape_of(body) for body in conversion_checks}) == len(conversion_checks)
    assert shape_of({"input": [{"role": "user", "content": "x"}]}) != shape_of({"input": "x"})


@pytest.mark.timeout(20)
def test_a_type_that_is_no_name_is_looked_at_once() -> None:
    """However deep it is and whatever is in it: written out at each of 250 levels this would take a minute."""
    body: dict[str, Any] = {"a": ["x" * 1000] * 20_000}
    for _ in range(250):
        body = {"type": body}
    assert shape_of(body) == {(" ", "type"), (" ", "a")}


async def check(conversion_checks: ConversionChecks, body: dict[str, Any], n_tokens: int) -> bool:
    """As for a request: the server is asked about what is not known."""
    known = conversion_checks.known(body)
    return await conversion_checks.check(body, n_tokens) if known is None else known


class Counter:
    """llama-server's count of tokens: as many as there are messages, times ``n_each``."""

    def __init__(self) -> None:
        self.n_each, self.status, self.n_asked = 10, 200, 0

    async def ask(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        assert path == "/v1/messages/count_tokens"
        self.n_asked += 1
        return self.status, {
            "input_tokens": self.n_each * len(body["messages"])
        } if self.status == 200 else None


async def test_the_server_is_asked_once_for_each_shape() -> None:
    """Until it is another one."""
    counter = Counter()
    conversion_checks = ConversionChecks(counter.ask)
    assert await check(conversion_checks, asked(text("a")), 10)
    assert await check(conversion_checks, asked(text("b"), text("c")), 10)
    assert counter.n_asked == 1
    assert not await check(conversion_checks, asked(text("b"), CALL), 11)
    assert not await check(conversion_checks, asked(text("c"), CALL), 10)
    assert (conversion_checks.known(asked(CALL, text("d"))), conversion_checks.known(asked(text("d")))) == (
        False,
        True,
    )
    assert counter.n_asked == 2


async def test_what_the_server_does_not_count_is_not_known() -> None:
    """It refuses the body, as it will when it is asked to answer; only a build without the route says nothing by it."""
    counter = Counter()
    conversion_checks, body = ConversionChecks(counter.ask), asked(text("a"))
    for status in (400, 500):
        counter.status = status
        assert not await check(conversion_checks, body, 10)
    counter.status = 404
    assert await check(conversion_checks, body, 10)
    assert conversion_checks.known(body) is not False
    assert counter.n_asked == 3


def test_wrong_ones_are_known() -> None:
    """The last 1,024 shapes; once wrong is wrong."""
    conversion_checks = ConversionChecks(Counter().ask)
    assert conversion_checks.known(asked(text("a"))) is not False
    conversion_checks.learn(asked(text("a")), is_right=False)
    conversion_checks.learn(asked(text("a")), is_right=True)
    assert conversion_checks.known(asked(text("b"))) is False
    assert conversion_checks.known(asked(text("b"), CALL)) is not False
    for n in range(1024):
        conversion_checks.learn({f"field {n}": 1}, is_right=False)
    assert conversion_checks.known(asked(text("a"))) is not False
    assert conversion_checks.known({"field 0": 2}) is False
