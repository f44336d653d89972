"""Long prompts, and the requests that have to wait for them, as black-box runs: each uses a Stack and returns figures.

The same function runs through llamaslot and on llama-server directly, one after the other: ``both``. Other processes on
the machine disturb both; the time that they take from llama-server is left out where a figure says so (``Took``).
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, TypeVar

from tests.support.bystander import gaps
from tests.support.jobs import clients
from tests.support.stack import Stack
from tests.support.users import Client, Event, Reply, User, content_of, talking, words
from tests.support.waiting import ServerClock, Stopwatch

T = TypeVar("T")
N_SLOTS = 4
N_ANSWER = 20  # tokens of a follow-up's answer
TELLS_OFTEN: dict[str, Any] = {"stream": {"keepalive_s": 0.2}}
PREFILLS_ITSELF: dict[str, Any] = {  # also what small models compute in no time
    **TELLS_OFTEN,
    "prefill": {"chunk_threshold_s": 0.001},
}


@dataclass(frozen=True, slots=True)
class Both(Generic[T]):
    """One run through llamaslot and the same one on llama-server directly."""

    through: T
    direct: T

    def ratio(self, of: Callable[[T], float]) -> float:
        """The figure ``of`` the run through llamaslot divided by the same figure of the direct run."""
        return of(self.through) / of(self.direct)

    def __str__(self) -> str:
        return f"through {self.through} | directly {self.direct}"


async def both(
    run: Callable[[Stack], Awaitable[T]],
    model: Path,
    directory: Path,
    *,
    is_through_first: bool = False,
    **options: Any,
) -> Both[T]:
    """The same run on two fresh stacks, one after the other. ``options`` are the Stack's."""
    runs: dict[bool, T] = {}
    for is_alone in (not is_through_first, is_through_first):
        where = directory / ("direct" if is_alone else "through")
        async with Stack(model, where, alone=is_alone, **options) as stack:
            runs[is_alone] = await run(stack)
    return Both(runs[False], runs[True])


def median_ratio(pairs: Sequence[Both[T]], of: Callable[[T], float]) -> float:
    """The median of the ratios of the pairs. The two runs of a pair are near in time, so the machine's load
    is similar.
    """
    return statistics.median(pair.ratio(of) for pair in pairs)


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds from the question to the first token: by the clock, and without the time in which other processes had
    llama-server's CPU."""

    wall_s: float
    undisturbed_s: float

    def __str__(self) -> str:
        return f"{self.wall_s:.2f} s ({self.undisturbed_s:.2f} undisturbed)"


async def first_token(stack: Stack, client: Client, path: str, body: dict[str, Any]) -> tuple[Reply, Took]:
    """Ask for a stream, read it to its end, and tell when its first token came."""
    watch, took = Stopwatch(stack.server.pid), list[Took]()

    async def note(event: Event) -> None:
        if not took and event.data is not None and content_of(event.data):
            took.append(Took(*watch.stop()))

    reply = await client.ask(path, body, on_event=note)
    assert not reply.error, reply.error
    assert took, "an answer without a token"
    return reply, took[0]


@dataclass(frozen=True, slots=True)
class Rush:
    """Follow-ups in their own slots while a stranger's long prompt is computed in the oldest one."""

    slot: int | None  # of the long prompt, as llamaslot tells
    long: Took
    followups_s: tuple[float, ...]  # to the first token of each
    n_before: int  # follow-ups that were answered whole before the long prompt's first token

    @property
    def worst_s(self) -> float:
        return max(self.followups_s)

    def __str__(self) -> str:
        mean_s = statistics.mean(self.followups_s)
        return (
            f"slot {self.slot}: follow-ups worst {self.worst_s:.2f} s, mean {mean_s:.2f} s, "
            f"the long prompt {self.long}"
        )


async def rush(
    stack: Stack,
    *,
    oldest: int = 0,
    n_long: int = 12_000,
    n_context: int = 1500,
    after_s: float = 1.0,
    seed: int = 1,
) -> Rush:
    """Four conversations in four slots; ``oldest`` is the slot used longest ago. A stranger sends a prompt of
    ``n_long`` tokens, the other three ask follow-ups ``after_s`` later.

    Directly, each conversation is pinned to the slot of its number, and the stranger to that of the oldest. Slot 0 is
    the bad case, because llama-server fills its batch by slot number.
    """
    rng = random.Random(seed)
    users = [User(f"user {number}", n_context, rng) for number in range(N_SLOTS)]
    stranger = User("stranger", n_long, rng)

    def pin(number: int) -> dict[str, Any]:
        return {"id_slot": number} if stack.alone else {}

    async with clients(stack) as (front, _):

        async def turn(number: int) -> Reply:
            turn = await users[number].turn(front, max_tokens=N_ANSWER, **pin(number))
            assert not turn.reply.error, turn.reply.error
            return turn.reply

        async def follow_up(number: int) -> tuple[Reply, bool]:
            reply = await turn(number)
            return reply, not long.done()

        order = [(oldest + step) % N_SLOTS for step in range(N_SLOTS)]
        for number in (*range(N_SLOTS), *order):
            await turn(number)
        async with asyncio.TaskGroup() as group:
            body = stranger.body(max_tokens=1, **pin(oldest))
            long = group.create_task(first_token(stack, front, "/v1/chat/completions", body))
            await asyncio.sleep(after_s)
            assert not long.done(), "the long prompt was through before any follow-up"
            followups = [group.create_task(follow_up(number)) for number in order[1:]]
        reply, took = long.result()
        replies = [task.result() for task in followups]
        return Rush(
            reply.slot,
            took,
            tuple(reply.ttft_s for reply, _ in replies),
            sum(was_before for _, was_before in replies),
        )


@dataclass(frozen=True, slots=True)
class Beside:
    """A stream beside a prefill, from the question to its first token."""

    prefill: Took
    n_tokens: int  # that the stream got meanwhile
    gap_s: float  # the longest between two of them, without the time in which others had llama-server's CPU
    late_gap_s: float  # directly a batch at this depth: the median of the last ones

    def __str__(self) -> str:
        return (
            f"{self.n_tokens} tokens beside a prefill of {self.prefill}, longest gap {self.gap_s:.2f} s, "
            f"the last ones {self.late_gap_s:.2f} s"
        )


async def stream_beside(stack: Stack, *, n_prompt: int = 14_000, seed: int = 1) -> Beside:
    """One client streams all the time while another sends a prompt of ``n_prompt`` tokens. The stack has two slots."""
    rng = random.Random(seed)
    async with clients(stack) as (front, _):
        clock = ServerClock(stack.server.pid)
        async with talking(front, rng, clock=clock) as times:
            await clock.start()
            n_before = len(times)
            body = {"prompt": words(rng, n_prompt), "max_tokens": 1, "temperature": 0, "stream": True}
            async with gaps(times, clock) as found:
                _, took = await first_token(stack, front, "/v1/completions", body)
                n_tokens = len(times) - n_before
        return Beside(took, n_tokens, max(found), statistics.median(found[-8:-1]))


@dataclass(frozen=True, slots=True)
class Undisturbed:
    """Seconds of a conversation with no other on the server: its first question, cold, and its follow-ups
    (the median).
    """

    cold: Took
    hot: Took
    n_computed: int

    def __str__(self) -> str:
        return f"cold {self.cold}, hot {self.hot}, {self.n_computed} computed"


async def converse(
    stack: Stack, client: Client, *, n_context: int, n_followups: int = 3, seed: int
) -> Undisturbed:
    user = User("user", n_context, random.Random(seed))
    took, n_computed = [], 0
    for _ in range(1 + n_followups):
        body = user.body(max_tokens=N_ANSWER)
        reply, first = await first_token(stack, client, "/v1/chat/completions", body)
        took.append(first)
        n_computed += reply.n_computed
        user.messages.append({"role": "assistant", "content": reply.text})
        user.messages.append({"role": "user", "content": words(user.rng, user.n_question)})
    cold, *hot = took
    return Undisturbed(
        cold,
        Took(
            statistics.median(one.wall_s for one in hot), statistics.median(one.undisturbed_s for one in hot)
        ),
        n_computed,
    )


async def compare_undisturbed(
    model: Path, directory: Path, n_pairs: int, *, n_context: int = 12_000, seed: int = 1, **options: Any
) -> list[Both[Undisturbed]]:
    """Conversations on two idle servers in turn; who is asked first alternates. Each pair has a slot of its own, so
    that nothing is evicted.
    """
    pairs = []
    async with AsyncExitStack() as entered:
        sides = {}
        for is_alone in (False, True):
            where = directory / ("direct" if is_alone else "through")
            stack = Stack(model, where, alone=is_alone, slots=n_pairs + 1, **options)
            await entered.enter_async_context(stack)
            sides[is_alone] = stack, await entered.enter_async_context(Client(stack.url))
        for is_alone in sides:  # the first question of all warms the server up
            await converse(*sides[is_alone], n_context=200, seed=seed)
        for number in range(n_pairs):
            runs = {}
            for is_alone in (number % 2 == 0, number % 2 == 1):
                runs[is_alone] = await converse(*sides[is_alone], n_context=n_context, seed=seed + 1 + number)
            pairs.append(Both(runs[False], runs[True]))
    return pairs


@dataclass(frozen=True, slots=True)
class Abandoned:
    """A client without a stream that leaves while its answer is decoded, beside another client that streams."""

    newcomer_s: float  # from its leaving to the first token of who can only run in its slot
    batch_s: float  # the longest step of the server: gap in the other client's stream
    n_decoded: int  # when it left, of an answer of ``n_answer``
    n_answer: int
    n_meanwhile: (
        int  # tokens that the other client got in ``newcomer_s``: as many as its own answer would have got
    )

    @property
    def limit_s(self) -> float:
        """The allowed time: two seconds, or two of the server's batches if those take longer."""
        return max(2.0, 2 * self.batch_s)

    def __str__(self) -> str:
        return (
            f"left at {self.n_decoded} of {self.n_answer} tokens, {self.newcomer_s:.2f} s later a newcomer's first "
            f"token in its slot (batch {self.batch_s:.2f} s)"
        )


async def abandon(
    stack: Stack, *, n_prompt: int = 200, n_answer: int = 4000, after_s: float = 2.0, seed: int = 1
) -> Abandoned:
    """The client leaves ``after_s`` after it has asked, and the newcomer asks at once. The stack has two slots.

    llama-server is asked only before the client leaves: each answer of its ``/slots`` starts the second again after
    which it detects that a client has gone.
    """
    rng = random.Random(seed)
    async with clients(stack) as (front, _), talking(front, rng) as times:
        body = {"prompt": words(rng, n_prompt), "max_tokens": n_answer, "temperature": 0}
        leaver = asyncio.get_running_loop().create_task(front.ask("/v1/completions", body))
        await asyncio.sleep(after_s)
        n_decoded = max(
            n_answer - slot["next_token"][0]["n_remain"]
            for slot in await stack.server.slots()
            if slot["is_processing"] and slot["next_token"][0]["n_remain"] <= n_answer
        )
        assert not leaver.done(), f"too fast to leave: {leaver.result()}"
        assert n_decoded > 0, "it has not begun to answer"
        n_before, left_at = len(times), time.perf_counter()
        leaver.cancel()
        newcomer = {"prompt": words(rng, 30), "max_tokens": 1, "temperature": 0, "stream": True}
        await first_token(stack, front, "/v1/completions", newcomer)
        newcomer_s = time.perf_counter() - left_at
        batch_s = max(b - a for a, b in pairwise([*times[n_before - 1 :], time.perf_counter()]))
        return Abandoned(newcomer_s, batch_s, n_decoded, n_answer, len(times) - n_before)
