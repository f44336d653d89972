"""Servers in front of which llamaslot leaves the choice of slots to llama-server: all of them serve, none as a 503."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamaslot.backend import connect
from llamaslot.backend.health import Health
from llamaslot.backend.probes import Probes
from tests.support.inprocess import CHAT, NATIVE, TEXT, Served, letters, right, served, spawn

ONE, TWO, THREE = (letters(n, 800) for n in (1, 2, 3))
NO_SLOTS = {
    "error": {
        "code": 501,
        "message": "This server does not support slots endpoint.",
        "type": "not_supported_error",
    }
}
NO_COMPLETIONS = {
    "error": {
        "code": 501,
        "message": "This server does not support completions.",
        "type": "not_supported_error",
    }
}


async def assist(it: Served) -> dict[str, Any]:
    return dict((await it.get("/llamaslot/status")).json["backends"][0]["assist"])


def touched(it: Served, since: int) -> list[Any]:
    """What names a slot, of all that llama-server was asked since."""
    return [seen for seen in it.fake.requests[since:] if seen.slot is not None]


async def test_where_idle_slots_are_emptied_no_request_names_a_slot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """llama-server's default flags: bodies go on as they are, nothing is saved or erased, and status, log, header and
    metric say so, with the command that would change it."""
    async with served(tmp_path, unified=True) as it:
        before = len(it.fake.requests)
        for text in (ONE, TWO, ONE + "more"):
            answer = await it.ask(text)
            assert answer.text == right(it.fake, text)
            assert answer.headers["x-llamaslot-assist"] == "off"
            assert "x-llamaslot-slot" not in answer.headers
        assert touched(it, before) == []
        assert [set(seen.body) & {"id_slot", "cache_prompt"} for seen in it.fake.sent(NATIVE)[-3:]] == [
            set()
        ] * 3
        said, status = await assist(it), (await it.get("/llamaslot/status")).json
        assert said["is_on"] is False
        assert "--no-kv-unified" in said["remedy"]
        assert "-np 2" in said["remedy"]
        assert status["backends"][0]["slots"] == []
        assert await it.count("backend_assist") == 0
        assert it.files() == []
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [line for line in lines if "assist is off" in line and "--no-kv-unified" in line] == lines


async def test_a_unified_cache_shows_where_no_slot_but_one_is_empty(tmp_path: Path) -> None:
    """Of two slots one holds somebody's context, as after each request to such a server: the probes have emptied it."""
    async with served(tmp_path, wait=False, unified=True, slots=2) as it:
        await it.fake.start()
        assert (await it.ask(ONE, to=it.fake.url)).status == 200
        await it.start()
        assert (await assist(it))["is_on"] is False


async def test_with_assist_on_it_says_so(tmp_path: Path) -> None:
    """And no header tells of what is as it should be."""
    async with served(tmp_path) as it:
        answer = await it.ask(ONE)
        assert "x-llamaslot-assist" not in answer.headers
        assert await assist(it) == {"is_on": True, "why": None, "remedy": None}
        assert await it.count("backend_assist") == 1
        await it.fake.stop()
        await it.until(lambda: it.backend.health is Health.DOWN)
        assert await it.count("backend_assist") == 0


async def test_the_journal_tells_what_llama_server_reused(tmp_path: Path) -> None:
    """As far as the answer tells, streaming or not, in llama-server's numbers."""
    async with served(tmp_path, unified=True) as it:
        first = await it.ask(ONE)
        streamed = await it.ask(ONE + first.text + "more", stream=True)
        newest, oldest = (await it.get("/llamaslot/journal?n=2")).json["decisions"]
        assert await it.count('reused_tokens_total{source="server"}') == newest["n_reused"]
    assert (oldest["n_reused"], oldest["n_tokens"]) == (0, 800)
    assert newest["n_tokens"] == streamed.timings["cache_n"] + streamed.timings["prompt_n"]
    assert newest["n_reused"] == streamed.timings["cache_n"] > 800
    assert newest["is_assisted"] is oldest["is_assisted"] is False
    assert "llama-server chooses" in newest["text"]


@pytest.mark.parametrize("path", [NATIVE, CHAT, "/v1/completions", "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("stream", [False, True])
async def test_answers_are_llama_servers_own(tmp_path: Path, path: str, stream: bool) -> None:
    """Each route's answer is what llama-server alone answers, but for ids and times."""
    said = (
        {"prompt": ONE}
        if path in (NATIVE, "/v1/completions")
        else {"messages": [{"role": "user", "content": ONE}]}
    )
    said = {"input": ONE} if path == "/v1/responses" else said
    body = {
        "model": "any",
        "max_tokens": 4,
        "max_output_tokens": 4,
        "temperature": 0,
        "stream": stream,
        **said,
    }
    async with served(tmp_path, unified=True) as it:
        direct = await it.post(path, body, to=it.fake.url)
        through = await it.post(path, body)
        assert through.status == direct.status == 200
        assert through.headers["Content-Type"] == direct.headers["Content-Type"]
        assert through.text == direct.text
        assert len(through.events) == len(direct.events)


async def test_what_waits_is_queued_and_told(tmp_path: Path) -> None:
    """No more requests at a time than llama-server has slots; a stream that waits is told its place."""
    settings = {"stream": {"keepalive_s": 0.02}}
    async with served(tmp_path, settings, unified=True, slots=2) as it, it.busy(2) as others:
        async with it.streaming(THREE) as answer:
            assert answer.headers["x-llamaslot-assist"] == "off"
            line = await answer.content.readline()
            assert line.startswith(b": queued 1")
            n_sent = len(it.fake.sent(NATIVE))
            it.fake.go()
            assert b'"stop":true' in (await answer.content.read()).replace(b" ", b"")
        assert len(it.fake.sent(NATIVE)) == n_sent + 1
        for other in others:
            assert (await other).status == 200


async def test_a_client_that_leaves_makes_room(tmp_path: Path) -> None:
    """Its connection to llama-server is closed, and the next request is sent."""
    async with served(tmp_path, unified=True, slots=1) as it:
        async with it.busy(1):
            pass
        it.fake.go()
        assert (await it.ask(TWO)).text == right(it.fake, TWO)


async def test_errors_are_llama_servers_own(tmp_path: Path) -> None:
    """What it refuses, what cannot be read, and what is too long."""
    async with served(tmp_path, unified=True) as it:
        for body in ({"prompt": ONE, "temperature": "hot"}, {}, {"prompt": letters(9, 9000)}):
            direct, through = await it.post(NATIVE, body, to=it.fake.url), await it.post(NATIVE, body)
            assert (through.status, through.json) == (direct.status, direct.json)
        broken = await it.send("POST", NATIVE, data=b'{"prompt": ')
        assert (broken.status, broken.json) == (
            400,
            (await it.send("POST", NATIVE, data=b'{"prompt": ', to=it.fake.url)).json,
        )


OTHERS: dict[str, dict[str, tuple[int, Any]]] = {
    "--no-slots": {"/slots": (501, NO_SLOTS)},
    "no route for properties": {"/props": (404, {"error": {"code": 404, "message": "File Not Found"}})},
    "a page instead of properties": {"/props": (200, b"<html>hello</html>")},
    "slots that are none": {"/slots": (200, {"not": "a list"})},
    "no health": {"/health": (404, {"error": {"code": 404, "message": "File Not Found"}})},
}


@pytest.mark.parametrize("kind", OTHERS)
async def test_whatever_answers_as_llama_server_does_is_passed_through(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """Completions, lists of models and slots that nobody asked for: never a 503 of llamaslot's."""
    async with served(tmp_path, wait=False) as it:
        await it.fake.start()
        it.fake.overrides = OTHERS[kind]
        await it.start()
        answers = [await it.ask(text) for text in (ONE, TWO, THREE)]
        assert [answer.text for answer in answers] == [right(it.fake, text) for text in (ONE, TWO, THREE)]
        assert (await it.chat("hi", stream=True)).status == 200
        assert (await it.get("/v1/models")).status == 200
        assert (await it.get("/health")).status == 200
        if kind != "no health":
            assert (await assist(it))["is_on"] is False
            assert "assist is off" in caplog.text
            assert touched(it, 0) == []


async def test_a_server_without_completions_is_passed_through(tmp_path: Path) -> None:
    """One for embeddings: what it refuses it refuses by itself, and its own route is served."""
    embeddings = {"object": "list", "data": [{"embedding": [1.0], "index": 0, "object": "embedding"}]}
    async with served(tmp_path, wait=False) as it:
        await it.fake.start()
        it.fake.overrides = {"/completion": (501, NO_COMPLETIONS), "/v1/embeddings": (200, embeddings)}
        await it.start()
        answer = await it.post("/v1/embeddings", {"input": "hi"})
        assert (answer.status, answer.json) == (200, embeddings)
        assert answer.headers["x-llamaslot-assist"] == "off"
        refused = await it.ask(ONE)
        assert (refused.status, refused.json) == (501, NO_COMPLETIONS)


async def test_limits_hold_where_the_number_of_slots_is_unknown(tmp_path: Path) -> None:
    """A user may have as many requests under way as ``queue.user_max_running`` says; others are not held up."""
    settings = {"queue": {"user_max_running": 1}, "stream": {"keepalive_s": 0.02}}
    async with served(tmp_path, settings, wait=False) as it:
        await it.fake.start()
        it.fake.overrides = OTHERS["no route for properties"]
        await it.start()
        it.fake.hold()
        async with it.asking(ONE) as first:
            await it.fake.wait_for(lambda f: any(slot.is_processing for slot in f.slots))
            async with it.streaming(TWO) as second:
                assert (await second.content.readline()).startswith(b": queued 1")
                it.fake.go()
                assert (await first).status == 200
                assert b"stop" in await second.content.read()


async def test_isolation_is_not_given_up(tmp_path: Path) -> None:
    """Where users must not find each other's contexts, and llama-server alone chooses, nothing is served."""
    async with served(tmp_path, {"cache": {"isolation": "per_user"}}, wait=False, unified=True) as it:
        await it.fake.start()
        await it.start(wait=False)
        await it.until(lambda: "cache.isolation" in it.backend._why_down)
        answer = await it.ask(ONE)
    assert answer.status == 503
    assert "set cache.isolation to shared" in answer.error["message"]


@pytest.mark.parametrize("is_unified_first", [True, False])
async def test_a_server_that_is_exchanged_is_served_as_it_is(tmp_path: Path, is_unified_first: bool) -> None:
    """For one with other flags, in both directions, while llamaslot runs."""
    async with served(tmp_path, unified=is_unified_first) as it:
        assert (await it.ask(ONE)).text == right(it.fake, ONE)
        assert (await assist(it))["is_on"] is not is_unified_first
        it.fake.shape = replace(it.fake.shape, unified=not is_unified_first)
        before = it.backend.session
        await it.fake.restart()
        await it.until(lambda: it.backend.session not in (None, before) and it.backend.health is Health.UP)
        since = len(it.fake.requests)
        for text in (ONE, TWO, ONE + "more"):
            assert (await it.ask(text)).text == right(it.fake, text)
        assert (await assist(it))["is_on"] is is_unified_first
        assert bool(touched(it, since)) is is_unified_first


async def test_while_all_slots_are_at_work_for_others_requests_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start: they are queued by llama-server, and llamaslot helps as soon as a slot is idle."""
    monkeypatch.setattr(connect, "_SETTLE_POLL_S", 0.01)
    async with served(tmp_path, wait=False, slots=1) as it:
        await it.fake.start()
        it.fake.hold()
        other = spawn(it.ask(TWO, to=it.fake.url))
        await it.fake.wait_for(lambda f: f.slots[0].is_processing)
        await it.start()
        assert (await assist(it))["is_on"] is False
        async with it.asking(ONE) as mine:
            await it.fake.wait_for(lambda f: len(f.sent(NATIVE)) == 2)
            it.fake.go()
            assert (await mine).text == right(it.fake, ONE)
        assert (await other).status == 200
        await it.until(lambda: it.backend.session is not None and it.backend.session.is_assisted)
        assert (await it.ask(ONE)).headers["x-llamaslot-slot"] == "0"
        # Of the one beside other clients, which llamaslot cannot keep out.
        it.fake.violations.remove("completion while slots are busy")


async def test_a_server_that_is_silent_while_it_is_connected_to_is_looked_at_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It computes nothing for longer than ``timeouts.watchdog_s``: that is its state, and no mistake of llamaslot's."""
    async with served(tmp_path, {"timeouts": {"watchdog_s": 0.15}}, wait=False) as it:
        await it.fake.start()
        it.fake.hold()
        await it.start()
        assert "sent nothing for 0.15 s" in (await assist(it))["why"]
        it.fake.go()
        await it.until(lambda: it.backend.session is not None and it.backend.session.is_assisted)
        assert (await it.ask(ONE)).text == right(it.fake, ONE)
    assert "Traceback" not in caplog.text


async def test_slots_that_keep_losing_their_contexts_are_looked_at_again(tmp_path: Path) -> None:
    """A server that was exchanged unseen (its mark is the same): what it does now is found out."""
    async with served(tmp_path, slots=3) as it:
        first = it.backend.session
        it.fake.engine.shape = replace(it.fake.shape, unified=True)
        texts = [ONE, TWO, THREE]
        for n in (0, 1, 2, 0, 1, 2, 0, 1, 2):
            answer = await it.ask(texts[n])
            assert answer.text == right(it.fake, texts[n])
            texts[n] += answer.text + "more"
        await it.until(lambda: it.backend.session not in (None, first))
        assert (await assist(it))["is_on"] is False


async def test_a_mistake_while_connecting_keeps_no_request_from_being_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever goes wrong in finding out what the server can do: requests are passed on."""

    async def wrong(*_: Any) -> None:
        raise RuntimeError("nobody has thought of this")

    monkeypatch.setattr(Probes, "cache_kind", wrong)
    async with served(tmp_path) as it:
        assert (await it.ask(ONE)).text == right(it.fake, ONE)
        assert "nobody has thought of this" in (await assist(it))["why"]
    assert "Traceback" in caplog.text


async def test_a_stream_that_waits_outlives_the_end_of_standing_aside(tmp_path: Path) -> None:
    """It has been told its place already, so that its headers are gone: it is placed all the same, and not failed."""
    settings = {"queue": {"user_max_running": 1}, "stream": {"keepalive_s": 0.02}}
    async with served(tmp_path, settings, unified=True, slots=2) as it, it.busy(1) as others:
        async with it.streaming(ONE) as answer:
            assert (await answer.content.readline()).startswith(b": queued 1")
            it.fake.engine.shape = replace(it.fake.shape, unified=False)
            it.fake.go()
            it.backend.changed("its flags are others")
            told = await answer.content.read()
        assert b"error" not in told, told
        assert b'"stop":true' in told.replace(b" ", b"")
        assert b": x-llamaslot-slot: " in told
        assert (await others[0]).status == 200


@pytest.mark.parametrize("stream", [True, False])
async def test_of_a_list_of_prompts_each_is_answered_once(tmp_path: Path, stream: bool) -> None:
    """Also if llamaslot begins to stand aside between two: what is left is asked for, and not the whole list."""
    async with served(tmp_path, {"prefill": {"chunk_threshold_s": 0}}) as it:
        settle = it.backend.executor.settle

        def settled(*of: Any) -> None:
            settle(*of)
            it.fake.engine.shape = replace(it.fake.shape, unified=True)
            it.backend.changed("its flags are others")

        it.backend.executor.settle = settled  # type: ignore[method-assign, assignment]
        answer = await it.ask([ONE, TWO, THREE], path=TEXT, stream=stream)
        assert (await assist(it))["is_on"] is False
        choices = answer.json["choices"] if not stream else [e["choices"][0] for e in answer.events if e]
        texts = {n: "".join(c["text"] for c in choices if c["index"] == n) for n in range(9)}
        assert texts == {
            **dict.fromkeys(range(9), ""),
            **{n: right(it.fake, text) for n, text in enumerate((ONE, TWO, THREE))},
        }


async def test_a_passing_fault_while_connecting_is_looked_at_again(tmp_path: Path) -> None:
    """llama-server fails once: requests are passed on, and assist is on as soon as it does not."""
    async with served(tmp_path, wait=False) as it:
        await it.fake.start()
        it.fake.faults.fail("/completion", 500, "a passing fault")
        await it.start()
        assert "a passing fault" in (await assist(it))["why"]
        assert (await it.ask(ONE)).text == right(it.fake, ONE)
        await it.until(lambda: it.backend.session is not None and it.backend.session.is_assisted)
        assert (await it.ask(ONE)).text == right(it.fake, ONE)
