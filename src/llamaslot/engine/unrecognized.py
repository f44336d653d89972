"""Requests whose tokens are not known: counted, and said once for each reason, never with a word of theirs."""

from __future__ import annotations

import logging

from llamaslot.llama.opaque import Reason
from llamaslot.llama.routes import Format
from llamaslot.observe.metrics import Metrics

log = logging.getLogger(__name__)

_WHY = {
    Reason.SHAPE: "something in its body is not known to llamaslot; please report its shape",
    Reason.TEMPLATE: "the chat template renders it otherwise than expected; please report the model",
    Reason.MEDIA: "it has images or audio with no text before them, or llama-server chooses its slot",
    Reason.INFILL: "how its prompt is built is unknown; a --batch-size below the context of a slot helps",
    Reason.MISCOUNTED: "llama-server counted other tokens in it; please report the model",
}
_COSTS = "a %s request is served without known tokens and its context is not found again: %s"


class Unrecognized:
    """The count of one backend's requests that were served so, and which reasons have been told."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._told: set[Reason] = set()

    def count(self, kind: Format, reason: Reason) -> None:
        """One more of the route's format ``kind`` was served so."""
        self._metrics.unrecognized.labels(kind, reason.value).inc()
        if reason not in self._told:
            self._told.add(reason)
            log.warning(_COSTS, kind, _WHY[reason])
