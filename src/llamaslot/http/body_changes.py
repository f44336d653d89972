"""What llamaslot changes in a body before llama-server gets it: system prompts by the rules of ``rewrite``, which a
header, a metric and the status page report, and the markers of media, since a client knows those of any server.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import orjson
from aiohttp import web

from llamaslot.errors import BadRequest
from llamaslot.fleet.failover import Attempts
from llamaslot.formats.base import Format
from llamaslot.formats.rewrite_rules import LIMIT_S, RewriteRule, Rewriting
from llamaslot.http.request_body import parse_object
from llamaslot.observe.metrics import Metrics
from llamaslot.tokens.media import MEDIA_KEY, PROMPTS, with_marker

log = logging.getLogger(__name__)

_MEDIA_KEY = MEDIA_KEY.encode()
_REWROTE = web.RequestKey("rewrote", list[str])


class SystemPrompts:
    """Rewrites the system prompts of all requests."""

    def __init__(self, rules: Sequence[RewriteRule], metrics: Metrics) -> None:
        self._rewriting, self._metrics = Rewriting(tuple(rules)), metrics
        self._told: set[str] = set()

    def apply(self, rules: Sequence[RewriteRule]) -> None:
        """Use ``rules`` from now on. If they differ from the present ones, all counters begin at 0."""
        if tuple(rules) != self._rewriting.rules:
            self._rewriting, self._told = Rewriting(tuple(rules)), set()

    def rewrite(self, request: web.Request, body: dict[str, Any], format_: Format | None) -> bool:
        """Apply the rules to the system prompt in ``body``, in place. Returns True if that has changed ``body``.
        ``format_``: None for a body whose format is not known, which stays as it is.
        """
        if format_ is None or not self._rewriting.rewriters:
            return False
        fired, given_up = self._rewriting.apply(body, format_)
        for name in fired:
            self._metrics.rewrites.labels(name).inc()
        for name in given_up:
            if name not in self._told:
                self._told.add(name)
                log.warning(
                    "rewrite: rule %s took more than %g ms for a system prompt, which was sent without this rule; a"
                    " simpler pattern or a smaller max_chars helps",
                    name, LIMIT_S * 1000,
                )  # fmt: skip
        if fired:
            request[_REWROTE] = fired
        return bool(fired)

    def report(self) -> list[dict[str, Any]]:
        """Return name and counters of each rule, for the status page."""
        return [
            {"name": rewriter.rule.name, "n_fired": rewriter.n_fired, "n_given_up": rewriter.n_given_up}
            for rewriter in self._rewriting.rewriters
        ]


def rewrote(request: web.Request) -> list[str]:
    """Return the names of the rules that have changed the body of this request."""
    return list(request.get(_REWROTE, ()))


def tell_rewrote(request: web.Request, response: web.StreamResponse) -> None:
    """Handler of the signal ``on_response_prepare``: add a header that names the rules that have changed the request's
    body, also to error answers.
    """
    if names := rewrote(request):
        response.headers["x-llamaslot-rewrote"] = ",".join(names)


# -- media ---------------------------------------------------------------------------------------------------------


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
    return len(attempts.pool.backends) > 1 and _MEDIA_KEY in raw


def _marked(attempts: Attempts, body: dict[str, Any]) -> dict[str, Any]:
    session = attempts.backend.session
    if session is None:
        return body
    return with_marker(body, attempts.pool.media_markers(), session.props.boot_id)
