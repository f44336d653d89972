"""Makes variants of a body: the common prefix of a variant's prompt with the body's prompt shows where a part of the
body ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def system_variant(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """``body`` with another question right after its system part, as the first of ``variants_of``; None if the
    messages have an unknown form.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return None
    n_system = _n_system(messages)
    question = {"role": "user", "content": _other(messages[n_system:])}
    return _with(body, [*messages[:n_system], question])


def variants_of(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bodies whose prompts share a part with the body's prompt: the system part; everything up to the answer, with
    the answer as a past turn; the same, with the answer being written (the last two only with a user message).

    As a past turn the answer has no reasoning, as most templates render it; the next turn will have it so. An answer
    being written may begin with <think>, or be refused ("prefill is incompatible with enable_thinking").
    """
    if (first := system_variant(body)) is None:
        return []
    messages, variants = body["messages"], [first]
    roles = [message.get("role") for message in messages]
    if "user" in roles:
        n_user = len(roles) - roles[::-1].index("user")
        answered = [*messages[:n_user], {"role": "assistant", "content": _other(messages[n_user:])}]
        later = [*answered, {"role": "user", "content": "x"}]
        variants += [_with(body, later), _with(body, answered)]
    return variants


def openings(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Two different conversations with the system part and tools of ``body``."""
    messages = body["messages"]
    n_system = _n_system(messages)
    if n_system or body.get("tools"):
        messages, role = messages[:n_system], "user"
    else:
        role = "assistant" if messages[-1].get("role") == "user" else "user"
    more = [] if role == "user" else [{"role": "user", "content": "x"}]
    return [_with(body, [*messages, {"role": role, "content": text}, *more]) for text in ("x", "y")]


def _n_system(messages: list[Any]) -> int:
    """The number of messages before the first one that is not of the system."""
    n = 0
    while n < len(messages) and messages[n].get("role") in ("system", "developer"):
        n += 1
    return n


def _with(body: Mapping[str, Any], messages: list[Any]) -> dict[str, Any]:
    """``body`` with other messages. Without the option to continue the last message, which is another one now."""
    fields = {name: value for name, value in body.items() if name != "continue_final_message"}
    return {**fields, "messages": messages}


def _other(messages: list[Any]) -> str:
    """A text of one character with which the first of ``messages`` does not begin, so that no part of that message
    seems common.
    """
    content = messages[0].get("content") if messages else None
    if isinstance(content, list):
        content = content[0].get("text") if content and isinstance(content[0], Mapping) else None
    return "y" if isinstance(content, str) and content.lstrip()[:1] == "x" else "x"
