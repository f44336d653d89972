"""Which models are loaded: which one makes room, in which order, and what a fault leaves."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bench.virtual import VirtualLoop
from llamaslot.backend.backend import Backend
from llamaslot.backend.presence import Presence
from llamaslot.backend.slot_table import SlotTable
from llamaslot.errors import BackendDown
from llamaslot.fleet.dispatcher import Dispatcher
from llamaslot.fleet.managed_models import ManagedModel, ServedOnDemand
from llamaslot.fleet.on_demand import OnDemand, State
from llamaslot.llama.managed.process import ManagedServer
from llamaslot.scheduling.rates import Rates
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.settings import QueueLimits, SchedulingSettings
from llamaslot.tasks import ChangeEvent, TaskOwner
from tests.support.inprocess import spawn


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """The test as pytest calls it, in time that passes only while all wait."""

    @functools.wraps(test)
    def run(*args: Any, **arguments: Any) -> None:
        loop = VirtualLoop()
        try:
            loop.run(test(*args, **arguments))
        finally:
            loop.close()

    return run


class Model:
    """Takes ``load_s`` seconds to load. ``log``: what happened to all models."""

    def __init__(self, name: str, log: list[str], load_s: float = 5.0) -> None:
        self.name, self.log, self.load_s = name, log, load_s
        self.changes = ChangeEvent()
        self.n_running = self.n_waiting = 0
        self.fails = False
        self.is_loaded: bool | None = None  # as the models of a router: others load them too

    def turn(self, *, is_loaded: bool) -> None:
        """Others have loaded or unloaded it."""
        self.is_loaded = is_loaded
        self.changes.notify()

    @property
    def is_at_work(self) -> bool:
        return self.n_running > 0

    async def load(self) -> None:
        await asyncio.sleep(self.load_s)
        if self.fails:
            raise BackendDown(f"{self.name} has no memory")
        self.log.append(f"+{self.name}")
        self.is_loaded = self.is_loaded if self.is_loaded is None else True

    async def unload(self) -> None:
        assert not self.n_running, "saved first"
        await asyncio.sleep(1.0)
        self.log.append(f"-{self.name}")
        self.is_loaded = self.is_loaded if self.is_loaded is None else False


class Stage:
    """Models a, b and c, and clients that use them."""

    def __init__(self, max_loaded: int | None, idle_unload_s: float | None) -> None:
        self.log: list[str] = []
        self.models = {name: Model(name, self.log) for name in "abc"}
        loop = asyncio.get_running_loop()
        self.on_demand = OnDemand(self.models.values(), max_loaded, idle_unload_s, loop.time)
        self.now = loop.time

    async def ask(self, name: str, answer_s: float = 1.0) -> None:
        """One request: it waits until its model is loaded, and runs."""
        await self.on_demand.serving(name)
        model = self.models[name]
        model.n_running += 1
        model.changes.notify()
        await asyncio.sleep(answer_s)
        self.log.append(f"{name}!")
        model.n_running -= 1
        model.changes.notify()

    def states(self) -> str:
        return " ".join(self.on_demand.state(name).value for name in self.models)


@asynccontextmanager
async def staged(max_loaded: int | None = 1, idle_unload_s: float | None = None) -> AsyncIterator[Stage]:
    stage, tasks = Stage(max_loaded, idle_unload_s), TaskOwner()
    tasks.spawn(stage.on_demand.run(), "on demand")
    yield stage
    await tasks.close()
    await stage.on_demand.close()


@virtual
async def test_nothing_is_loaded_until_it_is_asked_for() -> None:
    """Looking at the states loads nothing, for however long."""
    async with staged() as stage:
        for _ in range(60):
            await asyncio.sleep(60)
            assert stage.states() == "unloaded unloaded unloaded"
        await asyncio.gather(stage.ask("a"), stage.ask("a"))
        assert stage.log == ["+a", "a!", "a!"]


@virtual
async def test_the_least_recently_used_idle_one_makes_room() -> None:
    """It is saved and stopped before the other is started; one that is used again stays."""
    async with staged(max_loaded=2) as stage:
        for name in ("a", "b", "a", "c"):
            await stage.ask(name)
            await asyncio.sleep(3)
        assert stage.log == ["+a", "a!", "+b", "b!", "a!", "-b", "+c", "c!"]


@virtual
async def test_an_idle_model_is_unloaded_after_a_while() -> None:
    """Counted from the end of its last request."""
    async with staged(idle_unload_s=100) as stage:
        await stage.ask("a", answer_s=300)
        await asyncio.sleep(99)
        assert stage.states().startswith("loaded")
        await asyncio.sleep(3)
        assert stage.states().startswith("unloaded")
        assert stage.log == ["+a", "a!", "-a"]


@virtual
async def test_without_limits_all_stay() -> None:
    """None for both: loaded by the first request, for ever."""
    async with staged(None, None) as stage:
        for name in "abc":
            await stage.ask(name)
        await asyncio.sleep(100_000)
        assert stage.states() == "loaded loaded loaded"


@virtual
async def test_a_busy_model_stays_as_long_as_it_took_to_load() -> None:
    """Then new requests for it wait behind the other's, running ones end."""
    async with staged() as stage:
        await stage.ask("a")
        began = stage.now()
        users = [spawn(stage.ask("a", answer_s=1.5)) for _ in range(2)]
        await asyncio.sleep(0.5)
        users.append(spawn(stage.ask("b")))
        await asyncio.sleep(0.8)
        while "+b" not in stage.log:
            users.append(spawn(stage.ask("a", answer_s=1.5)))
            await asyncio.sleep(1.0)
        assert 4 + 1 + 5 <= stage.now() - began < 4 + 2 + 1 + 5 + 2
        await asyncio.gather(*users)
        before, after = stage.log[: stage.log.index("-a")], stage.log[stage.log.index("-a") :]
        assert before.count("a!") >= 4
        assert after[:4] == ["-a", "+b", "b!", "-b"]
        assert after[4:] == ["+a"] + ["a!"] * (len(users) - before.count("a!"))


@virtual
async def test_who_waits_first_is_served_first() -> None:
    """Three models in turn, however many ask for each."""
    async with staged() as stage:
        await asyncio.gather(*map(stage.ask, "abcabc"))
        assert stage.log == ["+a", "a!", "a!", "-a", "+b", "b!", "b!", "-b", "+c", "c!", "c!"]


@virtual
async def test_one_that_cannot_be_loaded_does_not_push_others_out_again_and_again() -> None:
    """Its requests fail with the reason; it is tried again after a pause, which grows."""
    async with staged() as stage:
        stage.models["b"].fails = True
        with pytest.raises(BackendDown, match="b has no memory"):
            await stage.ask("b")
        for pause_s in (1.1, 2.1, 4.1):
            with pytest.raises(BackendDown, match="b has no memory"):
                await asyncio.wait_for(stage.ask("b"), 0.1)
            await asyncio.sleep(pause_s)
            with pytest.raises(BackendDown, match="b has no memory"):
                await stage.ask("b")
        stage.models["b"].fails = False
        await asyncio.sleep(10)
        await stage.ask("b")
        assert stage.log == ["+b", "b!"]


@virtual
async def test_requests_in_the_queue_of_its_slots_load_it_again() -> None:
    """They came just before it was stopped."""
    async with staged() as stage:
        await stage.ask("a")
        await stage.ask("b")
        stage.models["a"].n_waiting = 1
        stage.models["a"].changes.notify()
        await asyncio.sleep(20)
        assert stage.log == ["+a", "a!", "-a", "+b", "b!", "-b", "+a"]


@virtual
async def test_a_request_that_leaves_is_forgotten() -> None:
    """Before the other has made room: then it stays."""
    async with staged() as stage:
        running = spawn(stage.ask("a", answer_s=2))
        await asyncio.sleep(5.5)
        waiting = spawn(stage.ask("b"))
        await asyncio.sleep(0.5)
        waiting.cancel()
        await asyncio.sleep(20)
        await running
        assert stage.log == ["+a", "a!"]


@virtual
async def test_stopping_tells_those_that_wait() -> None:
    """Nothing is being loaded afterwards."""
    async with staged() as stage:
        waiting = spawn(stage.ask("a"))
        await asyncio.sleep(1)
    with pytest.raises(BackendDown):
        await waiting
    assert stage.log == []
    assert stage.states() == "unloaded unloaded unloaded"
    with pytest.raises(BackendDown):
        await stage.on_demand.serving("b")  # not even loaded later


@pytest.mark.parametrize("max_loaded", [1, 2])
@virtual
async def test_never_more_than_allowed_and_all_are_served(max_loaded: int) -> None:
    """Many users with pauses of their own."""
    async with staged(max_loaded, 30) as stage:
        n_loaded: Callable[[], int] = lambda: sum(  # noqa: E731
            stage.on_demand.state(name) is not State.UNLOADED for name in stage.models
        )

        async def user(i: int) -> None:
            for turn in range(10):
                await stage.ask("abc"[(i + turn * (i % 2 + 1)) % 3], answer_s=0.3 + i % 4)
                assert n_loaded() <= max_loaded
                await asyncio.sleep((i * 7 + turn * 3) % 11)

        async with asyncio.timeout(3600):
            await asyncio.gather(*map(user, range(8)))
        await asyncio.sleep(40)
        assert n_loaded() == 0


@virtual
async def test_what_others_load_and_unload_is_followed() -> None:
    """One that they have loaded is used; one that they have unloaded is loaded by the next request, not before."""
    async with staged() as stage:
        a, b = stage.models["a"], stage.models["b"]
        a.is_loaded = b.is_loaded = False
        a.turn(is_loaded=True)
        await asyncio.sleep(10)
        assert stage.states().startswith("loaded unloaded")
        a.turn(is_loaded=False)
        b.turn(is_loaded=True)
        await asyncio.sleep(10)
        assert stage.states().startswith("unloaded loaded")
        asked = spawn(stage.ask("b"))
        b.turn(is_loaded=False)
        await asked
        assert stage.log == ["+a", "-a", "+b", "-b", "+b", "b!"]


@virtual
async def test_a_clock_that_moves_while_it_decides_hides_no_idle_model() -> None:
    """A timer that is a little early finds the model in use, and the next look at the clock finds it idle: another
    request for the other model waited until something else happened.
    """
    loop, n_read, log = asyncio.get_running_loop(), itertools.count(), list[str]()
    models = [Model(name, log, load_s=0.3) for name in "ab"]  # less than a request may take to begin
    on_demand = OnDemand(models, 1, None, lambda: 0.99 * loop.time() + 0.005 * next(n_read))
    tasks = TaskOwner()
    tasks.spawn(on_demand.run(), "on demand")
    await on_demand.serving("a")  # a request that is refused before it runs
    async with asyncio.timeout(20):
        await on_demand.serving("b")
    assert log == ["+a", "-a", "+b"]
    await tasks.close()
    await on_demand.close()


@virtual
async def test_a_llama_server_that_cannot_be_run_is_not_waited_for() -> None:
    """A mistake of llamaslot's has ended the task that runs it."""

    async def run() -> None:
        raise ValueError("embedded null byte")

    its = SimpleNamespace(
        name="a", leases=SimpleNamespace(), presence=Presence("a"), session=None, n_failed_connects=0,
        wake=lambda: None, sleep=lambda: None,
    )  # fmt: skip
    model = ManagedModel(cast(Backend, its), cast(ManagedServer, SimpleNamespace(run=run)), 1.0)
    with pytest.raises(BackendDown, match="could not be run"):
        await model.load()


class Queued(ServedOnDemand):
    """A model of one slot, for which requests wait in the queue of a pool of its own."""

    is_loaded = None

    def __init__(self) -> None:
        self.dispatcher = Dispatcher(SchedulingSettings(), QueueLimits(), asyncio.get_running_loop().time)
        self.leases = self.dispatcher.add("a")
        its = SimpleNamespace(name="a", leases=self.leases, last_session=object())
        super().__init__(cast(Backend, its), 1.0)

    async def load(self) -> None:
        await asyncio.sleep(1.0)
        self.dispatcher.attach(SlotTable("a", 1, 4096, settings=SchedulingSettings(), rates=Rates()))
        self.leases.dispatch()

    async def unload(self) -> None:
        self.dispatcher.detach("a")


@asynccontextmanager
async def queued(idle_unload_s: float) -> AsyncIterator[tuple[Queued, OnDemand]]:
    model, tasks = Queued(), TaskOwner()
    on_demand = OnDemand([model], None, idle_unload_s, asyncio.get_running_loop().time)
    tasks.spawn(on_demand.run(), "on demand")
    await asyncio.sleep(1)
    yield model, on_demand
    await tasks.close()
    await on_demand.close()


@virtual
async def test_a_request_that_begins_to_wait_for_a_slot_has_its_model_loaded() -> None:
    """Although the model was unloaded since the request found it loaded, and nothing else happens."""
    async with queued(idle_unload_s=30) as (model, on_demand), asyncio.timeout(20):
        (await model.dispatcher.lease(Request("late"))).release()
        assert on_demand.state("a") is State.LOADED


@virtual
async def test_a_model_is_unloaded_when_the_last_request_leaves_the_queue() -> None:
    """It waited for so long that the model has been idle for long enough."""
    async with queued(idle_unload_s=30) as (model, on_demand):
        await on_demand.serving("a")
        model.dispatcher.detach("a")  # its llama-server restarts
        waiting = spawn(model.dispatcher.lease(Request("leaves")))
        await asyncio.sleep(100)
        assert on_demand.state("a") is State.LOADED
        waiting.cancel()
        await asyncio.sleep(1)
        assert on_demand.state("a") is State.UNLOADED
