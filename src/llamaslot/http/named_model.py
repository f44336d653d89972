"""The name of the model in a request that is passed through: in its JSON, its form, or its query."""

from __future__ import annotations

import re

import orjson
from aiohttp import web

_FORM = re.compile(rb'name="?model"?\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]{1,256})\r\n')


def is_json(request: web.Request) -> bool:
    """Whether the body is JSON, or does not say what it is: llama-server reads it as JSON then."""
    return "multipart/" not in request.headers.get("Content-Type", "")


def named_model(request: web.Request, raw: bytes) -> object:
    """``raw``: the body, empty if there is none. None if no model is named."""
    if raw and is_json(request):
        try:
            body = orjson.loads(raw)
        except orjson.JSONDecodeError:
            body = None
        named = body.get("model") if isinstance(body, dict) else None
    else:
        found = _FORM.search(raw)
        named = found[1].decode(errors="replace") if found else None
    return named or request.query.get("model")
