"""What clients see of long prompts: how far they are, and that neither short ones nor streams wait for them."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request

from llamaslot.backend.long_prompt import Prefilling
from llamaslot.config.sections import StreamConfig
from llamaslot.http.client_stream import Downstream
from tests.support.answers import Answer, untimed
from tests.support.inprocess import (
    CHAT,
    NATIVE,
    TEXT,
    Served,
    letters,
    line_with,
    of_kind,
    right,
    served,
    spawn,
)

OWN_STEPS = {"prefill": {"chunk_threshold_s": 0}}
SILENT = {"stream": {"keepalive_s": 0.01, "comments": False}, **OWN_STEPS}
SOON = {"stream": {"keepalive_s": 0.01}}
BASE, MORE, LONG = letters(1, 600), letters(2, 400), letters(9, 6000)
ROUTES = [CHAT, TEXT, NATIVE]


async def ask(it: Served, path: str, text: str, **more: Any) -> Answer:
    return await (it.chat(text, **more) if path == CHAT else it.ask(text, path=path, **more))


def prompt(it: Served, path: str, text: str) -> str:
    """What llama-server computes for ``text``."""
    return it.fake.model.render({"messages": [{"role": "user", "content": text}]}) if path == CHAT else text


def progress(answer: Answer) -> list[dict[str, Any]]:
    return [event["prompt_progress"] for event in answer.events if "prompt_progress" in event]


# -- how far it is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("settings", [OWN_STEPS, SILENT], ids=["comments", "silent"])
async def test_progress_counts_the_whole_prompt(tmp_path: Path, path: str, settings: Any) -> None:
    """With what was there before, forwards only, and with times that grow, up to what the timings say."""
    async with served(tmp_path, settings, batch=100) as it:
        await ask(it, path, BASE)
        it.fake.pace.prompt_token_s = 0.0001
        answer = await ask(it, path, BASE + MORE, stream=True, return_progress=True)
        whole = prompt(it, path, BASE + MORE)
        n = len(it.fake.model.tokenize(whole))
    told = progress(answer)
    assert len(told) >= 4
    assert {one["total"] for one in told} == {n}
    assert {one["cache"] for one in told} == {answer.timings["cache_n"]}
    assert 600 <= told[0]["cache"] <= told[0]["processed"] < told[1]["processed"]
    assert told[-1]["processed"] == n
    assert all(type(one["time_ms"]) is int for one in told)
    assert all(a["processed"] <= b["processed"] and a["time_ms"] <= b["time_ms"] for a, b in pairwise(told))
    assert told[-1]["time_ms"] == pytest.approx(answer.timings["prompt_ms"], abs=2)
    assert answer.text == right(it.fake, whole)


@pytest.mark.parametrize("path", ROUTES)
async def test_progress_has_the_servers_shape(tmp_path: Path, path: str) -> None:
    """An event for what llamaslot computes ahead looks like those that the server sends for the rest, which has an id
    and names of its own."""
    async with served(tmp_path, OWN_STEPS, batch=100) as it:
        it.fake.pace.prompt_token_s = 0.0001
        answer = await ask(it, path, BASE, stream=True, return_progress=True, model="a name of the client's")
        n_servers = bytes(it.fake.sent(path)[-1].answer).count(b'"prompt_progress"')
    told = [event for event in answer.events if "prompt_progress" in event]
    own, servers = told[:-n_servers], told[-n_servers:]
    assert len(own) >= 4
    assert n_servers >= 2
    for event in told:
        numbers = event.pop("prompt_progress")
        assert list(numbers) == ["total", "cache", "processed", "time_ms"]
    for event in told:
        for name in ("model", "system_fingerprint"):
            event.pop(name, None)
    assert [untimed(event) for event in own] == [untimed(servers[0])] * len(own)


async def test_progress_comes_while_it_is_computed(tmp_path: Path) -> None:
    """One event after each batch, long before the answer; with comments too where those are due."""
    async with served(tmp_path, {**SOON, **OWN_STEPS}, batch=100) as it:
        it.fake.hold()
        async with it.streaming(BASE, return_progress=True) as stream:
            await it.fake.wait_for(lambda f: any(slot.is_processing for slot in f.slots))
            for n in (100, 200, 300):
                await it.fake.step()
                await line_with(stream, f'"processed":{n}')
            await line_with(stream, ": prefill 300 of 600")
            it.fake.go()
            await line_with(stream, '"stop":true')


async def test_progress_comes_through_where_comments_are_switched_off(tmp_path: Path) -> None:
    """The client has asked for it."""
    async with served(tmp_path, SILENT, batch=100) as it:
        it.fake.hold()
        stepping = spawn(it.fake.step(2))
        async with it.streaming(BASE, return_progress=True) as stream:
            await line_with(stream, '"processed":200')
            await stepping
            it.fake.go()
            rest = (await stream.read()).decode()
    assert '"stop":true' in rest
    assert "\n: " not in rest


async def test_where_an_api_has_no_progress_events_comments_come_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However often the progress changes: without them a proxy would close the connection."""
    said: list[bytes] = []

    async def write(_: Downstream, data: bytes) -> None:
        said.extend([data] if data else [])

    monkeypatch.setattr(Downstream, "write", write)
    request = make_mocked_request("POST", "/v1/messages")
    down = Downstream(request, StreamConfig(keepalive_s=0.2), True, progress=lambda _: b"")
    async with asyncio.timeout(5), down.waiting():
        while not said:
            down.say(Prefilling(100, 600, 0, 0.0))
            await asyncio.sleep(0)
    assert said == [b": prefill 100 of 600\n"]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("chunk_threshold_s", [0, 3600])
async def test_others_are_told_in_comments(tmp_path: Path, path: str, chunk_threshold_s: float) -> None:
    """Who has not asked for progress gets none of its events, whoever computes the prompt; the comments tell it."""
    settings = {**SOON, "prefill": {"chunk_threshold_s": chunk_threshold_s}}
    async with served(tmp_path, settings, batch=100) as it:
        it.fake.hold()
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": BASE}]} if path == CHAT else {}
        n = len(it.fake.model.tokenize(prompt(it, path, BASE)))
        async with it.streaming(BASE, path=path, **asked) as stream:
            await it.fake.wait_for(lambda f: any(slot.is_processing for slot in f.slots))
            for n_done in (100, 200, 300):
                await it.fake.step()
                await line_with(stream, f": prefill {n_done} of {n}")
            it.fake.go()
            assert b"prompt_progress" not in await stream.read()


async def test_an_answer_in_one_piece_has_no_progress(tmp_path: Path) -> None:
    """``return_progress`` has no meaning there, as with llama-server itself."""
    async with served(tmp_path, OWN_STEPS, batch=100) as it:
        answer = await it.chat(BASE, return_progress=True)
        assert b"prompt_progress" not in answer.raw
        assert answer.text == right(it.fake, prompt(it, CHAT, BASE))


# -- and others --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "slot", "chunk_threshold_s"),
    [  # each two of them
        ("dense", 0, 0),
        ("dense", 1, 0.02),
        ("swa", 0, 0.02),
        ("swa", 1, 0),
        ("recurrent", 0, 0),
        ("recurrent", 1, 0.02),
    ],
)
async def test_a_short_request_gets_its_first_token_before_a_long_one_is_through(
    tmp_path: Path, kind: str, slot: int, chunk_threshold_s: float
) -> None:
    """In whichever slot it lands, and whether or not it has a step of its own; the long one goes on where it was."""
    settings = {"prefill": {"chunk_threshold_s": chunk_threshold_s, "chunk_s": 0.05}}
    async with served(tmp_path, settings, batch=256, ubatch=128, **of_kind(kind, tmp_path)) as it:
        if slot == 0:  # the other one is taken by a context that the long prompt leaves alone
            assert (await it.ask(letters(2, 500))).slot == 0
        it.fake.pace.prompt_token_s = 0.0001
        async with it.asking(LONG, stream=True, return_progress=True) as long:
            await it.fake.wait_for(lambda f: f.slots[1 - slot].n_tokens > 512)
            async with it.streaming(letters(3, 80)) as short:
                await line_with(short, '"stop":false')
                assert it.fake.slots[1 - slot].n_tokens < 5000
                assert not long.done()
                assert short.headers["x-llamaslot-slot"] == str(slot)
            answer = await long
    assert answer.text == right(it.fake, LONG)
    assert (answer.timings["cache_n"], answer.timings["prompt_n"]) == (0, 6000)
    told = progress(answer)
    assert all(a["processed"] <= b["processed"] and a["time_ms"] <= b["time_ms"] for a, b in pairwise(told))
    assert {one["cache"] for one in told} == {0}
    assert it.n_computed(LONG) == 6000


async def test_a_stream_goes_on_beside_a_long_prefill(tmp_path: Path) -> None:
    """Between two chunks it gets its share of the time, in which no batch of the prompt slows it down."""
    settings = {"prefill": {"chunk_threshold_s": 0, "chunk_s": 0.1, "decode_share": 0.7}}
    short = letters(2, 50)
    async with served(tmp_path, settings, batch=256) as it, it.asking(short, stream=True, n=1000) as stream:
        await it.fake.wait_for(lambda f: any(slot.task and slot.task.generated for slot in f.slots))
        it.fake.pace.prompt_token_s, it.fake.pace.token_s = 0.00005, 0.001
        n_before = it.fake.engine.counters["tokens_predicted_total"]
        answer = await it.ask(LONG, n=1)
        n_meanwhile = it.fake.engine.counters["tokens_predicted_total"] - n_before
        it.fake.pace.token_s = 0.0
        assert (await stream).text == right(it.fake, short, 1000)
    assert answer.text == right(it.fake, LONG, 1)
    assert n_meanwhile > 3 * len(LONG) / 256


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", ["dense", "swa", "recurrent"])
async def test_who_leaves_a_prefill_and_asks_again_goes_on_where_it_was(
    tmp_path: Path, kind: str, stream: bool
) -> None:
    """Nothing is computed twice but the batch that was under way."""
    settings = {"prefill": {"chunk_threshold_s": 0, "chunk_s": 0.05}}
    async with served(tmp_path, settings, slots=1, batch=256, ubatch=128, **of_kind(kind, tmp_path)) as it:
        await left_half_way(it, stream=stream)
        answer = await it.ask(LONG, stream=stream)
        assert it.n_computed(LONG) <= 6000 + 256
    assert answer.text == right(it.fake, LONG)
    assert answer.timings["cache_n"] >= 1500


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", ["dense", "swa", "recurrent"])
async def test_it_does_so_also_when_its_only_slot_was_used_meanwhile(
    tmp_path: Path, kind: str, stream: bool
) -> None:
    """What was computed is saved before somebody else's question takes the slot, and comes back from disk."""
    settings = {"prefill": {"chunk_threshold_s": 0, "chunk_s": 0.05}}
    async with served(tmp_path, settings, slots=1, batch=256, ubatch=128, **of_kind(kind, tmp_path)) as it:
        await left_half_way(it, stream=stream)
        short = await it.ask(letters(3, 200), stream=stream)
        answer = await it.ask(LONG, stream=stream)
        assert it.n_computed(LONG) <= 6000 + 256
    assert short.text == right(it.fake, letters(3, 200))
    assert answer.text == right(it.fake, LONG)
    assert answer.timings["cache_n"] >= 1500


async def left_half_way(it: Served, **more: Any) -> None:
    """Somebody has left in the middle of ``LONG``."""
    it.fake.pace.prompt_token_s = 0.0001
    async with it.asking(LONG, **more):
        await it.fake.wait_for(lambda f: f.slots[0].n_tokens > 1500)


async def test_a_sliding_window_is_not_interrupted_before_it_is_full(tmp_path: Path) -> None:
    """llama-server can go on from there only when there is more than a window: of less it uses nothing."""
    settings = {"prefill": {"chunk_threshold_s": 0.02, "chunk_s": 0.05}}
    async with served(tmp_path, settings, batch=128, ubatch=128, **of_kind("swa", tmp_path)) as it:
        it.fake.pace.prompt_token_s = 0.0001
        async with it.asking(LONG, stream=True) as long:
            await it.fake.wait_for(lambda f: any(slot.n_tokens >= 128 for slot in f.slots))
            short = await it.ask(letters(3, 80), stream=True)
            assert not long.done()
            assert (await long).text == right(it.fake, LONG)
        assert it.n_computed(LONG) == 6000
    assert short.text == right(it.fake, letters(3, 80))
