"""Requests that may be sent on as streams, and answers put together from events, without a server."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from llamaslot.errors import UpstreamError
from llamaslot.formats import FORMATS
from llamaslot.formats.stream_to_json import Assembly, Doubt, Incomplete

CHAT: Any = {"messages": [{"role": "user", "content": "Hello"}]}
HEAD: Any = {"created": 5, "id": "chatcmpl-1", "model": "m", "system_fingerprint": "b1"}
USAGE: Any = {"completion_tokens": 2, "prompt_tokens": 3, "total_tokens": 5}
TIMINGS: Any = {"cache_n": 2, "prompt_n": 1, "predicted_n": 2}


def chunk(delta: Any, n: int | None = None, *, index: int = 0, finish: str | None = None) -> dict[str, Any]:
    """An event of chat; ``n``: how many tokens there are by now."""
    event = {"choices": [{"finish_reason": finish, "index": index, "delta": delta}], **HEAD}
    event |= {"timings": {"predicted_n": n}} if n is not None else {}
    return event | {"object": "chat.completion.chunk"}


def totals(n: int = 2) -> dict[str, Any]:
    usage, timings = {**USAGE, "completion_tokens": n}, {**TIMINGS, "predicted_n": n}
    return {"choices": [], **HEAD, "object": "chat.completion.chunk", "usage": usage, "timings": timings}


def native(content: str, n: int, *, index: int = 0) -> dict[str, Any]:
    return {
        "index": index, "content": content, "tokens": [1], "stop": False, "id_slot": -1, "tokens_predicted": n,
        "tokens_evaluated": 3,
    }  # fmt: skip


def native_end(n: int, stop_type: str = "limit", *, index: int = 0) -> dict[str, Any]:
    event = native("", n, index=index) | {"tokens": [], "id_slot": 2, "stop": True, "stop_type": stop_type}
    return event | {"generation_settings": {"seed": 1, "stream": True}, "timings": TIMINGS}


def fed(kind: str, *events: dict[str, Any], **body: Any) -> Assembly:
    assembly = FORMATS[kind].assembly((CHAT if kind == "chat" else {"prompt": "Hello"}) | body)
    assert assembly is not None
    for event in events:
        assembly.feed(event)
    return assembly


# -- what may be sent as a stream --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("chat", CHAT),
        ("chat", CHAT | {"n": 2, "stop": ["x"], "tools": [], "max_tokens": 5}),
        ("chat", CHAT | {"stream": False, "logprobs": False, "stream_options": None, "unheard_of": None}),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]}),
        ("openai-completion", {"prompt": "Hello", "logprobs": 0, "echo": False}),
        ("openai-completion", {"prompt": ["Hello", [1, 2], ["a", 3]], "n": 2}),
        ("native-completion", {"prompt": [1, 2, 3], "response_fields": ["content", "timings/predicted_n"]}),
        ("native-completion", {"prompt": "Hello", "n_cmpl": 2, "timings_per_token": True}),
    ],
)
def test_what_the_stream_tells_in_full_may_be_assembled(kind: str, body: dict[str, Any]) -> None:
    """Nulls are absent fields, and switches that are off change nothing."""
    assert FORMATS[kind].can_assemble(body)


@pytest.mark.parametrize(
    "more",
    [
        {"unheard_of": 1},
        {"unheard_of": False},
        {"logprobs": True},
        {"n_probs": 1},
        {"top_logprobs": 2},
        {"verbose": True},
        {"n_indent": 2},
        {"return_tokens": True},
        {"stream_options": {"include_usage": True}},
        {"n": 0},
        {"n": "2"},
        {"n": True},
        {"n": 1.5},
        {"n": 2, "n_cmpl": 2},
        {"stream": 0},
        {"timings_per_token": "yes"},
        {"return_progress": 1},
    ],
    ids=lambda more: orjson.dumps(more).decode(),
)
@pytest.mark.parametrize("kind", ["chat", "openai-completion", "native-completion"])
def test_whatever_else_a_body_asks_passes_through(kind: str, more: dict[str, Any]) -> None:
    """What the stream lacks, what it changes, what is checked only without or only with it, and the unknown."""
    base: dict[str, Any] = CHAT if kind == "chat" else {"prompt": "Hello"}
    assert FORMATS[kind].can_assemble(base)
    assert not FORMATS[kind].can_assemble({**base, **more})


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": "Hello"},
        {"messages": ["Hello"]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": ["Hello"]}]},
        CHAT | {"reasoning_format": "deepseek-legacy"},
        CHAT | {"reasoning_format": 3},
        CHAT | {"response_fields": ["choices"]},
        CHAT | {"prompt": "Hello"},
    ],
)
def test_odd_chats_pass_through(body: dict[str, Any]) -> None:
    """Media, reasoning that a stream has elsewhere, and fields of the wrong kind."""
    assert not FORMATS["chat"].can_assemble(body)


@pytest.mark.parametrize(
    "prompt", [None, 5, [], [[]], [1.5], [True, 1], {"prompt_string": "x"}, ["a", {}], [["a"]]]
)
@pytest.mark.parametrize("kind", ["openai-completion", "native-completion"])
def test_odd_prompts_pass_through(kind: str, prompt: Any) -> None:
    """How many answers there would be is not certain, or they are media."""
    assert not FORMATS[kind].can_assemble({"prompt": prompt})


@pytest.mark.parametrize("fields", ["content", [1], [""], ["a/"], ["a//b"]])
def test_odd_fields_pass_through(fields: Any) -> None:
    """Where llama.cpp's way to split at slashes could be another than Python's."""
    assert not FORMATS["native-completion"].can_assemble({"prompt": "x", "response_fields": fields})


def test_the_streamed_body_asks_for_all_that_is_needed() -> None:
    """Beside what the client said, which stays as it is."""
    body = CHAT | {"max_tokens": 5, "stream": False}
    told = {"return_progress": True, "stream_options": {"include_usage": True}, "timings_per_token": True}
    assert FORMATS["chat"].streamed(body) == {**body, "stream": True, "echo": True, **told}
    assert body["stream"] is False
    assert FORMATS["openai-completion"].streamed({"prompt": "x"}) == {"prompt": "x", "stream": True, **told}
    chosen = {"prompt": "x", "response_fields": ["content"]}
    assert FORMATS["native-completion"].streamed(chosen) == {
        "prompt": "x",
        "stream": True,
        "return_progress": True,
    }


# -- answers -----------------------------------------------------------------------------------------------------


def test_a_chat_is_assembled() -> None:
    """Text, reasoning and calls in their places; the totals as they came, but for the object's name."""
    first, second = {"name": "f", "arguments": "{"}, {"name": "g", "arguments": ""}
    told = fed(
        "chat",
        chunk({"role": "assistant", "content": None}, 0) | {"prompt_progress": {"total": 3}},
        chunk({"role": "assistant", "content": None}),
        chunk({"reasoning_content": "h"}, 1),
        chunk({"reasoning_content": "m"}, 2),
        chunk({"content": "o"}, 3),
        chunk({"content": "k"}, 4),
        chunk({"tool_calls": [{"index": 0, "id": "a", "type": "function", "function": first}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]}, 5),
        chunk({"tool_calls": [{"index": 1, "id": "b", "type": "function", "function": second}]}),
        chunk({}, finish="tool_calls"),
        totals(7),
    )
    message = {
        "role": "assistant",
        "content": "ok",
        "reasoning_content": "hm",
        "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": "{}"}, "id": "a"},
            {"type": "function", "function": {"name": "g", "arguments": ""}, "id": "b"},
        ],
    }
    assert told.doubt is None
    assert told.answer() == {
        **totals(7),
        "choices": [{"finish_reason": "tool_calls", "index": 0, "message": message}],
        "object": "chat.completion",
    }


def test_text_that_comes_with_the_progress_is_part_of_the_answer() -> None:
    """What the template has begun is told before the first token."""
    begun = chunk({"content": "Well, "}, 0) | {"prompt_progress": {"total": 3}}
    told = fed("chat", begun, chunk({"content": "no"}, 1), chunk({}, finish="stop"), totals(2))
    assert told.answer()["choices"][0]["message"]["content"] == "Well, no"


def test_several_answers_stand_by_index_with_the_totals_of_the_first() -> None:
    """Whichever ends first."""
    ends = [chunk({}, index=1, finish="length"), totals(1), chunk({}, index=0, finish="stop"), totals(2)]
    told = fed("chat", chunk({"content": "b"}, 1, index=1), chunk({"content": "a"}, 2, index=0), *ends, n=2)
    answer = told.answer()
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["a", "b"]
    assert answer["usage"]["completion_tokens"] == 2


def test_a_native_answer_says_that_it_was_no_stream() -> None:
    """As it would have been told; the event itself stays as it is."""
    end = native_end(2)
    told = fed("native-completion", native("a", 1), native("b", 2), end)
    settings = {"seed": 1, "stream": False}
    assert told.answer() == {**end, "content": "ab", "generation_settings": settings}
    assert end["generation_settings"]["stream"] is True


def test_native_answers_to_several_prompts_are_a_list() -> None:
    """In the order of the prompts; to one prompt in a list it is no list (ran)."""
    events = [native("b", 1, index=1), native_end(1, index=1), native("a", 1), native_end(1)]
    assert [each["content"] for each in fed("native-completion", *events, prompt=["x", "y"]).answer()] == [
        "a",
        "b",
    ]
    assert fed("native-completion", *events[2:], prompt=["x"]).answer()["content"] == "a"


def test_fields_are_chosen_from_the_native_answer() -> None:
    """A slash goes into an object; what is missing, or is in no object, is left out."""
    fields = ["content", "timings/predicted_n", "timings/nothing", "content/x", "nothing"]
    told = fed("native-completion", native("a", 1), native_end(1), response_fields=fields)
    assert told.answer() == {"content": "a", "timings/predicted_n": 2}


# -- what may be wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "events",
    [
        [],
        [chunk({"content": "a"}, 1)],
        [chunk({"content": "a"}, 1), chunk({}, finish="stop")],  # without the totals
    ],
)
def test_a_stream_that_breaks_off_gives_no_answer(events: list[dict[str, Any]]) -> None:
    """Neither an answer nor a doubt about one."""
    told = fed("chat", *events)
    assert not told.is_complete
    with pytest.raises(Incomplete):
        told.answer()
    with pytest.raises(Incomplete):
        _ = told.doubt


def test_one_answer_of_two_is_not_complete() -> None:
    """For as many as prompts and ``n`` say."""
    told = fed("native-completion", native("a", 1), native_end(1), prompt=["x", "y"], n=2)
    with pytest.raises(Incomplete, match="1 of 4"):
        told.answer()


@pytest.mark.parametrize(("code", "status"), [(500, 500), (400, 400), ("x", 500), (None, 500), (200, 500)])
def test_an_error_event_is_the_servers_error(code: Any, status: int) -> None:
    """With its code as the status, and a body as it has without a stream."""
    error = {"code": code, "message": "no", "type": "server_error"}
    with pytest.raises(UpstreamError) as told:
        fed("chat", chunk({"content": "a"}, 1), {"error": error})
    assert told.value.status == status
    assert orjson.loads(told.value.payload) == {"error": error}


def test_the_end_of_a_cut_answer_may_be_missing() -> None:
    """Its last token was not told, or told as nothing: half a character, or what could become a stop word."""
    assert (
        fed("chat", chunk({"content": "a"}, 1), chunk({}, finish="length"), totals(2)).doubt
        is Doubt.HELD_BACK
    )
    assert fed("native-completion", native("a", 1), native_end(2)).doubt is Doubt.HELD_BACK
    assert fed("native-completion", native("a", 1), native("", 2), native_end(2)).doubt is Doubt.HELD_BACK
    assert fed("native-completion", native("a", 1), native_end(2, "eos")).doubt is Doubt.HELD_BACK
    assert fed("native-completion", native("a", 1), native("", 2), native_end(2, "eos")).doubt is None
    assert fed("chat", chunk({"content": "a"}, 1), chunk({}, finish="stop"), totals(2)).doubt is None


def test_the_role_is_not_the_first_token() -> None:
    """Its event comes with the first token, also where that is held back."""
    role = chunk({"role": "assistant", "content": None}, 1)
    assert fed("chat", role, chunk({}, finish="length"), totals(1)).doubt is Doubt.HELD_BACK


def test_an_empty_message_may_have_had_a_text() -> None:
    """That of one token did not: it was the end, or the stop word."""
    role, end = chunk({"role": "assistant", "content": None}), chunk({}, finish="stop")
    assert fed("chat", role, end, totals(2)).doubt is Doubt.UNPARSED
    assert fed("chat", role, end, totals(1)).doubt is None


@pytest.mark.parametrize(
    "event",
    [
        chunk({"content": "a"}, 1) | {"__verbose": {}},
        chunk({"content": "a", "refusal": "no"}, 1),
        {"choices": [{"finish_reason": None, "index": 0, "delta": {"content": "a"}, "logprobs": {}}]},
        chunk({"tool_calls": [{"index": 1, "function": {"arguments": "{"}}]}, 1),
        chunk({"tool_calls": [{"index": 0, "id": "a", "function": {"strange": "{"}}]}, 1),
        {"type": "response.created"},
        chunk({"content": 5}, 1),
    ],
)
def test_an_event_that_is_not_understood_makes_the_answer_doubtful(event: dict[str, Any]) -> None:
    """Whether or not the stream came to its end."""
    assert fed("chat", event).doubt is Doubt.UNKNOWN
    assert (
        fed("chat", event, chunk({"content": "b"}, 2), chunk({}, finish="stop"), totals()).doubt
        is Doubt.UNKNOWN
    )


def test_the_other_formats_are_as_wary() -> None:
    """Of keys that they do not know, and of events without those that they need."""
    assert fed("native-completion", native("a", 1) | {"logits": []}).doubt is Doubt.UNKNOWN
    assert fed("native-completion", {"content": "a"}).doubt is Doubt.UNKNOWN
    end = {key: value for key, value in native_end(1).items() if key != "generation_settings"}
    assert fed("native-completion", native("a", 1), end).doubt is Doubt.UNKNOWN
    text = {"text": "a", "index": 0, "logprobs": None, "finish_reason": None}
    assert fed("openai-completion", {"choices": [text], **HEAD}).doubt is Doubt.UNKNOWN  # no timings
    known = {"choices": [text], **HEAD, "object": "text_completion", "timings": {"predicted_n": 1}}
    end = known | {
        "choices": [{**text, "text": "", "finish_reason": "stop"}],
        "usage": {**USAGE, "completion_tokens": 1},
    }
    told = fed("openai-completion", known, end)
    assert told.doubt is None
    assert told.answer() == {**end, "choices": [{**text, "finish_reason": "stop"}]}
