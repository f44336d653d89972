"""What ``GET /health`` answers. It imports little, so that health checks are answered early."""

from __future__ import annotations

import json
from http import HTTPStatus

from llamaslot.backend.health import Health
from llamaslot.fleet.registry import Registry
from llamaslot.http.connections import HealthAnswer


def health_of(registry: Registry) -> tuple[int, dict[str, str]]:
    """Return status and body of the answer: 200 if any backend is up, or asleep until the next request, else 503. A
    drained backend does not count.
    """
    states = {backend.health for backend in registry.backends if not backend.leases.is_drained}
    if states & {Health.UP, Health.ASLEEP}:
        return 200, {"status": "ok"}
    if not states:
        return 503, {"status": "drained"}
    health = Health.CONNECTING if Health.CONNECTING in states else Health.DOWN
    return 503, {"status": health.value}


class HealthChecks:
    """Answers the health checks of new connections, and counts them in the metrics."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def answer(self) -> HealthAnswer:
        status, told = health_of(self._registry)
        self._registry.metrics.requests.labels("own", str(status)).inc()
        return HealthAnswer(status, HTTPStatus(status).phrase, json.dumps(told).encode())
