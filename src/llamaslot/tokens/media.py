"""Finds the first medium (image, audio, video) of a chat, and the text before it, whose tokens can be known.

llama-server makes the tokens of an image itself, and does not tell them. ``/apply-template`` would fetch the images
that a body links to. So llamaslot never has a body with media rendered: it cuts the body at its first medium, and puts
a placeholder there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeGuard

from llamaslot.errors import PromptNotTokenizable, Reason

#: The type of a message part with a medium, and the key in ``modalities`` of ``/props`` that tells whether the server
#: accepts such media. llama-server answers other types with 400 (tools/server/server-common.cpp,
#: ``oaicompat_chat_params_parse``).
KINDS = {"image_url": "vision", "input_audio": "audio", "video_url": "video"}

OLD_MARKER = "<__media__>"
MEDIA_KEY = "multimodal_data"  # the key of a plain prompt's media
PROMPTS = ("prompt", "content", "input")  # the fields with prompts: of completions, and of embeddings

#: Stands for the medium in a body. No template contains this text, so it shows where the medium is after rendering.
PLACE = "llamaslot-puts-no-medium-here"


def has_media(body: Mapping[str, Any]) -> bool:
    """True if any message of a chat has a part that is not text; parts of unknown types count too."""
    return next(_media(body), None) is not None


def kinds(body: Mapping[str, Any]) -> set[str]:
    """The types of the media in a chat, keys of ``KINDS``. Raises PromptNotTokenizable for a part of another type that
    is not text either.
    """
    found = {str(part.get("type")) for _, _, part in _media(body)}
    if unknown := found - KINDS.keys():
        raise PromptNotTokenizable(f"parts of type {', '.join(sorted(unknown))}")
    return found


def up_to_medium(body: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``body``, a chat with media, that ends at its first medium, with the text ``PLACE`` instead of it."""
    number, at, _ = next(_media(body))
    message = body["messages"][number]
    content = [*message["content"][:at], {"type": "text", "text": PLACE}]
    # Without the option to continue the last message: after the cut another message is the last.
    fields = {name: value for name, value in body.items() if name != "continue_final_message"}
    return {**fields, "messages": [*body["messages"][:number], {**message, "content": content}]}


def text_before(rendered: str, body: Mapping[str, Any]) -> str:
    """The part of ``rendered`` before the medium. ``body``: a result of ``up_to_medium``; ``rendered``: the text that
    the template makes of it. Raises PromptNotTokenizable if that part is empty or its end cannot be found.

    For a template that does not support parts, llama-server joins texts with a line break, but a text and a medium
    without one. So a line break before ``PLACE`` does not belong to the text.
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


def before_marker(prompt: Any, markers: Collection[str]) -> str | None:
    """The text before the first medium of a completion's prompt with ``multimodal_data``; None for other prompts.

    ``markers``: ``media_marker`` of the ``/props`` of each backend, or "" for a build that tells none and uses
    ``OLD_MARKER``. Raises PromptNotTokenizable if the prompt contains none of them, or begins with one.
    """
    if not _has_media(prompt):
        return None
    text = prompt.get("prompt_string")
    found = [text.find(marker or OLD_MARKER) for marker in markers] if isinstance(text, str) else []
    at = min((at for at in found if at >= 0), default=-1)
    if at <= 0:
        raise PromptNotTokenizable("no text comes before the first medium", Reason.MEDIA)
    return str(text)[:at]


def with_marker(body: dict[str, Any], markers: Collection[str], own: str) -> dict[str, Any]:
    """A completion's body, or that of embeddings, for the llama-server whose ``media_marker`` is ``own``. A marker is
    random for each process, and the client has been told that of any in the pool, one of ``markers``. Each is as for
    ``before_marker``. A body without ``multimodal_data`` is returned as it is.
    """
    others = {marker or OLD_MARKER for marker in markers} - {own or OLD_MARKER}
    if not others:
        return body

    def marked(prompt: Any) -> Any:
        text = prompt.get("prompt_string") if _has_media(prompt) else None
        if not isinstance(text, str):
            return prompt
        for marker in others:
            text = text.replace(marker, own or OLD_MARKER)
        return {**prompt, "prompt_string": text}

    new = dict[str, Any]()
    for name in PROMPTS:
        prompt = body.get(name)
        prompts = prompt if isinstance(prompt, list) else [prompt]
        if any(map(_has_media, prompts)):
            new[name] = [marked(one) for one in prompts] if prompts is prompt else marked(prompt)
    return {**body, **new} if new else body


def _has_media(prompt: Any) -> TypeGuard[Mapping[str, Any]]:
    """True if a prompt that is no chat has media."""
    return isinstance(prompt, Mapping) and MEDIA_KEY in prompt


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
