"""The data and the actions of the operator page, each as a route: requests, history, snapshots, the stream
of changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import orjson
from aiohttp import web
from msgspec import Struct, field

from llamaslot.errors import BadRequest, ClientGone, NotFound, shortened
from llamaslot.fleet.registry import Registry
from llamaslot.http.admin import digits
from llamaslot.http.client_stream import SSE_HEADERS, begin, send
from llamaslot.http.in_flight import Requests
from llamaslot.http.page_state import PageState
from llamaslot.observe.history import KEPT
from llamaslot.observe.series import SPANS
from llamaslot.store.page_listing import MOST, Listing
from llamaslot.store.snapshot_store import SnapshotStore
from llamaslot.tasks import TaskOwner, in_slices

_LONGEST_S = 86_400
_EVERY_S = 1.0
_LEAST_S = 0.5  # between two looks at the state: one takes 1.5 ms with 16 requests in flight, none of it in one piece
_QUIET = 15  # after so many looks without a change, a comment shows that the stream is alive
_HISTORY_S = 1.0  # the sums over time are made again after so long
_KEPT = 16  # events that may wait for a slow viewer; with more it gets the whole state instead
_GIVE_UP_S = 30.0  # a viewer that receives nothing for so long is taken for gone


class PageApi:
    """Answers the requests of the operator page. ``is_admitted`` returns True while a request's key is valid."""

    def __init__(
        self,
        registry: Registry,
        requests: Requests,
        tasks: TaskOwner,
        is_admitted: Callable[[web.Request], bool],
    ) -> None:
        self._registry, self._requests, self._is_admitted = registry, requests, is_admitted
        self._page_state = PageState(registry, requests)
        self.events = PageEvents(self._page_state.state, requests.has_changed, tasks)
        self._listings: dict[str, Listing] = {}
        self._names: dict[str, str] = {}  # of models by their ids in rows, kept while llama-server restarts
        self._n_changes = 0
        self._shared_ended, self._shared_history, self._shared_snapshots = _Shared(), _Shared(), _Shared()

    async def handle(self, request: web.Request) -> web.StreamResponse | None:
        """Answer a request of the operator page (events, history, snapshots, pin, …); None for any other path. Raises
        NotFound and BadRequest, and ClientGone for a stream of events.
        """
        match request.path:
            case "/llamaslot/events":
                seconds = digits(request, "seconds", 0, _LONGEST_S)
                return await self.events.watch(request, seconds or None, partial(self._is_admitted, request))
            case "/llamaslot/activity":
                return _json(await self._activity(request))
            case "/llamaslot/history":
                return _json(await self._history(request))
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

    async def _activity(self, request: web.Request) -> bytes:
        """Return as JSON the requests in flight, the last that have ended, newest first, and today's sums. With
        ``request`` in the query, return all about the latest ended request with that id instead. Raises NotFound and
        BadRequest. Canceling is safe.
        """
        self._requests.digest()
        history, now = self._requests.history, time.monotonic()
        if (id_ := request.query.get("request")) is not None:
            if (found := history.activity(id_)) is None:
                raise NotFound(f"no request {shortened(id_)} is among the last {KEPT} that have ended")
            return orjson.dumps(found.to_json())
        n, after = digits(request, "n", 100, KEPT), digits(request, "after", 0, 10**9)
        running = [self._page_state.flight(flight, now) for flight in self._requests.running.values()]
        today = (await self._page_state.headline(now))["today"]

        def latest() -> tuple[object, ...]:
            its = history.latest
            return n, after, (its[0].serial, its[-1].serial) if its else None

        ended = await self._shared_ended.get(latest, math.inf, partial(self._ended, n, after))
        return orjson.dumps({"in_flight": running, "ended": orjson.Fragment(ended), "today": today})

    async def _ended(self, n: int, after: int) -> bytes:
        latest = [one for one in reversed(self._requests.history.latest) if one.serial > after][:n]
        return b"[%b]" % b",".join([orjson.dumps(activity.row()) async for activity in in_slices(latest)])

    def _cancel(self, request: web.Request) -> dict[str, Any]:
        id_ = _named(request, "request")
        if not self._requests.cancel(id_):
            raise NotFound(f"no request {shortened(id_)} is in flight")
        return {"request": id_}

    # -- history -------------------------------------------------------------------------------------------------

    async def _history(self, request: web.Request) -> bytes:
        """Return sums over time as JSON: one series for all requests, or one for each backend or model; those of the
        last second again if no request has ended since. Raises BadRequest. Canceling is safe.
        """
        span, by = request.query.get("span", "hour"), request.query.get("by", "all")
        if span not in SPANS:
            raise BadRequest(f"span={span}: one of {', '.join(SPANS)}")
        if by not in ("all", "backend", "model"):
            raise BadRequest(f"by={by}: one of all, backend, model")
        self._requests.digest()
        history = self._requests.history

        def latest() -> tuple[object, ...]:
            return span, by, history.latest[-1].serial if history.latest else 0

        return await self._shared_history.get(latest, _HISTORY_S, partial(self._series, span, by))

    async def _series(self, span: str, by: str) -> bytes:
        series, now = self._requests.history.series, time.time()
        backends, models = series.names()
        match by:
            case "all":
                lines = [("", "", "")]
            case "backend":
                lines = [(name, name, "") for name in backends]
            case _:
                lines = [(name, "", name) for name in models]
        told = {
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
        return orjson.dumps(told)

    # -- snapshots -----------------------------------------------------------------------------------------------

    async def _snapshots(self, max_age_s: float) -> bytes:
        """Return the list of snapshots as JSON.

        A list younger than ``max_age_s`` seconds is returned again, so many open pages cost no more than one. It is
        made anew at once if this page has changed a snapshot, or the number or total size of snapshots or a model is
        another. Canceling is safe.
        """

        def holds() -> tuple[object, ...]:
            models = tuple(backend.model_name for backend in self._registry.backends)
            return self._n_changes, self._registry.n_snapshots, self._registry.size_bytes, models

        return await self._shared_snapshots.get(holds, max_age_s, self._listing)

    async def _listing(self) -> bytes:
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
        told = [
            orjson.Fragment(
                orjson.dumps(
                    {
                        **row,
                        "user": users.get(row["id"]),
                        "model_name": self._names.get(row["model"]),
                    }
                )
            )
            async for row in in_slices(rows)
        ]
        return orjson.dumps(
            {
                "n": self._registry.n_snapshots,
                "most": MOST,
                "size_bytes": self._registry.size_bytes,
                "quota_bytes": self._registry.quota_bytes,
                "snapshots": told,
            }
        )

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


class _Shared:
    """The last answer of one kind, for all pages that ask for the same. One answer is made at a time: twenty pages that
    opened together, each with its own, held up a stream for 61 ms.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._last: tuple[float, object, bytes] | None = None  # when it was made, of what, and the answer

    async def get(
        self, made_of: Callable[[], object], max_age_s: float, make: Callable[[], Awaitable[bytes]]
    ) -> bytes:
        """Return the last answer if it was made less than ``max_age_s`` seconds ago and ``made_of()`` has the same
        value as then, else what ``make()`` returns. Canceling is safe.
        """
        async with self._turn:
            now, key = time.monotonic(), made_of()
            if self._last is None or self._last[1] != key or now - self._last[0] >= max_age_s:
                self._last = now, key, await make()
            return self._last[2]


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


# -- the stream of changes -----------------------------------------------------------------------------------------


class Viewer(Struct, eq=False):
    """One client that watches. ``events``: those that wait to be sent to it, None for the end. ``is_behind``: it has
    missed events, so it gets the whole state next. ``may_watch`` is called before each look at the state, because a key
    can be removed while its stream is open.
    """

    may_watch: Callable[[], bool]
    events: asyncio.Queue[bytes | None] = field(default_factory=lambda: asyncio.Queue(_KEPT))
    is_behind: bool = True


class PageEvents:
    """The stream of changes, ``/llamaslot/events``, for all viewers. One task makes the events, and runs only while
    there are viewers. ``state`` yields the whole state, by key. When ``has_changed`` is set, the state is looked at
    earlier than usual.
    """

    def __init__(
        self,
        state: Callable[[], AsyncIterator[tuple[str, Any]]],
        has_changed: asyncio.Event,
        tasks: TaskOwner,
    ) -> None:
        self._state, self._has_changed, self._tasks = state, has_changed, tasks
        self.viewers: dict[Viewer, None] = {}
        self._last: dict[str, bytes] = {}
        self._producer: asyncio.Task[None] | None = None
        self._is_closed = False

    async def watch(
        self,
        request: web.Request,
        seconds: float | None = None,
        may_watch: Callable[[], bool] = lambda: True,
    ) -> web.StreamResponse:
        """Send a viewer the whole state, then its changes: for ``seconds`` (None: until the viewer leaves), and only
        while ``may_watch()`` is True. Raises ClientGone if the viewer has left. Canceling is safe.
        """
        response = web.StreamResponse(headers=SSE_HEADERS)
        await begin(response, request)
        if request.method == "HEAD":
            return response
        viewer = Viewer(may_watch)
        self.viewers[viewer] = None
        if self._last:
            _put(viewer, b"")  # the state is there: it is sent at once
        if self._producer is None:
            self._producer = self._tasks.spawn(self._produce(), "watch for the page")
        try:
            async with asyncio.timeout(seconds):
                while not self._is_closed and (event := await viewer.events.get()) is not None:
                    async with asyncio.timeout(_GIVE_UP_S):
                        await send(response, self._whole(viewer) if viewer.is_behind else event)
        except TimeoutError:
            pass
        finally:
            self._leave(viewer)
        if request.transport is not None and not request.transport.is_closing():
            await response.write_eof()
            return response
        raise ClientGone

    def _leave(self, viewer: Viewer) -> None:
        del self.viewers[viewer]
        if not self.viewers and self._producer is not None:
            self._producer.cancel()
            self._producer, self._last = None, {}

    async def close(self) -> None:
        """End all streams; a stream that is opened later ends at once."""
        self._is_closed = True
        for viewer in self.viewers:
            _put(viewer, None)

    async def _produce(self) -> None:
        """Make events until the last viewer leaves. If the state cannot be told, all streams end: then the pages ask
        again.
        """
        n_quiet = 0
        try:
            while True:
                self._has_changed.clear()
                for viewer in self.viewers:
                    if not viewer.may_watch():
                        _put(viewer, None)
                event = await self._look()
                n_quiet = 0 if event else n_quiet + 1
                if event or n_quiet % _QUIET == 0:
                    # Let the streams of answers go on after each viewer.
                    for viewer in list(self.viewers):
                        _put(viewer, event or b": still here\n\n")
                        await asyncio.sleep(0)
                await asyncio.sleep(_LEAST_S)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_EVERY_S - _LEAST_S):
                        await self._has_changed.wait()
        finally:
            for viewer in self.viewers:
                _put(viewer, None)

    async def _look(self) -> bytes:
        """Return an event with each key whose value has changed since the last look, null for a key that has gone.
        Empty if nothing has changed.
        """
        state = dict[str, bytes]()
        async for key, value in self._state():
            state[key] = orjson.dumps(value)
            await asyncio.sleep(0)
        last, self._last = self._last, state
        changed: dict[str, Any] = {
            key: orjson.Fragment(value) for key, value in state.items() if last.get(key) != value
        }
        changed |= dict.fromkeys(last.keys() - state.keys())
        return _event("change", changed) if changed else b""

    def _whole(self, viewer: Viewer) -> bytes:
        viewer.is_behind = False
        while not viewer.events.empty():
            viewer.events.get_nowait()
        state: dict[str, Any] = {key: orjson.Fragment(value) for key, value in self._last.items()}
        return _event("all", {"now": time.time(), **state})


def _event(name: str, state: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps(state))


def _put(viewer: Viewer, event: bytes | None) -> None:
    """Queue an event for a viewer, without waiting; None ends its stream. A viewer whose queue is full loses its
    events, and gets the whole state as soon as it receives again.
    """
    try:
        viewer.events.put_nowait(event)
    except asyncio.QueueFull:
        viewer.is_behind = event is not None
        while not viewer.events.empty():
            viewer.events.get_nowait()
        viewer.events.put_nowait(event)
