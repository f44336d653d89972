"""Which message a place in a rendered prompt belongs to."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llamaslot.formats import FORMATS
from llamaslot.formats.prompt_location import whereabouts
from tests.support.fake_model import FakeModel

MODEL = FakeModel()
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"It can {name}.", "parameters": {}}}
    for name in ("read", "write")
]
CALL = {"id": "1", "type": "function", "function": {"name": "read", "arguments": "{}"}}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What is this?\n"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "A long text."},
    {"role": "assistant", "content": "It is a text."},
    {"role": "user", "content": [{"type": "text", "text": "Shorter,"}, {"type": "text", "text": "please."}]},
]


def at(wanted: str, body: dict[str, Any], kind: str = "chat") -> str:
    """What the first place where ``wanted`` stands in the prompt is said to belong to."""
    chat = FORMATS[kind].chat_body(body)
    assert chat is not None
    text = MODEL.render(dict(chat))
    return str(whereabouts(text, text.index(wanted), body, FORMATS[kind]))


@pytest.mark.parametrize(
    ("wanted", "where"),
    [
        ("Be brief", "system: message 0 (system)"),
        ("brief.", "system: message 0 (system)"),
        ("What is", "message 1 (user)"),
        ("A long", "message 3 (tool)"),
        ("It is a", "message 4 (assistant)"),
        ("Shorter", "message 5 (user)"),
        ("please", "message 5 (user)"),
    ],
)
def test_a_text_belongs_to_its_message(wanted: str, where: str) -> None:
    """Also where the template has taken the blanks at its ends away."""
    assert at(wanted, {"messages": CHAT}) == where


def test_tools_are_told_from_the_system_prompt() -> None:
    """In whatever order the template has them."""
    body = {"messages": CHAT, "tools": TOOLS}
    assert at("Be brief", body) == "system: message 0 (system)"
    assert at('"write"', body) == "tools"
    assert at("It can read", body) == "tools"
    assert at("What is", body) == "message 1 (user)"


@pytest.mark.parametrize(
    ("wanted", "where"),
    [
        ("Be brief", "system"),
        ("What is", "message 0 (user)"),
        ("It is", "message 1 (assistant)"),
        ("A long", "message 2 (user)"),
    ],
)
def test_messages_of_anthropic_are_counted_as_they_were_sent(wanted: str, where: str) -> None:
    """The system prompt is none of them; results of tools are in the user's."""
    result = {"type": "tool_result", "tool_use_id": "1", "content": "A long text."}
    body = {
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            {"role": "user", "content": "What is this?"},
            {"role": "assistant", "content": [{"type": "text", "text": "It is a text."}]},
            {"role": "user", "content": [result]},
        ],
    }
    assert at(wanted, body, "messages") == where


@pytest.mark.parametrize(
    ("wanted", "where"),
    [
        ("Be brief", "system"),
        ("What is", "message 0 (user)"),
        ("A long", "message 2 (function_call_output)"),
    ],
)
def test_items_of_responses_have_a_role_or_a_type(wanted: str, where: str) -> None:
    """As they were sent in ``input``."""
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "What is this?"}]},
        {"type": "function_call", "call_id": "1", "name": "read", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "A long text."},
    ]
    assert at(wanted, {"instructions": "Be brief.", "input": items}, "responses") == where


def test_a_question_that_is_only_a_text_is_message_0() -> None:
    """``input`` may be one."""
    assert at("What is", {"input": "What is this?"}, "responses") == "message 0 (user)"


def test_what_the_template_says_first_is_the_system_prompts() -> None:
    """A date that no body has."""
    body = {"messages": CHAT[1:2]}
    text = "<|im_start|>system\nYou are a model. Today is Thursday, and it rains.<|im_end|>\n" + MODEL.render(
        body
    )
    assert str(whereabouts(text, text.index("Thursday"), body, FORMATS["chat"])) == "system"
    assert str(whereabouts(text, text.index("What"), body, FORMATS["chat"])) == "message 0 (user)"


def test_the_last_turn_is_what_no_answer_follows() -> None:
    """Who asks there for something else has gone back, or asks on."""
    body = {"messages": CHAT}
    text = MODEL.render(body)
    found = {
        wanted: whereabouts(text, text.index(wanted), body, FORMATS["chat"])
        for wanted in ("What", "It is", "Shorter")
    }
    assert [where.is_last_turn for where in found.values()] == [False, False, True]


@pytest.mark.parametrize(
    "body", [{}, {"messages": None}, {"messages": [None, 3, {"role": 3}], "tools": [None, {}]}]
)
def test_a_body_of_any_shape_has_an_answer(body: dict[str, Any]) -> None:
    """Nothing is decided by it, and nothing may fail by it."""
    assert str(whereabouts(json.dumps(body), 1, body, FORMATS["chat"])) == "system"
    assert str(whereabouts("x" * 100, 50, body, FORMATS["native-completion"])) == "prompt"
