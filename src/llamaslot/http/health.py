"""What ``GET /health`` answers, in a module that imports little."""

from __future__ import annotations

import json
from http import HTTPStatus

from llamaslot.backend.health import Health
from llamaslot.fleet.registry import Registry
from llamaslot.http.connections import HealthAnswer


def health_of(registry: Registry) -> tuple[int, dict[str, str]]:
    """Status and content of the answer: 200 while any backend serves, or will on demand, else 503. A drained backend
    does not count.
    """
    states = {backend.health for backend in registry.backends if not backend.leases.is_drained}
    if states & {Health.UP, Health.ASLEEP}:
        return 200, {"status": "ok"}
    if not states:
        return 503, {"status": "drained"}
    health = Health.CONNECTING if Health.CONNECTING in states else Health.DOWN
    return 503, {"status": health.value}


class HealthChecks:
    """Answers health checks, and counts them."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def answer(self) -> HealthAnswer:
        status, told = health_of(self._registry)
        self._registry.metrics.requests.labels("own", str(status)).inc()
        return HealthAnswer(status, HTTPStatus(status).phrase, json.dumps(told).encode())
