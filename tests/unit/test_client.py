"""The client of llama-server: its connections, and errors that are translated at this edge."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio

from llamaslot.cache.ids import pack, unpack
from llamaslot.errors import BackendDown, SlotActionFailed, UpstreamError
from llamaslot.llama.answers import Progress
from llamaslot.llama.client import LlamaServer
from llamaslot.llama.transport.kept_connections import Answer
from tests.support.fake import FakeServer
from tests.support.leftovers import nothing_left
from tests.support.real import free_port
from tests.support.turns import with_turns

__all__ = ["nothing_left"]

TOKENS = pack([97 + i % 26 for i in range(300)])


@pytest_asyncio.fixture
async def fake(tmp_path: Path) -> AsyncIterator[FakeServer]:
    async with FakeServer(tmp_path / "kv", slots=2, context=4096, batch=100, gone_s=0.05) as server:
        yield server


@pytest_asyncio.fixture
async def api(fake: FakeServer) -> AsyncIterator[LlamaServer]:
    client = LlamaServer(fake.url + "/")
    yield client
    await client.close()


async def test_what_the_server_tells_of_itself(api: LlamaServer, fake: FakeServer) -> None:
    """Slots, context of one of them, and the mark of this process."""
    props = await api.props()
    assert (props.n_slots, props.n_ctx, props.boot_id) == (2, 4096, fake.media_marker)
    assert props.model_path == fake.model.path
    assert (await api.model_info())["meta"]["n_vocab"] == 259
    assert await api.lora_adapters() == []
    before = await api.slots()
    assert [(info.id, info.is_processing, info.n_tokens, info.id_task) for info in before] == [
        (0, False, None, None),
        (1, False, None, None),
    ]


async def test_a_prefill_says_first_what_is_reused(api: LlamaServer) -> None:
    """One Progress per batch; the slot holds exactly the tokens at the end."""

    async def prefill(tokens: bytes) -> list[Progress]:
        return [event async for event in api.prefill(1, tokens)]

    first = await prefill(TOKENS[: 4 * 250])
    assert [(event.total, event.cache, event.processed) for event in first] == [
        (250, 0, 0),
        (250, 0, 100),
        (250, 0, 200),
        (250, 0, 250),
    ]
    again = await prefill(TOKENS)
    assert (again[0].cache, again[0].processed, again[-1].processed) == (250, 250, 300)
    assert (await api.slots())[1].n_tokens == 300


async def test_a_prefill_is_computed_with_the_lora_scales_of_its_job(
    api: LlamaServer, fake: FakeServer
) -> None:
    """As JSON, as the job's own request has them; without any the server's own hold."""
    for lora in ("", '[{"id":0,"scale":0.5}]'):
        async for _ in api.prefill(0, TOKENS, lora):
            pass
    plain, scaled = (seen.body for seen in fake.sent("/completion"))
    assert "lora" not in plain
    assert scaled["lora"] == [{"id": 0, "scale": 0.5}]


async def test_a_prefill_that_is_closed_stops_and_keeps_what_was_computed(
    api: LlamaServer, fake: FakeServer
) -> None:
    """The next one resumes there."""
    fake.hold()
    stepping = asyncio.get_running_loop().create_task(fake.step())
    async with contextlib.aclosing(api.prefill(0, TOKENS)) as events:
        async for event in events:
            if event.processed:
                break
    await stepping
    await fake.wait_for(lambda f: not f.slots[0].is_processing)
    fake.go()
    async with contextlib.aclosing(api.prefill(0, TOKENS)) as events:
        assert (await anext(events)).cache == 100


async def test_slots_are_saved_erased_and_restored(
    api: LlamaServer, fake: FakeServer, tmp_path: Path
) -> None:
    """With tokens, bytes and seconds as the server counts them."""
    async for _ in api.prefill(0, TOKENS):
        pass
    saved = await api.save(0, "a.kv")
    assert (saved.n_tokens, saved.n_bytes) == (300, (tmp_path / "kv/a.kv").stat().st_size)
    assert saved.seconds > 0
    await api.erase(0)
    assert not fake.slots[0].tokens
    assert (await api.restore(0, "a.kv")).n_tokens == 300
    assert fake.slots[0].tokens == TOKENS


async def test_probabilities_are_computed_afresh(api: LlamaServer, fake: FakeServer) -> None:
    """Twice the same, and nothing cached is used."""
    first = await api.top_logprobs(0, TOKENS, 8)
    assert await api.top_logprobs(0, TOKENS, 8) == first
    assert len(first) == 8
    assert all(seen.body["cache_prompt"] is False for seen in fake.sent("/completion"))


async def test_texts_become_tokens(api: LlamaServer) -> None:
    """Special tokens are parsed."""
    prompt = await api.apply_template({"messages": [{"role": "user", "content": "hi"}]})
    tokens = unpack(await api.tokenize(prompt, add_special=True))
    assert tokens[0] == 256
    assert bytes(tokens[1:5]) == b"user"


Call = Callable[[LlamaServer], Awaitable[Any]]


async def drained(api: LlamaServer) -> None:
    async for _ in api.prefill(0, TOKENS):
        pass


CALLS: dict[str, Call] = {
    "/props": lambda api: api.props(),
    "/slots": lambda api: api.slots(),
    "/v1/models": lambda api: api.model_info(),
    "/apply-template": lambda api: api.apply_template({"messages": []}),
    "/tokenize": lambda api: api.tokenize("x", add_special=False),
    "save": lambda api: api.save(0, "a.kv"),
    "restore": lambda api: api.restore(0, "a.kv"),
    "erase": lambda api: api.erase(0),
    "/completion": drained,
}


@pytest.mark.parametrize("what", CALLS)
async def test_a_connection_that_is_dropped_is_backend_down(
    api: LlamaServer, fake: FakeServer, what: str
) -> None:
    """The errors of connections stay in this room; what only asks is perhaps asked twice."""
    for _ in range(2):
        fake.faults.disconnect_before_headers(what)
    with pytest.raises(BackendDown, match="closed the connection"):
        await CALLS[what](api)


@pytest.mark.parametrize("what", CALLS)
async def test_a_server_that_is_not_there_is_backend_down(what: str) -> None:
    """The message names its address and what to do."""
    api = LlamaServer(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(BackendDown, match=r"at http://127\.0\.0\.1:\d+ refuses the connection .*; try again"):
        await CALLS[what](api)
    await api.close()


@pytest.mark.parametrize("what", [what for what in CALLS if what != "/metrics"])
async def test_an_error_answer_keeps_its_status(api: LlamaServer, fake: FakeServer, what: str) -> None:
    """UpstreamError with the server's own body; SlotActionFailed with its status."""
    fake.faults.fail(what, 418, "no tea")
    with pytest.raises((UpstreamError, SlotActionFailed), match="no tea") as caught:
        await CALLS[what](api)
    error = caught.value
    if isinstance(error, UpstreamError):
        assert error.status == 418
        assert b"no tea" in error.payload
    else:
        assert isinstance(error, SlotActionFailed)
        assert error.status_upstream == 418


async def test_a_prefill_that_breaks_off_is_backend_down(api: LlamaServer, fake: FakeServer) -> None:
    """After some of its events."""
    fake.faults.disconnect_after_events(2)
    with pytest.raises(BackendDown):
        await drained(api)


async def test_health_is_a_question_that_never_raises(api: LlamaServer, fake: FakeServer) -> None:
    """200, or what is seen instead: a refused connection tells of the ports that builds choose by themselves."""
    assert await api.why_unhealthy() is None
    fake.loading = True
    assert await api.why_unhealthy() == "answers 503 to /health"
    await fake.kill()
    told = str(await api.why_unhealthy())
    assert told.startswith("refuses the connection")
    assert "9931" in told


async def test_a_server_that_closes_behind_each_answer(api: LlamaServer, fake: FakeServer) -> None:
    """Without a word, as after slow ones: no question is lost by that."""
    fake.faults.close_after_slow_s = 0.0
    for _ in range(20):
        await api.props()
        await api.slots()


async def test_the_key_is_sent(tmp_path: Path) -> None:
    """And without it the server's own 401 is told."""
    async with FakeServer(tmp_path / "kv", api_key="secret") as fake:
        for key, works in (("secret", True), ("wrong", False), (None, False)):
            api = LlamaServer(fake.url, key)
            if works:
                await api.props()
            else:
                with pytest.raises(UpstreamError, match="401"):
                    await api.props()
            await api.close()


async def test_a_request_that_is_cancelled_closes_its_connection(api: LlamaServer, fake: FakeServer) -> None:
    """The server notices, and is idle again."""
    fake.hold()
    task = asyncio.get_running_loop().create_task(drained(api))
    await fake.wait_for(lambda f: f.slots[0].is_processing)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await fake.wait_for(lambda f: not f.slots[0].is_processing)


async def test_other_tasks_run_between_the_steps_with_a_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else 16 MiB would hold up all streams for 54 ms or more; with a short text none runs, as that costs it time."""
    client, text = LlamaServer("http://127.0.0.1:1"), ""

    async def at_once(method: str, path: str, data: bytes | None = None, timeout_s: float = 1.0) -> Answer:
        return Answer(200, "application/json", orjson.dumps({"prompt": text, "tokens": [7]}))

    monkeypatch.setattr(client, "_question", at_once)
    n_turns = list[tuple[int, int]]()
    for text in ("short", "a" * (1 << 20)):
        rendered, n_rendering = await with_turns(client.apply_template({}, b"{}"))
        tokens, n_tokenizing = await with_turns(client.tokenize(text, add_special=True))
        assert (rendered, tokens) == (text, pack([7]))
        n_turns.append((n_rendering, n_tokenizing))
    # Before the answer is parsed and after that; before the text is written as JSON and after that.
    assert n_turns == [(0, 0), (2, 2)]
    await client.close()
