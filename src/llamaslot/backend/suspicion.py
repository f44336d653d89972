"""When a backend gets requests only if no other can take them: it may hang, or it answers with errors."""

from __future__ import annotations

import logging
import math

from llamaslot.backend.leases import Leases
from llamaslot.errors import UpstreamError

log = logging.getLogger(__name__)

_PAUSE_S, _PAUSE_AT_LAST_S = 2.0, 60.0


class Suspicion:
    """A circuit breaker. Silence is forgiven with the next answer to a question, an error after a pause: then a request
    tries the backend again, and goes to another one if that fails too. Each pause is twice the last, until a request
    was answered.
    """

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._n_errors, self._until = 0, -math.inf

    def begin(self) -> None:
        """It may hang. Idempotent."""
        if self._leases.table is not None and not self._leases.is_suspect:
            self._leases.is_suspect = True
            self._leases.dispatch()

    def blame(self, error: UpstreamError) -> None:
        """It has failed at what another backend can do, or at a question of llamaslot's own."""
        pause_s = min(_PAUSE_S * 2 ** min(self._n_errors, 30), _PAUSE_AT_LAST_S)
        self._n_errors, self._until = self._n_errors + 1, self._leases.now() + pause_s
        log.warning(
            "%s: answers with errors, and gets no requests for %g s while another backend can take them: %s",
            self._leases.backend, pause_s, error,
        )  # fmt: skip
        self.begin()

    def has_worked(self) -> None:
        """It has answered a request."""
        self._n_errors = 0

    def end(self) -> None:
        """It has answered a question. No effect during a pause."""
        if self._leases.is_suspect and self._leases.now() >= self._until:
            self._leases.is_suspect = False
            self._leases.dispatch()
