"""A chat body in a file, as ``prewarm`` names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson


def read_chat_file(path: Path) -> dict[str, Any]:
    """The body. Raises ValueError that says what is wrong with the file."""
    try:
        body = orjson.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise ValueError(
            f'{path} should hold a chat body: an object with "messages", and "tools" if there are any'
        )
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f'{path}: "messages" is missing or empty; its system message and its tools are what is kept'
        )
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f'{path}: messages[{i}] should be an object with "role" and "content"')
    return body
