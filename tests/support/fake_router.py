"""A fake llama-server in router mode: a ``FakeServer`` for each loaded model, behind one address.

As in tools/server/server-models.cpp: a request for a model that is not loaded loads it, unless it says
``autoload=false``. The least recently used model without a request is unloaded to make room.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from llamaslot.tasks import TaskOwner, outcome
from tests.support.fake import FakeModel, FakeServer, Hang
from tests.support.real import free_port

_uses = itertools.count(1)
MISSING = "model name is missing from the request"


class Child:
    """A model, and its process while it is loaded. ``state``: the word with which the router reports it."""

    def __init__(self, name: str, server: FakeServer, sleep_s: float | None) -> None:
        self.name, self.server, self.sleep_s = name, server, sleep_s
        self.state, self.used_at, self.n_requests, self.n_loads = "unloaded", 0, 0, 0
        self.fails = False
        self.meta: dict[str, Any] = {}
        self.changing: asyncio.Task[web.HTTPException | None] | None = None  # while it is loaded or woken

    @property
    def is_running(self) -> bool:
        return self.state in ("loading", "loaded", "sleeping")


class FakeRouter:
    """``models``: by name. ``max_models``: how many may be loaded, 0 for any number. ``woken``: the requests that have
    loaded or woken a model.
    """

    def __init__(
        self,
        save_dir: Path,
        models: Mapping[str, FakeModel],
        *,
        max_models: int = 1,
        has_events: bool = True,
        sleep_s: float | None = None,
        port: int | None = None,
        **fake: Any,
    ) -> None:
        self.children = {
            name: Child(name, FakeServer(save_dir, port=free_port(), model=model, **fake), sleep_s)
            for name, model in models.items()
        }
        self.max_models, self.has_events = max_models, has_events
        self.list_status = 200  # of the answer to GET /models; 0: it closes the connection instead
        self.load_hang: Hang | None = None  # loading a model waits until it is released
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.woken: list[str] = []
        self.requests: list[tuple[str, str]] = []
        self._changed = asyncio.Condition()
        self._listeners: list[asyncio.Queue[bytes]] = []
        self._tasks = TaskOwner()
        self._runner: web.AppRunner | None = None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> FakeRouter:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def start(self) -> None:
        """Listen; no model is loaded."""
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None), connector=aiohttp.TCPConnector(force_close=True)
        )
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def kill(self) -> None:
        """It and its models are gone. Idempotent."""
        if self._runner is not None:
            for listener in self._listeners:
                listener.put_nowait(b"")
            await self._runner.cleanup()
            self._runner = None
        if self._session is not None:
            await self._session.close()
        await self._tasks.close()
        for child in self.children.values():
            await child.server.kill()
            child.state = "unloaded"

    # -- models --------------------------------------------------------------------------------------------------

    async def _set(self, child: Child, state: str) -> None:
        child.state = state
        event = {"model": child.name, "event": "status_change", "data": {"status": state}}
        for listener in self._listeners:
            listener.put_nowait(b"data: %b\n\n" % orjson.dumps(event))
        async with self._changed:
            self._changed.notify_all()

    async def tell(self) -> None:
        """Send an event, after which clients ask for the list of models."""
        await self._set(child := self._all[0], child.state)

    async def load(self, child: Child) -> None:
        """Load a model, and wait until it is loaded. The least recently used model without a request makes room. As in
        the real router, which loads in a thread of its own, a load goes on if its client leaves.
        """
        await self._change(child, partial(self._load, child))

    async def _change(self, child: Child, change: Callable[[], Awaitable[None]]) -> None:
        if child.changing is None or child.changing.done():
            child.changing = self._tasks.spawn(outcome(change, web.HTTPException), f"{child.name} changes")
        if (fault := await asyncio.shield(child.changing)) is not None:
            raise web.HTTPInternalServerError(text=fault.text)

    async def _load(self, child: Child) -> None:
        while not child.is_running:
            running = [its for its in self.children.values() if its.is_running]
            if self.max_models and len(running) >= self.max_models:
                idle = [its for its in running if not its.n_requests and its.state != "loading"]
                if idle:
                    await self.unload(min(idle, key=lambda its: its.used_at))
                else:
                    async with self._changed:
                        await self._changed.wait()
                continue
            await self._set(child, "loading")
            if child.fails:
                await self._set(child, "unloaded")
                raise web.HTTPInternalServerError(text=f"model name={child.name} failed to load")
            if self.load_hang is not None:
                await self.load_hang.wait()
            await child.server.start()
            child.meta = (await child.server.get("/v1/models"))["data"][0]["meta"]
            child.used_at, child.n_loads = next(_uses), child.n_loads + 1
            await self._set(child, "loaded")

    async def _wake(self, child: Child) -> None:
        await self._set(child, "loading")
        await asyncio.sleep(0.05)  # for whatever follows the events
        await self._set(child, "loaded")

    async def unload(self, child: Child) -> None:
        """End the model's process, and its slots with it."""
        await child.server.kill()
        await self._set(child, "unloaded")

    async def fall_asleep(self, name: str) -> None:
        """Let a model sleep as after ``--sleep-idle-seconds``: the process stays, its slots are empty."""
        child = self.children[name]
        for slot in child.server.engine.slots:
            slot.clear()
        await self._set(child, "sleeping")

    # -- HTTP ----------------------------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path_qs))
        raw = await request.read()
        match request.method, request.path:
            case "GET", "/health":
                return web.json_response({"status": "ok"})
            case "GET", "/models" if self.list_status != 200 and "model" not in request.query:
                if not self.list_status and request.transport is not None:
                    request.transport.abort()
                return _error("the list is not there", 500)
            case "GET", "/models" | "/v1/models":
                return web.json_response({"object": "list", "data": [self._entry(its) for its in self._all]})
            case "GET", "/models/sse" if self.has_events:
                return await self._events(request)
            case "GET", "/props" if "model" not in request.query:
                return web.json_response(
                    {
                        "role": "router",
                        "max_instances": self.max_models,
                        "models_autoload": True,
                        "model_path": "none",
                    }
                )
            case "POST", "/models/unload":
                child = self.children[orjson.loads(raw)["model"]]
                await self.unload(child)
                return web.json_response({"success": True})
        name = (
            orjson.loads(raw).get("model") if request.method == "POST" and raw else request.query.get("model")
        )
        if not name:
            return _error(MISSING)
        if (asked := self.children.get(name)) is None:
            return _error(f"model '{name}' not found")
        child = asked
        may_load = request.query.getall("autoload", ["true"])[-1] in ("true", "1")
        if not child.is_running and not may_load:
            return _error("model is not loaded")
        if not child.is_running:
            self.woken.append(f"{name}: {request.method} {request.path}")
            await self.load(child)
        return await self._passed(request, raw, child)

    @property
    def _all(self) -> list[Child]:
        return list(self.children.values())

    def _entry(self, child: Child) -> dict[str, Any]:
        args = ["llama-server", "--alias", child.name]
        if child.sleep_s is not None:
            args += ["--sleep-idle-seconds", str(child.sleep_s)]
        entry: dict[str, Any] = {
            "id": child.name,
            "aliases": [f"{child.name}-alias"],
            "object": "model",
            "owned_by": "llamacpp",
        }
        if child.state in ("loaded", "sleeping"):
            entry["meta"] = child.meta
        return {**entry, "status": {"value": child.state, "args": args}}

    async def _events(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        queue = asyncio.Queue[bytes]()
        self._listeners.append(queue)
        try:
            while event := await queue.get():
                await response.write(event)
        finally:
            self._listeners.remove(queue)
        return response

    async def _passed(self, request: web.Request, raw: bytes, child: Child) -> web.StreamResponse:
        if child.state == "sleeping" and request.path not in ("/props", "/metrics", "/health"):
            self.woken.append(f"{child.name}: {request.method} {request.path}")
            await self._change(child, partial(self._wake, child))
        if request.method == "POST":
            child.used_at = next(_uses)
        child.n_requests += 1
        try:
            return await self._proxied(request, raw, child)
        finally:
            child.n_requests -= 1
            with contextlib.suppress(asyncio.CancelledError):
                async with self._changed:
                    self._changed.notify_all()

    async def _proxied(self, request: web.Request, raw: bytes, child: Child) -> web.StreamResponse:
        assert self._session is not None
        url = f"{child.server.url}{request.path_qs}"
        headers = (
            {"Content-Type": request.headers["Content-Type"]} if "Content-Type" in request.headers else {}
        )
        try:
            async with self._session.request(
                request.method, url, data=raw or None, headers=headers
            ) as answer:
                if request.path == "/props" and answer.status == 200:
                    return web.json_response(
                        {**await answer.json(), "is_sleeping": child.state == "sleeping"}
                    )
                kept = {"Content-Type": answer.headers["Content-Type"]}
                response = web.StreamResponse(status=answer.status, headers=kept)
                await response.prepare(request)
                async for piece in answer.content.iter_any():
                    await response.write(piece)
        except aiohttp.ClientError as error:
            return _error(f"proxy error: {error}", 500)
        return response


def _error(message: str, status: int = 400) -> web.Response:
    kind = "invalid_request_error" if status == 400 else "server_error"
    return web.json_response({"error": {"code": status, "message": message, "type": kind}}, status=status)
