"""Media in the fake: each medium becomes a text that a proxy cannot know."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import xxhash

KINDS = ("image_url", "input_audio", "video_url", "image", "input_image")


def of(body: Any) -> Iterator[dict[str, Any]]:
    """The media of a chat body."""
    for message in body.get("messages") or ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") in KINDS:
                yield part


def shown(medium: Any) -> str:
    """The 100 tokens that a medium becomes. They depend on the medium alone."""
    seed = xxhash.xxh3_64_hexdigest(json.dumps(medium, sort_keys=True).encode())
    return f"[{seed}{'.' * 82}]"


def content(parts: list[Any]) -> str:
    """The parts of a message as text, as templates get it that know no parts: a line break between two texts, none at a
    medium.
    """
    text, is_behind_text = "", False
    for part in parts:
        if not isinstance(part, dict):
            continue
        if part.get("type") in KINDS:
            text, is_behind_text = text + shown(part), False
        else:
            text, is_behind_text = text + "\n" * is_behind_text + str(part.get("text", "")), True
    return text
