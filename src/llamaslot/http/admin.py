"""llamaslot's own pages below ``/llamaslot/``: status, metrics, journal, drain, reload, OpenAPI."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from aiohttp import web
from msgspec.structs import asdict

from llamaslot import __version__
from llamaslot.backend.backend import Backend
from llamaslot.backend.connect import ServerSession
from llamaslot.backend.lease import Lease
from llamaslot.cache.content import NOTHING, Content
from llamaslot.errors import BadRequest, NotAllowed, NotFound, shortened
from llamaslot.fleet.pool import PoolStatus
from llamaslot.fleet.registry import Registry
from llamaslot.http.body_changes import SystemPrompts
from llamaslot.http.openapi import DESCRIPTION, PATHS
from llamaslot.http.reload import Reload
from llamaslot.observe.journal import KEPT
from llamaslot.scheduling.slots import Slot

_DIGITS = 9  # of a number in a query that are read; int() refuses more than 4,300


class Status:
    """Answers requests for llamaslot's own pages, except those that serve the operator page (``PageApi``). ``prompts``:
    the rules for system prompts, whose counters the status page shows.
    """

    def __init__(self, registry: Registry, prompts: SystemPrompts, reload: Reload) -> None:
        self._registry, self._prompts, self._reload = registry, prompts, reload

    async def handle(self, request: web.Request) -> web.Response:
        """Answer a request for status, metrics, journal, drain, reload or OpenAPI. Raises NotFound for an unknown path
        or backend, BadRequest for a faulty query, and NotReloaded if a reload fails.
        """
        match request.path:
            case "/llamaslot/status":
                return web.json_response(self.status())
            case "/llamaslot/metrics":
                return self._metrics()
            case "/llamaslot/journal":
                return web.json_response(self.journal(digits(request, "n", 100, KEPT)))
            case "/llamaslot/drain" | "/llamaslot/undrain":
                return web.json_response(self._drain(request))
            case "/llamaslot/reload":
                return web.json_response(await self._reload.run())
            case "/llamaslot/openapi.json":
                return web.json_response(DESCRIPTION)
            case _:
                own = ", ".join(path for path in PATHS if path.startswith("/llamaslot/"))
                raise NotFound(f"there is no {shortened(request.path)}; known: {own}")

    def status(self) -> dict[str, Any]:
        """Return the present state of backends, snapshots and queue, as ``/llamaslot/status`` answers it. It has no
        tokens or texts of any prompt.
        """
        pools = [pool.status() for pool in self._registry.pools]
        return {
            "version": __version__,
            "backends": [status_of(backend) for backend in self._registry.backends],
            "snapshots": {
                "n": sum(pool.n_snapshots for pool in pools),
                "size_bytes": self._registry.size_bytes,
                "quota_bytes": self._registry.quota_bytes,
            },
            "queue": sum(pool.n_waiting for pool in pools),
            "users": _users(pools),
            "too_long": {
                "n": sum(pool.n_too_long for pool in pools),
                "n_tokens": max(pool.longest_refused for pool in pools),
            },
            "rewrite": self._prompts.report(),
        }

    def journal(self, n: int) -> dict[str, Any]:
        """Return the last ``n`` decisions of the journals of all pools, newest first."""
        every = (decision for pool in self._registry.pools for decision in pool.journal.latest(n))
        latest = sorted(every, key=lambda decision: -decision.at)[:n]
        return {"decisions": [decision.to_json() for decision in latest]}

    def _drain(self, request: web.Request) -> dict[str, Any]:
        """Begin or end the drain of the backend that the query names. (A drained backend gets no new requests, and its
        slots are saved.) Raises BadRequest without a name, and NotFound for an unknown one.
        """
        there_are = ", ".join(backend.name for backend in self._registry.backends)
        if not (name := request.query.get("backend", "")):
            raise BadRequest(f"{request.path}?backend=NAME: which backend? Known: {there_are}")
        if (backend := self._registry.backend_named(name)) is None:
            raise NotFound(f"there is no backend {shortened(name)}; known: {there_are}")
        if request.path == "/llamaslot/drain":
            backend.drain.begin()
        else:
            backend.drain.end()
        return {"backend": name, "drain": backend.drain.state, "unsaved": backend.drain.unsaved}

    def _metrics(self) -> web.Response:
        metrics, pools = self._registry.metrics, [pool.status() for pool in self._registry.pools]
        metrics.n_tasks.set(len(asyncio.all_tasks()))
        metrics.n_waiting.set(sum(pool.n_waiting for pool in pools))
        metrics.n_snapshots.set(sum(pool.n_snapshots for pool in pools))
        stores = self._registry.stores.values()
        metrics.bytes_stored.set(self._registry.size_bytes)
        metrics.quota_bytes.set(self._registry.quota_bytes)
        metrics.bytes_added.set(sum(store.catalog.commits.added_bytes for store in stores))
        metrics.saves_differing.set(sum(store.catalog.commits.n_differing for store in stores))
        return web.Response(body=metrics.exposition(), headers={"Content-Type": "text/plain; version=0.0.4"})


def check_method(request: web.Request) -> None:
    """Raise NotAllowed if the request is for one of llamaslot's own pages, and that page does not accept its method."""
    if (described := PATHS.get(request.path)) is None:
        return
    methods = ("POST",) if "post" in described else ("GET", "HEAD")
    if request.method not in methods:
        raise NotAllowed(f"{request.path} takes {' and '.join(methods)}, not {request.method}", methods)


def digits(request: web.Request, name: str, default: int, most: int) -> int:
    """Return the number in the query parameter ``name``, but ``most`` if it is larger, and ``default`` if it is
    missing. Raises BadRequest if the value has anything but digits.
    """
    text = request.query.get(name, str(default))
    if not (text.isascii() and text.isdigit()):
        raise BadRequest(f"{name}={text}: a number is wanted, {most} at most")
    return min(int(text[-_DIGITS:]), most) if len(text.lstrip("0")) <= _DIGITS else most


def _users(pools: list[PoolStatus]) -> list[dict[str, Any]]:
    """Return the load of each user, summed over all pools."""
    found: dict[str, dict[str, Any]] = {}
    for user in (user for pool in pools for user in pool.users):
        sums = found.setdefault(user.id, {"id": user.id, "running": 0, "waiting": 0, "deficit_s": 0.0})
        sums["running"] += user.n_running
        sums["waiting"] += user.n_waiting
        sums["deficit_s"] = round(sums["deficit_s"] + user.deficit_s, 3)
    return list(found.values())


def status_of(backend: Backend) -> dict[str, Any]:
    """Return the present state of a backend and its slots, as JSON for ``/llamaslot/status``; ``http.openapi``
    describes it. It has no tokens or texts from the slots.
    """
    return {**without_slots(backend), "slots": [told for told, _, _ in slots_of(backend)]}


def without_slots(backend: Backend) -> dict[str, Any]:
    """Return a backend's model, health and warnings at present, as JSON."""
    session, table = backend.session, backend.leases.table
    return {
        "name": backend.name,
        "health": backend.health.value,
        "why_down": backend.why_down,
        "outage": asdict(backend.outage) if backend.outage is not None else None,
        "drain": backend.drain.state,
        "model": session.model_name if session else None,
        "n_ctx": table.n_ctx if table else None,
        "cache_kind": table.cache_kind.value if table else None,
        "warnings": list(session.warnings) if session else [],
        "assist": _assist_status(session) if session else None,
    }


def slots_of(backend: Backend) -> Iterator[tuple[dict[str, Any], Slot, Lease | None]]:
    """Yield each slot of a backend: its present state as JSON, the slot itself, and its lease. Yields nothing while
    llama-server chooses the slots. The next slot is computed when the iterator comes to it.
    """
    table = backend.leases.table
    if table is None or not table.is_assisted:
        return
    # An exclusive request has no slot until llama-server has chosen one.
    leases = {
        lease.slot_id: lease
        for lease in backend.leases.leases
        if lease.table is table and lease.slot is not None
    }
    prefills = {
        slot_id: {"n_done": lease.n_done, "n_tokens": lease.request.n_tokens}
        for slot_id, lease in leases.items()
        if lease.is_long
    }
    for slot in table.slots:
        lease = leases.get(slot.id)
        n_tokens, is_dirty = _held(slot.content, lease)
        told = {
            "id": slot.id,
            "state": slot.state.value,
            "n_tokens": n_tokens,
            "is_dirty": is_dirty,
            "is_worth_saving": table.worth.is_worth_saving(slot),
            "prefill": prefills.get(slot.id),
            "user": (lease.request.user.id or None) if lease is not None else None,
        }
        yield told, slot, lease


def _held(content: Content, lease: Lease | None) -> tuple[int, bool]:
    """Return how many tokens of a slot are known, and True if the slot is dirty (no snapshot has all of them).

    For a slot whose request llama-server is computing, these are the tokens of that request's prompt. For another
    leased slot they are the tokens that its lease has recorded.
    """
    if lease is None:
        return content.n_tokens, content.is_dirty
    if lease.is_running and lease.request.n_tokens:
        return lease.request.n_tokens, True
    held = lease.content or NOTHING
    return held.n_tokens, held.is_dirty


def _assist_status(session: ServerSession) -> dict[str, Any]:
    """Return whether llamaslot chooses the slots of a backend; if not, also why, and what the operator can
    do about it.
    """
    if session.aside is None:
        return {"is_on": True, "why": None, "remedy": None}
    return {"is_on": False, "why": session.aside.why, "remedy": session.aside.remedy}
