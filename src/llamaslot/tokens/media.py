"""Finds the first medium of a chat; the text before it is known token by token.

The tokens of an image are made inside llama-server, and ``/apply-template`` would fetch the images that a body links
to. So a body is never rendered with media: it is rendered up to its first medium, with a placeholder in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llamaslot.errors import PromptNotTokenizable, Reason

#: Parts of a message that are media, and what of ``modalities`` in ``/props`` says that the server takes them.
#: llama-server answers others with 400 (tools/server/server-common.cpp, ``oaicompat_chat_params_parse``).
KINDS = {"image_url": "vision", "input_audio": "audio", "video_url": "video"}

OLD_MARKER = "<__media__>"

#: The placeholder of the medium. No template contains it; the prompt before the medium ends where it is found.
PLACE = "llamaslot-puts-no-medium-here"


def has_media(body: Mapping[str, Any]) -> bool:
    """Whether any message of a chat has a part that is not text, unknown kinds included."""
    return next(_media(body), None) is not None


def kinds(body: Mapping[str, Any]) -> set[str]:
    """The kinds of media (``KINDS``) in a chat. Raises PromptNotTokenizable for a part that is neither of these nor
    text.
    """
    found = {str(part.get("type")) for _, _, part in _media(body)}
    if unknown := found - KINDS.keys():
        raise PromptNotTokenizable(f"parts of type {', '.join(sorted(unknown))}")
    return found


def up_to_medium(body: Mapping[str, Any]) -> dict[str, Any]:
    """``body``, a chat with media, cut at its first medium, where the text ``PLACE`` stands instead."""
    number, at, _ = next(_media(body))
    message = body["messages"][number]
    content = [*message["content"][:at], {"type": "text", "text": PLACE}]
    # The option to continue the last message cannot stay: the last message is another one now.
    fields = {name: value for name, value in body.items() if name != "continue_final_message"}
    return {**fields, "messages": [*body["messages"][:number], {**message, "content": content}]}


def text_before(rendered: str, body: Mapping[str, Any]) -> str:
    """The part of the rendered ``text`` before the medium, for a chat that ``up_to_medium`` has cut. Raises
    PromptNotTokenizable if there is none.

    A template without support for parts gets texts joined by a line break, and a medium without one before it: so that
    break does not belong to the text.
    """
    text, found, _ = rendered.partition(PLACE)
    if not found:
        raise PromptNotTokenizable("the template does not show where a medium stands", Reason.TEMPLATE)
    before = body["messages"][-1]["content"][:-1]
    last = before[-1].get("text") if before and isinstance(before[-1], Mapping) else None
    if isinstance(last, str) and text.endswith(last + "\n"):
        text = text[:-1]
    if not text:
        raise PromptNotTokenizable("nothing comes before the first medium", Reason.MEDIA)
    return text


def before_marker(prompt: Any, marker: str) -> str | None:
    """The text before the first medium of a completion's prompt with ``multimodal_data``; None for other prompts.

    ``marker``: ``media_marker`` of ``/props``; builds without that have a fixed one. Raises PromptNotTokenizable if
    the prompt does not contain the marker.
    """
    if not isinstance(prompt, Mapping) or "multimodal_data" not in prompt:
        return None
    text = prompt.get("prompt_string")
    at = text.find(marker or OLD_MARKER) if isinstance(text, str) else -1
    if at <= 0:
        raise PromptNotTokenizable("no text comes before the first medium", Reason.MEDIA)
    return str(text)[:at]


def _media(body: Mapping[str, Any]) -> Iterator[tuple[int, int, Mapping[str, Any]]]:
    """Each part of a chat that is not text: the index of its message, the index of the part in the message, and the
    part.
    """
    messages = body.get("messages")
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        parts = message.get("content") if isinstance(message, dict) else None
        for at, part in enumerate(parts if isinstance(parts, list) else ()):
            if isinstance(part, dict) and part.get("type") != "text":
                yield number, at, part
