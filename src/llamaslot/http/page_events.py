"""``/llamaslot/events``: what goes on in llamaslot, as server-sent events. One task makes the events for all viewers.
It runs only while there are viewers.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

import orjson
from aiohttp import web
from msgspec import Struct, field

from llamaslot.errors import ClientGone
from llamaslot.http.client_stream import SSE_HEADERS, begin, send
from llamaslot.tasks import TaskOwner

_EVERY_S = 1.0
_LEAST_S = 0.5  # between two looks at the state: one takes 1.5 ms with 16 requests in flight
_QUIET = 15  # after so many looks without a change, a comment shows that the stream is alive
_KEPT = 16  # events that may wait for a slow viewer; with more it gets the whole state instead
_GIVE_UP_S = 30.0  # a viewer that receives nothing for so long is taken for gone


class Viewer(Struct, eq=False):
    """One client that watches. ``events``: those that wait to be sent to it, None for the end. ``is_behind``: it has
    missed events, so it gets the whole state next. ``may_watch`` is called before each look at the state, because a key
    can be removed while its stream is open.
    """

    may_watch: Callable[[], bool]
    events: asyncio.Queue[bytes | None] = field(default_factory=lambda: asyncio.Queue(_KEPT))
    is_behind: bool = True


class PageEvents:
    """The stream of changes for all viewers. ``state`` returns the whole state, by key. When ``has_changed`` is set,
    the state is looked at earlier than usual.
    """

    def __init__(
        self, state: Callable[[], dict[str, Any]], has_changed: asyncio.Event, tasks: TaskOwner
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

    # -- the producer --------------------------------------------------------------------------------------------

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
                event = self._look()
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

    def _look(self) -> bytes:
        """Return an event with each key whose value has changed since the last look, null for a key that has gone.
        Empty if nothing has changed.
        """
        state = {key: orjson.dumps(value) for key, value in self._state().items()}
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
