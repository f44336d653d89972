"""What clients get from llamaslot in front of the real llama.cpp."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from llamaslot.backend.lease_states import OWN_REQUEST
from llamaslot.cache.ids import count
from llamaslot.store import read_slot_file
from tests.support import models
from tests.support.answers import Answer
from tests.support.inprocess import CHAT, NATIVE, TEXT, Front, fronted, letters, line_with, spawn
from tests.support.leftovers import nothing_left
from tests.support.real import RealServer
from tests.support.rounding import LIKELY_NATIVE, is_right

__all__ = ["nothing_left"]
pytestmark = pytest.mark.real

OWN_STEPS = {"prefill": {"chunk_threshold_s": 0}}
KINDS = ("dense", "swa", "recurrent", "hybrid")
ONE, TWO = letters(1, 2500), letters(2, 2500)


@asynccontextmanager
async def serving(
    tmp_path: Path, settings: Any = None, *, kind: str = "dense", has_draft: bool = False, **server: Any
) -> AsyncIterator[tuple[Front, RealServer]]:
    """The real llama.cpp and llamaslot in front of it."""
    options = {"slots": 1, "context": 8192, "draft": models.draft(tmp_path) if has_draft else None, **server}
    async with (
        RealServer(models.of_kind(kind, tmp_path), tmp_path / "kv", **options) as real,
        fronted(tmp_path, real.url, tmp_path / "kv", settings) as it,
    ):
        yield it, real


async def computed(real: RealServer) -> float:
    """Prompt tokens computed so far."""
    return (await real.metrics())["llamacpp:prompt_tokens_total"]


async def held(it: Front, real: RealServer, slot: int) -> bytes:
    """The tokens that the server has in a slot, read back from a file that it writes."""
    await real.post(f"/slots/{slot}?action=save", {"filename": "test.bin"})
    path = it.save_dir / "test.bin"
    file = await read_slot_file(path)
    path.unlink()
    return file.tokens


@pytest.mark.parametrize("kind", KINDS)
async def test_the_tokens_are_those_that_the_server_uses(tmp_path: Path, kind: str) -> None:
    """On every route, at once and in steps, for texts, ids and conversations: what llamaslot believes to be in the slot
    is what the server writes to a file."""
    turns = [
        {"role": "system", "content": "Answer briefly. ä€𝄞"},
        {"role": "user", "content": letters(3, 300)},
        {"role": "assistant", "content": "a <|im_end|> b"},
        {"role": "user", "content": "and?\n\n <|im_start|>"},
    ]
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    ]
    asked: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"messages": turns}),
        (CHAT, {"messages": turns, "tools": tools}),
        (CHAT, {"messages": [*turns, {"role": "assistant", "content": "begun"}]}),
        (TEXT, {"prompt": "plain text\n" + ONE[:300]}),
        (NATIVE, {"prompt": [10, "text <|im_end|>", 300 - 50, "é"]}),
        (NATIVE, {"prompt": list(range(30, 120))}),
    ]
    async with serving(tmp_path, OWN_STEPS, kind=kind, slots=2) as (it, real):
        for path, body in asked:
            for stream in (False, True):
                answer = await it.post(path, {**body, "max_tokens": 3, "n_predict": 3, "stream": stream})
                assert answer.status == 200, answer.raw
                n_prompt = int(answer.headers["x-llamaslot-prompt-tokens"])
                timings = answer.timings
                assert timings["cache_n"] + timings["prompt_n"] == n_prompt
                await it.at_rest()
                assert it.backend.leases.table is not None
                believed = it.backend.leases.table.slots[answer.slot].content.tokens
                tokens = await held(it, real, answer.slot)
                assert tokens[: len(believed)] == believed
                assert count(believed) == n_prompt
                assert count(tokens) == n_prompt + timings["predicted_n"] - 1
        assert it.pool.context is not None
        assert not it.pool.context.tokenizer.has_miscounted


@pytest.mark.parametrize("kind", [*KINDS, "with a draft model"])
async def test_what_was_evicted_comes_back_from_disk(tmp_path: Path, kind: str) -> None:
    """By the server's own count almost nothing is computed again, and the answer is the one asked cold."""
    options: dict[str, Any] = {"has_draft": True} if kind == "with a draft model" else {"kind": kind}
    async with serving(tmp_path, **options) as (it, real):
        first = await it.ask(ONE, n=8)
        longer = ONE + first.text + " and? "
        await it.ask(TWO, n=8)
        before = await computed(real)
        again = await it.ask(longer, n=8)
        assert again.source == "snapshot"
        assert await computed(real) - before < 40
        assert again.timings["cache_n"] > 2480
        cold = await it.ask(longer, n=8, cache_prompt=False, **LIKELY_NATIVE)
        assert is_right(again.text, cold.json)
        assert (await it.metrics())["llamaslot_snapshot_restores_total"] == 1


@pytest.mark.parametrize("path", [CHAT, TEXT, NATIVE])
@pytest.mark.parametrize("stream", [True, False])
async def test_answers_are_the_servers_own(tmp_path: Path, path: str, stream: bool) -> None:
    """Event by event what it says when it is asked directly, but for ids and times."""
    asked = {"messages": [{"role": "user", "content": ONE[:300]}]} if path == CHAT else {"prompt": ONE[:300]}
    body = {
        **asked,
        "n_predict": 6,
        "max_tokens": 6,
        "temperature": 0,
        "stream": stream,
        "cache_prompt": False,
    }
    options = {"stream_options": {"include_usage": True}, "return_progress": True} if stream else {}
    async with serving(tmp_path) as (it, real):
        direct = await it.post(path, {**body, **options, "id_slot": 0}, to=real.url)
        answer = await it.post(path, {**body, **options})
    assert same(answer) == same(direct)
    of_connection = {"Connection", "Keep-Alive", "Content-Length", "Transfer-Encoding", "Server"}
    ended = {"Access-Control-Allow-Origin"}  # whom web pages may ask is llamaslot's to say
    for name in direct.headers.keys() - of_connection - ended:
        assert answer.headers[name] == direct.headers[name], name


def same(answer: Answer) -> list[Any]:
    """What does not change from one request to the next."""

    def stripped(value: Any) -> Any:
        if isinstance(value, list):
            return [stripped(part) for part in value]
        if not isinstance(value, dict):
            return value
        changing = (
            "id",
            "created",
            "prompt_ms",
            "predicted_ms",
            "time_ms",
            "per_token_ms",
            "per_second",
            "id_slot",
        )
        return {k: stripped(v) for k, v in value.items() if not k.endswith(changing)}

    return [stripped(part) for part in (answer.events or [answer.json])]


REFUSED: list[tuple[str, dict[str, Any]]] = [
    (NATIVE, {"prompt": letters(1, 600)}),
    (TEXT, {"prompt": letters(1, 512), "stream": True}),
    (CHAT, {"messages": [{"role": "user", "content": letters(1, 500)}]}),
    (NATIVE, {"prompt": [999_999]}),
    (NATIVE, {"prompt": "x", "n_predict": "many"}),
    (NATIVE, {"prompt": "x", "n_cmpl": 5}),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "n": 5}),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "stream": "yes"}),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "nonsense"}}),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}),
    (CHAT, {"messages": "hello"}),
    (CHAT, {}),
    ("/v1/responses", {"nothing": 1}),
    ("/v1/messages", {"nothing": 1}),
    ("/v1/embeddings", {"input": "x"}),
    ("/v1/nothing", {}),
]
# 500 in its words, so what its slot holds is doubted.
IMAGE = [{"type": "image_url", "image_url": {"url": "data:x"}}]
DOUBTFUL = [(CHAT, {"messages": [{"role": "user", "content": IMAGE}]})]


async def test_what_the_server_refuses_is_refused_in_its_words(tmp_path: Path) -> None:
    """Equal but for the order of keys, too long prompts included; and what is kept in the slots stays there."""
    async with serving(tmp_path, slots=2, context=512) as (it, real):
        for n in (1, 2):
            await it.ask(letters(n, 300))
        answers = [await it.post(path, body) for path, body in REFUSED]
        for n in (1, 2):
            assert (await it.ask(letters(n, 300) + "more")).n_reused == 300
        answers += [await it.post(path, body) for path, body in DOUBTFUL]
        for (path, body), answer in zip([*REFUSED, *DOUBTFUL], answers, strict=True):
            direct = await it.post(path, body, to=real.url)
            assert direct.status >= 400, (path, body)
            assert (answer.status, answer.json) == (direct.status, direct.json), path
            assert answer.headers["Content-Type"] == direct.headers["Content-Type"]


async def test_numbers_of_answers_are_read_as_the_server_reads_them(tmp_path: Path) -> None:
    """As an int32: some large ones are small, and need no more slots than there are."""
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "temperature": 0}
    async with serving(tmp_path, slots=2, context=512) as (it, real):
        session = it.backend.session
        for n in (2.9, 2**32 + 1, 2**32 + 2, 2**32, 2**32 + 3, 2**31, 2**53, 1e30, -3):
            answer = await it.post(CHAT, {**body, "n": n})
            direct = await it.post(CHAT, {**body, "n": n}, to=real.url)
            assert answer.status == direct.status, n
            assert answer.json.get("error") == direct.json.get("error"), n
            assert len(answer.json.get("choices", ())) == len(direct.json.get("choices", ())), n
        assert it.backend.session is session, "nothing ran where nobody had a slot"


@pytest.mark.parametrize("path", [NATIVE, TEXT, CHAT])
async def test_switches_that_are_none_are_refused_as_by_the_server(tmp_path: Path, path: str) -> None:
    """Those that llamaslot sets itself: a wrong one is not put right in silence."""
    said = {"messages": [{"role": "user", "content": "x"}]} if path == CHAT else {"prompt": "x"}
    async with serving(tmp_path, slots=2, context=512) as (it, real):
        for name in ("cache_prompt", "return_progress"):
            values: tuple[Any, ...] = ("no", 0, [], None, False)
            for value, stream in itertools.product(values, (False, True)):
                body = {**said, "max_tokens": 2, "temperature": 0, "stream": stream, name: value}
                answer, direct = await it.post(path, body), await it.post(path, body, to=real.url)
                assert answer.status == direct.status, body
                if direct.status != 200:
                    assert answer.json == direct.json
                    assert answer.headers["Content-Type"] == direct.headers["Content-Type"]


async def test_an_empty_prompt_that_asks_for_two_answers_takes_no_slot(tmp_path: Path) -> None:
    """Asked directly llama-server loses one for good."""
    async with serving(tmp_path, slots=2, context=512) as (it, real):
        body = {"prompt": "", "n_predict": 2, "n_cmpl": 2}
        assert (await it.post(NATIVE, body)).status == 400
        assert not any(slot["is_processing"] for slot in await real.slots())
        endless = spawn(it.post(NATIVE, body, to=real.url))
        async with asyncio.timeout(20):
            while not any(slot["is_processing"] for slot in await real.slots()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await real.post(NATIVE, {"prompt": ONE[:200], "n_predict": 100, "ignore_eos": True})
        assert not endless.done(), "or llamaslot may ask for them"
        assert any(slot["is_processing"] for slot in await real.slots())
        endless.cancel()
        await asyncio.wait([endless])


async def test_web_pages_are_told_nothing_by_the_server_itself(tmp_path: Path) -> None:
    """It lets in every page: that ends at llamaslot, with preflights, answers and streams alike."""
    origin = {"Origin": "http://a.page", "Access-Control-Request-Method": "POST"}
    async with serving(tmp_path) as (it, real):
        for method, path, body in (
            ("OPTIONS", CHAT, None),
            ("GET", "/v1/models", None),
            ("POST", NATIVE, {"prompt": "x", "n_predict": 1}),
            ("POST", NATIVE, {"prompt": "x", "n_predict": 1, "stream": True}),
            ("POST", CHAT, {}),
            ("GET", "/nothing", None),
        ):
            answer = await it.send(method, path, body=body, headers=origin)
            direct = await it.send(method, path, body=body, headers=origin, to=real.url)
            assert answer.status == direct.status
            assert direct.headers["Access-Control-Allow-Origin"] == "http://a.page"
            assert not [name for name in answer.headers if name.lower().startswith("access-control")]


async def test_other_routes_pass_through(tmp_path: Path) -> None:
    """The server's bytes, the web UI's too; bodies of unknown length arrive."""

    async def pieces() -> AsyncIterator[bytes]:
        for piece in (b'{"cont', b'ent": "h', b'i"}'):
            yield piece

    async with serving(tmp_path) as (it, real):
        for path in ("/", "/props", "/v1/models", "/lora-adapters", "/nothing"):
            answer, direct = await it.get(path), await it.send("GET", path, to=real.url)
            assert answer.status == direct.status
            if path != "/v1/models":  # it tells the time
                assert answer.raw == direct.raw
        async with it.session.post(it.url + "/tokenize", data=pieces()) as response:
            assert await response.json() == {"tokens": [104, 105]}


async def leave(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait({task})


async def test_clients_leave_at_every_stage(tmp_path: Path) -> None:
    """In the queue, in a prefill, before the first token, mid-stream and without streaming: the slot comes back each
    time, and the next answer is the one asked cold."""
    slow = {"prefill": {"chunk_threshold_s": 0.05}, "stream": {"keepalive_s": 0.02}}
    async with serving(tmp_path, slow, batch=256, ubatch=256, context=16_384) as (it, real):
        cold = await it.ask(TWO, n=6, cache_prompt=False, **LIKELY_NATIVE)

        async def goes_on() -> None:
            await it.at_rest()
            assert not any(slot["is_processing"] for slot in await real.slots())
            assert is_right((await it.ask(TWO, n=6)).text, cold.json)

        async with it.streaming(ONE, n=3000) as talking:  # the only slot
            await line_with(talking, "data:")
            queued = spawn(it.ask(ONE))
            await it.until(lambda: it.pool.dispatcher.n_waiting == 1)
            await leave(queued)
        await goes_on()

        before = await computed(real)
        async with it.streaming(letters(5, 12_000)) as stream:
            await line_with(stream, ": prefill ")
        await goes_on()
        assert await computed(real) - before < 9000

        waiting = spawn(it.ask(letters(6, 12_000)))
        await it.until(lambda: any(lease.is_confirmed for lease in it.pool.dispatcher.leases))
        await leave(waiting)
        await goes_on()

        whole = spawn(it.ask("short", n=3000))
        await it.until(lambda: any(lease.state in OWN_REQUEST for lease in it.pool.dispatcher.leases))
        await leave(whole)
        await goes_on()
        assert await it.count("clients_left_total") == 5


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def all_answered(it: Front) -> None:
    """Three contexts on two slots, twice: the answers asked cold."""
    texts = [letters(n, 400) for n in (1, 2, 3)]
    cold = [await it.ask(text, cache_prompt=False, **LIKELY_NATIVE) for text in texts]
    for text, expected in [*zip(texts, cold, strict=True)] * 2:
        assert is_right((await it.ask(text)).text, expected.json)
    assert (await it.ask(texts[0], n_cmpl=2)).status == 200
    messages = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    assert (await it.post("/v1/messages", messages)).status == 200


async def test_a_unified_cache_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What it costs and which flags mend it; llamaslot runs on."""
    extra = ("--kv-unified", "--cache-idle-slots", "--cache-ram", "64")
    async with serving(tmp_path, slots=2, extra=extra) as (it, _):
        await all_answered(it)
        assert it.files() == []
    (line,) = said(caplog)
    assert "--no-kv-unified" in line


async def test_a_server_without_a_save_path_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Contexts live in their slots only; llamaslot runs on."""
    async with serving(tmp_path, slots=2, saves=False) as (it, _):
        await all_answered(it)
    (line,) = said(caplog)
    assert "--slot-save-path DIR" in line


async def test_waiting_clients_hear_of_it(tmp_path: Path) -> None:
    """Queue and prefill, on the real server's own progress; then the answer with the numbers of the whole request."""
    soon = {"prefill": {"chunk_threshold_s": 0}, "stream": {"keepalive_s": 0.02}}
    async with serving(tmp_path, soon, batch=256, ubatch=256) as (it, _):
        async with it.streaming("x", n=100_000) as talking:
            await line_with(talking, "data:")
            waiting = spawn(it.ask(ONE, stream=True, n=3))
            await it.until(lambda: it.pool.dispatcher.n_waiting == 1)
            many = iter(range(20))
            await it.until(lambda: next(many, None) is None)  # a few times keepalive_s
        answer = await waiting
    assert "queued 1" in answer.comments
    assert any(line.startswith("prefill ") and line.endswith(" of 2500") for line in answer.comments)
    assert "x-llamaslot-prompt-tokens: 2500" in answer.comments
    assert answer.timings["prompt_n"] + answer.timings["cache_n"] == 2500
    assert answer.timings["prompt_n"] > 2400
