"""llamaslot's own pages: ``/health``, and below ``/llamaslot/``: status, metrics, journal, OpenAPI."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from llamaslot import __version__
from llamaslot.backend.backend import Backend, Health
from llamaslot.backend.connect import ServerSession
from llamaslot.backend.slot_table import SlotTable
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

    def health(self) -> tuple[int, dict[str, str]]:
        """Status and content of ``/health``: 200 while any backend serves, else 503."""
        states = {backend.health for backend in self._registry.backends}
        if Health.UP in states:
            return 200, {"status": "ok"}
        health = Health.CONNECTING if Health.CONNECTING in states else Health.DOWN
        return 503, {"status": health.value}

    def status(self) -> dict[str, Any]:
        """Backends, snapshots and the queue at present. Token contents are never shown."""
        pools = self._registry.pools
        stores = [pool.store for pool in pools if pool.store is not None]
        return {
            "version": __version__,
            "backends": [_status_of(backend) for backend in self._registry.backends],
            "snapshots": {
                "n": sum(pool.n_snapshots for pool in pools),
                "size_bytes": sum(store.catalog.size_bytes for store in stores),
                "quota_bytes": sum(store.catalog.quota_bytes for store in stores),
            },
            "queue": sum(pool.dispatcher.n_waiting for pool in pools),
            "users": [
                {
                    "id": user.id,
                    "running": user.n_running,
                    "waiting": user.n_waiting,
                    "deficit_s": round(user.deficit_s, 3),
                }
                for pool in pools
                for user in pool.dispatcher.queue.standings(pool.dispatcher.now())
            ],
            "rewrite": self._prompts.report(),
        }

    def journal(self, n: str) -> dict[str, Any]:
        """The last ``n`` decisions, newest first. Raises BadRequest if ``n`` is no number."""
        if not (n.isascii() and n.isdigit()):
            raise BadRequest(f"n={n}: how many decisions of the last {KEPT}")
        n_wanted = min(int(n[-_DIGITS:]), KEPT) if len(n.lstrip("0")) <= _DIGITS else KEPT
        every = (
            decision for pool in self._registry.pools for decision in pool.dispatcher.journal.latest(n_wanted)
        )
        latest = sorted(every, key=lambda decision: -decision.at)[:n_wanted]
        return {"decisions": [decision.to_json() for decision in latest]}

    def _metrics(self) -> web.Response:
        metrics, pools = self._registry.metrics, self._registry.pools
        stores = [pool.store for pool in pools if pool.store is not None]
        metrics.n_waiting.set(sum(pool.dispatcher.n_waiting for pool in pools))
        metrics.n_snapshots.set(sum(pool.n_snapshots for pool in pools))
        metrics.bytes_stored.set(sum(store.catalog.size_bytes for store in stores))
        return web.Response(body=metrics.exposition(), headers={"Content-Type": "text/plain; version=0.0.4"})


def _status_of(backend: Backend) -> dict[str, Any]:
    session, table = backend.session, backend.leases.table
    return {
        "name": backend.name,
        "health": backend.health.value,
        "model": session.model_name if session else None,
        "n_ctx": table.n_ctx if table else None,
        "memory": table.cache_kind.value if table else None,
        "warnings": list(session.warnings) if session else [],
        "assist": _assist(session) if session else None,
        "slots": _slots(backend, table) if table and table.is_assisted else [],
    }


def _assist(session: ServerSession) -> dict[str, Any]:
    """Whether llamaslot chooses slots, and if not, why and how to change that."""
    if session.aside is None:
        return {"is_on": True, "why": None, "remedy": None}
    return {"is_on": False, "why": session.aside.why, "remedy": session.aside.remedy}


def _slots(backend: Backend, table: SlotTable) -> list[dict[str, Any]]:
    # Those with a slot: an exclusive request has none until llama-server has chosen.
    leases = [lease for lease in backend.leases.leases if lease.table is table and lease.slot is not None]
    chunked_prefill = {
        lease.slot_id: {"n_done": lease.n_done, "n_tokens": lease.request.n_tokens}
        for lease in leases
        if lease.is_long
    }
    users = {lease.slot_id: lease.request.user.id or None for lease in leases}
    return [
        {
            "id": slot.id,
            "state": slot.state.value,
            "n_tokens": slot.content.n_tokens,
            "is_dirty": slot.content.is_dirty,
            "is_worth_saving": table.worth.is_worth_saving(slot),
            "prefill": chunked_prefill.get(slot.id),
            "user": users.get(slot.id),
        }
        for slot in table.slots
    ]
