"""Conversations that begin together with the same long prefix: it is computed once, and everybody goes on from it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.support.answers import Answer
from tests.support.inprocess import CHAT, TEXT, Served, letters, of_kind, right, served, spawn

COMMON, OWN = letters(9, 3000), [letters(100 + n, 100) for n in range(4)]
SETTINGS = {"prefill": {"chunk_threshold_s": 0.02, "chunk_s": 0.05}}
#: Beyond a sliding window of 512 with the first batch: what is interrupted within it is lost.
FAKE: dict[str, Any] = {"slots": 4, "batch": 768, "ubatch": 256}
BATCH = 768
ALL, ONCE = 4 * 3100, 3000 + 4 * 100


def body(path: str, own: str) -> dict[str, Any]:
    if path == TEXT:
        return {"prompt": COMMON + own, "max_tokens": 4, "temperature": 0}
    messages = [{"role": "system", "content": COMMON}, {"role": "user", "content": own}]
    return {"messages": messages, "max_tokens": 4, "temperature": 0}


def prompt(it: Served, path: str, own: str) -> str:
    return COMMON + own if path == TEXT else it.fake.model.render(body(path, own))


def prepare(it: Served) -> None:
    """A prompt takes a third of a second, and is believed to take ten: nobody's patience ends while a test runs."""
    it.fake.pace.prompt_token_s = 0.0001
    setattr(it.backend.rates.prefill, "seconds", lambda start, end: max(end - start, 0) / 300)  # noqa: B010


def begin(it: Served, path: str = TEXT) -> list[asyncio.Task[Answer]]:
    """All of them at once; every other one streams."""
    prepare(it)
    return [spawn(it.post(path, {**body(path, own), "stream": n % 2 == 0})) for n, own in enumerate(OWN)]


async def computing(it: Served, n_tokens: int) -> None:
    """Wait until so many tokens of somebody's prompt are there."""
    await it.fake.wait_for(lambda f: any(slot.is_processing and slot.n_tokens > n_tokens for slot in f.slots))


async def all_right(it: Served, asked: list[asyncio.Task[Answer]], path: str = TEXT) -> list[Answer]:
    """Everybody who has not left gets the right answer, with numbers that add up to the prompt."""
    answers = []
    for own, task in zip(OWN, asked, strict=True):
        if task.cancelled() or task.cancelling():
            continue
        answers.append(answer := await task)
        whole = prompt(it, path, own)
        assert answer.text == right(it.fake, whole)
        n = len(it.fake.model.tokenize(whole))
        assert answer.timings["cache_n"] + answer.timings["prompt_n"] == n
    return answers


@pytest.mark.parametrize("kind", ["dense", "swa", "recurrent"])
@pytest.mark.parametrize("path", [TEXT, CHAT])
async def test_what_they_share_is_computed_once(tmp_path: Path, kind: str, path: str) -> None:
    """One computes it and keeps it on the way, the others restore it: of what each has to itself, all is computed."""
    async with served(tmp_path, SETTINGS, **of_kind(kind, tmp_path), **FAKE) as it:
        answers = await all_right(it, begin(it, path), path)
        start = prompt(it, path, OWN[0])
        assert it.n_computed(start) <= ONCE + 100
        assert (
            await it.count("completions_replanned_total") == await it.count("reuse_mispredictions_total") == 0
        )
    reused = sorted(answer.timings["cache_n"] for answer in answers)
    assert reused[0] == 0
    assert all(2990 <= n < 3050 for n in reused[1:])


@pytest.mark.parametrize("kind", ["dense", "recurrent"])
async def test_also_with_fewer_slots_than_conversations(tmp_path: Path, kind: str) -> None:
    """Who comes later to a slot finds it there, or on disk."""
    async with served(tmp_path, SETTINGS, **of_kind(kind, tmp_path), **{**FAKE, "slots": 2}) as it:
        await all_right(it, begin(it))
        assert it.n_computed(COMMON) <= ONCE + 100


@pytest.mark.parametrize("kind", ["dense", "recurrent"])
async def test_who_comes_while_it_is_computed_waits_for_it(tmp_path: Path, kind: str) -> None:
    """Also one whose end of the common part was not known before."""
    async with served(tmp_path, SETTINGS, **of_kind(kind, tmp_path), **FAKE) as it:
        prepare(it)
        async with it.asking(COMMON + OWN[0], path=TEXT) as first:
            await computing(it, 0)
            second = await it.ask(COMMON + OWN[1], path=TEXT, stream=True)
            assert (await first).text == right(it.fake, COMMON + OWN[0])
        assert it.n_computed(COMMON) <= 3000 + 2 * 100 + 10
    assert second.text == right(it.fake, COMMON + OWN[1])
    assert second.timings["cache_n"] >= 2990


@pytest.mark.parametrize("kind", ["dense", "swa", "recurrent"])
@pytest.mark.parametrize("at", [0, 1500])
async def test_when_the_first_one_leaves_another_takes_its_part(tmp_path: Path, kind: str, at: int) -> None:
    """It begins anew at worst; the others wait for that one instead."""
    async with served(tmp_path, SETTINGS, **of_kind(kind, tmp_path), **FAKE) as it:
        asked = begin(it)
        await computing(it, at)
        asked[0].cancel()
        n_left = it.n_computed(COMMON)
        assert len(await all_right(it, asked)) == 3
        assert it.n_computed(COMMON) <= n_left + ONCE + 2 * BATCH
        assert await it.count("clients_left_total") == 1


@pytest.mark.parametrize("kind", ["dense", "recurrent"])
async def test_who_takes_the_part_of_one_that_leaves_goes_on_where_it_was(tmp_path: Path, kind: str) -> None:
    """For computing it again would take longer than the server takes to notice the leaving."""
    async with served(tmp_path, SETTINGS, **of_kind(kind, tmp_path), **FAKE) as it:
        asked = begin(it)
        await computing(it, 1500)
        asked[0].cancel()
        assert len(await all_right(it, asked)) == 3
        assert it.n_computed(COMMON) <= ONCE + BATCH


@pytest.mark.parametrize("kind", ["dense", "recurrent"])
async def test_one_of_the_others_may_leave(tmp_path: Path, kind: str) -> None:
    """It is waited for by nobody."""
    async with served(tmp_path, SETTINGS, **of_kind(kind, tmp_path), **FAKE) as it:
        asked = begin(it)
        await computing(it, 1500)
        asked[2].cancel()
        assert len(await all_right(it, asked)) == 3
        assert it.n_computed(COMMON) <= ONCE


@pytest.mark.parametrize("kind", ["dense", "recurrent"])
async def test_a_prefix_that_could_not_be_saved_is_made_again(tmp_path: Path, kind: str) -> None:
    """The disk was full for a moment: one of the others keeps it instead."""
    async with served(tmp_path, SETTINGS, **of_kind(kind, tmp_path), **FAKE) as it:
        it.fake.faults.fail("save")
        await all_right(it, begin(it))
        assert it.n_computed(COMMON) <= ONCE + 3000
        assert await it.count('steps_failed_total{step="keep"}') == 1


@pytest.mark.parametrize("kind", ["dense", "swa", "recurrent"])
async def test_no_request_waits_for_a_prefix_that_can_never_be_saved(tmp_path: Path, kind: str) -> None:
    """At worst each computes its own prompt, as without llamaslot."""
    async with served(tmp_path, SETTINGS, **of_kind(kind, tmp_path), **FAKE) as it:
        it.fake.faults.fail("save", times=100)
        await all_right(it, begin(it))
        assert it.n_computed(COMMON) <= ALL + BATCH
        assert it.files() == []


@pytest.mark.parametrize("kind", ["dense", "recurrent"])
async def test_a_server_that_restarts_serves_them_all(tmp_path: Path, kind: str) -> None:
    """Who was at work is told, or begins again; nobody waits for what is gone."""
    async with served(tmp_path, SETTINGS, **of_kind(kind, tmp_path), **FAKE) as it:
        asked = begin(it)
        await computing(it, 1500)
        await it.fake.restart()
        answers = [await one for one in asked]
        assert sorted({answer.status for answer in answers}) in ([200], [200, 503])
        for own, answer in zip(OWN, answers, strict=True):
            if answer.status == 200:
                assert answer.text == right(it.fake, COMMON + own)
