"""llamaslot in the test's own loop, in front of the fake server, started as ``llamaslot serve`` starts it.

``async with served(tmp_path, slots=2) as it:``
    ``it.fake``: the fake llama-server; ``it.backend``: what llamaslot has made of it; ``it.url``: where clients ask;
    ``await it.ask(prompt=…)``, ``await it.chat(text)``: one request, read to its end, as bytes and parsed;
    ``async with it.asking(body) as answer``: one that is looked at while it runs, and left by leaving the block.

At the end nothing may be left: every slot is given back, the queue is empty, there is no half-written file, and the
fake has seen nothing that a good proxy never does.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import random
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from llamaslot.backend.backend import Backend
from llamaslot.backend.health import Health
from llamaslot.config.load import Config
from llamaslot.fleet.pool import Pool
from llamaslot.fleet.registry import Registry
from llamaslot.http.serve import listening
from tests.support import models
from tests.support.answers import Answer
from tests.support.fake import FakeServer
from tests.support.fake_model import FakeModel, pack
from tests.support.real import free_port
from tests.support.stack import without_backend

CHAT, TEXT, NATIVE = "/v1/chat/completions", "/v1/completions", "/completion"
PATIENCE_S = 30.0  # on a busy machine

Settings = Mapping[str, Any]

#: Nothing happens by itself unless a test asks for it: no idle saves, no comments, no steps of its own.
QUIET: Settings = {
    "store": {"idle_save_s": 3600, "quota": "1GiB"},
    "stream": {"keepalive_s": 3600},
    "prefill": {"chunk_threshold_s": 3600},
    "routing": {"small_prompt_tokens": 100},
    "shutdown": {"save_s": 5, "drain_s": 2},
}


def of_kind(kind: str, directory: Path) -> dict[str, Any]:
    """The arguments that make a fake of this kind of model. For a sliding window there is a GGUF file with
    its length.
    """
    return {"kind": kind, **({"model": FakeModel(path=str(models.swa(directory)))} if kind == "swa" else {})}


def letters(seed: int, n: int) -> str:
    """``n`` tokens that share nothing with those of another seed."""
    rng = random.Random(seed if seed >= 0 else repr(seed))  # an int seeds with its absolute value
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=n))


def right(fake: FakeServer, prompt: str, n: int = 4) -> str:
    """The answer of the model that runs now if everything is computed from nothing."""
    model, tokens = fake.model, pack(fake.model.tokenize(prompt))
    ids = []
    for _ in range(n):
        ids.append(model.next_token(tokens, frozenset({model.weights})))
        tokens += pack(ids[-1:])
    return model.detokenize(ids)


async def line_with(response: aiohttp.ClientResponse, text: str) -> str:
    """Read a stream up to the line that contains ``text``, and return that line. AssertionError if the stream ends
    without it.
    """
    lines = []
    async with asyncio.timeout(PATIENCE_S):
        async for line in response.content:
            lines.append(line.decode().rstrip())
            if text in lines[-1]:
                return lines[-1]
    raise AssertionError(f"no {text!r} in {lines}")


@dataclass(kw_only=True)
class Front:
    """llamaslot in the test's own loop, and its clients."""

    config: Config
    session: aiohttp.ClientSession
    save_dir: Path
    registry: Registry = field(init=False)
    _running: contextlib.AsyncExitStack = field(init=False, default_factory=contextlib.AsyncExitStack)

    @property
    def url(self) -> str:
        return f"http://{self.config.listen.host}:{self.config.listen.port}"

    @property
    def pool(self) -> Pool:
        return self.registry.pools[0]

    @property
    def backend(self) -> Backend:
        return self.registry.backends[0]

    # -- life ----------------------------------------------------------------------------------------------------

    async def start(self, *, wait: bool = True) -> None:
        self.registry = Registry.of(self.config)
        await self.registry.open()
        self._running.push_async_callback(self._close)
        front = await self._running.enter_async_context(listening(self.config, self.registry))
        await front.load()
        self.registry.start()
        if wait:
            await self.until(lambda: self.backend.health is Health.UP)

    async def stop(self) -> None:
        """Stop llamaslot as ``serve`` ends."""
        await self._running.aclose()

    async def _close(self) -> None:
        await self.registry.close(self.config.shutdown.save_s)

    async def restart(self) -> None:
        """End llamaslot and start another one."""
        await self.stop()
        await self.start()

    async def until(self, condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> None:
        """Wait until ``condition()`` is true, for conditions without an event. Raises AssertionError with the state
        after ``timeout_s``.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():  # noqa: ASYNC110  # llamaslot has no event for it
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise AssertionError(f"never: {self.readout()}") from None

    def readout(self) -> str:
        table = self.backend.leases.table
        return str(table.slots if table else self.backend.health)

    async def at_rest(self) -> None:
        """Wait until every slot is given back and no request waits."""

        def rests() -> bool:
            dispatcher = self.pool.dispatcher
            table = self.backend.leases.table
            slots = table.slots if table else []
            return not (dispatcher.n_waiting or dispatcher.leases) and all(slot.is_idle for slot in slots)

        await self.until(rests)

    # -- clients -------------------------------------------------------------------------------------------------

    async def send(
        self,
        method: str,
        path: str,
        *,
        data: bytes | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        to: str | None = None,
    ) -> Answer:
        """Any request, read to its end. ``to``: another server than llamaslot."""
        if body is not None:
            data, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})}
        # aiohttp warns of bytes over 1 MiB
        async with self.session.request(
            method,
            (to or self.url) + path,
            data=io.BytesIO(data) if data is not None else None,
            headers=headers,
        ) as response:
            return Answer(response.status, response.headers, await response.read())

    async def post(self, path: str, body: Any, *, to: str | None = None, **headers: str) -> Answer:
        return await self.send("POST", path, body=body, headers=headers, to=to)

    async def get(self, path: str) -> Answer:
        return await self.send("GET", path)

    async def ask(
        self, prompt: Any, *, path: str = NATIVE, n: int = 4, to: str | None = None, **more: Any
    ) -> Answer:
        """A completion of ``n`` tokens."""
        limit = {"n_predict": n} if path == NATIVE else {"max_tokens": n}
        return await self.post(path, {"prompt": prompt, **limit, "temperature": 0, **more}, to=to)

    async def chat(self, text: str, *, n: int = 4, **more: Any) -> Answer:
        messages = [{"role": "user", "content": text}]
        return await self.post(CHAT, {"messages": messages, "max_tokens": n, "temperature": 0, **more})

    @contextlib.asynccontextmanager
    async def asking(
        self, prompt: Any, *, path: str = NATIVE, n: int = 4, **more: Any
    ) -> AsyncIterator[asyncio.Task[Answer]]:
        """A context manager for a completion that runs in its block. Leaving the block before the answer's end closes
        the connection.
        """
        task = spawn(self.ask(prompt, path=path, n=n, **more))
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.wait({task})

    @contextlib.asynccontextmanager
    async def streaming(
        self, prompt: Any, *, path: str = NATIVE, n: int = 4, **more: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A context manager for a stream whose headers have come. Leaving the block before the stream's end closes the
        connection.
        """
        limit = {"n_predict": n} if path == NATIVE else {"max_tokens": n}
        body = {"prompt": prompt, **limit, "temperature": 0, "stream": True, **more}
        async with self.session.post(self.url + path, json=body) as response:
            yield response

    # -- questions -----------------------------------------------------------------------------------------------

    async def metrics(self) -> dict[str, float]:
        """llamaslot's own samples, by name with labels, without the label of the only backend."""
        lines = (await self.get("/llamaslot/metrics")).raw.decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if line and line[0] != "#")
        return {without_backend(name): float(value) for name, _, value in pairs}

    async def count(self, name: str) -> float:
        """The value of one of llamaslot's own counters, 0 if it was not counted yet."""
        return (await self.metrics()).get(f"llamaslot_{name}", 0.0)

    def files(self) -> list[Path]:
        """The names of the snapshots in the directory."""
        return sorted(self.save_dir.glob("*.kv"))

    async def saved(self) -> None:
        """Wait until no file is half written, and all saved snapshots are listed. Both go on after the answer."""
        await self.until(lambda: not self._parts())
        await self.backend.executor.saving.settle()

    def check(self) -> None:
        """Raise AssertionError if something is left."""
        self.pool.dispatcher.check()
        assert not self._parts(), f"{self._parts()}, {self.pool.dispatcher.journal.latest(5)}"

    def _parts(self) -> list[str]:
        """The names of half-written files."""
        return [part.name for part in self.save_dir.glob("*.part")]


def _is_busy(n_slots: int, fake: FakeServer) -> bool:
    return sum(slot.is_processing for slot in fake.slots) == n_slots


@dataclass(kw_only=True)
class Served(Front):
    """llamaslot in front of a fake llama-server; see the module."""

    fake: FakeServer

    def readout(self) -> str:
        return f"{super().readout()}, {self.fake!r}"

    @contextlib.asynccontextmanager
    async def busy(self, n_slots: int = 1) -> AsyncIterator[list[asyncio.Task[Answer]]]:
        """In the block ``n_slots`` slots work for other clients, whose answers go on with ``fake.go()``."""
        self.fake.hold()
        async with contextlib.AsyncExitStack() as stack:
            others = []
            for n in range(1, n_slots + 1):
                others.append(await stack.enter_async_context(self.asking(letters(-n, 200))))
                await self.fake.wait_for(partial(_is_busy, n))
            yield others

    def n_computed(self, *texts: str) -> int:
        """How many tokens the fake has computed so far of prompts that begin like one of ``texts`` (their first 100
        letters), also for clients that have left.
        """
        starts = tuple(pack(self.fake.model.tokenize(text[:100])) for text in texts)
        every = (task for seen in self.fake.requests for task in seen.tasks)
        return sum(task.n_computed for task in every if task.tokens.startswith(starts))

    def check(self) -> None:
        """Also raise AssertionError if llamaslot has done something that a good proxy never does."""
        assert self.fake.violations == [], self.fake.violations
        super().check()


def spawn(coroutine: Any) -> asyncio.Task[Any]:
    """Start a client as a task. The caller awaits or cancels it."""
    return asyncio.get_running_loop().create_task(coroutine)


def configured(directory: Path, backends: list[dict[str, Any]], settings: Settings) -> Config:
    """The configuration that a file with these backends and settings gives. ``settings`` replace those of ``QUIET``."""
    sections: dict[str, Any] = {name: dict(values) for name, values in QUIET.items()}
    for name, values in settings.items():
        if isinstance(values, Mapping):
            sections.setdefault(name, {}).update(values)
        else:
            sections[name] = values
    sections["store"]["meta_dir"] = str(directory / "meta")
    sections.setdefault("listen", {})["port"] = free_port()
    (directory / "meta").mkdir(parents=True, exist_ok=True)
    return Config.model_validate({"backends": backends, **sections}, context={"directory": directory})


def with_one_backend(directory: Path, url: str, save_dir: Path | None, settings: Settings) -> Config:
    """As ``configured``, with one backend. ``settings["backend"]``: more of the backend's keys."""
    backend: dict[str, Any] = {"name": "gpu0", "url": url}
    if save_dir is not None:
        backend["slot_save_path"] = str(save_dir)
    backend |= settings.get("backend", {})
    rest = {name: values for name, values in settings.items() if name != "backend"}
    return configured(directory, [backend], rest)


@contextlib.asynccontextmanager
async def served(
    directory: Path,
    settings: Settings | None = None,
    *,
    wait: bool = True,
    has_save_path: bool = True,
    answers_at: str | None = None,
    **fake: Any,
) -> AsyncIterator[Served]:
    """A fake server and llamaslot in front of it; see the module.

    ``settings`` go over ``QUIET``; ``wait`` False: neither is started. ``has_save_path`` False: llama-server runs
    without one. Further arguments are the fake's.
    """
    save_dir = directory / "kv"
    save_dir.mkdir(parents=True, exist_ok=True)
    options = {"slots": 2, "context": 8192, "gone_s": 0.05, **fake}
    server = FakeServer(save_dir if has_save_path else None, port=free_port(), **options)
    config = with_one_backend(directory, answers_at or server.url, save_dir, settings or {})
    async with a_session() as session:
        it = Served(fake=server, config=config, session=session, save_dir=save_dir)
        try:
            if wait:
                await server.start()
                await it.start()
            yield it
            if it.backend.health is Health.UP:
                await it.at_rest()
                await it.saved()
            it.check()
        finally:
            server.go()
            await it.stop()
            await server.kill()
        it.check()


@contextlib.asynccontextmanager
async def fronted(
    directory: Path, url: str, save_dir: Path | None, settings: Settings | None = None
) -> AsyncIterator[Front]:
    """llamaslot in front of a llama-server that runs at ``url``."""
    config = with_one_backend(directory, url, save_dir, settings or {})
    async with a_session() as session:
        it = Front(config=config, session=session, save_dir=save_dir or directory / "none")
        try:
            await it.start()
            yield it
            # A server that is met anew has files of that in its directory, and there is no lease meanwhile.
            await it.until(lambda: it.backend.health is not Health.CONNECTING)
            await it.at_rest()
            await it.saved()
            it.check()
        finally:
            await it.stop()


def a_session() -> aiohttp.ClientSession:
    """A client session without time limits, except one for a test that hangs. Each request has a fresh connection."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=2 * PATIENCE_S),
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
    )
