"""Numbers tell the client's whole request, also where its prompt was computed in steps before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.answers import Answer, without_progress
from tests.support.inprocess import CHAT, NATIVE, TEXT, Served, letters, served

OWN_STEPS = {"prefill": {"chunk_threshold_s": 0}}
BASE, MORE = letters(1, 600), letters(2, 300)


async def ask(it: Served, path: str, text: str, **more: Any) -> Answer:
    if path == CHAT:
        return await it.chat(text, **more)
    return await it.ask(text, path=path, **more)


async def n_tokens(it: Served, path: str, text: str) -> int:
    if path != CHAT:
        return len(text)
    return len(
        it.fake.model.tokenize(it.fake.model.render({"messages": [{"role": "user", "content": text}]}))
    )


@pytest.mark.parametrize("path", [CHAT, TEXT, NATIVE])
@pytest.mark.parametrize("stream", [True, False])
async def test_timings_tell_what_was_reused_before_and_computed_in_all(
    tmp_path: Path, path: str, stream: bool
) -> None:
    """The server itself saw one new token; the client asked for 300 of 900."""
    async with served(tmp_path, OWN_STEPS) as it:
        await ask(it, path, BASE)
        n = await n_tokens(it, path, BASE + MORE)
        n_reused = n - 300 - (20 if path == CHAT else 0)
        answer = await ask(it, path, BASE + MORE, stream=stream)
        own = it.fake.sent(path)[-1].tasks[0]
    assert (own.n_cache, own.n_computed) == (n - 1, 1)
    timings = answer.timings
    assert timings["cache_n"] + timings["prompt_n"] == n
    assert timings["cache_n"] == answer.n_reused
    assert abs(timings["cache_n"] - n_reused) <= 24
    assert timings["prompt_ms"] >= own.prompt_s * 1000
    assert timings["prompt_per_second"] == pytest.approx(timings["prompt_n"] / timings["prompt_ms"] * 1000)
    assert timings["prompt_per_token_ms"] == pytest.approx(timings["prompt_ms"] / timings["prompt_n"])
    assert timings["predicted_n"] == 4


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stream", [True, False])
async def test_usage_tells_what_was_reused_before(tmp_path: Path, path: str, stream: bool) -> None:
    """``cached_tokens``, which OpenAI clients show."""
    options = {"stream_options": {"include_usage": True}} if stream else {}
    async with served(tmp_path, OWN_STEPS) as it:
        await ask(it, path, BASE)
        answer = await ask(it, path, BASE + MORE, stream=stream, **options)
        n = await n_tokens(it, path, BASE + MORE)
    usage = answer.last["usage"]
    assert usage["prompt_tokens"] == n
    assert usage["prompt_tokens_details"]["cached_tokens"] == answer.n_reused == answer.timings["cache_n"]
    assert 600 <= answer.n_reused < 640


@pytest.mark.parametrize("path", [CHAT, TEXT, NATIVE])
async def test_progress_tells_what_was_reused_before(tmp_path: Path, path: str) -> None:
    """The client asked for progress: what the server says at the end counts from the beginning."""
    async with served(tmp_path, OWN_STEPS) as it:
        await ask(it, path, BASE)
        answer = await ask(it, path, BASE + MORE, stream=True, return_progress=True)
        n = await n_tokens(it, path, BASE + MORE)
    progress = [event["prompt_progress"] for event in answer.events if "prompt_progress" in event]
    assert progress[-1]["total"] == progress[-1]["processed"] == n
    assert {part["cache"] for part in progress} == {answer.n_reused}
    assert all(isinstance(part["time_ms"], int) for part in progress)


async def test_timings_of_each_token_are_put_right(tmp_path: Path) -> None:
    """``timings_per_token``: every event carries them."""
    async with served(tmp_path, OWN_STEPS) as it:
        answer = await it.ask(BASE, stream=True, n=6, timings_per_token=True)
    told = [event["timings"] for event in answer.events if "timings" in event]
    assert len(told) >= 6
    assert {timings["prompt_n"] for timings in told} == {600}


async def test_events_without_numbers_keep_their_bytes(tmp_path: Path) -> None:
    """Only the one that carries numbers is written anew; those of progress nobody has asked for."""
    async with served(tmp_path, OWN_STEPS) as it:
        answer = await it.chat(BASE, stream=True)
        sent = without_progress(bytes(it.fake.sent(CHAT)[-1].answer))
    pairs = zip(answer.raw.split(b"\n\n"), sent.split(b"\n\n"), strict=True)
    differ = [(a, b) for a, b in pairs if a != b]
    assert len(differ) == 1
    assert b'"timings"' in differ[0][0]


@pytest.mark.parametrize("stream", [True, False])
async def test_every_one_of_n_answers_tells_the_whole_prompt(tmp_path: Path, stream: bool) -> None:
    """They all go on from the same prefill."""
    async with served(tmp_path, OWN_STEPS, slots=3) as it:
        answer = await it.ask(BASE, n_cmpl=2, stream=stream)
    told = [part["timings"] for part in (answer.events or answer.json) if "timings" in part]
    assert [timings["prompt_n"] for timings in told] == [600, 600]


@pytest.mark.parametrize("stream", [True, False])
async def test_only_the_first_of_several_prompts_is_put_right(tmp_path: Path, stream: bool) -> None:
    """What was done before was done for it; the others tell their own work."""
    async with served(tmp_path, OWN_STEPS) as it:
        answer = await it.ask([BASE, MORE, letters(3, 400)], stream=stream)
    told = {part["index"]: part["timings"] for part in (answer.events or answer.json) if "timings" in part}
    assert [told[i]["prompt_n"] for i in range(3)] == [600, 300, 400]
    assert [told[i]["cache_n"] for i in range(3)] == [0, 0, 0]


async def test_what_the_server_did_alone_is_not_touched(tmp_path: Path) -> None:
    """A short prompt has no steps of its own: its bytes are the server's, also where the client wants progress."""
    async with served(tmp_path) as it:
        await it.ask(BASE)
        answer = await it.ask(BASE + MORE, stream=True)
        sent = bytes(it.fake.sent(NATIVE)[-1].answer)
        whole = await it.ask(letters(4, 300), stream=True, return_progress=True)
        assert whole.raw == bytes(it.fake.sent(NATIVE)[-1].answer)
    assert answer.raw == without_progress(sent)
    assert answer.timings["cache_n"] == answer.n_reused == 600


async def test_counters_tell_the_same(tmp_path: Path) -> None:
    """What was reused by source, and of how many tokens."""
    async with served(tmp_path, OWN_STEPS) as it:
        await it.ask(BASE)
        await it.ask(BASE + MORE)
        metrics = await it.metrics()
    assert metrics['llamaslot_reused_tokens_total{source="resident"}'] == 600
    assert metrics["llamaslot_prompt_tokens_total"] == 1500
    assert metrics['llamaslot_completions_total{source="cold"}'] == 1


async def test_the_journal_tells_decisions_and_no_texts(tmp_path: Path) -> None:
    """The newest first, as many as are asked for, and nothing of what was said."""
    async with served(tmp_path) as it:
        for seed in (1, 2, 3):
            await it.ask(letters(seed, 300))
        async with it.session.get(f"{it.url}/llamaslot/journal?n=2") as response:
            assert response.status == 200
            text = await response.text()
        decisions = json.loads(text)["decisions"]
        assert [decision["n_tokens"] for decision in decisions] == [300, 300]
        assert decisions[0]["at"] >= decisions[1]["at"]
        assert [decision["n_reused"] for decision in decisions] == [0, 0]
        assert letters(3, 300)[:20] not in text
        async with it.session.get(f"{it.url}/llamaslot/journal?n=-1") as response:
            assert response.status == 400
        for many in ("9" * 5000, "0" * 5000 + "1"):  # Python reads no number with more than 4,300 digits
            assert len((await it.get(f"/llamaslot/journal?n={many}")).json["decisions"]) >= 1
