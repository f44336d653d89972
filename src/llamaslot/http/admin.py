"""llamaslot's own pages below ``/llamaslot/``: status, metrics, journal, OpenAPI."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from llamaslot import __version__
from llamaslot.errors import BadRequest, NotAllowed, NotFound
from llamaslot.fleet.registry import Registry
from llamaslot.http.openapi import DESCRIPTION, PATHS
from llamaslot.http.rewriting import SystemPrompts
from llamaslot.observe.journal import KEPT

_DIGITS = 9  # of a number in a query; Python reads no more than 4,300


class Status:
    """The pages about all backends. ``prompts``: the rules for system prompts, whose counters are reported too."""

    def __init__(self, registry: Registry, prompts: SystemPrompts | None = None) -> None:
        self._registry = registry
        self._prompts = prompts or SystemPrompts((), registry.metrics)

    async def handle(self, request: web.Request) -> web.Response:
        """Answer a request for one of the pages. Raises NotFound, NotAllowed, and BadRequest."""
        if request.path in PATHS and request.method not in ("GET", "HEAD"):
            raise NotAllowed(f"{request.path} can only be read: GET or HEAD, not {request.method}")
        match request.path:
            case "/llamaslot/status":
                return web.json_response(self.status())
            case "/llamaslot/metrics":
                return self._metrics()
            case "/llamaslot/journal":
                return web.json_response(self.journal(request.query.get("n", "100")))
            case "/llamaslot/openapi.json":
                return web.json_response(DESCRIPTION)
            case _:
                own = ", ".join(path for path in PATHS if path.startswith("/llamaslot/"))
                raise NotFound(f"there is no {request.path}; there are {own}")

    def status(self) -> dict[str, Any]:
        """Backends, snapshots and the queue at present. Token contents are never shown."""
        pools = [pool.status() for pool in self._registry.pools]
        return {
            "version": __version__,
            "backends": [backend.status() for backend in self._registry.backends],
            "snapshots": {
                "n": sum(pool.n_snapshots for pool in pools),
                "size_bytes": sum(pool.size_bytes for pool in pools),
                "quota_bytes": sum(pool.quota_bytes for pool in pools),
            },
            "queue": sum(pool.n_waiting for pool in pools),
            "users": [
                {
                    "id": user.id,
                    "running": user.n_running,
                    "waiting": user.n_waiting,
                    "deficit_s": round(user.deficit_s, 3),
                }
                for pool in pools
                for user in pool.users
            ],
            "rewrite": self._prompts.report(),
        }

    def journal(self, n: str) -> dict[str, Any]:
        """The last ``n`` decisions, newest first. Raises BadRequest if ``n`` is no number."""
        if not (n.isascii() and n.isdigit()):
            raise BadRequest(f"n={n}: how many decisions of the last {KEPT}")
        n_wanted = min(int(n[-_DIGITS:]), KEPT) if len(n.lstrip("0")) <= _DIGITS else KEPT
        every = (decision for pool in self._registry.pools for decision in pool.latest_decisions(n_wanted))
        latest = sorted(every, key=lambda decision: -decision.at)[:n_wanted]
        return {"decisions": [decision.to_json() for decision in latest]}

    def _metrics(self) -> web.Response:
        metrics, pools = self._registry.metrics, [pool.status() for pool in self._registry.pools]
        metrics.n_waiting.set(sum(pool.n_waiting for pool in pools))
        metrics.n_snapshots.set(sum(pool.n_snapshots for pool in pools))
        metrics.bytes_stored.set(sum(pool.size_bytes for pool in pools))
        return web.Response(body=metrics.exposition(), headers={"Content-Type": "text/plain; version=0.0.4"})
