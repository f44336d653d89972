"""Servers that answer with errors, and prompts that end them: what another server can do is done, and nothing is sent
round and round.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llamaslot.backend.connect import ServerSession
from tests.support.fleet import Fleet, backend_of, fleet
from tests.support.inprocess import CHAT, NATIVE, letters, spawn

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
    monkeypatch.setattr("llamaslot.backend.backend._WATCH_S", 0.05)
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
        assert f"{place}: answers with errors, and gets no requests for 2 s while" in caplog.text
        it.fakes[place].overrides = {}
        it.named(place).suspicion._until = 0.0
        await it.until(lambda: not it.named(place).leases.is_suspect)
        it.fakes[other].hold()
        assert {backend_of(await it.ask(text)) for text in TEXTS[:2]} == {place}
        it.fakes[other].go()


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
