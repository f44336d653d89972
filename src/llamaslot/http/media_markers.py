"""Puts the media marker of the llama-server that gets a request into its body: a client knows that of any server."""

from __future__ import annotations

import contextlib
from typing import Any

import orjson

from llamaslot.errors import BadRequest
from llamaslot.fleet.failover import Attempts
from llamaslot.http.request_body import parse_object
from llamaslot.tokens.media import MEDIA_KEY, PROMPTS, with_marker

_KEY = MEDIA_KEY.encode()


def marked(attempts: Attempts, body: dict[str, Any], raw: bytes) -> dict[str, Any]:
    """Return ``body`` with the marker of the backend of the present attempt. ``raw``: the client's bytes of it, which
    tell sooner than long lists of tokens that there are no media.
    """
    has_prompts = any(isinstance(body.get(name), dict | list) for name in PROMPTS)
    return _marked(attempts, body) if has_prompts and _may_have_media(attempts, raw) else body


def marked_bytes(attempts: Attempts, raw: bytes) -> bytes:
    """As ``marked``, for a body that was not parsed. One that llamaslot cannot read is returned as it is, so that
    llama-server refuses it.
    """
    if _may_have_media(attempts, raw):
        with contextlib.suppress(BadRequest):
            body = parse_object(raw)
            if (new := _marked(attempts, body)) is not body:
                return orjson.dumps(new)
    return raw


def _may_have_media(attempts: Attempts, raw: bytes) -> bool:
    """True if there may be media in plain prompts, and another server's marker for them."""
    return len(attempts.pool.backends) > 1 and _KEY in raw


def _marked(attempts: Attempts, body: dict[str, Any]) -> dict[str, Any]:
    session = attempts.backend.session
    if session is None:
        return body
    return with_marker(body, attempts.pool.media_markers(), session.props.boot_id)
