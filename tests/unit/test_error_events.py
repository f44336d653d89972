"""An error in a stream: which words it gets for the clients of each format."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from llamaslot.errors import (
    BackendDown,
    LlamaslotError,
    PromptTooLong,
    QueueFull,
    TooManyRequests,
    UpstreamError,
)
from llamaslot.formats import FORMATS
from llamaslot.formats.base import ErrorEvents, translated_all
from llamaslot.llama.sse import event_of, n_commented, without_empty_events

TOO_LONG = PromptTooLong(9000, 8192)
REFUSED = UpstreamError(400, b'{"error":{"code":400,"message":"no","type":"invalid_request_error"}}')
BROKEN = UpstreamError(500, b"<html>")
BUSY, MANY, DOWN = QueueFull("wait", 5), TooManyRequests("yours", 5), BackendDown("away")


def told(kind: Any, error: LlamaslotError) -> dict[str, Any]:
    errors = FORMATS[kind].errors("req-1") if kind else ErrorEvents("req-1")
    name, _, data = errors.event(error.inner).decode().removesuffix("\n\n").rpartition("data: ")
    payload: dict[str, Any] = orjson.loads(data)
    assert name == (f"event: {payload['type']}\n" if "type" in payload else "")
    return payload


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TOO_LONG, "context_length_exceeded"),
        (REFUSED, "invalid_prompt"),
        (MANY, "rate_limit_exceeded"),
        (BUSY, "server_error"),
        (DOWN, "server_error"),
        (BROKEN, "server_error"),
        (LlamaslotError("a mistake"), "server_error"),
    ],
    ids=str,
)
def test_a_failed_response_tells_whether_to_ask_again(error: LlamaslotError, code: str) -> None:
    """By its ``code``, a string; the usual error stands beside it."""
    payload = told("responses", error)
    assert payload["response"]["error"] == {"code": code, "message": error.inner["message"]}
    assert payload["response"]["id"] == "resp_req-1"
    assert payload["error"] == error.inner


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TOO_LONG, "invalid_request_error"),
        (REFUSED, "invalid_request_error"),
        (MANY, "rate_limit_error"),
        (BUSY, "overloaded_error"),
        (BROKEN, "api_error"),
    ],
    ids=str,
)
def test_an_error_of_messages_has_a_type_of_anthropics(error: LlamaslotError, kind: str) -> None:
    payload = told("messages", error)
    assert payload["type"] == "error"
    assert payload["error"] == {**error.inner, "type": kind}


@pytest.mark.parametrize("kind", ["chat", "openai-completion", "native-completion", "infill", None])
def test_others_are_told_as_llama_server_does_it(kind: Any) -> None:
    assert told(kind, TOO_LONG) == TOO_LONG.body()
    assert told(kind, REFUSED) == orjson.loads(REFUSED.payload)


def test_a_failed_response_goes_on_from_what_the_client_was_told() -> None:
    """Its id, and the next number where the events have numbers."""
    errors = FORMATS["responses"].errors("req-1")
    created = {"type": "response.created", "response": {"id": "resp_x", "model": "m"}, "sequence_number": 0}
    errors.saw(event_of(created, b"event: response.created\n"))
    errors.saw(event_of({"type": "response.output_text.delta", "sequence_number": 6}))
    payload = orjson.loads(errors.event(DOWN.inner).partition(b"data: ")[2])
    assert (payload["response"]["id"], payload["response"]["model"]) == ("resp_x", "m")
    assert payload["sequence_number"] == 7


@pytest.mark.parametrize(
    ("kind", "event", "name"),
    [
        (
            "messages",
            b'event: error\ndata: {"code":500,"message":"no","type":"server_error"}\n\n',
            b"event: error\n",
        ),
        (
            "messages",
            b'event: error\ndata: {"error":{"code":500,"message":"no","type":"x"}}\n\n',
            b"event: error\n",
        ),
        (
            "responses",
            b'data: {"error":{"code":500,"message":"no","type":"x"}}\n\n',
            b"event: response.failed\n",
        ),
    ],
)
def test_llama_servers_own_errors_are_put_into_these_words(kind: Any, event: bytes, name: bytes) -> None:
    """Wherever they stand among other events."""
    other = b'event: other\ndata: {"text":"error"}\n\n'
    said = translated_all(FORMATS[kind].errors(""), other + event + other)
    assert said.startswith(other + name)
    assert said.endswith(b"\n\n" + other)
    payload = orjson.loads(said.removeprefix(other).removesuffix(other).partition(b"data: ")[2])
    assert payload["error"]["message"] == "no"
    assert payload["type"] in ("error", "response.failed")
    assert translated_all(FORMATS["chat"].errors(""), event) == event


def test_comments_that_stand_alone_lose_their_blank_line() -> None:
    """And nothing else does."""
    data = b'data: {"a": ": b\\n\\n: c"}\n\n'
    for comment in (b":\n", b": ping\n", b": one\n: two\n"):
        assert without_empty_events(comment + b"\n") == comment
        assert without_empty_events(data + comment + b"\n" + data) == data + comment + data
        assert without_empty_events(2 * (comment + b"\n") + data) == 2 * comment + data
        assert n_commented(comment + data) == len(comment)
    assert without_empty_events(data) == data
    assert n_commented(data) == 0
