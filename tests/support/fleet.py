"""llamaslot in the test's own loop in front of several llama-servers: fakes (``fleet``), or real ones (``real_fleet``).

``async with fleet(tmp_path, 3) as it:``
    ``it.fakes["gpu0"]``, ``it.named("gpu0")``: a server, and the backend that llamaslot has made of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llamaslot.backend import health, process_check
from llamaslot.backend.backend import Backend
from llamaslot.backend.health import Health
from llamaslot.fleet.pool import Pool
from tests.support.answers import Answer
from tests.support.fake import FakeModel, FakeServer
from tests.support.inprocess import Front, Settings, a_session, configured
from tests.support.real import RealServer, free_port

_COMPUTED = "llamacpp:prompt_tokens_total"
A, B = FakeModel(path="a"), FakeModel(weights="B", path="b")


def ask_often(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """A server that hangs is suspect, and then down, after so many seconds each."""
    for name in ("SUSPECT_S", "_SILENT_S", "_HEALTH_S", "_WATCH_S"):
        monkeypatch.setattr(health, name, seconds)
    monkeypatch.setattr(process_check, "SUSPECT_S", seconds)


class Several(Front):
    """llamaslot in front of several servers."""

    def named(self, name: str) -> Backend:
        """A backend."""
        found = self.registry.backend_named(name)
        assert found is not None
        return found

    def pool_of(self, name: str) -> Pool:
        """The pool that a backend belongs to."""
        return self.registry.pool_of(self.named(name))

    def members(self) -> list[set[str]]:
        """The backends of each pool."""
        return [set(pool.backends) for pool in self.registry.pools]

    async def start(self, *, wait: bool = True) -> None:
        """Start llamaslot and the servers. ``wait``: also wait until all backends are up."""
        await super().start(wait=False)
        if wait:
            await self.all_up()

    async def all_up(self) -> None:
        """Wait until the backends of all running servers are connected."""
        await self.until(lambda: all(its.health is Health.UP for its in self.registry.backends))

    def readout(self) -> str:
        return str([(its.name, its.health, its.leases.table) for its in self.registry.backends])

    async def rest(self) -> None:
        """Wait until every slot is given back, no request waits and no save is pending."""
        every = [its.leases for its in self.registry.backends]

        def rests() -> bool:
            tables = [leases.table for leases in every if leases.table]
            if any(leases.leases or leases.n_waiting for leases in every):
                return False
            return all(slot.is_idle for table in tables for slot in table.slots) and not any(
                len(table.model_snapshots.pending) for table in tables
            )

        await self.until(rests)

    def check(self) -> None:
        """Raise AssertionError if something is left."""
        for pool in self.registry.pools:
            pool.dispatcher.check()


@dataclass(kw_only=True)
class Fleet(Several):
    """See the module."""

    fakes: Mapping[str, FakeServer]

    def check(self) -> None:
        """Also raise AssertionError if llamaslot has done something that a good proxy never does."""
        super().check()
        violations = {name: fake.violations for name, fake in self.fakes.items() if fake.violations}
        assert not violations, violations


@dataclass(kw_only=True)
class RealFleet(Several):
    """llamaslot in front of several real llama-servers."""

    servers: Mapping[str, RealServer]

    async def n_computed(self) -> float:
        """Prompt tokens that the running servers have computed, by their own counters."""
        return sum([(await its.metrics())[_COMPUTED] for its in self.servers.values() if its.is_running])


@contextlib.asynccontextmanager
async def real_fleet(
    directory: Path,
    models: Sequence[Path],
    settings: Settings | None = None,
    *,
    is_shared: bool = True,
    **server: Any,
) -> AsyncIterator[RealFleet]:
    """One real server ``gpu0``, ``gpu1``, … for each of ``models``, all with one directory, or each with its own."""
    path = directory / "kv"
    servers = {
        f"gpu{i}": RealServer(model, path if is_shared else directory / f"kv{i}", **server)
        for i, model in enumerate(models)
    }
    backends = [
        {"name": name, "url": its.url, "slot_save_path": str(its.save_dir)} for name, its in servers.items()
    ]
    config = configured(directory, backends, settings or {})
    async with contextlib.AsyncExitStack() as stack:
        for its in servers.values():
            await stack.enter_async_context(its)
        session = await stack.enter_async_context(a_session())
        it = RealFleet(servers=servers, config=config, session=session, save_dir=path)
        try:
            await it.start()
            yield it
            await it.rest()
            it.check()
        finally:
            await it.stop()


@contextlib.asynccontextmanager
async def fleet(
    directory: Path,
    models: int | Sequence[FakeModel],
    settings: Settings | None = None,
    *,
    is_shared: bool = True,
    wait: bool = True,
    **fake: Any,
) -> AsyncIterator[Fleet]:
    """One server ``gpu0``, ``gpu1``, … for each of ``models``; a number: so many of one model. ``is_shared``: all have
    one directory; else each has its own.
    """
    models = [A] * models if isinstance(models, int) else models
    options = {"slots": 2, "context": 8192, "gone_s": 0.05, **fake}
    fakes, backends = dict[str, FakeServer](), []
    for i, model in enumerate(models):
        path = directory / ("kv" if is_shared else f"kv{i}")
        path.mkdir(parents=True, exist_ok=True)
        server = fakes[f"gpu{i}"] = FakeServer(path, port=free_port(), model=model, **options)
        backends.append({"name": f"gpu{i}", "url": server.url, "slot_save_path": str(path)})
    config = configured(directory, backends, settings or {})
    async with a_session() as session:
        it = Fleet(fakes=fakes, config=config, session=session, save_dir=directory / "kv")
        try:
            if wait:
                for server in fakes.values():
                    await server.start()
                await it.start()
            yield it
            await it.rest()
            it.check()
        finally:
            for server in fakes.values():
                server.thaw()
            await it.stop()
            for server in fakes.values():
                await server.kill()


def backend_of(answer: Answer) -> str:
    """The name of the backend that gave the answer."""
    return answer.headers["x-llamaslot-backend"]
