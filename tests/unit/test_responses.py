"""Bodies of /v1/responses become the chat bodies that llama-server makes of them. Really so: real/test_conversions."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from llamaslot.errors import PromptNotTokenizable
from llamaslot.formats.responses import chat_body

HI = {"role": "user", "content": [{"text": "hi", "type": "text"}]}
CALL = {
    "type": "function_call",
    "id": "fc",
    "call_id": "c1",
    "name": "look",
    "arguments": '{"b": 1,  "a":1.50}',
}
CALLED = {"function": {"arguments": '{"b": 1,  "a":1.50}', "name": "look"}, "id": "c1", "type": "function"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "r"}
THOUGHT = {
    "type": "reasoning",
    "summary": [],
    "content": [{"type": "reasoning_text", "text": "hm"}, {"text": "x"}],
}


def said(*parts: Any, **fields: Any) -> dict[str, Any]:
    """An item of the assistant's."""
    content = [{"type": "output_text", "text": part, "annotations": []} for part in parts]
    return {"type": "message", "role": "assistant", "status": "completed", "content": content, **fields}


def texts(*parts: str) -> list[dict[str, Any]]:
    return [{"text": part, "type": "text"} for part in parts]


def messages_of(body: dict[str, Any]) -> Any:
    """The messages of its chat body, which alone is made: the body stays as it is."""
    before = deepcopy(body)
    made = chat_body(body)
    assert body == before
    return made["messages"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("hi", [{"role": "user", "content": "hi"}]),
        ([], []),
        ([{"role": "user", "content": "hi"}], [HI]),
        ([{"role": "developer", "content": "d"}], [{"role": "developer", "content": texts("d")}]),
        (
            [
                {
                    "type": "message",
                    "status": "completed",
                    "id": "m",
                    "role": "system",
                    "content": [
                        {"type": "input_text", "text": "a", "x": 1},
                        {"type": "input_text", "text": "b"},
                    ],
                }
            ],
            [{"id": "m", "role": "system", "content": texts("a", "b")}],
        ),
        ([said("ok", id="m")], [{"id": "m", "role": "assistant", "content": texts("ok")}]),
        ([said(content="ok")], [{"role": "assistant", "content": texts("ok")}]),
        ([said(content=None)], [{"role": "assistant", "content": []}]),
        ([said("a", "b"), said("c")], [{"role": "assistant", "content": texts("a", "b", "c")}]),
        ([CALL], [{"role": "assistant", "tool_calls": [CALLED]}]),
        (
            [CALL, {**CALL, "call_id": "c2"}, OUTPUT],
            [
                {"role": "assistant", "tool_calls": [CALLED, {**CALLED, "id": "c2"}]},
                {"content": "r", "role": "tool", "tool_call_id": "c1"},
            ],
        ),
        (  # all that the assistant did in a turn, in any order
            [THOUGHT, said("ok"), CALL],
            [
                {
                    "role": "assistant",
                    "content": texts("ok"),
                    "reasoning_content": "hm",
                    "tool_calls": [CALLED],
                }
            ],
        ),
        (
            [CALL, said("ok"), THOUGHT],
            [
                {
                    "role": "assistant",
                    "tool_calls": [CALLED],
                    "content": texts("ok"),
                    "reasoning_content": "hm",
                }
            ],
        ),
        ([THOUGHT], [{"role": "assistant", "content": [], "reasoning_content": "hm"}]),
        (
            [{**OUTPUT, "output": [{"type": "input_text", "text": "a", "x": 1}]}],
            [{"content": [{"type": "text", "text": "a", "x": 1}], "role": "tool", "tool_call_id": "c1"}],
        ),
    ],
)
def test_input(given: Any, expected: list[Any]) -> None:
    """Items become messages; those of the assistant that follow each other, one."""
    assert messages_of({"input": given}) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"instructions": "Be kind."}, "Be kind."),
        ({"instructions": ""}, ""),
        ({"instructions": None}, ""),
    ],
)
def test_instructions(fields: dict[str, Any], expected: str) -> None:
    """A system message before the others; null makes one too."""
    assert messages_of({"input": [], **fields}) == [{"role": "system", "content": expected}]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tools": []}, {}),
        ({"tools": [{"type": "web_search"}, {"type": "custom", "name": "x"}]}, {}),
        (
            {
                "tools": [
                    {"type": "custom"},
                    {"type": "function", "name": "f", "parameters": {"b": 1, "a": 2}},
                ]
            },
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"b": 1, "a": 2}, "strict": True},
                    }
                ]
            },
        ),
        (
            {"tools": [{"strict": None, "name": "f", "type": "function"}]},
            {"tools": [{"type": "function", "function": {"strict": None, "name": "f"}}]},
        ),
        ({"tool_choice": "required"}, {"tool_choice": "required"}),
        ({"tool_choice": {"type": "function"}}, {"tool_choice": {"type": "function"}}),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, {"reasoning_effort": "low"}),
        ({"reasoning": {"effort": None}, "reasoning_effort": "low"}, {"reasoning_effort": None}),
        ({"reasoning": {}, "reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        ({"reasoning": None}, {}),
        ({"max_output_tokens": 5, "max_tokens": 6}, {"max_tokens": 5}),
        ({"previous_response_id": None}, {"previous_response_id": None}),
        ({"messages": [HI]}, {}),
    ],
)
def test_fields_that_are_converted(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    """Tools, their schemas with the keys in the order that they came in; effort; the length of the answer."""
    made = chat_body({"input": [], **fields})
    assert made == {"messages": [], **expected}
    assert str(made.get("tools")) == str(expected.get("tools"))


def test_all_other_fields_are_kept() -> None:
    """Among them those that decide about slot and cache, and those that templates show."""
    fields = {
        "model": "m",
        "id_slot": 1,
        "cache_prompt": False,
        "return_progress": True,
        "lora": [],
        "n": 2,
        "response_format": {"type": "json_object"},
        "chat_template_kwargs": {"x": 1},
        "text": {"format": {"type": "json_schema"}},
        "add_generation_prompt": False,
    }
    assert chat_body({"input": [], **fields}) == {"messages": [], **fields}


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({}, "input"),
        ({"input": {"role": "user", "content": "hi"}}, "input"),
        ({"input": ["hi"]}, "object"),
        ({"input": "hi", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "hi", "instructions": [{"type": "input_text"}]}, "instructions"),
        ({"input": "hi", "tools": None}, "tools"),
        ({"input": "hi", "tools": ["x"]}, "tool"),
        ({"input": [{"role": "assistant", "content": "ok"}]}, "assistant"),
        ({"input": [{"role": "user"}]}, "content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "image_url"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input_text"),
        ({"input": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "input_text"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "text"),
        ({"input": [said(content=[{"type": "refusal", "refusal": "no"}])]}, "output_text"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        ({"input": [{"type": "custom_tool_call", "call_id": "c"}]}, "custom_tool_call"),
        ({"input": [{**CALL, "arguments": {}}]}, "arguments"),
        ({"input": [{**OUTPUT, "output": [{"type": "input_image"}]}]}, "input_text"),
        ({"input": [{**OUTPUT, "output": None}]}, "content"),
        ({"input": [{**THOUGHT, "content": []}]}, "reasoning"),
        ({"input": [{**THOUGHT, "content": None, "encrypted_content": "x"}]}, "reasoning"),
        ({"input": [{**THOUGHT, "content": ["hm"]}]}, "reasoning"),
        ({"input": [{**THOUGHT, "summary": None}]}, "reasoning"),
    ],
)
def test_what_is_not_known_to_render_alike(body: dict[str, Any], why: str) -> None:
    """Says what it was."""
    with pytest.raises(PromptNotTokenizable, match=why):
        chat_body(body)
