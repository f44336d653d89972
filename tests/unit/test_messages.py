"""Bodies of /v1/messages become the chat bodies that llama-server makes of them. Really so: real/test_conversions."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from llamaslot.errors import PromptNotTokenizable
from llamaslot.formats.messages import chat_body

HI = {"role": "user", "content": "hi"}
HEADER = "x-anthropic-billing-header: cc_version=2.1; cch="


def use(id_: str = "t1", **fields: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": id_, "name": "look", **fields}


def called(id_: str = "t1", arguments: Any = None) -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": "look", "arguments": arguments or {}}}


def result(content: Any, id_: str = "t1") -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": id_, "content": content}


def answered(content: str, id_: str = "t1") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id_, "content": content}


def text(content: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": content, **fields}


def messages_of(body: dict[str, Any]) -> Any:
    """The messages of its chat body, which alone is made: the body stays as it is."""
    before = deepcopy(body)
    made = chat_body(body)
    assert body == before
    return made["messages"]


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        (None, []),
        ("", [""]),
        ("Be kind.", ["Be kind."]),
        ([], [""]),
        ([text("Be "), text("kind.", cache_control={"type": "ephemeral"})], ["Be kind."]),
        (HEADER + "a5145;You", [HEADER + "fffff;You"]),
        ([text(HEADER + "a5145;"), text("You")], [HEADER + "fffff;You"]),
        ([text("You"), text(HEADER + "a5145;")], ["You" + HEADER + "fffff;"]),
        ([text("You. "), text("It says " + HEADER + "a5145;")], ["You. It says " + HEADER + "a5145;"]),
        (HEADER + "a5145; cch=b5145;", [HEADER + "fffff; cch=b5145;"]),  # the first only
        (HEADER + "a514;", [HEADER + "a514;"]),  # not five
        (HEADER + "a5145", [HEADER + "a5145"]),  # no end
        (HEADER + "üüa;", [HEADER + "fffff;"]),  # five bytes
        (HEADER + "üüabc;", [HEADER + "üüabc;"]),  # five characters
        ("x-anthropic-billing-header: cc_version=2.1;", ["x-anthropic-billing-header: cc_version=2.1;"]),
    ],
)
def test_system(system: Any, expected: list[str]) -> None:
    """One message of joined texts, without the stamp that Claude Code gives each request."""
    body = {"system": system, "messages": [HI]}
    assert messages_of(body) == [*({"role": "system", "content": content} for content in expected), HI]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([HI], [HI]),
        ([HI, {"role": "system", "content": "s"}], [HI, {"role": "system", "content": "s"}]),
        ([{**HI, "name": "x"}], [{**HI, "name": "x"}]),
        ([{"role": "user", "content": []}], []),
        ([{"role": "assistant"}, HI], [HI]),
        (
            [{"role": "user", "content": [text("a", cache_control={"type": "ephemeral"}), text("b")]}],
            [{"role": "user", "content": [text("a", cache_control={"type": "ephemeral"}), text("b")]}],
        ),
        (  # reasoning in several blocks, signatures and what is secret left out
            [
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "h", "signature": "s"},
                        {"type": "redacted_thinking", "data": "x"},
                        {"type": "thinking", "thinking": "m"},
                        text("ok"),
                    ],
                }
            ],
            [{"role": "assistant", "content": [text("ok")], "reasoning_content": "hm"}],
        ),
        (
            [{"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}]}],
            [{"role": "assistant", "content": "", "reasoning_content": "hm"}],
        ),
        ([{"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}], []),
        (
            [{"role": "assistant", "content": [use(input={"b": 1, "a": [1.5, "ü"]}), use("t2"), text("ok")]}],
            [
                {
                    "role": "assistant",
                    "content": [text("ok")],
                    "tool_calls": [called(arguments={"b": 1, "a": [1.5, "ü"]}), called("t2")],
                }
            ],
        ),
        (
            [{"role": "assistant", "content": [use(input={})]}],
            [{"role": "assistant", "content": "", "tool_calls": [called()]}],
        ),
        (  # what the user says moves in front of the results
            [{"role": "user", "content": [result("r1"), result("r2", "t2"), text("go")]}],
            [{"role": "user", "content": [text("go")]}, answered("r1"), answered("r2", "t2")],
        ),
        ([{"role": "user", "content": [{**result("no"), "is_error": True}]}], [answered("no")]),
        ([{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1"}]}], [answered("")]),
        (
            [{"role": "user", "content": [result([text("a"), {"type": "tool_reference"}, text("b")])]}],
            [answered("ab")],
        ),
    ],
)
def test_messages(given: list[Any], expected: list[Any]) -> None:
    """Blocks become one message, and one more for each tool result."""
    assert messages_of({"messages": given}) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tools": []}, {"tools": []}),
        ({"tools": None}, {}),
        (
            {
                "tools": [
                    {"name": "f", "description": "d", "input_schema": {"b": 1, "a": 2}, "cache_control": {}}
                ]
            },
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "description": "d", "parameters": {"b": 1, "a": 2}},
                    }
                ]
            },
        ),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 8}]},
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "web_search", "description": "", "parameters": {}},
                    }
                ]
            },
        ),
        ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, {"tool_choice": "auto"}),
        ({"tool_choice": {"type": "any"}}, {"tool_choice": "required"}),
        ({"tool_choice": {"type": "tool", "name": "f"}}, {"tool_choice": "required"}),
        ({"tool_choice": {"type": "none"}}, {}),
        ({"tool_choice": "any"}, {}),
        (
            {"chat_template_kwargs": {"enable_thinking": False}},
            {"chat_template_kwargs": {"enable_thinking": False}},
        ),
    ],
)
def test_fields_that_templates_show(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    """Tools, their schemas with the keys in the order that they came in; the choice among them; arguments."""
    made = chat_body({"messages": [HI], **fields})
    assert made == {"messages": [HI], **expected}
    assert str(made) == str({"messages": [HI], **expected})


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "m", "max_tokens": 10, "stream": True, "temperature": 1, "top_p": 1, "top_k": 1},
        {"stop_sequences": ["x"], "metadata": {"user_id": "u"}, "service_tier": "auto"},
        {"thinking": {"type": "enabled", "budget_tokens": 2000}},
        {"thinking": {"type": "disabled"}},
        {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}},
        {"id_slot": 1, "cache_prompt": False, "return_progress": True, "lora": [], "n": 2},
        {"response_format": {"type": "json_object"}, "json_schema": {}, "reasoning_effort": "low"},
    ],
)
def test_fields_that_change_no_prompt(fields: dict[str, Any]) -> None:
    """Dropped by llama-server, or nothing that a template sees."""
    assert chat_body({"messages": [HI], **fields}) == {"messages": [HI]}


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "role"),
        ({"messages": [{"content": "hi"}]}, "role"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "content"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "object"),
        ({"messages": [{"role": "user", "content": [{"text": "hi"}]}]}, "type"),
        ({"messages": [{"role": "user", "content": [text(5)]}]}, "text"),  # type: ignore[arg-type]
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "document"),
        ({"messages": [{"role": "assistant", "content": [{"type": "server_tool_use"}]}]}, "server_tool_use"),
        ({"messages": [{"role": "user", "content": [result([{"type": "image"}])]}]}, "image"),
        ({"messages": [{"role": "user", "content": [result([{"type": "document"}])]}]}, "document"),
        ({"messages": [{"role": "user", "content": [result(5)]}]}, "result"),
        ({"messages": [{"role": "assistant", "content": [use(input="x")]}]}, "input"),
        ({"messages": [{"role": "assistant", "content": [use(5)]}]}, "id"),  # type: ignore[arg-type]
        ({"messages": [HI], "system": 5}, "system"),
        ({"messages": [HI], "system": ["x"]}, "object"),
        ({"messages": [HI], "system": [{"type": "image"}]}, "system"),
        ({"messages": [HI], "tools": ["x"]}, "tool"),
        ({"messages": [HI], "tools": [{"name": 5}]}, "name"),
        ({"messages": [HI], "tool_choice": {"type": ["any"]}}, "type"),
    ],
)
def test_what_is_not_known_to_render_alike(body: dict[str, Any], why: str) -> None:
    """Says what it was."""
    with pytest.raises(PromptNotTokenizable, match=why):
        chat_body(body)
