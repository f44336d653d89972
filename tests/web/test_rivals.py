"""Requests whose slot llama-server chooses by the prompt, and others that stand in their way: nobody waits for ever."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.support.inprocess import NATIVE, letters, served, spawn

MESSAGES = "/v1/messages"
OWN_STEPS = {"prefill": {"chunk_threshold_s": 0}}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 3, **more}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("settings", [None, OWN_STEPS])
async def test_the_same_prompt_several_times_at_once(tmp_path: Path, settings: Any, stream: bool) -> None:
    """Each slot that has it would do for each of them: one goes first, the others make way."""
    async with served(tmp_path, settings, slots=3) as it:
        body = said(letters(1, 300), stream=stream)
        answers = await asyncio.gather(*(it.post(MESSAGES, body) for _ in range(4)))
    assert [answer.status for answer in answers] == [200] * 4


async def test_the_same_prompt_while_it_is_answered_already(tmp_path: Path) -> None:
    """llama-server does not choose a slot that is at work: the second one waits for its own prompt only."""
    async with served(tmp_path, OWN_STEPS, slots=2, batch=100, context=8000) as it:
        text = letters(1, 300)
        long = spawn(it.post(MESSAGES, said(text, stream=True) | {"max_tokens": 4000}))
        await it.until(lambda: any(lease.is_running for lease in it.pool.dispatcher.leases))
        it.fake.hold()
        again = spawn(it.post(MESSAGES, said(text)))
        for _ in range(100):
            if again.done():
                break
            await it.fake.step()
        assert again.done()
        assert not long.done()
        assert (await again).status == 200
        long.cancel()
        await asyncio.wait([long])
        it.fake.go()
        await it.at_rest()


async def test_an_unknown_slot_while_an_exclusive_request_waits(tmp_path: Path) -> None:
    """The slot is emptied although the turn keeps others from beginning: the turn waits for this one."""
    async with served(tmp_path, OWN_STEPS, slots=3, batch=100) as it:
        it.fake.faults.fail_stream("failed to decode", after_tokens=1)
        await it.ask(letters(1, 100))
        it.fake.hold()
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            first = group.create_task(it.post(MESSAGES, said(letters(2, 300))))
            await it.fake.wait_for(lambda fake: any(slot.is_processing for slot in fake.slots))
            second = group.create_task(
                it.post("/infill", {"input_prefix": "x", "input_suffix": "", "n_predict": 1})
            )
            third = group.create_task(it.post(NATIVE, {"prompt": "y", "n_predict": 1, "n_cmpl": 2}))
            await it.until(lambda: it.pool.dispatcher.n_waiting > 0 or len(it.pool.dispatcher.leases) > 1)
            it.fake.go()
    assert [task.result().status for task in (first, second, third)] == [200] * 3


async def test_slots_that_cannot_be_emptied_block_no_request(tmp_path: Path) -> None:
    """Without ``--slot-save-path`` nobody could ever clear them: it is not tried, and everybody is answered."""
    async with served(tmp_path, OWN_STEPS, slots=2, has_save_path=False) as it:
        it.fake.faults.fail_stream("failed to decode", after_tokens=1)
        await it.ask(letters(1, 100))  # and now nobody knows what its slot holds
        n_before = len(it.fake.requests)
        async with asyncio.timeout(20):
            alone = await it.post(MESSAGES, said(letters(2, 300)))
            together = await asyncio.gather(*(it.post(MESSAGES, said(letters(3, 300))) for _ in range(3)))
        assert [answer.status for answer in (alone, *together)] == [200] * 4
        assert not [seen for seen in it.fake.requests[n_before:] if seen.action]
        assert len(it.fake.requests) - n_before < 100
