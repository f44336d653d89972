"""A greedy user's slots, in which prompts are still computed, go to a user that comes later.

Who comes before whom, and how many tokens are computed: how long it takes is measured in ``tests/soak/test_greedy.py``.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from tests.support.figures import Figure
from tests.support.speeds import Kind, Speed, model_of
from tests.support.stack import Stack
from tests.support.users import Client, Event, User, rendered, symbols

pytestmark = pytest.mark.real

N_PROMPT, N_ANSWER = 2000, 150


@pytest.mark.parametrize(
    ("kind", "speed", "chunk_threshold_s"),
    [
        ("dense", "2x128", 0.001),
        ("dense", "2x128", 3600),  # by its own request
        ("recurrent", "2x128", 0.001),
    ],
)
async def test_a_newcomer_waits_for_no_answer_of_the_user_that_has_all_slots(
    tmp_path: Path, figure: Figure, kind: Kind, speed: Speed, chunk_threshold_s: float
) -> None:
    """Four long prompts, in two slots. The newcomer is through before any of their answers; those whose
    prompts stopped for it are answered whole, and next to nothing of them is computed twice."""
    settings = {"prefill": {"chunk_threshold_s": chunk_threshold_s}, "stream": {"keepalive_s": 0.1}}
    done, rng, begun = list[str](), random.Random(1), asyncio.Event()

    async def note(event: Event) -> None:
        """Prompts are being computed."""
        if "prefill" in event.comment:
            begun.set()

    async def ask(client: Client, name: str, n_prompt: int, n_answer: int) -> None:
        user = User(name, n_prompt, rng)
        body = user.body(max_tokens=n_answer)
        reply = await client.ask("/v1/chat/completions", body, on_event=note)
        assert not reply.error, reply.error
        assert reply.n_prompt == len(symbols(rendered(user.messages)))
        assert reply.n_computed >= n_prompt, "nothing of it was there before it came"
        done.append(name)

    model = model_of(kind, speed, tmp_path)
    async with Stack(
        model, tmp_path, slots=2, batch=256, ubatch=256, context=8192, settings=settings
    ) as stack:
        async with (
            Client(stack.url, {"x-llamaslot-user": "greedy"}) as greedy,
            Client(stack.url, {"x-llamaslot-user": "newcomer"}) as newcomer,
            asyncio.TaskGroup() as group,
        ):
            for number in range(4):
                group.create_task(ask(greedy, f"greedy {number}", N_PROMPT, N_ANSWER))
            await begun.wait()
            await ask(newcomer, "newcomer", 300, 2)
        metrics, counted = await stack.own_metrics(), await stack.server.metrics()
    n_computed = counted["llamacpp:prompt_tokens_total"]
    figure(f"{done}, {metrics['llamaslot_preemptions_total']:.0f} stopped, {n_computed:.0f} computed")
    assert done[0] == "newcomer", done
    assert len(done) == 5
    assert metrics["llamaslot_preemptions_total"] >= 1
    assert n_computed <= 1.2 * (4 * N_PROMPT + 300)
