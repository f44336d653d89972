"""llamaslot about itself: ``/health``, and what is below ``/llamaslot/``: status, metrics, journal, OpenAPI."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from llamaslot import __version__
from llamaslot.backend.backend import Backend, Health
from llamaslot.backend.slot_table import Pool
from llamaslot.errors import BadRequest, NotAllowed, NotFound
from llamaslot.http.openapi import DESCRIPTION, PATHS
from llamaslot.http.rewriting import SystemPrompts
from llamaslot.observe.journal import KEPT

_DIGITS = 9  # of a number that is read; Python reads no more than 4,300


class Status:
    """The pages of one backend. ``prompts``: the rules for system prompts, whose doings are told too."""

    def __init__(self, backend: Backend, prompts: SystemPrompts | None = None) -> None:
        self._backend = backend
        self._prompts = prompts or SystemPrompts((), backend.metrics)

    async def handle(self, request: web.Request) -> web.Response:
        """Raises NotFound, NotAllowed, and BadRequest."""
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

    def health(self) -> web.Response:
        """200 while the backend serves, else 503."""
        if self._backend.health is Health.UP:
            return web.json_response({"status": "ok"})
        return web.json_response({"status": self._backend.health.value}, status=503)

    def status(self) -> dict[str, Any]:
        """Slots, snapshots and the queue as they are now. Token contents are never shown."""
        backend, pool = self._backend, self._backend.leases.table
        catalog = backend.catalog
        return {
            "version": __version__,
            "backend": {
                "name": backend.name,
                "health": backend.health.value,
                "model": backend.met.model_name if backend.met else None,
                "n_ctx": pool.n_ctx if pool else None,
                "memory": pool.memory.value if pool else None,
                "warnings": list(backend.met.warnings) if backend.met else [],
                "assist": self._assist(),
            },
            "slots": self._slots(pool) if pool and pool.is_assisted else [],
            "snapshots": {
                "n": len(pool.library.snapshots) if pool else 0,
                "size_bytes": catalog.size_bytes if catalog else 0,
                "quota_bytes": catalog.quota_bytes if catalog else 0,
            },
            "queue": backend.scheduler.n_waiting,
            "users": [
                {
                    "id": user.id,
                    "running": user.n_running,
                    "waiting": user.n_waiting,
                    "deficit_s": round(user.deficit_s, 3),
                }
                for user in backend.scheduler.queue.standings(backend.scheduler.now())
            ],
            "rewrite": self._prompts.report(),
        }

    def _assist(self) -> dict[str, Any] | None:
        """Whether llamaslot chooses slots, and if not, why and what would change that; None while it is not known."""
        if (met := self._backend.met) is None:
            return None
        if met.aside is None:
            return {"is_on": True, "why": None, "remedy": None}
        return {"is_on": False, "why": met.aside.why, "remedy": met.aside.remedy}

    def _slots(self, pool: Pool) -> list[dict[str, Any]]:
        # Those with a slot: a turn has none until llama-server has chosen.
        every = self._backend.scheduler.leases
        leases = [lease for lease in every if lease.pool is pool and lease.slot is not None]
        prefills = {
            lease.slot_id: {"n_done": lease.n_done, "n_tokens": lease.job.n_tokens}
            for lease in leases
            if lease.is_long
        }
        users = {lease.slot_id: lease.job.user.id or None for lease in leases}
        return [
            {
                "id": slot.id,
                "state": slot.state.value,
                "n_tokens": slot.content.n_tokens,
                "is_dirty": slot.content.is_dirty,
                "is_worth_saving": pool.worth.is_worth_saving(slot),
                "prefill": prefills.get(slot.id),
                "user": users.get(slot.id),
            }
            for slot in pool.slots
        ]

    def journal(self, n: str) -> dict[str, Any]:
        """The last ``n`` decisions, the newest first. Raises BadRequest when ``n`` is no number."""
        if not (n.isascii() and n.isdigit()):
            raise BadRequest(f"n={n}: how many decisions of the last {KEPT}")
        n_wanted = min(int(n[-_DIGITS:]), KEPT) if len(n.lstrip("0")) <= _DIGITS else KEPT
        latest = self._backend.scheduler.journal.latest(n_wanted)
        return {"decisions": [decision.to_json() for decision in latest]}

    def _metrics(self) -> web.Response:
        metrics, backend = self._backend.metrics, self._backend
        metrics.n_waiting.set(backend.scheduler.n_waiting)
        metrics.n_snapshots.set(len(backend.leases.table.library.snapshots) if backend.leases.table else 0)
        metrics.bytes_stored.set(backend.catalog.size_bytes if backend.catalog else 0)
        return web.Response(body=metrics.exposition(), headers={"Content-Type": "text/plain; version=0.0.4"})
