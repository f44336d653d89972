"""Parses request bodies, within limits."""

from __future__ import annotations

from typing import Any

import orjson

from llamaslot.errors import BadRequest

# There is one event loop, and reading more than that would delay all requests by seconds. A million tokens of text
# have a quarter of so many brackets, and 200 tools with 1,000 messages some 40,000 items.
_COMMAS, _BRACKETS, _NUMBERS, _ITEMS = 8_000_000, 1_000_000, 4_000_000, 100_000
_LOOKED_THROUGH = ("messages", "system", "tools", "prompt", "input", "input_extra", "lora")
_DEPTH = 254  # levels that orjson writes; it reads 1,024
_TOO_DEEP = f"the body is nested more than {_DEPTH} levels deep"
_MARK = b"\xef\xbb\xbf"  # byte order mark, which some editors write and llama-server skips
_TOO_MANY = (
    f"the body has too many parts: {_ITEMS} at most, of messages, prompts and tools and what is in them"
)


class NoObject(BadRequest):
    """A body that llama-server cannot parse either, whatever the route."""


def parse_object(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises BadRequest with the position of the fault: NoObject if llama-server finds the same
    fault.

    Its parser is more lenient in two points only: it stops at a NUL, and has no limit of depth.
    """
    raw = raw.removeprefix(_MARK)
    if not raw.strip():
        raise NoObject("the body is empty; it should be a JSON object")
    n_brackets = raw.count(b"[") + raw.count(b"{")
    if n_brackets > _BRACKETS or raw.count(b",") > _COMMAS:
        raise BadRequest(_TOO_MANY)
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        if error.msg.startswith("depth limit"):  # orjson's own, of 1,024
            raise BadRequest(_TOO_DEEP) from None
        is_broken = b"\0" not in raw and n_brackets <= _DEPTH
        raise (NoObject if is_broken else BadRequest)(f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise NoObject("the body should be a JSON object")
    if _has_too_many_items(body):
        raise BadRequest(_TOO_MANY)
    if n_brackets > _DEPTH and not _can_be_written(body):
        raise BadRequest(_TOO_DEEP)
    return body


def _has_too_many_items(body: dict[str, Any]) -> bool:
    """Whether the fields that llamaslot reads have too many items; that is most of the work for a body. A list of
    numbers (tokens) is one item.
    """
    n_items, left = 0, [body[name] for name in _LOOKED_THROUGH if isinstance(body.get(name), dict | list)]
    while left:
        one = left.pop()
        if isinstance(one, list) and len(one) <= _NUMBERS and set(map(type, one)) <= {int, float}:
            continue
        n_items += len(one)
        if n_items > _ITEMS:
            return True
        inner = one.values() if isinstance(one, dict) else one
        left += [item for item in inner if isinstance(item, dict | list)]
    return False


def _can_be_written(body: dict[str, Any]) -> bool:
    try:
        orjson.dumps(body)
    except TypeError:  # "Recursion limit reached"
        return False
    return True
