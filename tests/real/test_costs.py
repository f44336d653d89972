"""What is worth a request more, small, on models that are fast, with the settings as they are when nobody sets any.

Tokens are counted here; how long it takes is measured in ``tests/soak/test_costs.py``.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from tests.support.agents import think_and_go_on
from tests.support.figures import Figure
from tests.support.jobs import clients
from tests.support.speeds import Kind, Speed, model_of
from tests.support.stack import Stack
from tests.support.together import Place, begin_together
from tests.support.users import Client, Reply, words

pytestmark = pytest.mark.real


@pytest.mark.parametrize(
    ("kind", "speed", "place"), [("swa", "2x64", "system"), ("recurrent", "2x128", "user")]
)
async def test_what_four_begin_with_is_computed_once(
    tmp_path: Path, figure: Figure, kind: Kind, speed: Speed, place: Place
) -> None:
    """Four at once, 5,000 tokens in common: that takes less than a second, and is shared all the same."""
    async with Stack(model_of(kind, speed, tmp_path), tmp_path, context=6144) as stack:
        result = await begin_together(stack, place, n_common=5000, n_own=200)
    figure(result)
    assert result.share <= 1.08


@pytest.mark.parametrize(
    ("kind", "is_evicted"),
    [("swa", False), ("recurrent", True)],
    ids=["swa, in its slot", "recurrent, from disk"],
)
async def test_dropped_reasoning_costs_no_more_than_it_must(
    tmp_path: Path, figure: Figure, kind: Kind, is_evicted: bool
) -> None:
    """The end of the user's message is a stop, though all of the prompt is computed in less than a second, and the next
    turn goes on from there: also when others have had every slot meanwhile."""
    async with Stack(model_of(kind, "2x64", tmp_path), tmp_path, slots=2) as stack:
        result = await think_and_go_on(
            stack, n_slots=2, is_evicted=is_evicted, n_question=5000, n_thoughts=1500
        )
    figure(result)
    assert result.ratio >= 0.97


async def test_a_follow_up_stays_where_its_answer_is(tmp_path: Path, figure: Figure) -> None:
    """After a restart of both. On disk is an older conversation with the same question, whose answer begins as the new
    one does: it has more of the follow-up than is known of the slot, and less than the slot has."""
    rng = random.Random(1)
    question, rest, more = words(rng, 2000), words(rng, 200), words(rng, 30)
    settings = {"store": {"idle_save_s": 0.1}}

    async def ask(client: Client, prompt: str) -> Reply:
        body = {"prompt": prompt, "max_tokens": 500, "temperature": 0, "stream": True}
        reply = await client.ask("/v1/completions", body)
        assert not reply.error, reply.error
        return reply

    model = model_of("dense", "2x128", tmp_path)
    async with Stack(model, tmp_path, slots=2, context=6144, settings=settings) as stack:
        async with clients(stack) as (front, _):
            older = question + (await ask(front, question)).text[:350] + rest
            await ask(front, older)
            await until_saved(stack, len(older))
        await stack.llamaslot.stop()
        await stack.server.stop()
        await stack.server.start()
        await stack.llamaslot.start()
        async with clients(stack) as (front, _):
            first = await ask(front, question)
            follow_up = await ask(front, question + first.text + more)
            figure(f"slots {first.slot} and {follow_up.slot}, {follow_up.n_computed} computed")
            assert first.headers["x-llamaslot-source"] == "snapshot"
            assert follow_up.slot == first.slot
            assert follow_up.headers["x-llamaslot-source"] == "resident"
            assert follow_up.n_computed <= len(more) + 5


async def until_saved(stack: Stack, n_tokens: int) -> None:
    """Until a context of so many tokens is on disk."""
    async with asyncio.timeout(30):
        while True:
            status = await stack.status()
            if any(
                slot["n_tokens"] >= n_tokens and not slot["is_dirty"]
                for slot in status["backends"][0]["slots"]
            ):
                return
            await asyncio.sleep(0.1)
