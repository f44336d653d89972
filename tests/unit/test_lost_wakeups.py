"""What waits is woken by every change that it waits for, also if nothing else happens afterwards."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from msgspec.structs import replace

from llamaslot.backend import backend
from llamaslot.backend.health import Health
from llamaslot.backend.lease import Lease
from llamaslot.backend.slot_table import SlotTable
from llamaslot.cache.ids import pack
from llamaslot.config.load import Config
from llamaslot.errors import BackendDown
from llamaslot.fleet.on_demand import OnDemand
from llamaslot.fleet.pool import Pool, PoolSettings
from llamaslot.fleet.registry import Registry
from llamaslot.observe.metrics import Metrics
from llamaslot.scheduling.rates import Rates
from llamaslot.scheduling.request import Request, User
from llamaslot.scheduling.settings import QueueLimits
from tests.support.inprocess import spawn
from tests.support.turns import until_idle

ANNA = User("key:anna")


class Model:
    """A pool with the backends ``a`` and ``b`` of two slots each, without a server behind them."""

    def __init__(self, user_max_running: int | None = None) -> None:
        self.settings = PoolSettings(0.0, limits=QueueLimits(user_max_running=user_max_running))
        self.pool = Pool(self.settings, Metrics(), {})
        self.dispatcher = self.pool.dispatcher
        for name in "ab":
            self.dispatcher.add(name)
            self.attach(name)

    def attach(self, name: str) -> None:
        self.dispatcher.attach(SlotTable(name, 2, 4096, settings=self.settings.scheduling, rates=Rates()))

    def asks(self, number: int, **more: object) -> asyncio.Task[Lease]:
        request = Request(f"{number}", pack(range(500 * number, 500 * number + 300)), user=ANNA)
        return spawn(self.dispatcher.lease(replace(request, **more)))


def registry_of(directory: Path, **urls: str) -> Registry:
    """Backends by name that have not been started."""
    backends = [{"name": name, "url": url} for name, url in urls.items()]
    sections = {"backends": backends, "store": {"meta_dir": str(directory / "meta")}}
    return Registry.of(Config.of(sections, "a test", directory))


async def waits(task: asyncio.Task[Lease]) -> bool:
    """True if it waits although everything that can run has run."""
    await until_idle()
    return not task.done()


async def test_a_user_at_its_limit_may_run_again_when_its_backend_gets_another_model() -> None:
    """The request that runs there no longer counts in this pool."""
    model, other = Model(user_max_running=1), Model()
    first = await model.asks(1)
    second = model.asks(2)
    assert await waits(second)
    gone = model.dispatcher.backends[first.table.backend]
    model.dispatcher.detach(gone.backend)
    other.dispatcher.join(gone)
    model.dispatcher.remove(gone.backend)
    assert not await waits(second)
    first.release()
    second.result().release()
    model.dispatcher.check()


async def test_a_user_at_its_limit_may_run_again_when_a_reload_raises_it() -> None:
    """Not only when the first request ends."""
    model = Model(user_max_running=1)
    first = await model.asks(1)
    second = model.asks(2)
    assert await waits(second)
    model.pool.configure(PoolSettings(0.0, limits=QueueLimits(user_max_running=2)))
    assert not await waits(second)
    first.release()
    second.result().release()


@pytest.mark.parametrize("is_suspect", [False, True])
async def test_the_worse_backend_is_taken_when_the_better_one_does_not_come_back(is_suspect: bool) -> None:
    """The request has failed on ``a``, or ``a`` is suspect, so it waits for ``b`` while llamaslot connects to that."""
    model = Model()
    model.dispatcher.detach("b")
    model.dispatcher.backends["a"].is_suspect = is_suspect
    asked = model.asks(1, avoids=frozenset() if is_suspect else frozenset({"a"}))
    assert await waits(asked)
    model.dispatcher.detach("b", BackendDown("it is gone"))
    assert not await waits(asked)
    assert asked.result().table.backend == "a"
    asked.result().release()


async def test_a_backend_that_a_reload_is_just_adding_is_not_waited_for(tmp_path: Path) -> None:
    """Nothing tells a request that waits for it when it turns out to be down: it is down from its beginning."""
    registry = registry_of(tmp_path, a="http://127.0.0.1:9")
    with pytest.raises(BackendDown, match="has not answered yet"):
        await registry.pools[0].lease(Request("1", pack([1]), user=ANNA))
    await registry.close(0.0)


async def test_a_model_that_was_never_loaded_is_not_waited_for(tmp_path: Path) -> None:
    """Until its first connection it is in the pool of the others, and only a request for it loads it."""
    registry = registry_of(tmp_path, a="http://a:9", b="http://b:9")
    unloaded = registry.backend_named("b")
    assert unloaded is not None
    unloaded.sleep()  # as it is when models are loaded on demand
    asked = spawn(registry.pools[0].lease(Request("1", pack([1]), user=ANNA)))
    assert not await waits(asked)
    with pytest.raises(BackendDown, match=r"a:9 has not answered yet.*b:9 is asleep"):
        await asked
    await registry.close(0.0)


async def test_a_model_that_is_unloaded_before_it_serves_is_asleep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not down, and is asked no more until it is loaded again."""
    monkeypatch.setattr(backend, "_HEALTH_POLL_S", (0.0,))
    registry = registry_of(tmp_path, a="http://a:9")
    (model,) = registry.backends
    is_asked = asyncio.Event()

    async def why_unhealthy() -> str:
        is_asked.set()
        return "refuses connections"

    monkeypatch.setattr(model.api, "why_unhealthy", why_unhealthy)
    model.presence.on_demand = OnDemand((), None, None)
    model.sleep()
    model.start()
    model.wake()
    await is_asked.wait()
    model.sleep()
    await until_idle()
    is_asked.clear()
    await until_idle()
    found = model.health, model.outage, is_asked.is_set()
    model.wake()
    await is_asked.wait()
    await registry.close(0.0)
    assert found == (Health.ASLEEP, None, False)


async def test_a_slot_that_was_left_at_work_is_not_waited_for_when_its_server_is_gone() -> None:
    """A drain, and a model that must make room, wait for it."""
    model = Model()
    lease = await model.asks(1)
    leases = model.dispatcher.backends[lease.table.backend]
    lease.begin_request()
    lease.release()

    async def at_rest() -> None:
        while leases.is_at_work:
            await leases.changes.wait()

    resting = spawn(at_rest())
    await until_idle()
    assert not resting.done()
    model.dispatcher.detach(leases.backend, BackendDown("it is gone"))
    await until_idle()
    assert resting.done()
