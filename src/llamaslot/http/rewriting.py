"""Applies the rules of ``rewrite`` to bodies, and reports which rules have changed something: in a header, a metric and
the status page.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from llamaslot.formats.base import Format
from llamaslot.formats.rewrite import LIMIT_S, RewriteRule, Rewriting
from llamaslot.observe.metrics import Metrics

log = logging.getLogger(__name__)

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
