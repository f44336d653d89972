"""llama-server in router mode behind one address: each of its models is a pool of its own, loaded on demand."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from llamaslot.backend.health import Health
from llamaslot.fleet.on_demand import OnDemand, State
from llamaslot.http.reload import Reload
from llamaslot.http.service_manager import ServiceManager
from tests.support.fake import FakeModel, Hang
from tests.support.fake_router import FakeRouter
from tests.support.fleet import A, B, Several
from tests.support.inprocess import Settings, a_session, configured, letters, spawn

MODELS = {"a": A, "org/b:Q4": B}
TALK = letters(1, 600)


@contextlib.asynccontextmanager
async def routed(
    directory: Path, settings: Settings | None = None, *, wait: bool = True, **options: Any
) -> AsyncIterator[tuple[Several, FakeRouter]]:
    """llamaslot in front of a router with the models ``a`` and ``org/b:Q4``, one of them loaded at a time."""
    kv = directory / "kv"
    kv.mkdir()
    router = FakeRouter(kv, MODELS, **{"slots": 2, "context": 8192, "gone_s": 0.05, **options})
    backends = [{"name": "box", "url": router.url, "slot_save_path": str(kv)}]
    config = configured(directory, backends, settings or {})
    async with contextlib.AsyncExitStack() as stack:
        if wait:
            await stack.enter_async_context(router)
        else:
            stack.push_async_callback(router.kill)
        session = await stack.enter_async_context(a_session())
        it = Several(config=config, session=session, save_dir=kv)
        try:
            await it.start(wait=False)
            if wait:
                await it.until(
                    lambda: len(it.registry.backends) == len(MODELS) and "box" not in its_names(it)
                )
            yield it, router
            await it.rest()
            it.check()
            assert not any(child.server.violations for child in router.children.values())
        finally:
            await it.stop()


def its_names(it: Several) -> list[str]:
    return [backend.name for backend in it.registry.backends]


async def states(it: Several) -> dict[str, str]:
    async with it.session.get(it.url + "/v1/models") as answer:
        return {model["id"]: model["status"]["value"] for model in (await answer.json())["data"]}


async def test_a_swap_keeps_every_conversation(tmp_path: Path) -> None:
    """Its slots are saved before the router unloads a model, though no idle save is due; a follow-up finds them."""
    async with routed(tmp_path) as (it, router):
        assert await states(it) == {"a": "unloaded", "org/b:Q4": "unloaded"}
        talks = dict.fromkeys(MODELS, TALK)
        for turn in range(3):
            for name in MODELS:
                answer = await it.ask(talks[name], model=name)
                assert answer.status == 200, answer.error
                assert answer.headers["x-llamaslot-backend"] == f"box/{name}"
                assert (await states(it))[name] == "loaded"
                assert answer.source == ("snapshot" if turn else "cold")
                assert not turn or answer.n_reused >= len(talks[name]) - 60
                talks[name] += answer.text + letters(turn, 50)
        assert it.members() == [{"box/a"}, {"box/org/b:Q4"}]
        assert router.woken == ["a: GET /props", "org/b:Q4: GET /props"] * 3
        told = (await it.get("/llamaslot/status")).json["backends"]
        assert {one["outage"] for one in told if one["name"] != "box"} == {None}  # a swap is none


async def test_asking_loads_and_wakes_nothing(tmp_path: Path) -> None:
    """Neither what is not loaded, nor what sleeps; llamaslot is healthy meanwhile."""
    asking = (
        *("/health", "/v1/models", "/llamaslot/status", "/llamaslot/metrics", "/metrics", "/slots", "/props"),
        *(
            "/props?model=a",
            "/slots?model=a",
            "/metrics?model=a&autoload=true",
            "/slots?%6dodel=a&model=org/b:Q4",
        ),
    )

    async def ask_all() -> None:
        for path in asking:
            async with it.session.get(it.url + path) as answer:
                assert answer.status in (200, 503), (path, await answer.text())
        assert (await it.post("/tokenize", {"content": "x", "model": "org/b:Q4"})).status == 503

    async with routed(tmp_path, {"store": {"idle_save_s": 0}}) as (it, router):
        await ask_all()
        assert router.woken == []
        await it.ask(TALK, model="a")
        await it.until(lambda: any(store.catalog.snapshots for store in it.registry.stores.values()))
        await router.fall_asleep("a")
        await it.until(lambda: it.named("box/a").leases.is_asleep)
        router.woken.clear()
        await ask_all()
        await asyncio.sleep(0.6)  # an idle save would be due
        assert router.woken == []
        assert it.named("box/a").health is Health.UP
        assert (await it.ask(TALK + "more", model="a")).source == "snapshot"


async def test_what_cannot_be_served_loads_nothing(tmp_path: Path) -> None:
    """A body without messages, a drained model, a model that is not there, a question about one that is not loaded."""
    async with routed(tmp_path) as (it, router):
        invalid = await it.post("/v1/chat/completions", {"model": "a"})
        assert (invalid.status, invalid.error["message"]) == (400, "'messages' is required")
        messages = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        unknown = await it.post("/v1/chat/completions", {"model": "x" * 1_000_000, **messages})
        assert (unknown.status, len(unknown.raw) < 600) == (404, True)
        for name in MODELS:
            counted = await it.post("/v1/messages/count_tokens", {"model": name, **messages})
            assert (counted.status, "is not loaded" in counted.error["message"]) == (503, True)
        it.named("box/a").drain.begin()
        for path in ("/v1/chat/completions", "/v1/messages", "/infill"):
            drained = await it.post(path, {"model": "a", **messages})
            assert (drained.status, "undrain box/a" in drained.error["message"]) == (503, True), path
        assert router.woken == []


async def test_a_model_has_limits_of_its_own(tmp_path: Path) -> None:
    """The others have those of all."""
    async with routed(tmp_path, {"models": {"each": {"a": {"queue": {"max_waiting": 3}}}}}) as (it, _):
        for name in MODELS:
            await it.ask(TALK, model=name)
        limits = [it.pool_of(f"box/{name}").dispatcher.queue.limits for name in MODELS]
        assert [its.max_waiting for its in limits] == [3, 256]
        assert limits[0].max_wait_s == limits[1].max_wait_s


async def test_new_limits_for_all_leave_a_model_its_own(tmp_path: Path) -> None:
    """When the configuration is read again."""
    async with routed(tmp_path, {"models": {"each": {"a": {"queue": {"max_waiting": 3}}}}}) as (it, _):
        for name in MODELS:
            await it.ask(TALK, model=name)
        queue = it.config.queue.model_copy(update={"max_waiting": 99, "max_wait_s": 7.0})
        it.registry.apply(it.config.model_copy(update={"queue": queue}))
        limits = [it.pool_of(f"box/{name}").dispatcher.queue.limits for name in MODELS]
        assert [(its.max_waiting, its.max_wait_s) for its in limits] == [(3, 7.0), (99, 7.0)]


async def test_it_is_found_when_it_comes_up(tmp_path: Path) -> None:
    """A request that waits for the connection is placed again."""
    async with routed(tmp_path, wait=False) as (it, router):
        asked = [spawn(it.ask(TALK, model="a"))]
        assert (await asked[0]).status == 503
        await router.start()
        await it.until(lambda: it.registry.backend_named("box/a") is not None)
        assert (await it.ask(TALK, model="a")).status == 200
        assert (await it.ask(TALK + "more", model="a-alias")).source == "resident"
        unknown = await it.ask(TALK, model="c")
        assert (unknown.status, unknown.error["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("has_events", [True, False])
async def test_what_others_load_and_unload_is_seen(tmp_path: Path, has_events: bool) -> None:
    """Nothing is believed of the slots of a process that is gone; the next request loads its model again."""
    async with routed(tmp_path, {"store": {"idle_save_s": 0}}, has_events=has_events) as (it, router):
        await router.load(router.children["a"])
        await it.until(lambda: it.named("box/a").health is Health.UP)
        await it.ask(TALK, model="a")
        await it.until(lambda: any(store.catalog.snapshots for store in it.registry.stores.values()))
        await router.load(router.children["org/b:Q4"])
        assert (await it.ask(TALK + "more", model="a")).source == "snapshot"
        await router.unload(router.children["a"])
        await it.until(lambda: it.named("box/a").health is Health.ASLEEP)
        assert it.named("box/a").leases.table is None
        assert (await it.ask(TALK + "more", model="a")).source == "snapshot"


async def test_one_that_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    """And the other is served as before."""
    async with routed(tmp_path) as (it, router):
        router.children["a"].fails = True
        answer = await it.ask(TALK, model="a")
        assert (answer.status, "failed to load" in answer.error["message"]) == (503, True)
        assert (await it.ask(TALK, model="org/b:Q4")).status == 200


async def test_a_router_that_was_gone_is_used_again(tmp_path: Path) -> None:
    """By itself, with what was saved; meanwhile its models are unavailable."""
    async with routed(tmp_path, {"store": {"idle_save_s": 0}}) as (it, router):
        await it.ask(TALK, model="a")
        await it.until(lambda: any(store.catalog.snapshots for store in it.registry.stores.values()))
        await router.kill()
        await it.until(lambda: it.named("box/a").health is Health.DOWN)
        assert (await it.ask(TALK, model="a")).status == 503
        assert set((await states(it)).values()) == {"unavailable"}
        async with it.session.get(it.url + "/health") as answer:
            assert answer.status == 503
        await router.start()
        await it.until(lambda: it.named("box/a").health is Health.ASLEEP)
        assert (await it.ask(TALK + "more", model="a")).source == "snapshot"


async def is_gone(it: Several, router: FakeRouter, status: int) -> None:
    """Its list of models cannot be read any more, and llamaslot has noticed."""
    router.list_status = status
    await router.tell()
    await it.until(lambda: it.named("box/a").health is Health.DOWN)


async def is_back(it: Several, router: FakeRouter) -> None:
    router.list_status = 200
    await router.tell()
    await it.until(lambda: it.named("box/org/b:Q4").health is Health.ASLEEP)


async def test_a_model_that_was_loaded_before_the_router_gave_its_list_again_stays(tmp_path: Path) -> None:
    """It is not taken for one that is asleep, which no request would load again."""
    async with routed(tmp_path) as (it, router):
        await is_gone(it, router, 500)
        assert (await it.ask(TALK, model="a")).status == 200
        await is_back(it, router)
        again = await it.ask(TALK + "more", model="a")
        assert (again.status, again.source) == (200, "resident"), again.error


async def test_a_router_that_goes_while_it_loads_a_model_is_not_waited_for(tmp_path: Path) -> None:
    """The request that needs the model is told. Later ones are served."""
    async with routed(tmp_path) as (it, router):
        hang = router.load_hang = Hang()
        asked = spawn(it.ask(TALK, model="a"))
        await hang.reached.wait()
        await is_gone(it, router, 0)
        answer = await asked
        assert (answer.status, "the router does not answer" in answer.error["message"]) == (503, True)
        router.load_hang = None
        hang.release()
        await is_back(it, router)
        assert (await it.ask(TALK, model="a")).status == 200


async def test_a_model_that_llamaslot_cannot_use_keeps_no_other_from_being_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is unloaded, and the request for it is told why: here its slots cannot be emptied between two users."""
    monkeypatch.setattr("llamaslot.backend.backend._RETRY_CONNECT_S", 0.01)
    async with routed(tmp_path, {"cache": {"isolation": "per_user"}}) as (it, router):
        router.children["a"].server.save_dir = None
        answer = await it.ask(TALK, model="a")
        assert (answer.status, "cache.isolation is per_user" in answer.error["message"]) == (503, True)
        assert router.children["a"].state == "unloaded"
        assert (await it.ask(TALK, model="org/b:Q4")).status == 200


async def test_a_model_of_others_that_llamaslot_cannot_use_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program has loaded it, and may use it."""
    monkeypatch.setattr("llamaslot.backend.backend._RETRY_CONNECT_S", 0.01)
    async with routed(tmp_path, {"cache": {"isolation": "per_user"}}) as (it, router):
        child = router.children["a"]
        child.server.save_dir = None
        await router.load(child)
        await it.until(lambda: it.named("box/a").n_failed_connects >= 5)
        answer = await it.ask(TALK, model="a")
        assert (answer.status, "cache.isolation is per_user" in answer.error["message"]) == (503, True)
        assert (child.state, child.n_loads) == ("loaded", 1)
        assert (await it.ask(TALK, model="org/b:Q4")).status == 200


async def test_the_users_of_both_at_once_are_all_served(tmp_path: Path) -> None:
    """Each waits for its model."""
    async with routed(tmp_path) as (it, _):
        asked = [spawn(it.ask(letters(n, 300), model=list(MODELS)[n % 2])) for n in range(4)]
        assert [(await one).status for one in asked] == [200] * 4


async def test_a_request_in_the_queue_of_a_model_that_must_go_is_served_first(tmp_path: Path) -> None:
    """It gets a slot, and must not wait until its model is loaded again: the model waits for it."""
    async with routed(tmp_path) as (it, router):
        await it.ask(TALK, model="a")
        fake = router.children["a"].server
        fake.hold()
        asked = [spawn(it.ask(letters(n, 300), model="a")) for n in range(3)]
        await it.until(lambda: it.pool_of("box/a").n_waiting == 1)
        asked.append(spawn(it.ask(letters(9, 300), model="org/b:Q4")))
        on_demand = it.named("box/a").presence.on_demand
        assert isinstance(on_demand, OnDemand)
        await it.until(lambda: on_demand.state("box/a") is State.LEAVING)
        fake.go()
        assert [(await one).status for one in asked] == [200] * 4
        assert [child.n_loads for child in router.children.values()] == [1, 1]


async def test_a_router_comes_and_goes_with_a_restart_only(tmp_path: Path) -> None:
    """A reload says so, each time. The router's models are served meanwhile."""
    file = tmp_path / "config.yaml"
    async with routed(tmp_path) as (it, _):
        own = {"name": "box", "url": it.config.backends[0].url, "slot_save_path": str(tmp_path / "kv")}
        other = {"name": "other", "url": "http://127.0.0.1:9"}
        reload = Reload(file, it.config, it.registry, ServiceManager())

        async def reloaded(*backends: dict[str, Any]) -> list[str]:
            sections = it.config.model_dump(mode="json", exclude_unset=True, exclude={"backends"})
            file.write_text(json.dumps({**sections, "backends": backends}))
            told = await reload.run()
            return [line for line in told["in_force"] + told["needs_restart"] if "box" in line]

        for _ in range(2):
            assert await reloaded(other) == ["backends: box"]
        assert (await it.ask(TALK, model="a")).status == 200
        assert await reloaded(own, other) == []
        assert its_names(it) == ["box/a", "box/org/b:Q4", "other"]
        it.named("other").drain.begin()


async def test_one_model_is_a_router_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any name is its own, as with one llama-server."""
    monkeypatch.delitem(MODELS, "org/b:Q4")
    async with routed(tmp_path) as (it, router):
        assert (await it.ask(TALK, model="a")).status == 200
        assert router.children["a"].n_loads == 1
        assert (await it.post("/tokenize", {"content": "hello"})).status == 200


def test_models_have_weights_of_their_own() -> None:
    """Else they would be one pool."""
    assert isinstance(A, FakeModel)
    assert A.weights != B.weights


async def test_a_load_of_the_fake_goes_on_without_its_client(tmp_path: Path) -> None:
    """As that of the real router, which loads in a thread of its own."""
    router = FakeRouter(tmp_path, MODELS)
    child, router.load_hang = router.children["a"], Hang()
    leaving = spawn(router.load(child))
    await router.load_hang.reached.wait()
    leaving.cancel()
    await asyncio.wait({leaving})
    router.load_hang.release()
    async with asyncio.timeout(10):
        await router.load(child)
    assert (child.state, child.n_loads) == ("loaded", 1)
    await router.kill()
