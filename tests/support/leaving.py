"""Clients that leave while another client streams all the time: how soon does their slot work for another client?

llama-server detects that a client has gone after a second without an answer; each answer of its ``/slots`` and
``/metrics`` starts that second again. So it is asked only once, two seconds (or two batches) after the client has left,
and at the end. The newcomer measures the time: its short question can only run in the slot that is given up.
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from tests.support.jobs import clients
from tests.support.stack import Stack
from tests.support.users import Client, Event, Reply, talking, words

Stage = Literal["queued", "prefill", "prefill, not streaming", "later prefill", "mid-stream"]
STAGES: tuple[Stage, ...] = ("queued", "prefill", "prefill, not streaming", "later prefill", "mid-stream")
N_SHORT, N_ANSWER = 30, 7  # tokens of the newcomer's prompt and answer


def slots_for(stage: Stage) -> int:
    """The number of slots at which the newcomer has no other slot than the one that is given up."""
    return 3 if stage == "later prefill" else 2


@dataclass(frozen=True, slots=True)
class Left:
    """What happened after a client had left."""

    stage: Stage
    n_prompt: int  # of the client that left
    newcomer_s: float  # from the leaving to the newcomer's first token
    batch_s: float  # the longest step of the server: gap in the other client's stream
    n_busy: int  # slots that work without a client after `limit_s`
    n_computed: int  # prompt tokens computed for the client that left, before it left and after
    n_computed_late: int  # of these, later than `limit_s` after the leaving

    @property
    def limit_s(self) -> float:
        """The allowed time: two seconds, or two of the server's batches if those take longer."""
        return max(2.0, 2 * self.batch_s)

    def __str__(self) -> str:
        return (
            f"{self.stage}: newcomer's first token {self.newcomer_s:.1f} s after the leaving "
            f"(batch {self.batch_s:.1f} s), then {self.n_busy} slots busy without a client, "
            f"{self.n_computed} of {self.n_prompt} tokens computed, "
            f"{self.n_computed_late} of them later than {self.limit_s:.1f} s"
        )


def completion(rng: random.Random, n_prompt: int, n_answer: int, *, stream: bool = True) -> dict[str, Any]:
    return {"prompt": words(rng, n_prompt), "max_tokens": n_answer, "temperature": 0, "stream": stream}


async def leave(
    stack: Stack, stage: Stage, *, n_prompt: int = 14_000, after_s: float = 3.0, seed: int = 1
) -> Left:
    """One client leaves at ``stage``; the stack has ``slots_for(stage)`` slots.

    ``after_s``: how long the client stays (mid-stream: until 50 tokens have come). In the queue, streams hold all
    slots, and one of them ends when the client leaves. As the later of two prefills, it started half a second after the
    other one.
    """
    rng = random.Random(seed)
    async with clients(stack) as (front, _), AsyncExitStack() as held:
        times = await held.enter_async_context(talking(front, rng))
        second = await held.enter_async_context(AsyncExitStack())
        if stage == "queued":
            await second.enter_async_context(talking(front, rng))
        before = await computed(stack)
        first = None
        if stage == "later prefill":
            first = spawn(front, completion(rng, n_prompt, 1))
            await asyncio.sleep(0.5)

        under_way = asyncio.Event()
        leaver = spawn(
            front,
            completion(
                rng,
                500 if stage == "mid-stream" else n_prompt,
                10_000 if stage == "mid-stream" else 1,
                stream=stage != "prefill, not streaming",
            ),
            under_way,
        )
        newcomer_body = completion(rng, N_SHORT, N_ANSWER)
        newcomer = None
        if stage == "mid-stream":
            await under_way.wait()
        else:
            await asyncio.sleep(after_s)
        if stage == "queued":
            newcomer = spawn(front, newcomer_body)  # behind the one who leaves
            await asyncio.sleep(0.2)
        assert not leaver.done(), f"too fast to leave: {leaver.result()}"

        loop = asyncio.get_running_loop()
        n_steps, left_at = len(times), loop.time()
        leaver.cancel()
        if stage == "queued":
            await second.aclose()
        newcomer = newcomer or spawn(front, newcomer_body)
        first_token = loop.create_task(first_token_at(newcomer, left_at))
        await asyncio.sleep(2.0)
        batch_s = longest(times[max(0, n_steps - 50) :])
        await asyncio.sleep(max(0.0, left_at + max(2.0, 2 * batch_s) - loop.time()))
        slots = await stack.server.slots()
        n_expected = 1 + (first is not None and not first.done()) + sum(map(is_newcomers, slots))
        n_late_by_right = 0 if newcomer.done() else N_SHORT  # on a busy machine the newcomer is late himself
        at_limit = await computed(stack)
        newcomer_s = await first_token
        others = N_SHORT
        if first is not None:
            reply = await first
            assert not reply.error, reply.error
            others += n_prompt
        else:
            await asyncio.sleep(3)
        total = await computed(stack)
        return Left(
            stage=stage,
            n_prompt=500 if stage == "mid-stream" else n_prompt,
            newcomer_s=newcomer_s,
            batch_s=batch_s,
            n_busy=max(0, sum(bool(slot["is_processing"]) for slot in slots) - n_expected),
            n_computed=round(total - before) - others,
            n_computed_late=0 if first is not None else max(0, round(total - at_limit) - n_late_by_right),
        )


def longest(times: list[float]) -> float:
    """The longest step of the server: the longest gap between two tokens of a stream, the present one included."""
    return max(b - a for a, b in pairwise([*times, time.perf_counter()]))


def is_newcomers(slot: dict[str, Any]) -> bool:
    """True if the slot works on the newcomer's request: only that asks for so few tokens, and for more than one."""
    return bool(slot["is_processing"]) and 1 < slot["next_token"][0]["n_remain"] <= N_ANSWER


async def computed(stack: Stack) -> float:
    """How many prompt tokens llama-server has computed so far. The counter grows batch by batch."""
    return (await stack.server.metrics())["llamacpp:prompt_tokens_total"]


def spawn(
    client: Client, body: dict[str, Any], under_way: asyncio.Event | None = None
) -> asyncio.Task[Reply]:
    """Ask in a task of its own. ``under_way`` is set when 50 tokens have come. Canceling the task lets the client
    leave.
    """
    n_tokens = 0

    async def note(event: Event) -> None:
        nonlocal n_tokens
        n_tokens += event.data is not None
        if under_way is not None and n_tokens >= 50:
            under_way.set()

    return asyncio.get_running_loop().create_task(client.ask("/v1/completions", body, on_event=note))


async def first_token_at(asked: asyncio.Task[Reply], since: float) -> float:
    """Seconds from ``since`` to the end of a short answer, which is nearly the time of its first token."""
    reply = await asked
    assert not reply.error, reply.error
    return asyncio.get_running_loop().time() - since
