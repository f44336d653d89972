"""Several llama-servers behind one address: pools, models, failures, drain."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from llamaslot import cli
from llamaslot.backend import backend, health
from llamaslot.backend.health import Health
from llamaslot.backend.lease import Lease
from llamaslot.fleet.pool import Pool
from tests.support.fake import FakeModel, FakeServer
from tests.support.fleet import A, B, Fleet, ask_often, backend_of, fleet
from tests.support.inprocess import CHAT, Settings, a_session, configured, letters, line_with, right, spawn

TEXTS = [letters(n, 600) for n in range(6)]


async def test_a_follow_up_goes_to_the_server_that_holds_its_tokens(tmp_path: Path) -> None:
    """Six conversations on three servers of two slots, each on one of its own."""
    async with fleet(tmp_path, 3) as it:
        assert it.members() == [{"gpu0", "gpu1", "gpu2"}]
        first = [await it.ask(text) for text in TEXTS]
        places = [(backend_of(answer), answer.headers["x-llamaslot-slot"]) for answer in first]
        assert len(set(places)) == 6
        for text, place in zip(TEXTS, places, strict=True):
            again = await it.ask(text + "more")
            assert (backend_of(again), again.headers["x-llamaslot-slot"], again.source) == (
                *place,
                "resident",
            )


async def test_what_one_server_has_saved_another_restores(tmp_path: Path) -> None:
    """They have one directory. The first server is gone."""
    async with fleet(tmp_path, 2, {"store": {"idle_save_s": 0}}) as it:
        place = backend_of(await it.ask(TEXTS[0]))
        await it.until(lambda: [len(store.catalog.snapshots) for store in it.registry.stores.values()] == [1])
        await it.fakes[place].kill()
        again = await it.ask(TEXTS[0] + "more")
        assert (again.status, again.source) == (200, "snapshot")
        assert backend_of(again) != place


async def test_a_snapshot_in_a_directory_of_its_own_belongs_to_its_server(tmp_path: Path) -> None:
    """The other one computes it again."""
    async with fleet(tmp_path, 2, {"store": {"idle_save_s": 0}}, is_shared=False) as it:
        assert it.members() == [{"gpu0", "gpu1"}]
        place = backend_of(await it.ask(TEXTS[0]))
        stores = it.registry.stores.values()
        await it.until(lambda: sum(len(store.catalog.snapshots) for store in stores) == 1)
        await it.fakes[place].kill()
        again = await it.ask(TEXTS[0] + "more")
        assert (again.status, again.source) == (200, "cold")
        await it.until(lambda: it.named(place).health is Health.DOWN)
        await it.fakes[place].start()
        await it.all_up()
        await it.fakes[backend_of(again)].kill()
        assert (await it.ask(TEXTS[0] + "more")).source == "snapshot"


async def test_prewarm_keeps_its_prefixes_in_every_directory(tmp_path: Path) -> None:
    """Each server finds them in its own."""
    messages = [{"role": "system", "content": letters(7, 600)}, {"role": "user", "content": "x"}]
    (tmp_path / "agent.json").write_text(json.dumps({"messages": messages}))
    settings: Settings = {"prewarm": ["agent.json"], "store": {"idle_save_s": 0}}
    async with fleet(tmp_path, 2, settings, is_shared=False) as it:
        catalogs = [store.catalog for store in it.registry.stores.values()]

        def are_pinned() -> list[list[bool]]:
            return [[its.is_pinned for its in catalog.snapshots.values()] for catalog in catalogs]

        await it.until(lambda: are_pinned() == [[True], [True]])


async def test_a_model_has_its_own_prewarm(tmp_path: Path) -> None:
    """The other has none."""
    messages = [{"role": "system", "content": letters(7, 600)}, {"role": "user", "content": "x"}]
    (tmp_path / "agent.json").write_text(json.dumps({"messages": messages}))
    settings: Settings = {
        "models": {"each": {"b": {"prewarm": ["agent.json"]}}},
        "store": {"idle_save_s": 0},
    }
    async with fleet(tmp_path, [A, B], settings, is_shared=False) as it:
        await it.until(lambda: bool(it.named("gpu1").leases.table.prewarmed()))  # type: ignore[union-attr]
        await it.rest()
        assert [its.n_snapshots for its in (it.pool_of(name).status() for name in it.fakes)] == [0, 1]


async def test_the_model_chooses_the_pool(tmp_path: Path) -> None:
    """By the name that its server tells, or an alias; with several an unknown name is refused as by OpenAI."""
    aliases = {"aliases": {"gpt-4o": "b", "small": "gpu0"}}
    async with fleet(tmp_path, [A, B, A], {"models": aliases}) as it:
        assert sorted(map(sorted, it.members())) == [["gpu0", "gpu2"], ["gpu1"]]
        for name, places in (
            ("b", {"gpu1"}),
            ("gpt-4o", {"gpu1"}),
            ("a", {"gpu0", "gpu2"}),
            ("small", {"gpu0", "gpu2"}),
        ):
            assert backend_of(await it.ask(TEXTS[0], model=name)) in places
        unknown = await it.chat("hello", model="c")
        assert (unknown.status, unknown.error["code"]) == (404, "model_not_found")
        assert "known: a, b, gpt-4o, small" in unknown.error["message"]
        missing = await it.chat("hello")
        assert (missing.status, missing.error["type"]) == (400, "invalid_request_error")
        listed = (await it.get("/v1/models")).json
        states = {entry["id"]: entry["status"]["value"] for entry in listed["data"]}
        assert states == dict.fromkeys(["a", "b", "gpt-4o", "small"], "loaded")
        await it.fakes["gpu1"].kill()
        await it.until(lambda: it.named("gpu1").health is Health.DOWN)
        assert (await it.chat("hello", model="b")).status == 503
        listed = (await it.get("/v1/models")).json
        assert {entry["id"]: entry["status"]["value"] for entry in listed["data"]}["b"] == "unavailable"
        assert (await it.chat("hello", model="a")).status == 200


async def test_a_default_model_takes_what_names_none_or_an_unknown_one(tmp_path: Path) -> None:
    """As configured."""
    async with fleet(tmp_path, [A, B], {"models": {"default": "b"}}) as it:
        for model in (None, "gpt-5"):
            assert backend_of(await it.chat("hello", model=model)) == "gpu1"
        assert backend_of(await it.chat("hello", model="a")) == "gpu0"


async def test_with_one_model_any_name_is_accepted(tmp_path: Path) -> None:
    """As by llama-server, on however many servers."""
    async with fleet(tmp_path, 2) as it:
        assert (await it.chat("hello", model="gpt-5")).status == 200


async def test_an_unknown_name_may_be_that_of_a_server_that_was_not_up_yet(tmp_path: Path) -> None:
    """It is not answered by another model. After that server was up once, llamaslot knows, also when started again."""
    async with fleet(tmp_path, [A, A]) as it:
        await it.stop()
        await it.fakes["gpu1"].kill()
        await it.start(wait=False)
        await it.until(lambda: {its.health for its in it.registry.backends} == {Health.UP, Health.DOWN})
        assert (await it.chat("hello", model="b")).status == 200
        await it.stop()
        (tmp_path / "meta" / "gpu1.rates.json").unlink()
        await it.start(wait=False)
        await it.until(lambda: {its.health for its in it.registry.backends} == {Health.UP, Health.DOWN})
        unknown = await it.chat("hello", model="b")
        assert unknown.status == 503
        assert "gpu1 is not up" in unknown.error["message"]
        assert (await it.chat("hello", model="a")).status == 200


async def test_what_takes_no_slot_goes_to_its_model_too(tmp_path: Path) -> None:
    """By its body, or the query of a GET."""
    async with fleet(tmp_path, [A, B]) as it:
        for name, other in (("a", "gpu1"), ("b", "gpu0")):
            before = len(it.fakes[other].requests)
            assert (await it.post("/tokenize", {"content": "hi", "model": name})).status == 200
            assert (await it.get(f"/props?model={name}")).json["model_path"] == name
            assert not [seen for seen in it.fakes[other].requests[before:] if seen.path == "/tokenize"]
        assert (await it.post("/tokenize", {"content": "hi", "model": "c"})).status == 404


async def test_a_server_with_another_model_moves_to_the_pool_of_that(tmp_path: Path) -> None:
    """It is found out at the next connection; what it saved before is found by the others."""
    async with fleet(tmp_path, [A, A, B], {"store": {"idle_save_s": 0}}) as it:
        await it.fakes["gpu1"].restart(B)
        await it.until(lambda: {"gpu1", "gpu2"} in it.members())
        assert sorted(map(sorted, it.members())) == [["gpu0"], ["gpu1", "gpu2"]]
        await it.fakes["gpu0"].restart(B)
        await it.until(lambda: it.members() == [{"gpu0", "gpu1", "gpu2"}])
        await it.all_up()
        assert (await it.ask(TEXTS[0], model="b")).status == 200


@pytest.mark.parametrize("n_members", [1, 2])
async def test_a_server_replaced_after_its_check_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_members: int
) -> None:
    """Within milliseconds, on the same port, by one with another model: that is no answer of the model asked for."""
    async with fleet(tmp_path, [A] * n_members + [B]) as it:
        expected = right(it.fakes["gpu0"], TEXTS[1])
        confirm, replaced = Pool.confirm, list[str]()

        async def then_replace(pool: Pool, lease: Lease) -> None:
            await confirm(pool, lease)
            if not replaced:
                replaced.append(lease.table.backend)
                await it.fakes[replaced[0]].restart(B)

        monkeypatch.setattr(Pool, "confirm", then_replace)
        answer = await it.ask(TEXTS[1], model="a")
        if n_members == 1:
            assert answer.error["code"] == "model_not_found"
        else:
            assert answer.text == expected
        await it.all_up()


async def test_who_waits_for_a_model_that_has_gone_is_told(tmp_path: Path) -> None:
    """Its last server has another one: 404. That there is only one left, which takes any name, is no answer."""
    async with fleet(tmp_path, [A, B], slots=1) as it:
        it.fakes["gpu1"].hold()
        running = spawn(it.ask(TEXTS[0], model="b"))
        assert await at_work(it) == "gpu1"
        waiting = spawn(it.ask(TEXTS[1], model="b"))
        await it.until(lambda: it.pool_of("gpu1").dispatcher.n_waiting == 1)
        await it.fakes["gpu1"].restart(A)
        assert (await running).status == 503
        assert (await waiting).error["code"] == "model_not_found"


async def test_one_name_for_two_models_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With what to do; requests go to the first."""
    other = FakeModel(weights="B", path="a")
    async with fleet(tmp_path, [A, other, other]) as it:
        assert [text for text in caplog.messages if "is called a, like the model of" in text]
        assert len([text for text in caplog.messages if "like the model of" in text]) == 1
        assert backend_of(await it.ask(TEXTS[0], model="a")) == "gpu0"


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_server_that_dies_before_a_byte_was_sent_is_not_noticed(
    tmp_path: Path, is_stream: bool
) -> None:
    """Comments have been sent, and the status 200 of a stream: both are llamaslot's own."""
    async with fleet(tmp_path, 2, {"stream": {"keepalive_s": 0.02}}) as it:
        for server in it.fakes.values():
            server.hold()
        task = spawn(it.ask(TEXTS[0], stream=is_stream))
        place = await at_work(it)
        await asyncio.sleep(0.05)  # a comment or two
        it.fakes[({*it.fakes} - {place}).pop()].go()
        await it.fakes[place].kill()
        answer = await task
        assert (answer.status, len(answer.text)) == (200, 4)
        counted = (await it.get("/llamaslot/metrics")).raw.decode()
        assert re.search(rf'llamaslot_failovers_total{{backend="{place}",model="[^"]+"}} 1\.0', counted)
        assert bool(answer.comments) is is_stream


async def test_a_path_begins_no_line_of_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Log lines have it as the client has written it, percent-encoded."""
    async with fleet(tmp_path, 2) as it:
        await it.fakes["gpu0"].kill()
        for _ in range(2):
            await it.get("/props/%0Afake%20line")
        (said,) = [text for text in caplog.messages if "another backend takes the request" in text]
        assert said.startswith("/props/%0Afake%20line: ")


async def test_no_text_of_a_prompt_is_in_log_or_history(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """llama-server's messages may quote one; only the client is told."""
    async with fleet(tmp_path, 2) as it:
        answer = await it.post(CHAT, {"model": "a", "messages": [{"content": "a secret"}]})
        assert (answer.status, "a secret" in answer.error["message"]) == (500, True)
        (latest,) = (await it.get("/llamaslot/activity")).json["ended"]
        assert latest["error"] == "llama-server answered 500 (server_error)"
        assert any("another backend takes the request" in text for text in caplog.messages)
        assert "a secret" not in caplog.text


async def at_work(it: Fleet) -> str:
    """The server that has got a completion."""
    await it.until(lambda: any(slot.is_processing for server in it.fakes.values() for slot in server.slots))
    return next(name for name, server in it.fakes.items() if any(slot.is_processing for slot in server.slots))


async def test_a_stream_that_has_begun_ends_with_an_error(tmp_path: Path) -> None:
    """Never a second beginning."""
    async with fleet(tmp_path, 2, {"stream": {"keepalive_s": 0.02}}) as it:
        for server in it.fakes.values():
            server.hold()
        async with it.streaming(TEXTS[0], n=8) as response:
            place = await at_work(it)
            await it.fakes[place].step(3)
            await line_with(response, "data:")
            await it.fakes[place].kill()
            rest = (await response.read()).decode()
        assert json.loads(rest.split("data: ")[-1])["error"]["code"] == 503


async def test_one_that_hangs_does_not_delay_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request on it is answered by another one; it is used again when it goes on."""
    ask_often(monkeypatch, 0.1)
    async with fleet(tmp_path, 3) as it:
        place = backend_of(await it.ask(TEXTS[0]))
        it.fakes[place].freeze()
        answers = await asyncio.gather(*(it.ask(text + "more") for text in TEXTS))
        assert [answer.status for answer in answers] == [200] * 6
        assert place not in set(map(backend_of, answers))
        await it.until(lambda: it.named(place).health is Health.DOWN)
        assert (await it.ask(TEXTS[0] + "more")).status == 200
        it.fakes[place].thaw()
        await it.all_up()


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_request_on_one_that_hangs_goes_to_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_stream: bool
) -> None:
    """As soon as that is known to be down, and not after ``timeouts.watchdog_s``: it has had no byte of an answer."""
    ask_often(monkeypatch, 0.05)
    async with fleet(tmp_path, 2, {"stream": {"keepalive_s": 0.02}}) as it:
        for server in it.fakes.values():
            server.hold()
        task = spawn(it.ask(TEXTS[0], stream=is_stream))
        place = await at_work(it)
        it.fakes[place].freeze()
        it.fakes[({*it.fakes} - {place}).pop()].go()
        answer = await task
        assert (answer.status, len(answer.text)) == (200, 4)
        assert it.named(place).health is not Health.UP
        it.fakes[place].thaw()
        it.fakes[place].go()


@pytest.mark.parametrize("comes_back", ["thawed", "started"])
async def test_one_that_is_back_is_used_within_five_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes_back: str
) -> None:
    """It is connected to by the first health check that it answers, and between two of them there is a second."""
    assert max(backend._HEALTH_POLL_S) <= 1.0
    assert health._HEALTH_S + 1.0 < 5.0  # a check that hangs is over before the next
    ask_often(monkeypatch, 0.05)
    monkeypatch.setattr("llamaslot.backend.backend._HEALTH_POLL_S", (0.05,))
    async with fleet(tmp_path, 2) as it:
        away = it.fakes["gpu0"]
        if comes_back == "thawed":
            away.freeze()
        else:
            await away.kill()
        await it.until(lambda: it.named("gpu0").health is Health.DOWN)
        n_before = len(away.requests)
        if comes_back == "thawed":
            away.thaw()
        else:
            await away.start()
        await it.all_up()
        checks = [seen for seen in away.requests[n_before:] if seen.path == "/health"]
        assert len([seen for seen in checks if not seen.client_left]) <= 2
        await it.send("POST", "/llamaslot/drain?backend=gpu1")
        assert backend_of(await it.ask(TEXTS[0])) == "gpu0"


async def test_a_drained_server_gets_nothing_new_and_loses_nothing(tmp_path: Path) -> None:
    """Its answer ends, its slots are saved; undrained it serves again."""
    async with fleet(tmp_path, 2) as it:
        place = backend_of(await it.ask(TEXTS[0]))
        it.fakes[place].hold()
        running = spawn(it.ask(TEXTS[0] + "more"))
        await at_work(it)
        drained = await it.send("POST", f"/llamaslot/drain?backend={place}")
        assert drained.json == {"backend": place, "drain": "draining", "unsaved": []}
        other = await it.ask(TEXTS[1])
        assert backend_of(other) != place
        it.fakes[place].go()
        assert backend_of(await running) == place
        await it.until(lambda: it.named(place).drain.state == "drained")
        again = await it.ask(TEXTS[0] + "more and more")
        assert (backend_of(again), again.source) == (backend_of(other), "snapshot")
        status = (await it.get("/llamaslot/status")).json["backends"]
        assert {its["name"]: its["drain"] for its in status} == {place: "drained", backend_of(other): None}
        await it.send("POST", f"/llamaslot/drain?backend={backend_of(other)}")
        refused = await it.ask(TEXTS[2])
        assert (refused.status, "llamaslot undrain" in refused.error["message"]) == (503, True)
        for name in it.fakes:
            assert (await it.send("POST", f"/llamaslot/undrain?backend={name}")).json["drain"] is None
        assert (await it.ask(TEXTS[2])).status == 200
        assert (await it.send("POST", "/llamaslot/drain?backend=x")).status == 404
        assert (await it.send("POST", "/llamaslot/drain")).status == 400
        assert (await it.get("/llamaslot/drain")).status == 405


async def test_slots_that_a_drain_could_not_save_are_named(tmp_path: Path) -> None:
    """By the command, with exit code 1, and by the route; another drain tries again."""
    async with fleet(tmp_path, 1) as it:
        await it.ask(TEXTS[0])
        it.fakes["gpu0"].faults.disk_full()
        config = tmp_path / "config.yaml"
        backends = [{"name": "gpu0", "url": it.fakes["gpu0"].url}]
        config.write_text(json.dumps({"listen": {"port": it.config.listen.port}, "backends": backends}))
        words = ["drain", "gpu0", "--config", str(config)]
        done = await asyncio.to_thread(CliRunner().invoke, cli.main, words)
        assert (done.exit_code, "drained, but some slots could not be saved: 0;" in done.output) == (1, True)
        again = await it.send("POST", "/llamaslot/drain?backend=gpu0")
        assert again.json == {"backend": "gpu0", "drain": "draining", "unsaved": []}
        await it.until(lambda: it.named("gpu0").drain.state == "drained")
        again = await it.send("POST", "/llamaslot/drain?backend=gpu0")
        assert again.json == {"backend": "gpu0", "drain": "drained", "unsaved": []}


async def test_when_all_are_drained_what_waits_goes_on_waiting(tmp_path: Path) -> None:
    """New requests, health checks and the list of models are told; what was accepted before outlasts it."""
    async with fleet(tmp_path, [A, A, B], slots=1) as it:
        for server in it.fakes.values():
            server.hold()
        asked = [spawn(it.ask(text, model="a")) for text in TEXTS[:3]]
        await it.until(lambda: it.pool_of("gpu0").dispatcher.n_waiting == 1)
        for name in ("gpu0", "gpu1"):
            await it.send("POST", f"/llamaslot/drain?backend={name}")
        refused = await it.ask(TEXTS[3], model="a")
        assert refused.status == 503
        assert all(f"llamaslot undrain {name}'" in refused.error["message"] for name in ("gpu0", "gpu1"))
        listed = (await it.get("/v1/models")).json["data"]
        assert {its["id"]: its["status"]["value"] for its in listed} == {"a": "unavailable", "b": "loaded"}
        assert (await it.get("/health")).status == 200
        await it.send("POST", "/llamaslot/drain?backend=gpu2")
        health = await it.get("/health")
        assert (health.status, health.json) == (503, {"status": "drained"})
        for server in it.fakes.values():
            server.go()
        await it.until(lambda: it.named("gpu1").drain.state == "drained")
        assert it.pool_of("gpu0").dispatcher.n_waiting == 1
        await it.send("POST", "/llamaslot/undrain?backend=gpu1")
        assert [(await one).status for one in asked] == [200] * 3


async def test_a_server_that_comes_later_is_used_by_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests do not wait for it."""
    caplog.set_level(logging.INFO)
    async with fleet(tmp_path, 2, wait=False) as it:
        await it.fakes["gpu0"].start()
        await it.start(wait=False)
        await it.until(lambda: it.named("gpu0").health is Health.UP)
        assert backend_of(await it.ask(TEXTS[0], model="a")) == "gpu0"
        await it.fakes["gpu1"].start()
        await it.all_up()
        assert it.members() == [{"gpu0", "gpu1"}]


async def test_the_commands_drain_and_undrain(tmp_path: Path) -> None:
    """They find the running llamaslot by its configuration; faults are said, with exit code 2."""
    async with fleet(tmp_path, 2) as it:
        config = tmp_path / "config.yaml"
        backends = [{"name": name, "url": fake.url} for name, fake in it.fakes.items()]
        config.write_text(json.dumps({"listen": {"port": it.config.listen.port}, "backends": backends}))

        async def run(*words: str) -> tuple[int, str]:
            done = await asyncio.to_thread(CliRunner().invoke, cli.main, [*words, "--config", str(config)])
            return done.exit_code, done.output.strip()

        assert await run("drain", "gpu1") == (0, "gpu1: drained")
        assert await run("undrain", "gpu1") == (0, "gpu1: in service")
        assert await run("drain", "gpu7") == (2, "there is no backend gpu7; known: gpu0, gpu1")
    code, said = await run("drain", "gpu1")
    assert (code, "is it running there?" in said) == (2, True)


async def test_one_that_does_not_see_the_files_of_others_keeps_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It saves into the directory, but does not find what is renamed there: said with the remedy, and it serves."""
    async with fleet(tmp_path, 2, wait=False) as it:
        for server in it.fakes.values():
            await server.start()
        it.fakes["gpu1"].faults.fail("restore")
        await it.start()
        (told,) = [
            text for text in caplog.messages if "cannot restore a file that llamaslot has renamed" in text
        ]
        assert "nothing is kept on disk: " in told
        assert (await it.ask(TEXTS[0])).status == 200


async def test_one_whose_disk_is_not_seen_keeps_what_its_slots_hold(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A server on another machine, without slot_save_path: what would mend it is said once; it saves nothing, and its
    contexts are found in its slots. The other one saves."""
    async with FakeServer(tmp_path / "kv", slots=2) as near, FakeServer(tmp_path / "far", slots=2) as far:
        backends = [
            {"name": "near", "url": near.url, "slot_save_path": str(tmp_path / "kv")},
            {"name": "far", "url": far.url},
        ]
        config = configured(tmp_path, backends, {"store": {"idle_save_s": 0}})
        async with a_session() as session:
            fakes = {"near": near, "far": far}
            it = Fleet(fakes=fakes, config=config, session=session, save_dir=tmp_path / "kv")
            try:
                await it.start()
                assert it.members() == [{"near", "far"}]
                assert len([text for text in caplog.messages if "(NFS)" in text]) == 1
                places = [*map(backend_of, await asyncio.gather(*(it.ask(text, n=64) for text in TEXTS[:4])))]
                assert sorted(places) == ["far", "far", "near", "near"]
                for text, place in zip(TEXTS[:4], places, strict=True):
                    again = await it.ask(text + "more")
                    assert (backend_of(again), again.source) == (place, "resident")
                await it.until(lambda: len(it.files()) == 2)
                assert not list((tmp_path / "far").iterdir())
                await it.rest()
                it.check()
            finally:
                await it.stop()


async def test_a_request_waits_for_the_first_server_that_comes(tmp_path: Path) -> None:
    """Not for the one that is configured first; while none answers it is told at once."""
    async with fleet(tmp_path, 2, wait=False) as it:
        await it.start(wait=False)
        assert (await it.ask(TEXTS[0])).status == 503
        hang = it.fakes["gpu1"].faults.hang("/props")
        await it.fakes["gpu1"].start()
        await asyncio.wait_for(hang.reached.wait(), 10)
        task = spawn(it.ask(TEXTS[0]))
        await asyncio.sleep(0)
        hang.release()
        assert backend_of(await task) == "gpu1"
