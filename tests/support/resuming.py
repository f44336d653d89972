"""Prefills that do not run through, as black-box runs: clients that leave and come back, other requests in between, and
a server that was restarted.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from tests.support.jobs import clients, ids, quiet, shared, snapshot_files
from tests.support.prefilling import Took, first_token
from tests.support.stack import Stack
from tests.support.users import Client, Event, Meter, User, rendered, symbols, talking, words

N_SHORT = 40  # tokens of a short request of another user
N_LITTLE = 1000  # more tokens than any request here asks for, but the streams
LOOK_S = 0.02
WATCH_S = (
    0.5  # llamaslot looks every 2 s whether it is the same process, and at once if it was stopped for long
)
UNSEEN = {
    "LLAMA_MEDIA_MARKER": "<__media__>"
}  # in llama-server's environment: all its processes look the same


@dataclass(frozen=True, slots=True)
class Returned:
    """A client that left a prefill and sent the same prompt again. The computed tokens are by llama-server's counter,
    which counts a request once it has ended or was given up.
    """

    n_prompt: int
    n_told: int  # what the last comment had said when it left, 0 where there are none
    n_first: int  # computed when it left
    n_meanwhile: int  # after that, without a client
    n_again: int
    text: str

    @property
    def again(self) -> float:
        """The share of the prompt that was computed when the client came back."""
        return self.n_again / self.n_prompt

    @property
    def meanwhile(self) -> float:
        return self.n_meanwhile / self.n_prompt

    def __str__(self) -> str:
        return (
            f"left at {self.n_first} of {self.n_prompt} tokens (told {self.n_told}), {self.n_meanwhile} computed for "
            f"no client, {self.n_again} ({self.again:.3f}) when it came back"
        )


def short(rng: random.Random, n_answer: int = 2) -> dict[str, Any]:
    return {"prompt": words(rng, N_SHORT), "max_tokens": n_answer, "temperature": 0, "stream": True}


def told(comment: str) -> int:
    """The 8192 of ``prefill 8192 of 14000``; 0 for any other comment."""
    what, _, rest = comment.partition(" ")
    n_done, _, _ = rest.partition(" of ")
    return int(n_done) if what == "prefill" and n_done.isdigit() else 0


async def leave_and_return(
    stack: Stack,
    *,
    n_prompt: int = 14_000,
    at: float = 0.6,
    is_streaming: bool = True,
    is_busy: bool = False,
    rest_s: float = 3.0,
    seed: int = 1,
) -> Returned:
    """One client leaves when the share ``at`` of its prompt is computed. Another one asks a short question at once, and
    ``rest_s`` later the first client comes back. ``is_busy``: another client streams all the time.
    """
    rng = random.Random(seed)
    n_told = 0

    async def note(event: Event) -> None:
        nonlocal n_told
        n_told = max(n_told, told(event.comment))

    async with clients(stack) as (front, _), AsyncExitStack() as held:
        if is_busy:
            await held.enter_async_context(talking(front, rng))
        meter = Meter(stack.server.metrics)
        await meter.resume()
        messages = [{"role": "user", "content": words(rng, n_prompt)}]
        body = {"messages": messages, "max_tokens": 30, "temperature": 0, "stream": is_streaming}
        leaver = asyncio.get_running_loop().create_task(
            front.ask("/v1/chat/completions", body, on_event=note)
        )
        n_first = await prefilled(stack, leaver, at * n_prompt)
        assert not leaver.done(), "too fast to leave"
        leaver.cancel()
        await first_token(stack, front, "/v1/completions", short(rng))
        # No poll meanwhile: each answer of /slots would keep the abandoned request alive for a second.
        await asyncio.sleep(rest_s)
        if not stack.alone:
            await without_abandoned(stack)
        n_before = await meter.total()
        reply = await front.ask("/v1/chat/completions", {**body, "stream": True})
        assert not reply.error, reply.error
        n_again = await meter.total() - n_before
    return Returned(
        n_prompt=len(symbols(rendered(messages))),
        n_told=n_told,
        n_first=n_first,
        n_meanwhile=round(n_before - n_first) - N_SHORT,
        n_again=round(n_again),
        text=reply.text,
    )


async def without_abandoned(stack: Stack) -> None:
    """Wait until llamaslot has seen that the abandoned work is over. llamaslot is asked, not llama-server. Until then a
    model that computes the whole prompt in half a second does better to compute it than to wait for the slot.
    """
    while any(slot["state"] == "ABANDONED" for slot in (await stack.status())["backends"][0]["slots"]):  # noqa: ASYNC110
        await asyncio.sleep(0.05)


async def prefilled(stack: Stack, asked: asyncio.Task[Any], n_tokens: float) -> int:
    """Wait until ``n_tokens`` of a prompt are computed, or its request has ended. Returns how many were at the last
    look.

    The figure is ``n_prompt_tokens`` of ``/slots``, because the counter of /metrics grows batch by batch only while
    other requests get tokens. A client that streams all the time is recognised by the number of tokens that it still
    wants.
    """
    n_now = 0
    while n_now < n_tokens and not asked.done():
        for slot in await stack.server.slots():
            if slot["is_processing"] and slot["next_token"][0]["n_remain"] < N_LITTLE:
                n_now = max(n_now, slot["n_prompt_tokens"])
        await asyncio.sleep(LOOK_S)
    return n_now


@dataclass(frozen=True, slots=True)
class TokenizeCache:
    """A prefill during which other clients' short requests were served, and the size of its slot as a file."""

    n_prompt: int
    n_short: int  # that were answered before the long prompt's first token
    n_computed: int
    prefill: Took
    n_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.n_short} short answers before the first token of {self.n_prompt} ({self.prefill}), "
            f"{self.n_computed} computed, slot file {self.n_bytes / 1e6:.3f} MB"
        )


async def prefill_in_pieces(
    stack: Stack, *, n_prompt: int = 14_000, n_interruptions: int = 5, seed: int = 1
) -> TokenizeCache:
    """One client asks a short question each time that another part of a long prompt is computed. Afterwards, when
    nothing runs, llama-server itself saves the slot.
    """
    rng = random.Random(seed)
    user = User("user", n_prompt, rng)
    async with clients(stack) as (front, _):
        meter = Meter(stack.server.metrics)
        await meter.resume()
        async with asyncio.TaskGroup() as group:
            body = user.body(max_tokens=2)
            long = group.create_task(first_token(stack, front, "/v1/chat/completions", body))
            n_short = 0
            for number in range(1, n_interruptions + 1):
                await prefilled(stack, long, number * n_prompt / (n_interruptions + 1))
                await first_token(stack, front, "/v1/completions", short(rng))
                n_short += not long.done()
        reply, took = long.result()
        n_computed = await meter.total() - N_SHORT * n_interruptions
    return TokenizeCache(reply.n_prompt, n_short, round(n_computed), took, await size_of_largest(stack))


async def size_of_largest(stack: Stack) -> int:
    """Bytes of the slot with the longest prompt, saved by llama-server when nothing runs."""
    if not stack.alone:
        await quiet(stack, None)
    slots = await stack.server.slots()
    assert not any(slot["is_processing"] for slot in slots)
    largest = max(slots, key=lambda slot: slot.get("n_prompt_tokens") or 0)["id"]
    answer = await stack.server.post(f"/slots/{largest}?action=save", {"filename": "measured.tmp"})
    return int(answer["n_written"])


@dataclass(frozen=True, slots=True)
class Surprised:
    """A follow-up after a restart of llama-server that llamaslot has not noticed."""

    n_prompt: int
    n_on_disk: int  # of the prompt, the tokens that the best snapshot holds
    n_computed: int
    was_noticed: bool  # after all, before the follow-up was sent: then this has measured nothing

    @property
    def n_excess(self) -> int:
        """How many tokens were computed besides those that no snapshot holds."""
        return self.n_computed - (self.n_prompt - self.n_on_disk)

    def __str__(self) -> str:
        noticed = ", NOTICED BEFORE" if self.was_noticed else ""
        return (
            f"{self.n_computed} computed of {self.n_prompt} tokens, {self.n_on_disk} of them on disk "
            f"({self.n_excess:+d}){noticed}"
        )


async def restart_unseen(
    stack: Stack, *, n_context: int = 8000, n_question: int = 60, is_saved: bool = True, seed: int = 1
) -> Surprised:
    """A conversation, a restart of llama-server while llamaslot is stopped (SIGSTOP), and a follow-up of ``n_question``
    tokens.

    The stack has ``env=UNSEEN``. Unless ``is_saved`` the stack must never save ahead of need (``store.idle_save_s``).
    """
    user = User("user", n_context, random.Random(seed), n_question=n_question)
    async with clients(stack) as (front, _):
        meter = Meter(stack.server.metrics)
        await turn(user, front)
        if is_saved:
            await quiet(stack, None)
        n_met = session(stack)
        os.kill(stack.llamaslot.pid, signal.SIGSTOP)
        try:
            await stack.server.kill()
            await stack.server.start()
        finally:
            os.kill(stack.llamaslot.pid, signal.SIGCONT)
        await asyncio.sleep(WATCH_S)
        was_noticed = session(stack) > n_met
        await meter.resume()
        prompt = ids(rendered(user.messages))
        held = [tokens for _, tokens in snapshot_files(stack.server.save_dir)]
        n_on_disk = max((min(shared(prompt, tokens), len(prompt) - 1) for tokens in held), default=0)
        await turn(user, front)
        return Surprised(len(prompt), n_on_disk, round(await meter.total()), was_noticed)


async def turn(user: User, client: Client) -> None:
    reply = (await user.turn(client, max_tokens=20)).reply
    assert not reply.error, reply.error


def session(stack: Stack) -> int:
    """How often llamaslot has connected to its llama-server so far. Each restart that it notices adds one."""
    return stack.llamaslot.log.count(" slots of ")
