"""The client of the benchmark, a process of its own: ``python -m bench.proxy.load``.

Each line of its input is one task, ``{"do": NAME, …}``; it answers with one line of JSON when that is done. Times are
in seconds, counted from when a request is sent, a new connection included.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import random
import statistics
import string
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httptools
import orjson
import uvloop

from llamaslot.tasks import TaskOwner

_LETTERS = (string.ascii_lowercase + " ") * 4
_TOKEN = b'"content":"'  # only an event with a token has it: the role comes with null, comments have none
_PATIENCE_S = 60.0


@dataclass(slots=True)
class Got:
    """An answer. ``delays_s``: of each event that names the moment of its sending."""

    status: int = 0
    first_s: float = 0.0
    end_s: float = 0.0
    n_events: int = 0
    body: list[bytes] = field(default_factory=list)
    delays_s: list[float] = field(default_factory=list)


class Connection(asyncio.Protocol):
    """One request after the other; httptools calls the methods that begin with ``on_``."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[Got] | None = None
        self.begun: asyncio.Future[None] | None = None
        self.is_closing = False
        self.n_answers = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def send(self, data: bytes, sent_at: float, *, keep: bool, timed: bool) -> asyncio.Future[Got]:
        """``keep``: the bytes of the answer are kept; ``timed``: its events name the moment of their sending."""
        self.parser = httptools.HttpResponseParser(self)
        self.got, self.sent_at, self.keep, self.timed = Got(), sent_at, keep, timed
        self.done, self.begun = self.loop.create_future(), self.loop.create_future()
        self.transport.write(data)
        return self.done

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        got = self.got
        if not got.first_s and _TOKEN in body:
            got.first_s = time.perf_counter() - self.sent_at
            if self.begun is not None and not self.begun.done():
                self.begun.set_result(None)
        if self.timed:
            now = time.monotonic_ns()
            for piece in body.split(_TOKEN)[1:]:
                stamp = piece.partition(b" ")[0]
                if stamp.isdigit():
                    got.n_events += 1
                    got.delays_s.append((now - int(stamp)) / 1e9)
        else:
            got.n_events += body.count(_TOKEN)
        if self.keep:
            got.body.append(body)

    def on_message_complete(self) -> None:
        self.got.status = self.parser.get_status_code()
        self.got.end_s = time.perf_counter() - self.sent_at
        self.is_closing = not self.parser.should_keep_alive()
        self.n_answers += 1
        if self.done is not None and not self.done.done():
            self.done.set_result(self.got)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closing = True
        if self.done is not None and not self.done.done():
            self.done.set_exception(ConnectionError("the connection was closed before the end of the answer"))


class Client:
    """Connections to one address, kept while it keeps them."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.idle: list[Connection] = []

    async def ask(self, body: object, user: str = "u", *, timed: bool = False) -> Got:
        """A completion, to its end; once more if a kept connection turns out to be closed. Raises ConnectionError,
        ValueError unless it is 200.
        """
        while True:
            connection, got = await self.begin(body, user, timed=timed)
            try:
                return await self.finish(connection, got)
            except ConnectionError:
                if not connection.n_answers or connection.got.body:
                    raise

    async def begin(
        self, body: object, user: str, *, timed: bool = False, fresh: bool = False
    ) -> tuple[Connection, asyncio.Future[Got]]:
        """``fresh``: on a new connection."""
        raw = orjson.dumps(body)
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {user}\r\nContent-Length: {len(raw)}\r\n\r\n"
        )
        sent_at = time.perf_counter()
        connection = await self.connection(fresh=fresh)
        return connection, connection.send(head.encode() + raw, sent_at, keep=True, timed=timed)

    async def finish(self, connection: Connection, answer: Awaitable[Got]) -> Got:
        got = await answer
        if not connection.is_closing:
            self.idle.append(connection)
        if got.status != 200:
            raise ValueError(f"{got.status}: {b''.join(got.body)[:500]!r}")
        return got

    async def get(self, path: str) -> Got:
        sent_at = time.perf_counter()
        connection = await self.connection()
        request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
        return await self.finish(connection, connection.send(request, sent_at, keep=True, timed=False))

    async def connection(self, *, fresh: bool = False) -> Connection:
        while self.idle and not fresh:
            if not (connection := self.idle.pop()).is_closing:
                return connection
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(Connection, "127.0.0.1", self.port))[1]

    def close(self) -> None:
        for connection in self.idle:
            connection.transport.close()
        self.idle.clear()


class Viewer:
    """A browser that shows llamaslot's page, without the drawing: it reads the stream of changes, and asks for the
    rest when the page's scripts would (``static/page.js``, ``store.js``).
    """

    def __init__(self, port: int) -> None:
        self.client, self.is_drawn = Client(port), asyncio.Event()
        self.store: asyncio.TimerHandle | None = None
        self.stored_at = 0.0
        self.n_told = 0
        self.tasks = TaskOwner()
        self.tasks.spawn(self.watch(), "watch")

    async def watch(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.client.port)
        writer.write(b"GET /llamaslot/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        try:
            while told := await reader.read(2**18):
                self.n_told += told.count(b"event: ")
                if b"event: all" in told:
                    await self.get("activity?n=2000&after=0")
                    await self.get("history?span=hour&by=all")
                if b'"store":{"n"' in told and self.store is None:
                    loop = asyncio.get_running_loop()
                    wait_s = max(self.stored_at + 4.0 - loop.time(), 0.0) + random.random()
                    self.store = loop.call_later(wait_s if self.stored_at else 0.0, self.begin_store)
        finally:
            writer.close()

    async def get(self, path: str) -> None:
        await self.client.get(f"/llamaslot/{path}")

    def begin_store(self) -> None:
        self.stored_at = asyncio.get_running_loop().time()
        self.tasks.spawn(self.snapshots(), "snapshots")

    async def snapshots(self) -> None:
        await self.get("snapshots?max_age_s=4")
        self.store = None
        self.is_drawn.set()

    async def close(self) -> None:
        if self.store is not None:
            self.store.cancel()
        await self.tasks.close()
        self.client.close()


def text(rng: random.Random, n_tokens: int) -> str:
    """Four characters are one token."""
    return "".join(rng.choices(_LETTERS, k=4 * n_tokens))


def chat(*texts: str, max_tokens: int = 4, stream: bool = True) -> dict[str, Any]:
    """``texts``: of user and assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": said} for i, said in enumerate(texts)]
    return {"model": "bench", "messages": messages, "max_tokens": max_tokens, "stream": stream}


def percentile(values: list[float], part: float) -> float:
    """The value that ``part`` (0 to 1) of all are at most."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * part), len(ordered) - 1)] if ordered else 0.0


class Load:
    """The tasks. What is begun is kept until it is ended by another task."""

    def __init__(self) -> None:
        self.rng = random.Random(1)
        self.clients = dict[int, Client]()
        self.talks = dict[int, list[str]]()
        self.held = list[tuple[Client, Connection, asyncio.Future[Got]]]()
        self.viewers = list[Viewer]()

    def client(self, port: int) -> Client:
        return self.clients.setdefault(port, Client(port))

    async def forget(self, port: int) -> None:
        """Nothing is at this port any more."""
        if (client := self.clients.pop(port, None)) is not None:
            client.close()
        self.talks.pop(port, None)

    async def short(
        self, port: int, n: int, at_once: int, *, stream: bool = True, n_tokens: int = 50
    ) -> dict[str, Any]:
        """``n`` requests that have nothing in common, ``at_once`` at a time, each of these a user of its own."""
        client, firsts, left = self.client(port), list[float](), iter(range(n))

        async def user(number: int) -> None:
            for _ in left:
                body = chat(text(self.rng, n_tokens - 8), stream=stream)
                got = await client.ask(body, f"user{number}")
                firsts.append(got.first_s if stream else got.end_s)

        start = time.perf_counter()
        await asyncio.gather(*(user(i) for i in range(min(at_once, n))))
        took_s = time.perf_counter() - start
        return {"per_s": n / took_s, "first_s": statistics.median(firsts), "p99_s": percentile(firsts, 0.99)}

    async def talk(self, port: int, n_tokens: int) -> None:
        """Begin a conversation of so many tokens."""
        said = [text(self.rng, n_tokens)]
        got = await self.client(port).ask(chat(*said), "talker")
        self.talks[port] = [*said, answer_in(got)]

    async def follow(self, port: int, n: int, n_tokens: int) -> dict[str, Any]:
        """``n`` more turns of the conversation, each ``n_tokens`` longer than the last."""
        said, firsts = self.talks[port], []
        for _ in range(n):
            said.append(text(self.rng, n_tokens - 16))
            got = await self.client(port).ask(chat(*said), "talker")
            said.append(answer_in(got))
            firsts.append(got.first_s)
        return {"first_s": statistics.median(firsts)}

    async def fill(self, port: int, n: int, n_tokens: int, at_once: int) -> None:
        """``n`` conversations of so many tokens, the same ones each time."""
        client, left = self.client(port), iter(range(n))

        async def user() -> None:
            for i in left:
                await client.ask(chat(text(random.Random(i), n_tokens)), f"filler{i}")

        await asyncio.gather(*(user() for _ in range(at_once)))

    async def hold(self, port: int, n: int, every_ms: int) -> dict[str, Any]:
        """``n`` streams at once, with an event each ``every_ms``; returns when all have begun."""
        client, start = self.client(port), time.perf_counter()

        async def one(number: int) -> None:
            words = f"{text(self.rng, 40)} @every-{every_ms}"
            connection, got = await client.begin(chat(words), f"user{number}", timed=True, fresh=True)
            self.held.append((client, connection, got))
            assert connection.begun is not None
            await asyncio.wait((connection.begun, got), return_when=asyncio.FIRST_COMPLETED)
            if not connection.begun.done():
                raise ValueError(f"{got.result().status}: {b''.join(got.result().body)[:500]!r}")

        try:
            async with asyncio.timeout(_PATIENCE_S):
                await asyncio.gather(*(one(i) for i in range(n)))
        except BaseException:
            held, self.held = self.held, []
            for _, connection, got in held:
                got.cancel()
                connection.transport.abort()
            raise
        return {"begun_s": time.perf_counter() - start}

    async def listen(
        self, seconds: float, port: int = 0, cold_per_s: float = 0.0, n_tokens: int = 0, *, keep: bool = False
    ) -> dict[str, Any]:
        """Count the events of the streams that are held; beside requests of ``n_tokens`` at ``port``, if any.
        ``keep``: return each delay too.
        """
        for _, connection, _ in self.held:
            connection.got.delays_s.clear()
            connection.got.body.clear()
        if cold_per_s:
            colds = iter([text(self.rng, n_tokens) for _ in range(int(seconds * cold_per_s) + 2)])

            async def cold(number: int) -> None:
                await self.client(port).ask(chat(next(colds)), f"cold{number % 4}")

            async with asyncio.TaskGroup() as group:
                await self._at_pace(seconds, cold_per_s, cold, group)
        else:
            await asyncio.sleep(seconds)
        delays = [delay for _, connection, _ in self.held for delay in connection.got.delays_s]
        answer = {"n": len(delays), "p50_s": percentile(delays, 0.5), "p99_s": percentile(delays, 0.99)}
        return {**answer, "delays_s": delays} if keep else answer

    async def release(self, upstream_port: int) -> None:
        """End the streams that are held, and wait for that."""
        held, self.held = self.held, []
        for _, connection, _ in held:
            connection.got.body.clear()
        await Client(upstream_port).get("/bench/release")
        await asyncio.gather(*(client.finish(connection, got) for client, connection, got in held))
        # Nothing uses them again, and each proxy would be measured with those of all rounds before.
        for _, connection, _ in held:
            connection.transport.close()

    async def flood(self, port: int, n: int, n_events: int) -> dict[str, Any]:
        """``n`` streams of ``n_events`` each, as fast as they go."""
        client = self.client(port)

        async def one(number: int) -> Got:
            body = chat(f"{text(self.rng, 40)} @flood", max_tokens=n_events)
            connection, got = await client.begin(body, f"user{number}", fresh=True)
            connection.keep = False
            return await client.finish(connection, got)

        start = time.perf_counter()
        gots = await asyncio.gather(*(one(i) for i in range(n)))
        took_s = time.perf_counter() - start - min(got.first_s for got in gots)
        n_seen = sum(got.n_events for got in gots)
        assert n_seen == n * n_events, f"{n_seen} events of {n * n_events}"
        return {"per_s": n_seen / took_s, "n": n_seen}

    async def beside(
        self, port: int, seconds: float, short_per_s: int, cold_tokens: int, cold_per_s: float
    ) -> dict[str, Any]:
        """Short requests at their own pace, whether the ones before have ended or not, beside long cold ones."""
        client, firsts = self.client(port), list[float]()

        async def short(number: int) -> None:
            firsts.append((await client.ask(chat(text(self.rng, 42)), f"user{number % 8}")).first_s)

        async def long(said: str) -> None:
            await client.ask(chat(said), "cold")

        colds = [text(self.rng, cold_tokens) for _ in range(int(seconds * cold_per_s) + 1)]
        async with asyncio.TaskGroup() as group:
            group.create_task(self._at_pace(seconds, short_per_s, short, group))
            group.create_task(self._at_pace(seconds, cold_per_s, lambda i: long(colds[i]), group))
        return {"n": len(firsts), "p50_s": percentile(firsts, 0.5), "p99_s": percentile(firsts, 0.99)}

    async def _at_pace(
        self, seconds: float, per_s: float, begin: Callable[[int], Awaitable[None]], group: asyncio.TaskGroup
    ) -> None:
        """So many a second, whether the ones before have ended or not."""
        loop = asyncio.get_running_loop()
        end, due, number = loop.time() + seconds, loop.time() + self.rng.random() / per_s, 0
        while due < end:
            await asyncio.sleep(max(0.0, due - loop.time()))
            group.create_task(_as_coroutine(begin(number)))
            due, number = due + 1 / per_s, number + 1
        await asyncio.sleep(max(0.0, end - loop.time()))

    async def view(self, port: int, n: int) -> None:
        """``n`` browsers open llamaslot's page; returns when it is drawn in all of them."""
        begun = [Viewer(port) for _ in range(n)]
        self.viewers += begun
        async with asyncio.timeout(_PATIENCE_S):
            await asyncio.gather(*(viewer.is_drawn.wait() for viewer in begun))

    async def leave(self) -> int:
        """All of them are closed. Returns the number of events that each one has received at least."""
        viewers, self.viewers = self.viewers, []
        for viewer in viewers:
            await viewer.close()
        return min((viewer.n_told for viewer in viewers), default=0)

    async def health(self, port: int, n: int, at_once: int) -> dict[str, Any]:
        """``GET /health`` as ``ab -k -c`` does it: on kept connections."""
        client, took, left = self.client(port), list[float](), iter(range(n))

        async def user() -> None:
            for _ in left:
                took.append((await client.get("/health")).end_s)

        start = time.perf_counter()
        await asyncio.gather(*(user() for _ in range(at_once)))
        return {"per_s": n / (time.perf_counter() - start), "p99_s": percentile(took, 0.99)}


async def _as_coroutine(work: Awaitable[None]) -> None:
    await work


def answer_in(got: Got) -> str:
    """The text of a streamed answer."""
    events = (line[6:] for line in b"".join(got.body).split(b"\n\n") if line.startswith(b"data: {"))
    choices = (choice for event in events for choice in orjson.loads(event)["choices"])
    return "".join(choice["delta"].get("content") or "" for choice in choices)


async def main() -> None:
    load, loop = Load(), asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.buffer.readline):
        task = orjson.loads(line)
        work = getattr(load, task.pop("do"))
        assert inspect.iscoroutinefunction(work)
        gc.collect()
        gc.disable()
        try:
            answer = {"ok": await work(**task)}
        except (ConnectionError, OSError, ValueError, AssertionError, TimeoutError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        except ExceptionGroup as errors:
            answer = {"error": repr(errors.exceptions[0])}
        finally:
            gc.enable()
        sys.stdout.buffer.write(orjson.dumps(answer) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    uvloop.run(main())
