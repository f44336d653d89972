"""Makes the tasks of a completion request from its body, with the checks and error texts of the real server."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from tests.support import fake_media
from tests.support.fake_model import N_VOCAB, BadInput, FakeModel, pack
from tests.support.fake_types import Result, Shape, Task

PROMPT_SHAPE = (
    '"prompt" elements must be a string, a list of tokens, a JSON object containing a prompt string, '
    "or a list of mixed strings & tokens."
)


def parse(data: bytes) -> Any:
    """Parse JSON as the real server does: NaN and half a surrogate pair are refused, a byte order mark is skipped."""
    try:
        return orjson.loads(data.removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:
        last = f"parse error at line 1, column 1: {error}"
        raise BadInput(f"[json.exception.parse_error.101] {last}") from error


def number(body: dict[str, Any], name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        kind = {str: "string", bool: "boolean", list: "array", dict: "object"}[type(value)]
        raise BadInput(f"Field '{name}': [json.exception.type_error.302] type must be number, but is {kind}")
    if not low <= value <= high:
        raise BadInput(f"Field '{name}': Value must be between {low} <= value <= {high}, but got {value}")
    return int(value)


def prompts(value: Any, model: FakeModel, marker: str = "") -> list[list[int]]:
    """Return the prompts in ``value``. It is one prompt if it is a string, or a list of ids and strings; it is several
    if it is a list of strings only, or of lists.
    """
    if isinstance(value, str):
        return [model.tokenize(value)]
    if not isinstance(value, list):
        if isinstance(value, dict) and "prompt_string" in value:
            if not model.takes_media:
                raise BadInput("Multimodal data provided, but model does not support multimodal requests.")
            text = value["prompt_string"]
            if text.count(marker) != len(value["multimodal_data"]):
                raise BadInput("Failed to tokenize prompt")
            for medium in value["multimodal_data"]:
                text = text.replace(marker, fake_media.shown(medium), 1)
            return [model.tokenize(text)]
        raise BadInput(PROMPT_SHAPE)
    if not value:
        raise BadInput('"prompt" must not be empty')
    if any(isinstance(item, int) and not isinstance(item, bool) for item in value):
        ids: list[int] = []
        has_text = any(
            isinstance(item, str) for item in value
        )  # then true is 1; among numbers alone it is none
        for item in value:
            if isinstance(item, str):
                ids.extend(model.tokenize(item))
            elif isinstance(item, int) and (not isinstance(item, bool) or has_text):
                ids.append(item)
            else:
                raise BadInput(PROMPT_SHAPE)
        if not all(0 <= i < N_VOCAB for i in ids):
            raise BadInput("Prompt contains invalid tokens")
        return [ids]
    return [ids for item in value for ids in _subprompt(item, model, marker)]


def _subprompt(item: Any, model: FakeModel, marker: str) -> list[list[int]]:
    if item == []:
        return [[]]
    if isinstance(item, list) and not any(isinstance(one, int) and not isinstance(one, bool) for one in item):
        raise BadInput(PROMPT_SHAPE)
    return prompts(item, model, marker)


def tasks(
    body: dict[str, Any],
    rows: list[list[int]],
    shape: Shape,
    next_id: Any,
    *,
    user_marks: tuple[int, ...] = (),
) -> list[Task]:
    """A task for each prompt, with children where ``n`` > 1. Raises ``BadInput``."""
    if "stream" in body and not isinstance(body["stream"], bool):
        text = "[json.exception.type_error.302] type must be boolean, but is string"
        raise BadInput(f"Field 'stream': {text}")
    limits = [
        number(body, name, -1, 2_147_483_647) for name in ("n_predict", "max_tokens", "max_completion_tokens")
    ]
    n_predict = next((limit for limit in limits if limit is not None), -1)
    n = max(number(body, name, 1, shape.n_slots) or 1 for name in ("n", "n_cmpl"))
    number(body, "temperature", -100, 1000)
    if any(not isinstance(name, str) for name in body.get("samplers") or ()):
        text = "[json.exception.type_error.302] type must be string, but is number"
        raise BadInput(f"Field 'samplers': {text}")
    asked = body.get("id_slot")
    pinned = isinstance(asked, int) and not isinstance(asked, bool) and asked >= 0
    given = body.get("stop")
    stop = [
        word
        for word in ([given] if isinstance(given, str) else given or ())
        if isinstance(word, str) and word
    ]
    n_probs = number(body, "n_probs", 0, 2_147_483_647)
    n_logprobs = number(body, "top_logprobs", 0, 2_147_483_647) if body.get("logprobs") else 0
    results: asyncio.Queue[Result | None] = asyncio.Queue()
    made: list[Task] = []
    index = 0
    for row in rows:
        family: list[Task] = []
        for _ in range(n):
            family.append(
                Task(
                    id=next_id(),
                    index=index,
                    tokens=pack(row),
                    n_predict=n_predict,
                    results=results,
                    slot=asked if pinned else None,
                    cache_prompt=body.get("cache_prompt", True) is not False,
                    progress=bool(body.get("return_progress")) and bool(body.get("stream")),
                    n_probs=min(n_probs or n_logprobs or 0, 100),
                    stop=tuple(stop),
                    user_marks=user_marks,
                )
            )
            index += 1
        parent, *parent.children = family
        for child in parent.children:
            child.parent = parent
        made.append(parent)
    return made
