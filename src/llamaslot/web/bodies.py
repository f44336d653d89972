"""Request bodies: parsed once."""

from __future__ import annotations

from typing import Any

import orjson

from llamaslot.errors import BadRequest

_DEPTH = 254  # levels that orjson writes; it reads 1,024
_MARK = b"\xef\xbb\xbf"  # of byte order, which some editors write and llama-server skips


class NoObject(BadRequest):
    """A body that llama-server cannot read either, whatever the route."""


def parse_object(raw: bytes) -> dict[str, Any]:
    """A JSON object. Raises BadRequest that says where the fault is: NoObject if llama-server sees the same fault.

    Its parser is more lenient in two things only: it stops at a NUL, and has no limit of depth.
    """
    raw = raw.removeprefix(_MARK)
    if not raw.strip():
        raise NoObject("the body is empty; it should be a JSON object")
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        is_broken = b"\0" not in raw and raw.count(b"[") + raw.count(b"{") <= _DEPTH
        raise (NoObject if is_broken else BadRequest)(f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise NoObject("the body should be a JSON object")
    if raw.count(b"[") + raw.count(b"{") > _DEPTH and not _can_be_written(body):
        raise BadRequest(f"the body is nested more than {_DEPTH} levels deep")
    return body


def _can_be_written(body: dict[str, Any]) -> bool:
    try:
        orjson.dumps(body)
    except TypeError:  # "Recursion limit reached"
        return False
    return True
