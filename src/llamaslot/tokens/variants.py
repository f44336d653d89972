"""Variants of a body. What their prompts have in common with the body's prompt shows where its parts end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def variants_of(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bodies whose prompts share a part with the body's prompt: the system part; everything up to the answer, with
    the answer as a past turn; the same, with the answer being written (the last two only with a user message).

    As a past turn the answer has no reasoning, as most templates render it; the next turn will have it so. An answer
    being written may begin with <think>, or be refused ("prefill is incompatible with enable_thinking").
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        return []
    roles = [m.get("role") for m in messages]
    n_system = next((i for i, role in enumerate(roles) if role not in ("system", "developer")), len(roles))
    question = {"role": "user", "content": _other(messages[n_system:])}
    variants = [[*messages[:n_system], question]]
    if "user" in roles:
        n_user = len(roles) - roles[::-1].index("user")
        answered = [*messages[:n_user], {"role": "assistant", "content": _other(messages[n_user:])}]
        variants += [[*answered, {"role": "user", "content": "x"}], answered]
    # The option to continue the last message cannot stay: the last message is another one now.
    fields = {name: value for name, value in body.items() if name != "continue_final_message"}
    return [{**fields, "messages": variant} for variant in variants]


def openings(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Two different conversations with the system part and tools of ``body``."""
    messages = body["messages"]
    roles = [message.get("role") for message in messages]
    n_system = next((i for i, role in enumerate(roles) if role not in ("system", "developer")), len(roles))
    if n_system or body.get("tools"):
        messages, role = messages[:n_system], "user"
    else:
        role = "assistant" if roles[-1] == "user" else "user"
    more = [] if role == "user" else [{"role": "user", "content": "x"}]
    fields = {name: value for name, value in body.items() if name != "continue_final_message"}
    return [
        {**fields, "messages": [*messages, {"role": role, "content": text}, *more]} for text in ("x", "y")
    ]


def _other(messages: list[Any]) -> str:
    """One character that the first message does not begin with, so that no part of it seems common."""
    content = messages[0].get("content") if messages else None
    if isinstance(content, list):
        content = content[0].get("text") if content and isinstance(content[0], Mapping) else None
    return "y" if isinstance(content, str) and content.lstrip()[:1] == "x" else "x"
