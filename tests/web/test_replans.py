"""A slot that does not hold what was believed: the request gets another place, and its client sees none of that."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llamaslot.backend import prefill
from tests.support.answers import Answer
from tests.support.inprocess import NATIVE, TEXT, Served, letters, right, served, spawn

ONE, TWO, LONG = letters(1, 3000), letters(2, 300), letters(9, 6000)
BATCH = 256
#: What goes on after ``ONE``: a little, which its own request computes, and so much that it is computed ahead.
MORE = [pytest.param("more", id="short"), pytest.param(letters(3, 500), id="long")]
OWN_STEPS = {"prefill": {"chunk_threshold_s": 0.05, "chunk_s": 0.05}}
SAVED = {**OWN_STEPS, "store": {"idle_save_s": 0.01}}


async def erased(it: Served) -> int:
    """``ONE`` has been computed, and somebody has erased its slot without a word. The slot."""
    slot = (await it.ask(ONE)).slot
    if it.config.store.idle_save_s < 1:
        await it.until(it.files)
        await it.at_rest()
    assert (await it.fake.post(f"/slots/{slot}?action=erase", {}))["n_erased"] >= 3000
    it.fake.pace.prompt_token_s = 0.0001
    return slot


def progress(answer: Answer) -> list[dict[str, Any]]:
    return [event["prompt_progress"] for event in answer.events if "prompt_progress" in event]


@pytest.mark.idle_clock  # how much is computed before a loss is noticed is not up to the machine
@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_snapshot_takes_the_place_of_what_is_gone(tmp_path: Path, more: str, stream: bool) -> None:
    """It is restored, and no more than the batches that showed the loss is computed in vain."""
    async with served(tmp_path, SAVED, batch=BATCH) as it:
        await erased(it)
        n_before = it.n_computed(ONE)
        answer = await it.ask(ONE + more, stream=stream)
        assert it.n_computed(ONE) - n_before <= len(more) + 2 * BATCH
        assert await it.count("completions_replanned_total") == 1
        assert await it.count("snapshot_restores_total") == 1
        assert await it.count("steps_failed_total") == 0
    assert answer.text == right(it.fake, ONE + more)
    assert (answer.timings["cache_n"], answer.timings["prompt_n"]) == (3000, len(more))


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("stream", [True, False])
async def test_without_a_snapshot_all_is_computed_once(tmp_path: Path, more: str, stream: bool) -> None:
    """Also the batches that showed the loss are used."""
    async with served(tmp_path, OWN_STEPS, batch=BATCH) as it:
        await erased(it)
        n_before = it.n_computed(ONE)
        answer = await it.ask(ONE + more, stream=stream)
        assert it.n_computed(ONE) - n_before == 3000 + len(more)
        assert await it.count("completions_replanned_total") == 1
    assert answer.text == right(it.fake, ONE + more)


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("stream", [True, False])
async def test_what_was_computed_at_another_place_was_not_there_before(
    tmp_path: Path, more: str, stream: bool
) -> None:
    """Timings, usage and headers tell the whole request: nothing was reused, and all was computed."""
    async with served(tmp_path, OWN_STEPS, batch=BATCH) as it:
        await erased(it)
        answer = await it.ask(ONE + more, path=TEXT, stream=stream)
    n = 3000 + len(more)
    assert (answer.timings["cache_n"], answer.timings["prompt_n"]) == (0, n)
    assert answer.last["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    if "x-llamaslot-source" in answer.headers:
        assert (answer.source, answer.n_reused) == ("cold", 0)


@pytest.mark.parametrize("stream", [True, False])
async def test_the_time_at_another_place_is_told_too(tmp_path: Path, stream: bool) -> None:
    """Of a request that was given up before its first token: it has computed for a while."""
    async with served(tmp_path, OWN_STEPS, batch=BATCH) as it:
        await erased(it)
        it.fake.pace.step_s = 0.4
        async with it.asking(ONE + "more", path=TEXT, stream=stream) as asked:
            await it.fake.wait_for(lambda f: any(seen.client_left for seen in f.sent(TEXT)))
            it.fake.pace.step_s, it.fake.pace.prompt_token_s = 0.0, 0.00001
            answer = await asked
        assert await it.count("completions_replanned_total") == 1
    assert answer.timings["prompt_ms"] >= 400


@pytest.mark.parametrize("more", MORE)
async def test_progress_goes_on_at_the_other_place(tmp_path: Path, more: str) -> None:
    """Who asked for progress sees one prompt that is computed: never backwards, and the same numbers all the time."""
    async with served(tmp_path, OWN_STEPS, batch=BATCH) as it:
        await erased(it)
        answer = await it.ask(ONE + more, stream=True, return_progress=True)
    told = progress(answer)
    assert len(told) > 5
    assert {one["total"] for one in told} == {3000 + len(more)}
    assert {one["cache"] for one in told} == {0}
    assert all(a["processed"] <= b["processed"] and a["time_ms"] <= b["time_ms"] for a, b in pairwise(told))


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("settings", [OWN_STEPS, SAVED], ids=["computed", "restored"])
async def test_nothing_of_it_is_in_the_answer(tmp_path: Path, more: str, settings: Any) -> None:
    """A stream of one answer, with one set of headers, of the place where it came from."""
    async with served(tmp_path, settings, batch=BATCH) as it:
        await erased(it)
        answer = await it.ask(ONE + more, n=6, stream=True)
        last = it.fake.sent(NATIVE)[-1]
        assert answer.slot == last.landed[0]
        assert await it.count("clients_left_total") == 0
    assert [event["tokens_predicted"] for event in answer.events] == [1, 2, 3, 4, 5, 6, 6]
    assert answer.comments == []
    assert answer.raw.count(b"\n\n") == 7


@pytest.mark.parametrize("more", MORE)
async def test_no_request_gets_more_than_three_places(tmp_path: Path, more: str) -> None:
    """Whatever is there at the third is taken, also when that is nothing."""
    async with served(tmp_path, {"prefill": {"chunk_threshold_s": 0.01}}, batch=BATCH) as it:
        await it.ask(ONE)
        it.fake.pace.prompt_token_s = 0.0001
        it.fake.faults.lose_slots(4)
        answer = await it.ask(ONE + more, stream=True)
        assert not it.fake.faults.take_loss(), (
            "all of them were used up: its prompt is sent whole when it is alone"
        )
        assert await it.count("completions_replanned_total") == 2
    assert answer.text == right(it.fake, ONE + more)


async def test_a_small_loss_is_computed_where_it_is(tmp_path: Path) -> None:
    """Another place would cost more than that."""
    async with served(tmp_path, {"prefill": {"chunk_threshold_s": 0.1}}, batch=BATCH) as it:
        slot = (await it.ask(TWO)).slot
        await it.fake.post(f"/slots/{slot}?action=erase", {})
        answer = await it.ask(TWO + "more", stream=True)
        assert it.fake.sent(NATIVE)[-1].tasks[0].n_computed == 304
        assert await it.count("completions_replanned_total") == 0
        assert await it.count("reuse_mispredictions_total") == 1
    assert (answer.slot, answer.text) == (slot, right(it.fake, TWO + "more"))


@pytest.mark.parametrize("stream", [True, False])
async def test_a_prefill_that_is_lost_before_its_own_request_is_made_again(
    tmp_path: Path, stream: bool
) -> None:
    """Somebody erases the slot in the moment between the two."""
    async with served(tmp_path, OWN_STEPS, batch=BATCH) as it:
        hang = it.fake.faults.hang(TEXT)
        async with it.asking(ONE, path=TEXT, stream=stream) as asked:
            await hang.reached.wait()
            for slot in (0, 1):
                await it.fake.post(f"/slots/{slot}?action=erase", {})
            it.fake.pace.prompt_token_s = 0.0001
            hang.release()
            answer = await asked
        assert await it.count("completions_replanned_total") == 1
        assert it.n_computed(ONE) <= 2 * 3000
    assert answer.text == right(it.fake, ONE)
    assert (answer.timings["cache_n"], answer.timings["prompt_n"]) == (0, 3000)


@pytest.mark.parametrize("body", [{"n_cmpl": 2, "prompt": ONE}, {"prompt": [ONE, TWO]}])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_loss_is_survived_by_several_answers_too(tmp_path: Path, body: Any, stream: bool) -> None:
    """Of one prompt and of two."""
    async with served(tmp_path, OWN_STEPS, batch=BATCH, slots=3) as it:
        await erased(it)
        answer = await it.post(NATIVE, {**body, "n_predict": 4, "stream": stream})
        parts = answer.events or answer.json
        texts = ["".join(part["content"] for part in parts if part["index"] == i) for i in (0, 1)]
    assert texts[0] == right(it.fake, ONE)
    assert texts[1] == right(it.fake, ONE if "n_cmpl" in body else TWO)


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_may_leave_on_the_way_to_the_other_place(
    tmp_path: Path, more: str, stream: bool
) -> None:
    """Its snapshot is just being restored: the slots come back, and so does what is in them."""
    async with served(tmp_path, SAVED, batch=BATCH) as it:
        await erased(it)
        hang = it.fake.faults.hang("restore")
        async with it.asking(ONE + more, stream=stream):
            await hang.reached.wait()
        hang.release()
        await it.at_rest()
        answer = await it.ask(ONE + more)
        assert await it.count("clients_left_total") == 1
    assert (answer.timings["cache_n"], answer.text) == (3000, right(it.fake, ONE + more))


# -- making room -------------------------------------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prefill makes room as soon as somebody waits for whom llama-server chooses the slot."""
    monkeypatch.setattr(prefill, "_SURELY_S", 0.0)


ROOM = {"prefill": {"chunk_threshold_s": 0, "chunk_s": 0.05, "max_yield_s": 0.01}}
DOCUMENT = [{"role": "user", "content": [{"type": "text", "text": letters(50, 200)}, {"type": "document"}]}]


@contextlib.asynccontextmanager
async def made_room(it: Served, **more: Any) -> AsyncIterator[asyncio.Task[Answer]]:
    """``LONG`` is computed, and has just made room for somebody's request that may land anywhere."""
    it.fake.pace.prompt_token_s = 0.0001
    it.fake.hold()
    async with it.asking(LONG, **more) as asked:
        await it.fake.step(5)
        other = spawn(it.post("/v1/messages", {"messages": DOCUMENT, "max_tokens": 4}))
        await it.until(lambda: it.backend.leases.exclusive is not None)
        it.fake.go()
        assert (await other).status == 200
        assert not asked.done()
        yield asked


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("slots", [1, 2])
async def test_a_long_prefill_makes_room_and_goes_on(tmp_path: Path, slots: int) -> None:
    """In its slot, or off the disk where that was taken: nothing is computed twice, and the numbers tell one prompt."""
    async with served(tmp_path, ROOM, slots=slots, batch=BATCH) as it:
        async with made_room(it) as asked:
            answer = await asked
        assert it.n_computed(LONG) == 6000
        assert await it.count("snapshot_restores_total") == (slots == 1)
    assert answer.text == right(it.fake, LONG)
    assert (answer.timings["cache_n"], answer.timings["prompt_n"]) == (0, 6000)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("slots", [1, 2])
async def test_progress_goes_on_behind_the_room_that_was_made(tmp_path: Path, slots: int) -> None:
    """Forwards, with the times before it, and with nothing in the cache that was not there at the beginning."""
    async with (
        served(tmp_path, ROOM, slots=slots, batch=BATCH) as it,
        made_room(it, stream=True, return_progress=True) as asked,
    ):
        told = progress(await asked)
    assert {one["cache"] for one in told} == {0}
    assert all(a["processed"] <= b["processed"] and a["time_ms"] <= b["time_ms"] for a, b in pairwise(told))


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("slots", [1, 2])
async def test_what_came_back_behind_the_room_that_was_made_was_as_believed(
    tmp_path: Path, slots: int
) -> None:
    """Slot and snapshot have kept their word: neither is held against them."""
    async with served(tmp_path, ROOM, slots=slots, batch=BATCH) as it, made_room(it) as asked:
        assert (await asked).status == 200
        assert await it.count("reuse_mispredictions_total") == 0
