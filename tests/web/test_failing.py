"""Servers that answer with errors, and prompts that end them: what another server can do is done, and nothing is sent
round and round.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llamaslot.backend.connect import ServerSession
from llamaslot.backend.health import Health
from tests.support.fake import FakeServer
from tests.support.fleet import Fleet, backend_of, fleet
from tests.support.inprocess import CHAT, NATIVE, a_session, configured, letters, spawn

TEXTS = [letters(n, 1200) for n in range(40, 48)]
ROUTES = (NATIVE, CHAT, "/v1/completions", "/tokenize", "/apply-template", "/props", "/v1/embeddings")
BROKEN = (500, {"error": {"code": 500, "message": "something is broken", "type": "server_error"}})


def n_sent(it: Fleet, name: str) -> int:
    """Requests of clients that it has got; they have more tokens than those of llamaslot itself."""
    every = it.fakes[name].requests
    return sum(seen.path in (NATIVE, CHAT, "/v1/embeddings") and len(str(seen.body)) > 1000 for seen in every)


def is_connected_again(it: Fleet, before: ServerSession | None) -> bool:
    return it.named("gpu0").session not in (None, before)


def break_(it: Fleet, name: str, *paths: str) -> None:
    """From now on it answers these routes with an error of its own."""
    it.fakes[name].overrides = dict.fromkeys(paths, BROKEN)


async def at_work(it: Fleet, besides: Collection[str] = ()) -> str:
    """The server that has got a completion."""

    def working() -> list[str]:
        every = it.fakes.items()
        return [
            name for name, its in every if name not in besides and any(s.is_processing for s in its.slots)
        ]

    await it.until(lambda: bool(working()))
    return working()[0]


@pytest.mark.parametrize("paths", [ROUTES, (NATIVE, CHAT)])
async def test_one_that_answers_500_draws_no_requests(
    tmp_path: Path, paths: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether it answers llamaslot's own questions or not. No client notices, and it is used again when it works."""
    monkeypatch.setattr("llamaslot.backend.health._WATCH_S", 0.05)
    monkeypatch.setattr("llamaslot.backend.health._PAUSE_S", 60.0)  # longer than the test on any machine
    async with fleet(tmp_path, 2) as it:
        place = backend_of(await it.ask(TEXTS[0]))
        other = ({*it.fakes} - {place}).pop()
        break_(it, place, *paths)
        for is_stream in (False, True):
            for text in TEXTS:
                assert backend_of(await it.ask(text + "more", stream=is_stream)) == other
        assert (await it.chat("hello")).status == 200
        assert (await it.post("/tokenize", {"content": "hi"})).status == 200
        assert n_sent(it, place) <= 2
        assert f"{place}: llama-server answers with errors; for 60 s it gets no request" in caplog.text
        it.fakes[place].overrides = {}

        def is_forgiven() -> bool:
            """After its pause. A question that was under way may still bring an error, and the next pause."""
            it.named(place).suspicion._until = 0.0
            return not it.named(place).leases.is_suspect

        await it.until(is_forgiven)
        break_(it, other, *ROUTES)  # else it might be preferred: it holds what the other one has missed
        assert {backend_of(await it.ask(text)) for text in TEXTS[:2]} == {place}


@pytest.mark.parametrize("path", [NATIVE, "/apply-template", "/tokenize", "/v1/embeddings"])
async def test_an_error_of_the_request_is_passed_on(tmp_path: Path, path: str) -> None:
    """llama-server answers 500 to some mistakes of clients: a second one is asked once, and neither is blamed."""
    body: dict[str, Any] = {NATIVE: {"prompt": TEXTS[0] * 2}, "/v1/embeddings": {"input": TEXTS[0] * 2}}.get(
        path, {}
    )
    route, body = (path, body) if body else (CHAT, {"messages": [{"role": "user", "content": "hello"}]})
    async with fleet(tmp_path, 3) as it:
        for name in it.fakes:
            break_(it, name, path)
        answers = [await it.post(route, body) for _ in range(3)]
        assert [(answer.status, answer.json) for answer in answers] == [BROKEN] * 3
        assert not any(its.leases.is_suspect for its in it.registry.backends)
        if route == path:
            assert sum(n_sent(it, name) for name in it.fakes) == 4  # the first of them two


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_failure_in_the_middle_of_the_prompt_goes_to_another(tmp_path: Path, is_stream: bool) -> None:
    """The stream of llama-server has begun, that of the client has not."""
    async with fleet(tmp_path, 2) as it:
        place = backend_of(await it.ask(TEXTS[0]))
        it.fakes[place].faults.fail_stream()
        answer = await it.ask(TEXTS[0] + "more", stream=is_stream)
        assert (answer.status, len(answer.text)) == (200, 4)
        assert backend_of(answer) != place


async def test_without_another_the_answer_is_the_servers_own(tmp_path: Path) -> None:
    """Also while the other one is drained."""
    async with fleet(tmp_path, 2) as it:
        await it.send("POST", "/llamaslot/drain?backend=gpu1")
        break_(it, "gpu0", NATIVE)
        answer = await it.ask(TEXTS[0])
        assert (answer.status, answer.json) == BROKEN
        assert not it.named("gpu0").leases.is_suspect


async def test_a_prompt_that_ends_servers_is_not_sent_on(tmp_path: Path) -> None:
    """It ends two of three, and is refused from then on; other prompts are served."""
    async with fleet(tmp_path, 3) as it:
        for server in it.fakes.values():
            server.hold()
        task = spawn(it.ask(TEXTS[0]))
        ended = set[str]()
        for _ in range(2):
            ended.add(place := await at_work(it, ended))
            await it.fakes[place].kill()
        left = ({*it.fakes} - ended).pop()
        it.fakes[left].go()
        for answer in (await task, await it.ask(TEXTS[0]), await it.ask(TEXTS[0], stream=True)):
            assert (answer.status, answer.error["code"]) == (500, "server_ended")
            assert "has ended 2 times while it computed this prompt" in answer.error["message"]
        assert n_sent(it, left) == 0
        assert backend_of(await it.ask(TEXTS[1])) == left


async def test_it_is_known_where_there_is_only_one_server(tmp_path: Path) -> None:
    """It was started again, and ended again."""
    async with fleet(tmp_path, 1) as it:
        for status in (503, 500):
            it.fakes["gpu0"].hold()
            task = spawn(it.ask(TEXTS[0]))
            await at_work(it)
            before = it.named("gpu0").session
            await it.fakes["gpu0"].restart()
            assert (await task).status == status
            await it.until(partial(is_connected_again, it, before))
        before_n = n_sent(it, "gpu0")
        assert (await it.ask(TEXTS[0])).status == 500
        assert n_sent(it, "gpu0") == before_n
        assert (await it.ask(TEXTS[1])).status == 200


async def test_a_prompt_that_was_answered_elsewhere_is_forgotten(tmp_path: Path) -> None:
    """The server ended for another reason."""
    async with fleet(tmp_path, 2) as it:
        for server in it.fakes.values():
            server.hold()
        task = spawn(it.ask(TEXTS[0]))
        place = await at_work(it)
        await it.fakes[place].kill()
        for server in it.fakes.values():
            server.go()
        assert (await task).status == 200
        assert len(it.pool_of(place).bad_prompts) == 0


OTHER_PROGRAMS: dict[str, Any] = {"an object": {}, "a page": b"<html>It works!</html>", "a list": [1, 2]}


@pytest.mark.parametrize("kind", OTHER_PROGRAMS)
async def test_another_program_is_no_server(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It answers 200 to everything: what it answered is said once, it is no model, and nothing is sent to it."""
    answer = (200, OTHER_PROGRAMS[kind])
    async with fleet(tmp_path, 2, wait=False) as it:
        for server in it.fakes.values():
            await server.start()
        it.fakes["gpu1"].overrides = dict.fromkeys((*ROUTES, "/health", "/v1/models", "/slots"), answer)
        await it.start(wait=False)
        await it.until(lambda: it.named("gpu0").health is Health.UP)
        await it.until(lambda: "is not ready" in it.named("gpu1")._why_down)
        (said,) = {
            text for text in caplog.messages if "what answers is no llama-server: GET /props 200" in text
        }
        assert said.startswith("gpu1: ")
        assert {backend_of(await it.ask(text, model="a")) for text in TEXTS[:3]} == {"gpu0"}
        assert [entry["id"] for entry in (await it.get("/v1/models")).json["data"]] == ["a"]
        it.fakes["gpu1"].overrides = {}
        await it.all_up()
        assert it.members() == [{"gpu0", "gpu1"}]


async def test_another_program_in_place_of_a_server_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While llamaslot runs."""
    monkeypatch.setattr("llamaslot.backend.health._WATCH_S", 0.05)
    async with fleet(tmp_path, 2) as it:
        page = (200, OTHER_PROGRAMS["a page"])
        it.fakes["gpu0"].overrides = dict.fromkeys((*ROUTES, "/v1/models", "/slots"), page)
        await it.until(lambda: "is no llama-server" in it.named("gpu0")._why_down)
        assert {backend_of(await it.ask(text)) for text in TEXTS[:3]} == {"gpu1"}


async def test_one_server_under_two_addresses_is_used_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own tells: each process has a mark. The text of the addresses does not."""
    async with FakeServer(tmp_path / "kv") as fake, forwarded(fake.port) as port:
        urls = {"gpu0": fake.url, "gpu1": f"http://127.0.0.1:{port}"}
        backends = [
            {"name": name, "url": url, "slot_save_path": str(tmp_path / "kv")} for name, url in urls.items()
        ]
        async with a_session() as session:
            config = configured(tmp_path, backends, {})
            it = Fleet(fakes={"gpu0": fake}, config=config, session=session, save_dir=tmp_path / "kv")
            await it.start(wait=False)
            try:
                await it.until(lambda: any("same llama-server as" in text for text in caplog.messages))
                await it.until(lambda: [its.health for its in it.registry.backends].count(Health.UP) == 1)
                answers = [await it.ask(text) for text in TEXTS[:4]]
                assert len({backend_of(answer) for answer in answers}) == 1
                it.check()
            finally:
                await it.stop()


@contextlib.asynccontextmanager
async def forwarded(port: int) -> AsyncIterator[int]:
    """Another port that leads to ``port``."""

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        its_reader, its_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pipe(reader, its_writer), pipe(its_reader, writer))

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as listener:
        yield listener.sockets[0].getsockname()[1]
