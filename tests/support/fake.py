"""``FakeServer``: a faithful fake llama-server over real sockets, in the test's own event loop.

It does what the real one cannot be made to do: faults on order, hundreds of slots, time by hand. ``test_fake.py`` runs
the same scenario against both, so that they stay alike. It has the methods of ``RealServer``, and more:

``async with FakeServer(tmp_path / "kv", slots=4) as fake:``
    ``fake.slots[2].tokens``, ``.is_processing``; ``await fake.slots()`` is what GET /slots answers;
    ``fake.requests``: all that was sent, and where it landed; ``fake.violations``: what a good proxy never does;
    ``fake.faults``: failures on order; ``fake.pace`` and ``clock``: what work costs, and whose seconds those are;
    ``fake.hold()``, ``fake.step()``, ``fake.go()``: the main loop by hand;
    ``await fake.wait_for(lambda f: f.slots[2].is_processing)``.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
from aiohttp import web

from llamaslot.tasks import TaskOwner
from tests.support.fake_clock import Clock, HandClock, Pace, WallClock
from tests.support.fake_faults import Faults, Hang
from tests.support.fake_http import Seen
from tests.support.fake_model import FakeModel
from tests.support.fake_render import random_name
from tests.support.fake_routes import Routes
from tests.support.fake_state import Engine
from tests.support.fake_types import FakeSlot, Shape

__all__ = ["FakeModel", "FakeServer", "Faults", "HandClock", "Hang", "Pace", "Seen", "Shape", "WallClock"]

_pids = itertools.count(1_000_001)  # above Linux's own: killing one by mistake hits no process


class Slots(list[FakeSlot]):
    """The slots as a list. Calling it returns what GET /slots answers, as ``RealServer.slots()`` does."""

    def __init__(self, server: FakeServer) -> None:
        super().__init__(server.engine.slots)
        self._server = server

    async def __call__(self) -> list[dict[str, Any]]:
        routes, engine = self._server.routes, self._server.engine
        return [routes.slot_json(slot) for slot in engine.slots]


class FakeServer:
    """A fake llama-server. ``context`` is per slot; ``save_dir`` None: started without ``--slot-save-path``."""

    def __init__(
        self,
        save_dir: Path | None,
        *,
        slots: int = 4,
        context: int = 16384,
        batch: int = 2048,
        ubatch: int = 512,
        kind: str = "dense",
        model: FakeModel | None = None,
        port: int | None = None,
        api_key: str | None = None,
        clock: Clock | None = None,
        step_s: float = 0.0,
        gone_s: float = 1.0,
        sps: float = 0.10,
        unified: bool = False,
        bytes_per_token: int = 64,
        answer_tokens: int = 16,
        checkpoints_in_file: bool = True,
        stale_checkpoints: bool = False,
    ) -> None:
        self.save_dir, self.api_key = save_dir, api_key
        self.shape = Shape(
            n_slots=slots,
            n_ctx=context,
            batch=batch,
            ubatch=ubatch,
            kind=kind,
            sps=sps,
            unified=unified,
            checkpoints_in_file=checkpoints_in_file,
            stale_checkpoints=stale_checkpoints,
            bytes_per_token=bytes_per_token,
            answer_tokens=answer_tokens,
        )
        self.model = model or FakeModel()
        self.clock: Clock = clock or WallClock()
        self.pace = Pace(step_s=step_s)
        self.gone_s = gone_s
        self.faults = Faults()
        self.requests: list[Seen] = []
        self.violations: list[str] = []
        self.overrides: dict[
            str, tuple[int, Any]
        ] = {}  # what it answers on a path, as another kind of server
        self.missing = {"/api/chat"}  # routes of other builds
        self.loading = False
        self.port = port or 0
        self.n_starts = 0
        self.started_at = 600_000_000
        self.media_marker = ""
        self.pid = 0
        self.routes = Routes(self)
        self.engine = self._new_engine()
        self.slots = Slots(self)
        self._thawed = asyncio.Event()
        self._thawed.set()
        self._listener: asyncio.Server | None = None
        self._web: web.Server | None = None
        self._tasks = TaskOwner()
        self._handlers: set[asyncio.Task[Any]] = set()
        self._watched: dict[int, tuple[web.BaseRequest, Seen, list[float]]] = {}
        self._hopes: list[tuple[Callable[[FakeServer], Any], asyncio.Future[None]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _new_engine(self) -> Engine:
        engine = Engine(self.shape, self.model, self.clock, self.pace, self.faults, self.violations)
        engine.on_change = self.changed
        return engine

    # ---- life

    async def __aenter__(self) -> FakeServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.kill()

    async def start(self, listening: socket.socket | None = None) -> None:
        """Listen, with empty slots, a new ``media_marker`` and counters at zero. The port stays the same.
        ``listening``: a socket that listens there already.
        """
        assert self._listener is None, "runs already"
        if self.save_dir is not None:
            self.save_dir.mkdir(parents=True, exist_ok=True)
        self.n_starts += 1
        self.started_at += 1
        self.pid = next(_pids)
        self.media_marker = f"<__media_{random_name()}__>"
        self.engine = self._new_engine()
        self.slots = Slots(self)
        self._web = web.Server(
            self._handle,
            request_factory=_request,
            keepalive_timeout=5.0,
            access_log=None,
            logger=logging.getLogger("tests.fake"),
        )
        loop = asyncio.get_running_loop()
        if listening is None:
            self._listener = await loop.create_server(self._web, "127.0.0.1", self.port)
        else:
            self._listener = await loop.create_server(self._web, sock=listening)
        self.port = self._listener.sockets[0].getsockname()[1]
        self._tasks.spawn(self.engine.run(), "fake main loop")
        self._tasks.spawn(self._watch_clients(), "fake client watch")

    async def kill(self) -> None:
        """Die at once: every connection is reset, nothing is saved. Idempotent."""
        if self._listener is None or self._web is None:
            return
        self._listener.close()
        self._listener = None
        for connection in self._web.connections:
            if connection.transport is not None:
                connection.transport.abort()
        for handler in list(self._handlers):
            handler.cancel()
        await self._tasks.close()
        await self._web.shutdown(0.1)
        self._web = None
        self._watched.clear()

    die = kill
    stop = kill

    async def restart(self, model: FakeModel | None = None) -> None:
        """Die and start again on the same port, with other weights if ``model`` is given. The port is never closed:
        clients that connect meanwhile wait.
        """
        kept = None
        if self._listener is not None:
            kept = socket.fromfd(self._listener.sockets[0].fileno(), socket.AF_INET, socket.SOCK_STREAM)
        await self.kill()
        if model is not None:
            self.model = model
        await self.start(kept)

    # ---- the main loop by hand

    def hold(self) -> None:
        """Compute no further step until ``step`` or ``go``. Slot actions and questions are still answered."""
        self.engine.hold()

    def go(self) -> None:
        self.engine.release()

    async def step(self, n: int = 1) -> None:
        """Compute ``n`` steps while held, as soon as there is something to compute."""
        until = self.engine.n_steps + n
        self.engine.allow(n)
        await self.wait_for(lambda f: f.engine.n_steps >= until and not f.engine.is_stepping)

    def freeze(self) -> None:
        """As SIGSTOP: connections are accepted by the kernel, and nothing is answered until ``thaw``."""
        self._thawed.clear()
        self.hold()

    def thaw(self) -> None:
        self._thawed.set()
        self.go()

    # ---- observing

    async def wait_for(self, condition: Callable[[FakeServer], Any], timeout_s: float = 10.0) -> None:
        """Wait until ``condition(self)`` is true; it is called after each change. Raises TimeoutError that names the
        state.

        Canceling is safe.
        """
        if condition(self):
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        hope = (condition, future)
        self._hopes.append(hope)
        try:
            async with asyncio.timeout(timeout_s):
                await future
        except TimeoutError:
            raise TimeoutError(f"not seen within {timeout_s} s: {self!r}") from None
        finally:
            self._hopes.remove(hope)

    def changed(self) -> None:
        for condition, future in self._hopes:
            if not future.done() and condition(self):
                future.set_result(None)

    async def metrics(self) -> dict[str, float]:
        """The counters of /metrics, without asking over HTTP."""
        return {f"llamacpp:{name}": value for name, value in self.engine.metrics().items()}

    async def post(self, path: str, body: Any) -> Any:
        """POST JSON on a fresh connection; the JSON of the answer. aiohttp.ClientResponseError if not 2xx."""
        async with aiohttp.request("POST", self.url + path, json=body, raise_for_status=True) as answer:
            return await answer.json()

    async def get(self, path: str) -> Any:
        """GET over HTTP; the JSON of the answer."""
        async with aiohttp.request("GET", self.url + path, raise_for_status=True) as answer:
            return await answer.json()

    def sent(self, path: str | None = None, *, action: str | None = None) -> list[Seen]:
        """The requests to ``path``, or with a slot ``action``, in order."""
        return [
            seen
            for seen in self.requests
            if (path is None or seen.path == path) and (action is None or seen.action == action)
        ]

    def __repr__(self) -> str:
        state = "loading" if self.loading else "up" if self._listener else "down"
        last = self.requests[-1] if self.requests else None
        return (
            f"<FakeServer {self.url} {state} {list(self.slots)} deferred={len(self.engine.deferred)} "
            f"requests={len(self.requests)} last={last and (last.method, last.path, last.slot)}>"
        )

    # ---- HTTP

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        try:
            await self._thawed.wait()
            return await self.routes.handle(request)
        finally:
            self._handlers.discard(task)

    @contextlib.contextmanager
    def watch(self, request: web.BaseRequest, seen: Seen) -> Iterator[None]:
        """Detect that the client of the tasks of ``request`` has gone, as late as llama-server does."""
        self._watched[id(seen)] = (request, seen, [self.clock.now()])
        try:
            yield
        finally:
            self._watched.pop(id(seen), None)

    async def _watch_clients(self) -> None:
        """Detect clients that have gone, after a whole second in which the server has sent no result.

        Each token of any stream and each answer to GET /slots starts that second again.
        """
        while True:
            await self.clock.sleep(self.gone_s / 8)
            now = self.clock.now()
            for request, seen, since in list(self._watched.values()):
                if now - max(since[0], self.engine.last_result_s) < self.gone_s:
                    continue
                since[0] = now
                if request.transport is None or request.transport.is_closing():
                    seen.client_left = True
                    self.engine.cancel(seen.tasks)
                    seen.tasks[0].results.put_nowait(None)


def _request(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
    loop = asyncio.get_running_loop()
    return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=1 << 30)
