"""The data and the actions of the operator page, each as a route: requests, history, snapshots, the stream
of changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import orjson
from aiohttp import web

from llamaslot.errors import BadRequest, NotFound, shortened
from llamaslot.fleet.registry import Registry
from llamaslot.http.admin import digits
from llamaslot.http.in_flight import Requests
from llamaslot.http.page_events import PageEvents
from llamaslot.http.page_state import PageState
from llamaslot.observe.history import KEPT
from llamaslot.observe.series import SPANS
from llamaslot.store.listing import MOST, Listing
from llamaslot.store.snapshot_store import SnapshotStore
from llamaslot.tasks import in_slices

_LONGEST_S = 86_400


class PageApi:
    """Answers the requests of the operator page. ``is_admitted`` returns True while a request's key is valid."""

    def __init__(
        self,
        registry: Registry,
        requests: Requests,
        events: PageEvents,
        is_admitted: Callable[[web.Request], bool],
    ) -> None:
        self._registry, self._requests, self._events = registry, requests, events
        self._is_admitted = is_admitted
        self._page_state = PageState(registry, requests)
        self._listings: dict[str, Listing] = {}
        self._names: dict[str, str] = {}  # of models by their ids in rows, kept while llama-server restarts
        # The last list of snapshots: when it was made, what it was made of, and the list as JSON.
        self._listed: tuple[float, tuple[object, ...], bytes] | None = None
        self._n_changes = 0

    async def handle(self, request: web.Request) -> web.StreamResponse | None:
        """Answer a request of the operator page (events, history, snapshots, pin, …); None for any other path. Raises
        NotFound and BadRequest, and ClientGone for a stream of events.
        """
        match request.path:
            case "/llamaslot/events":
                seconds = digits(request, "seconds", 0, _LONGEST_S)
                return await self._events.watch(request, seconds or None, partial(self._is_admitted, request))
            case "/llamaslot/activity":
                return _answer(await self._activity(request))
            case "/llamaslot/history":
                return _answer(await self._history(request))
            case "/llamaslot/snapshots":
                return _json(await self._snapshots(digits(request, "max_age_s", 0, _LONGEST_S)))
            case "/llamaslot/cancel":
                return _answer(self._cancel(request))
            case "/llamaslot/pin" | "/llamaslot/unpin" | "/llamaslot/delete":
                try:
                    return _answer(await self._change(request))
                finally:
                    self._n_changes += 1
            case _:
                return None

    # -- requests ------------------------------------------------------------------------------------------------

    async def _activity(self, request: web.Request) -> dict[str, Any]:
        """Return the requests in flight, the last that have ended, newest first, and today's sums. With ``request`` in
        the query, return all about the latest ended request with that id instead. Raises NotFound. Canceling is safe.
        """
        self._requests.digest()
        history, now = self._requests.history, time.monotonic()
        if (id_ := request.query.get("request")) is not None:
            if (found := history.activity(id_)) is None:
                raise NotFound(f"no request {shortened(id_)} is among the last {KEPT} that have ended")
            return found.to_json()
        n, after = digits(request, "n", 100, KEPT), digits(request, "after", 0, 10**9)
        latest = [activity for activity in reversed(history.latest) if activity.serial > after][:n]
        running = [self._page_state.flight(flight, now) for flight in self._requests.running.values()]
        ended = [activity.row() async for activity in in_slices(latest)]
        return {"in_flight": running, "ended": ended, "today": self._page_state.headline(now)["today"]}

    def _cancel(self, request: web.Request) -> dict[str, Any]:
        id_ = _named(request, "request")
        if not self._requests.cancel(id_):
            raise NotFound(f"no request {shortened(id_)} is in flight")
        return {"request": id_}

    # -- history -------------------------------------------------------------------------------------------------

    async def _history(self, request: web.Request) -> dict[str, Any]:
        """Return sums over time: one series for all requests, or one for each backend or model. Raises BadRequest.
        Canceling is safe.
        """
        span, by = request.query.get("span", "hour"), request.query.get("by", "all")
        if span not in SPANS:
            raise BadRequest(f"span={span}: one of {', '.join(SPANS)}")
        self._requests.digest()
        series, now = self._requests.history.series, time.time()
        backends, models = series.names()
        match by:
            case "all":
                lines = [("", "", "")]
            case "backend":
                lines = [(name, name, "") for name in backends]
            case "model":
                lines = [(name, "", name) for name in models]
            case _:
                raise BadRequest(f"by={by}: one of all, backend, model")
        return {
            "span": span,
            "by": by,
            "now": now,
            "span_s": SPANS[span][0],
            "step_s": SPANS[span][1],
            "lines": [
                {
                    "name": name,
                    "points": [
                        {"at": at, **sums.to_json()}
                        async for at, sums in in_slices(series.points(span, now, backend, model))
                    ],
                }
                for name, backend, model in lines
            ],
        }

    # -- snapshots -----------------------------------------------------------------------------------------------

    async def _snapshots(self, max_age_s: float) -> bytes:
        """Return the list of snapshots as JSON.

        A list younger than ``max_age_s`` seconds is returned again, so many open pages cost no more than one. It is
        made anew at once if this page has changed a snapshot, or the number or total size of snapshots or a model is
        another. Canceling is safe.
        """
        models = tuple(backend.model_name for backend in self._registry.backends)
        holds = self._n_changes, self._registry.n_snapshots, self._registry.size_bytes, models
        now = time.monotonic()
        if self._listed is not None and self._listed[1] == holds and now - self._listed[0] < max_age_s:
            return self._listed[2]
        listed = orjson.dumps(await self._listing())
        self._listed = now, holds, listed
        return listed

    async def _listing(self) -> dict[str, Any]:
        self._requests.digest()
        users = self._requests.history.owners
        stores = list(self._registry.stores.values())
        self._listings = {store.name: self._listings.get(store.name) or Listing(store) for store in stores}
        rows = [row for listing in list(self._listings.values()) for row in await listing.rows()]
        self._names |= {
            row["model"]: backend.model_name
            for row in rows
            for backend in self._registry.backends
            if backend.model_name is not None and row["is_served"]
            if backend.store is not None and row["id"] in _usable(backend.leases.table)
        }
        for row in rows:
            row["user"] = users.get(row["id"])
            row["model_name"] = self._names.get(row["model"])
        return {
            "n": self._registry.n_snapshots,
            "most": MOST,
            "size_bytes": self._registry.size_bytes,
            "quota_bytes": self._registry.quota_bytes,
            "snapshots": rows,
        }

    async def _change(self, request: web.Request) -> dict[str, Any]:
        """Pin, unpin or delete a snapshot, by the request's path. Raises NotFound and BadRequest."""
        id_ = _named(request, "snapshot")
        if (store := self._store_of(id_)) is None:
            raise NotFound(f"there is no snapshot {shortened(id_)}")
        snapshot = store.catalog.snapshots[id_]
        if request.path == "/llamaslot/delete":
            await store.catalog.drop(id_)
            return {"snapshot": id_, "is_pinned": None}
        is_pinned = request.path == "/llamaslot/pin"
        if snapshot.is_pinned != is_pinned or snapshot.is_prewarmed:  # then it becomes the user's own pin
            snapshot = await store.catalog.change_kind(id_, snapshot.kind, is_pinned=is_pinned)
            for backend in self._registry.backends:
                if (table := backend.leases.table) is not None and table.has_snapshot(id_):
                    table.kind_changed(snapshot)
        return {"snapshot": id_, "is_pinned": is_pinned}

    def _store_of(self, id_: str) -> SnapshotStore | None:
        return next(
            (store for store in self._registry.stores.values() if id_ in store.catalog.snapshots), None
        )


def _usable(table: Any) -> Any:
    return table.model_snapshots.snapshots if table is not None else ()


def _named(request: web.Request, what: str) -> str:
    """Return the query parameter ``what``: the id of a request or snapshot. Raises BadRequest if it is missing."""
    if not (id_ := request.query.get(what, "")):
        raise BadRequest(f"{request.path}?{what}=ID: which {what}?")
    return id_


def _answer(told: dict[str, Any]) -> web.Response:
    return _json(orjson.dumps(told))


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json", charset="utf-8")
