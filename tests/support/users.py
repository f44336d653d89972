"""Simulated users: what the IDEs of a team send to an OpenAI endpoint, with an exact count of what a cache could reuse.

The generated models have one token for each byte of printable ASCII and for each special token. So tokens and common
prefixes are counted here, independently of the server and of llamaslot. ``Team.check_counts`` compares prompt and count
with the server's own ``/apply-template`` and ``/tokenize`` once.
"""

from __future__ import annotations

import asyncio
import json
import random
import string
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import aiohttp

SPECIALS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LETTERS = string.ascii_lowercase + "     "


def symbols(text: str) -> str:
    """One character per token of the generated models: specials become control characters, bytes stay."""
    for number, special in enumerate(SPECIALS, 1):
        text = text.replace(special, chr(number))
    return text


def common(a: str, b: str) -> int:
    """The longest common prefix of two symbol strings, in tokens."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def rendered(messages: Sequence[Mapping[str, str]]) -> str:
    """The prompt that the generated models' template makes of plain messages of users and assistants."""
    turns = (f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)
    return "".join(turns) + "<|im_start|>assistant\n"


def words(rng: random.Random, n: int) -> str:
    """Random text of exactly ``n`` tokens that shares nothing with any other user's."""
    return "".join(rng.choices(LETTERS, k=n - 1)) + "."


@dataclass(frozen=True, slots=True)
class Event:
    """One SSE event or comment as the client received it, ``at_s`` seconds after the request was sent."""

    at_s: float
    data: dict[str, Any] | None
    comment: str = ""


@dataclass(slots=True)
class Reply:
    """All that one request brought back."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    text: str = ""
    error: str = ""
    ttft_s: float = float("nan")  # to the first content, of a stream
    total_s: float = float("nan")
    n_prompt: int = 0  # as the answer's usage or timings tell
    n_reused: int = 0
    n_computed: int = 0
    n_predicted: int = 0
    comments: list[str] = field(default_factory=list)
    body: dict[str, Any] = field(default_factory=dict)  # of an answer in one piece, or the last event

    @property
    def slot(self) -> int | None:
        """The slot that llamaslot names in its header; None if llama-server was asked directly."""
        value = self.headers.get("x-llamaslot-slot")
        return int(value) if value and value.isdigit() else None

    def learn(self, body: dict[str, Any]) -> None:
        """Take the figures from ``body``, where it has ``usage`` (OpenAI) or ``timings`` (llama-server)."""
        if usage := body.get("usage"):
            self.n_prompt = usage["prompt_tokens"]
        if timings := body.get("timings"):
            self.n_reused, self.n_computed = timings["cache_n"], timings["prompt_n"]
            self.n_prompt = self.n_reused + self.n_computed
            self.n_predicted = timings["predicted_n"]


async def events(response: aiohttp.ClientResponse, t0: float) -> AsyncIterator[Event]:
    """The SSE events of a response, as they come; ``[DONE]`` ends them."""
    async for line in response.content:
        text = line.decode().rstrip("\r\n")
        if text.startswith("data: "):
            if text == "data: [DONE]":
                return
            yield Event(time.perf_counter() - t0, json.loads(text[6:]))
        elif text.startswith("error: "):
            yield Event(time.perf_counter() - t0, {"error": json.loads(text[7:])})
        elif text.startswith(":"):
            yield Event(time.perf_counter() - t0, None, text[1:].strip())


class Client:
    """An HTTP client without delays of its own: a fresh connection for each request, no time limit."""

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        self.url, self._headers = url, headers
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None),
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            read_bufsize=1 << 22,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        assert self._session is not None, "use the client as a context manager"
        return self._session

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """An answer in one piece; AssertionError with the body for any status but 200."""
        async with self.session.post(self.url + path, json=body) as response:
            text = await response.text()
            assert response.status == 200, f"{path}: {response.status} {text[:300]}"
            return dict(json.loads(text))

    async def ask(
        self, path: str, body: dict[str, Any], *, on_event: Callable[[Event], Awaitable[None]] | None = None
    ) -> Reply:
        """Send a completion, streaming or not, and read it to its end.

        ``Reply.error`` reports a failure, which is never raised. Canceling closes the connection: the client has left.
        """
        reply, t0 = Reply(), time.perf_counter()
        try:
            async with self.session.post(self.url + path, json=body) as response:
                reply.status = response.status
                reply.headers = {name.lower(): value for name, value in response.headers.items()}
                if response.status != 200 or not body.get("stream"):
                    text = await response.text()
                    reply.total_s = time.perf_counter() - t0
                    if response.status != 200:
                        reply.error = f"{response.status} {text[:300]}"
                        return reply
                    reply.body = json.loads(text)
                    reply.learn(reply.body)
                    reply.text = content_of(reply.body)
                    return reply
                async for event in events(response, t0):
                    if event.data is None:
                        reply.comments.append(event.comment)
                        learn_comment(reply, event.comment)
                    elif "error" in event.data:
                        reply.error = json.dumps(event.data["error"])[:300]
                    else:
                        piece = content_of(event.data)
                        if piece and reply.ttft_s != reply.ttft_s:
                            reply.ttft_s = event.at_s
                        reply.text += piece
                        reply.learn(event.data)
                        reply.body = event.data
                    if on_event is not None:
                        await on_event(event)
                reply.total_s = time.perf_counter() - t0
                if not reply.error and not reply.body:
                    reply.error = "the stream ended without an event"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            reply.error = f"{type(error).__name__}: {error}"
        return reply


def learn_comment(reply: Reply, comment: str) -> None:
    """Take a header of llamaslot from a comment (``x-llamaslot-slot: 2``), which replaces it if the HTTP headers were
    sent before.
    """
    for part in comment.replace(";", ",").split(","):
        name, separator, value = part.strip().partition(":")
        if separator and name.lower().startswith("x-"):
            reply.headers[name.lower()] = value.strip()


def content_of(body: dict[str, Any]) -> str:
    """The text in an answer or in one event of it: chat, completions or llama-server's own /completion."""
    if "content" in body:
        return str(body["content"])
    pieces = []
    for choice in body.get("choices", ()):
        message = choice.get("delta") or choice.get("message") or choice
        pieces.append(message.get("content") or message.get("text") or "")
    return "".join(pieces)


@dataclass(slots=True)
class Turn:
    """One question of one user, and its result."""

    user: str
    number: int  # 1 is the first
    n_prompt: int  # counted here
    n_unlimited: int  # what a cache of unlimited size would have reused: of its last prompt and answer
    reply: Reply


class User:
    """One conversation: a long context, then one question after another, each with all messages before it."""

    def __init__(self, name: str, n_context: int, rng: random.Random, *, n_question: int = 60) -> None:
        self.name, self.rng, self.n_question = name, rng, n_question
        self.messages: list[dict[str, str]] = [
            {"role": "user", "content": f"{name}: {words(rng, n_context)}"}
        ]
        self.turns: list[Turn] = []
        self.known = (
            ""  # symbols that the server has evaluated for this user: prompt and answer but its last token
        )

    def forget(self, n_context: int) -> None:
        """Begin another conversation."""
        self.messages = [{"role": "user", "content": f"{self.name}: {words(self.rng, n_context)}"}]
        self.known = ""

    @property
    def n_turns(self) -> int:
        return len(self.turns)

    @property
    def last(self) -> Turn:
        return self.turns[-1]

    def body(self, *, max_tokens: int = 40, stream: bool = True, **more: Any) -> dict[str, Any]:
        return {
            "model": "any",
            "messages": list(self.messages),
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": stream,
            **({"stream_options": {"include_usage": True}} if stream else {}),
            **more,
        }

    async def turn(self, client: Client, **options: Any) -> Turn:
        """Ask once. The conversation gets the answer and the next question only if the request was answered."""
        prompt = symbols(rendered(self.messages))
        n_unlimited = min(common(self.known, prompt), len(prompt) - 1)
        reply = await client.ask("/v1/chat/completions", self.body(**options))
        turn = Turn(self.name, self.n_turns + 1, len(prompt), n_unlimited, reply)
        self.turns.append(turn)
        if not reply.error:
            self.known = (prompt + reply.text)[:-1]
            self.messages.append({"role": "assistant", "content": reply.text})
            self.messages.append({"role": "user", "content": words(self.rng, self.n_question)})
        return turn


class Team:
    """Some users that take turns, a few at a time, in an order drawn at random.

    ``n_context``: the tokens of their contexts, or several sizes that are used in turn. ``client`` asks (llamaslot, or
    llama-server directly); ``server`` is llama-server itself.
    """

    def __init__(
        self,
        n_users: int,
        n_context: int | Sequence[int],
        *,
        client: Client,
        server: Client,
        seed: int = 1,
        n_question: int = 60,
    ) -> None:
        self.rng = random.Random(seed)
        self.client, self.server = client, server
        sizes = cycle([n_context] if isinstance(n_context, int) else n_context)
        self.users = [
            User(f"user {n}", size, self.rng, n_question=n_question)
            for n, size in zip(range(n_users), sizes, strict=False)
        ]

    async def check_counts(self) -> None:
        """Check that the server renders a conversation and counts its tokens as this module does."""
        conversation = [
            *self.users[0].messages,
            {"role": "assistant", "content": " an answer"},
            {"role": "user", "content": "and a question"},
        ]
        text = (await self.server.post("/apply-template", {"messages": conversation}))["prompt"]
        assert text == rendered(conversation), "the model has another template"
        body = {"content": text, "add_special": True, "parse_special": True}
        n_tokens = len((await self.server.post("/tokenize", body))["tokens"])
        assert n_tokens == len(symbols(text)), "the model does not have one token per byte"

    async def run(self, n_turns: int, *, at_a_time: int = 4, **options: Any) -> list[Turn]:
        """Every user has ``n_turns`` more turns. The next one is drawn at random among the users that do not wait for
        an answer.
        """
        left = {user.name: n_turns for user in self.users}
        ready = {user.name: user for user in self.users}
        done: list[Turn] = []

        async def worker() -> None:
            while ready:
                name = self.rng.choice(sorted(ready))
                user = ready.pop(name)
                done.append(await user.turn(self.client, **options))
                left[name] -= 1
                if left[name]:
                    ready[name] = user

        async with asyncio.TaskGroup() as group:
            for _ in range(at_a_time):
                group.create_task(worker())
        assert not any(left.values()), f"turns left: {left}"
        return done

    async def round(self, *, at_a_time: int = 4, **options: Any) -> list[Turn]:
        """Every user has one more turn, in another order than before."""
        order = self.users[:]
        self.rng.shuffle(order)
        gate = asyncio.Semaphore(at_a_time)

        async def one(user: User) -> Turn:
            async with gate:
                return await user.turn(self.client, **options)

        return list(await asyncio.gather(*(one(user) for user in order)))


@dataclass(frozen=True, slots=True)
class Tally:
    """How many tokens a number of turns asked for, and how many llama-server computed for them.

    ``n_computed`` is the difference of ``llamacpp:prompt_tokens_total``. So it includes what llamaslot itself computes:
    probes, prefills in steps, work done twice.
    """

    n_turns: int
    n_errors: int
    n_prompt: int
    n_unlimited: int  # of follow-up turns
    n_first_shared: (
        int  # at most this much of first turns was reused from other users: the template's first words
    )
    n_computed: int

    @property
    def ratio(self) -> float:
        """The share that was reused of the tokens that an unlimited cache would have reused on follow-up turns.

        It may be too low for llamaslot: tokens that first turns have reused count as not reused by the others.
        """
        return (self.n_prompt - self.n_computed - self.n_first_shared) / max(self.n_unlimited, 1)

    def __str__(self) -> str:
        return (
            f"{self.n_turns} turns, {self.n_errors} errors, {self.n_prompt} prompt tokens, "
            f"{self.n_computed} computed, reused {self.ratio:.4f} of what an unlimited cache would have"
        )


def tally(turns: Sequence[Turn], n_computed: float) -> Tally:
    first = [turn for turn in turns if turn.number == 1]
    shared = len(symbols("<|im_start|>user\nuser 10")) * len(first)
    return Tally(
        n_turns=len(turns),
        n_errors=sum(bool(turn.reply.error) for turn in turns),
        n_prompt=sum(turn.n_prompt for turn in turns),
        n_unlimited=sum(turn.n_unlimited for turn in turns),
        n_first_shared=shared,
        n_computed=round(n_computed),
    )


class Meter:
    """Counts ``llamacpp:prompt_tokens_total`` over restarts of the server, whose counter begins again at 0.

    ``pause`` before a restart and ``resume`` after it; ``total`` at the end.
    """

    def __init__(self, metrics: Callable[[], Awaitable[dict[str, float]]]) -> None:
        self._metrics = metrics
        self._sum, self._start = 0.0, 0.0

    async def _now(self) -> float:
        return (await self._metrics())["llamacpp:prompt_tokens_total"]

    async def resume(self) -> None:
        self._start = await self._now()

    async def pause(self) -> None:
        self._sum += await self._now() - self._start

    async def total(self) -> float:
        return self._sum + await self._now() - self._start


@asynccontextmanager
async def talking(
    client: Client,
    rng: random.Random,
    *,
    max_tokens: int = 100_000,
    clock: Callable[[], float] = time.perf_counter,
) -> AsyncIterator[list[float]]:
    """A context manager: in its block another client streams all the time. Gives the times, by ``clock``, at which the
    tokens of that stream came.
    """
    times: list[float] = []
    started = asyncio.Event()

    async def note(event: Event) -> None:
        if event.data is not None:
            times.append(clock())
            if len(times) > 2:
                started.set()

    async def talk() -> None:
        while True:
            body = {
                "prompt": words(rng, 50),
                "n_predict": max_tokens,
                "max_tokens": max_tokens,
                "temperature": 0,
                "stream": True,
            }
            reply = await client.ask("/v1/completions", body, on_event=note)
            assert not reply.error, reply.error

    task = asyncio.get_running_loop().create_task(talk(), name="talking")
    try:
        waiting = asyncio.get_running_loop().create_task(started.wait())
        await asyncio.wait({waiting, task}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if task.done():
            task.result()
        yield times
        if task.done():
            task.result()
    finally:
        task.cancel()
        await asyncio.wait({task})
