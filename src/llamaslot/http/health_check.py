"""``GET /health``: the answer, and the health checks that are answered without aiohttp."""

from __future__ import annotations

import json
import re
from email.utils import formatdate
from http import HTTPStatus

from llamaslot.backend.health import Health
from llamaslot.fleet.registry import Registry
from llamaslot.http.response_headers import NAME

# Headers that curl, browsers' fetch, Kubernetes, HAProxy, nginx and ab send and that do not change the answer.
# ``Origin`` does, with ``listen.cors``.
_PLAIN = rb"(?:User-Agent|Accept|Accept-Encoding|Accept-Language|Cache-Control|Pragma):[\t -~]*\r\n"
_HEALTH = re.compile(
    rb"GET /(?:v1/)?health HTTP/1\.(?P<minor>[01])\r\n"
    rb"(?:Host: ?[!-~]+\r\n)(?:%b)*(?P<close>Connection: close\r\n)?(?:%b)*\r\n" % (_PLAIN, _PLAIN),
    re.IGNORECASE,
)
_LONGEST = 2048  # a longer request is no plain health check


def health_of(registry: Registry) -> tuple[int, dict[str, str]]:
    """Return status and body of the answer to a health check: 200 if any backend is up, or asleep until the next
    request, else 503. A drained backend does not count.
    """
    states = {backend.health for backend in registry.backends if not backend.leases.is_drained}
    if states & {Health.UP, Health.ASLEEP}:
        return 200, {"status": "ok"}
    if not states:
        return 503, {"status": "drained"}
    health = Health.CONNECTING if Health.CONNECTING in states else Health.DOWN
    return 503, {"status": health.value}


def answer_to(data: bytes, registry: Registry) -> tuple[bytes, bool] | None:
    """Return the answer to ``data``, all bytes that a client has sent since the last answer, and True if the connection
    ends with it. Returns None if ``data`` is not exactly one plain health check: then aiohttp must answer.
    """
    if len(data) > _LONGEST or (check := _HEALTH.fullmatch(data)) is None:
        return None
    status, told = health_of(registry)
    registry.metrics.requests.labels("own", str(status)).inc()
    body = json.dumps(told).encode()
    is_last = check["minor"] == b"0" or check["close"] is not None
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json; charset=utf-8\r\n"
        f"Server: {NAME['Server']}\r\nContent-Length: {len(body)}\r\nDate: {formatdate(usegmt=True)}\r\n"
        f"{'Connection: close' if is_last else ''}\r\n"
    )
    return head.encode() + (b"\r\n" if is_last else b"") + body, is_last
