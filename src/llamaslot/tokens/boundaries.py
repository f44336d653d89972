"""Finds the boundaries of a chat, where its parts end: makes variants of its body that begin like the body and go on
differently after one part. The prompts of body and variant diverge where that part ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def system_variant(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """A copy of ``body`` with its system part and tools, and then only another user message. None if ``messages`` is
    not a list of objects.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return None
    n_system = _n_system(messages)
    question = {"role": "user", "content": _other(messages[n_system:])}
    return _with(body, [*messages[:n_system], question])


def variants_of(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bodies whose prompts begin like the prompt of ``body``, up to the end of one part:

    1. ``system_variant``: the same system part and tools.
    2. The same messages up to the last user message, another answer, and one more user message. Most templates leave
       out the reasoning of such a past answer, so this is how the next turn's prompt will begin.
    3. As 2, but the answer is the last message, which is still being written. A template may let it begin with
       <think>, or refuse it ("prefill is incompatible with enable_thinking").

    Only the first if there is no user message; none if ``messages`` is not a list of objects.
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
    """Two bodies with the system part and tools of ``body``, each with a different message after them. If ``body`` has
    neither, they have all its messages, and a different message after these.
    """
    messages = body["messages"]
    n_system = _n_system(messages)
    if n_system or body.get("tools"):
        messages, role = messages[:n_system], "user"
    else:
        role = "assistant" if messages[-1].get("role") == "user" else "user"
    more = [] if role == "user" else [{"role": "user", "content": "x"}]
    return [_with(body, [*messages, {"role": role, "content": text}, *more]) for text in ("x", "y")]


def _n_system(messages: list[Any]) -> int:
    """The number of messages before the first whose role is neither system nor developer."""
    n = 0
    while n < len(messages) and messages[n].get("role") in ("system", "developer"):
        n += 1
    return n


def _with(body: Mapping[str, Any], messages: list[Any]) -> dict[str, Any]:
    """A copy of ``body`` with other messages, and without the option to continue the last one."""
    fields = {name: value for name, value in body.items() if name != "continue_final_message"}
    return {**fields, "messages": messages}


def _other(messages: list[Any]) -> str:
    """A text of one character with which the first of ``messages`` does not begin. So a message with this text diverges
    from that one at its first character.
    """
    content = messages[0].get("content") if messages else None
    if isinstance(content, list):
        content = content[0].get("text") if content and isinstance(content[0], Mapping) else None
    return "y" if isinstance(content, str) and content.lstrip()[:1] == "x" else "x"
