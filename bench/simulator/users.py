"""The users: each goes through its script, and thinks after the end of an answer. What is requested next, and when."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from bench.simulator.machine import Hardware
from bench.simulator.server import Origin
from bench.simulator.trace import Text, Trace, TraceRequest
from llamaslot.cache.ids import head

LONG_S = 1.0  # a prompt that takes longer to compute is a long one


@dataclass(slots=True)
class Served:
    """What became of a request. ``n_known``: what an unlimited cache would have had of its prompt.

    In seconds from when it was sent: ``queued_s`` until it had a slot, ``ttft_s`` until its first token;
    ``answer_s`` from that to the last one.
    """

    request: TraceRequest
    n_known: int
    n_reused: int = 0
    ttft_s: float = 0.0
    queued_s: float = 0.0
    answer_s: float = 0.0

    @property
    def n_computed(self) -> int:
        return self.request.n_prompt - self.n_reused

    @property
    def n_recomputed(self) -> int:
        """Computed although it had been before; negative for one that was begun beside the first of its kind."""
        return self.n_known - self.n_reused


@dataclass(frozen=True, slots=True)
class SentRequest:
    """A request with its tokens, ``n_system`` of them system part and tools. ``served`` is to be filled in."""

    served: Served
    prompt: bytes
    n_system: int
    answer: bytes
    origin: Origin
    sent_at: float


class Known:
    """What an unlimited cache would have: the text of all earlier requests.

    A conversation's own prefix is in its script; what first turns share are the texts that they begin with.
    """

    def __init__(self) -> None:
        # By the texts before it and the key of a text.
        self._longest: dict[tuple[tuple[Text, ...], int], int] = {}

    def share(self, request: TraceRequest) -> int:
        """Tokens of the prompt that are known, one at least is not; from now on all of it is."""
        return min(request.keep or self._begun(request.add), request.n_prompt - 1)

    def _begun(self, texts: tuple[Text, ...]) -> int:
        n, is_known = 0, True
        for i, text in enumerate(texts):
            place = texts[:i], text.key
            longest = self._longest.get(place, 0)
            n += min(longest, text.n) if is_known else 0
            is_known = is_known and longest >= text.n
            self._longest[place] = max(longest, text.n)
        return n


class Foresight:
    """When which conversation goes on, as far as scripts tell: users think as written, answers take a usual time."""

    def __init__(self, trace: Trace, hardware: Hardware, now: Callable[[], float]) -> None:
        self._now = now
        self._requests = trace.conversations
        self._due: dict[tuple[int, int], float] = {}  # user and round: seconds in its script
        for user, rounds in trace.rounds.items():
            clock_s = 0.0
            for requests in rounds:
                clock_s += requests[0].think_s
                self._due[user, requests[0].round] = clock_s
                clock_s += max(_usual_s(request, hardware) for request in requests)
        self._late_s: dict[int, float] = {}  # by user: how far it is behind its script
        self._n_begun: dict[int, int] = {}

    def will_ask(self, user: int, round_: int, at: float) -> None:
        """The user sends this round at that time."""
        self._late_s[user] = at - self._due[user, round_]

    def begun(self, origin: Origin) -> None:
        """The request has what it needs of the disk."""
        self._n_begun[origin.conversation] = origin.index + 1

    def next_use(self, origin: Origin, n_tokens: int) -> tuple[float, int]:
        """Seconds until a context of ``n_tokens`` tokens with that origin is asked for, and how much of it then is.

        Infinity and 0 when its conversation is over.
        """
        requests = self._requests[origin.conversation]
        i = self._n_begun.get(origin.conversation, 0)
        if i >= len(requests):
            return math.inf, 0
        request = requests[i]
        n = min(n_tokens, *(later.keep for later in requests[origin.index + 1 : i + 1])) if i else 0
        due = self._due[request.user, request.round] + self._late_s.get(request.user, 0.0)
        return max(due - self._now(), 1.0), n


def _usual_s(request: TraceRequest, hardware: Hardware) -> float:
    n_new = request.n_prompt - request.keep
    prefill_s = hardware.prefill_s(request.n_prompt - n_new, request.n_prompt)
    return prefill_s + request.answer.n / hardware.decode_tokens_per_s


class Users:
    """All users of a trace; ``run`` returns when each has come to the end of its script."""

    def __init__(
        self,
        trace: Trace,
        loop: asyncio.AbstractEventLoop,
        ask: Callable[[SentRequest], Awaitable[None]],
        foresight: Foresight,
    ) -> None:
        self.served: list[Served] = []
        self._trace, self._loop, self._ask, self._foresight = trace, loop, ask, foresight
        self._known = Known()
        self._held: dict[int, bytes] = {}  # by conversation: its last prompt and the answer to it
        self._index = {
            id(request): Origin(conversation, i)
            for conversation, requests in trace.conversations.items()
            for i, request in enumerate(requests)
        }
        self._n_left = {conversation: len(requests) for conversation, requests in trace.conversations.items()}

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for user, rounds in self._trace.rounds.items():
                group.create_task(self._live(rounds), name=f"user {user}")

    async def _live(self, rounds: list[list[TraceRequest]]) -> None:
        for requests in rounds:
            first = requests[0]
            self._foresight.will_ask(first.user, first.round, self._loop.time() + first.think_s)
            await asyncio.sleep(first.think_s)
            if len(requests) == 1:
                await self._send(first)
                continue
            async with asyncio.TaskGroup() as group:
                for request in requests:
                    group.create_task(self._send(request), name=f"user {first.user} asks")

    async def _send(self, request: TraceRequest) -> None:
        trace, conversation = self._trace, request.conversation
        before = head(self._held.pop(conversation, b""), request.keep)
        prompt = b"".join((before, *map(trace.text, request.add)))
        answer = trace.text(request.answer)
        self._n_left[conversation] -= 1
        if self._n_left[conversation]:
            self._held[conversation] = prompt + answer
        served = Served(request, self._known.share(request))
        self.served.append(served)
        sent_at = self._loop.time()
        n_system = trace.n_system(conversation)
        await self._ask(SentRequest(served, prompt, n_system, answer, self._index[id(request)], sent_at))
