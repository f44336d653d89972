"""Questions on kept connections: when one is used again, when a question is repeated, and what is no answer."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import socket
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio

from llamaslot.errors import BackendDown
from llamaslot.llama.transport import connection, kept_connections
from llamaslot.llama.transport.connection import BadAnswer
from llamaslot.llama.transport.kept_connections import Answer, KeptConnections
from tests.support.inprocess import PATIENCE_S, spawn
from tests.support.leftovers import nothing_left
from tests.support.real import free_port
from tests.support.wire import looked_up, until_open, upstream

__all__ = ["nothing_left"]

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: 2\r\n\r\n{}"
TOLD = Answer(200, "application/json; charset=utf-8", b"{}")
Reply = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Server:
    """Answers each question with the next of ``replies``, then with ``OK``; None closes the connection instead."""

    url: str = ""
    replies: list[bytes | None] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)  # of the connections, in their order
    on: list[int] = field(default_factory=list)  # of each question: which connection it came on
    closes: bool = False  # behind each answer, without saying so
    is_mute: bool = False
    asked: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(self.writers)
        self.writers.append(writer)
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            self.heads.append(head)
            self.bodies.append(await reader.readexactly(int(length or 0)))
            self.on.append(number)
            self.asked.set()
            if self.is_mute:
                await reader.read()
                return
            reply = self.replies.pop(0) if self.replies else OK
            if reply is None:
                return
            writer.write(reply)
            await writer.drain()
            if self.closes:
                return


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    async with upstream(server.serve) as server.url:
        yield server
        for writer in server.writers:
            writer.close()


@pytest_asyncio.fixture
async def pool(server: Server) -> AsyncIterator[KeptConnections]:
    pool = KeptConnections.of(server.url, "secret")
    assert pool is not None
    yield pool
    pool.close()


async def ask(pool: KeptConnections, timeout_s: float = 30.0) -> Answer:
    return await pool.ask("GET", "/props", None, timeout_s)


async def closed_by(server: Server, pool: KeptConnections) -> None:
    """Let the server close all connections, and the pool notice it."""
    for writer in server.writers:
        writer.close()
    await until_open(pool, 0)


async def test_questions_follow_each_other_on_one_connection(server: Server, pool: KeptConnections) -> None:
    """With the host, the key, and the length of a body."""
    assert [await ask(pool) for _ in range(3)] == [TOLD] * 3
    await pool.ask("POST", "/tokenize", b'{"content":"x"}', 30.0)
    assert server.on == [0, 0, 0, 0]
    host = server.url.removeprefix("http://")
    head = f"GET /props HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer secret\r\n\r\n"
    assert server.heads[0] == head.encode()
    assert b"Content-Type: application/json\r\nContent-Length: 15\r\n" in server.heads[3]
    assert server.bodies[3] == b'{"content":"x"}'
    assert len(pool) == 1


async def test_a_closed_connection_is_no_work_for_the_garbage_collector(
    server: Server, pool: KeptConnections
) -> None:
    """After a burst there are hundreds of them, each with a transport and a parser."""
    await ask(pool)
    (its,) = map(weakref.ref, pool._idle)
    gc.disable()
    try:
        await closed_by(server, pool)
        await asyncio.sleep(0)  # the transport lets go of it after it has told
        assert its() is None
    finally:
        gc.enable()


async def test_questions_at_the_same_time_have_a_connection_each(
    server: Server, pool: KeptConnections
) -> None:
    """One waits for no other; those that come later use the same ones."""
    for _ in range(3):
        assert await asyncio.gather(*(ask(pool) for _ in range(4))) == [TOLD] * 4
    assert len(server.writers) == 4


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n3;x=y\r\nefg\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7\r\nabcdefg\r\n0\r\nTrailer: x\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nabcdefg",
    ],
    ids=["chunks", "a trailer", "an interim answer"],
)
async def test_answers_in_other_shapes(server: Server, pool: KeptConnections, reply: bytes) -> None:
    """The connection is used again."""
    server.replies = [reply]
    assert (await ask(pool)).body == b"abcdefg"
    assert await ask(pool) == TOLD
    assert server.on == [0, 0]


async def test_an_answer_in_single_bytes(server: Server, pool: KeptConnections) -> None:
    """However the kernel cuts it."""
    await ask(pool)
    server.is_mute = True
    asking = asyncio.get_running_loop().create_task(ask(pool))
    server.asked.clear()
    await server.asked.wait()
    for byte in OK:
        server.writers[0].write(bytes([byte]))
        await asyncio.sleep(0)
    assert await asking == TOLD


@pytest.mark.parametrize(
    "reply",
    [
        OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),
        OK.replace(b"200 OK", b"404 Not Found"),
        OK.replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
    ids=["it says so", "an error", "HTTP/1.0"],
)
async def test_a_connection_that_will_be_closed_is_not_used_again(
    server: Server, pool: KeptConnections, reply: bytes
) -> None:
    """As llama-server says it after an error and after 100 questions."""
    server.replies = [reply]
    assert (await ask(pool)).body == b"{}"
    assert len(pool) == 0
    await ask(pool)
    assert server.on == [0, 1]


async def test_an_answer_without_a_length_ends_with_its_connection(
    server: Server, pool: KeptConnections
) -> None:
    """As HTTP/1.0 has it."""
    server.replies, server.closes = [b"HTTP/1.1 200 OK\r\n\r\nabc"], True
    assert (await ask(pool)).body == b"abc"


async def test_a_slow_answer_is_the_last_on_its_connection(
    server: Server, pool: KeptConnections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama-server closes behind it, and does not say so."""
    monkeypatch.setattr(kept_connections, "_SLOW_S", 0.0)
    for _ in range(3):
        await ask(pool)
    assert server.on == [0, 1, 2]


async def test_of_a_burst_few_connections_are_kept(
    server: Server, pool: KeptConnections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are closed soon, for each has a thread of llama-server's; and the last before llama-server does it."""
    monkeypatch.setattr(kept_connections, "_BURST_S", 0.01)
    monkeypatch.setattr(kept_connections, "_WAIT_S", PATIENCE_S)
    await asyncio.gather(*(ask(pool) for _ in range(24)))
    assert len(server.writers) == 4
    await until_open(pool, 2)
    assert len(pool) == 2
    monkeypatch.setattr(kept_connections, "_IDLE_S", 0.02)
    await until_open(pool, 0)


async def test_a_burst_waits_for_the_connections_that_are_there(
    server: Server, pool: KeptConnections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as one of them becomes free now and then."""
    monkeypatch.setattr(kept_connections, "_WAIT_S", PATIENCE_S)
    assert await asyncio.gather(*(ask(pool) for _ in range(200))) == [TOLD] * 200
    assert len(server.writers) == 4


async def test_a_burst_waits_longer_while_this_process_is_busy(
    server: Server, pool: KeptConnections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When their time is over, answers may have come that were not read yet: these connections are free at once."""
    monkeypatch.setattr(kept_connections, "_WAIT_S", 0.0)
    monkeypatch.setattr(kept_connections, "_READ_S", PATIENCE_S)
    assert await asyncio.gather(*(ask(pool) for _ in range(200))) == [TOLD] * 200
    assert len(server.writers) == 4


async def test_a_burst_does_not_wait_for_slow_answers(
    server: Server, pool: KeptConnections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then each opens a connection, as if there were no other."""
    monkeypatch.setattr(kept_connections, "_WAIT_S", 0.01)
    server.is_mute = True
    loop = asyncio.get_running_loop()
    asking = [loop.create_task(ask(pool)) for _ in range(17)]
    leaving = loop.create_task(ask(pool))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    async with asyncio.timeout(PATIENCE_S):
        while len(server.writers) < 17:  # noqa: ASYNC110  # no event comes for it
            await asyncio.sleep(0.005)
    pool.close()
    assert all(
        isinstance(one, ConnectionError) for one in await asyncio.gather(*asking, return_exceptions=True)
    )
    assert len(pool) == 0


async def test_one_that_waits_replaces_a_connection_that_is_closed(
    server: Server, pool: KeptConnections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a hundred questions, and after one that fails."""
    monkeypatch.setattr(kept_connections, "_WAIT_S", 300.0)
    server.replies = [OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")] * 20 + [None] * 4
    asking = (ask(pool) for _ in range(60))
    answers = await asyncio.gather(*asking, return_exceptions=True)
    assert sum(answer == TOLD for answer in answers) >= 56
    assert len(answers) == 60


async def test_closing_ends_those_that_wait_for_a_connection(server: Server, pool: KeptConnections) -> None:
    """As those that wait for an answer."""
    server.is_mute = True
    asking = [asyncio.get_running_loop().create_task(ask(pool)) for _ in range(20)]
    async with asyncio.timeout(PATIENCE_S):
        while len(server.on) < 16:  # noqa: ASYNC110  # no event comes for it
            await asyncio.sleep(0)
    pool.close()
    assert all(
        isinstance(one, ConnectionError) for one in await asyncio.gather(*asking, return_exceptions=True)
    )


async def test_one_that_leaves_as_it_gets_a_connection_gives_it_on(
    server: Server, pool: KeptConnections
) -> None:
    """To the next that waits, or it is idle."""
    await ask(pool)
    taken = pool._take()
    waiting = asyncio.get_running_loop().create_task(pool._next_free())
    await asyncio.sleep(0)
    pool._keep(taken)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert list(pool._idle) == [taken]
    assert await ask(pool) == TOLD
    assert server.on == [0, 0]


async def test_a_kept_connection_that_was_closed_is_noticed(server: Server, pool: KeptConnections) -> None:
    """The next question opens a new one. Whose answer came on it may be gone."""
    answer = await ask(pool)
    assert answer.is_connected()
    await closed_by(server, pool)
    assert not answer.is_connected()
    assert await ask(pool) == TOLD
    assert server.on == [0, 1]


async def test_that_it_was_closed_is_known_before_the_loop_hears_of_it() -> None:
    """The process of an answer is known to be gone in the same moment."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        pool = KeptConnections.of(f"http://127.0.0.1:{listening.getsockname()[1]}", None)
        assert pool is not None
        asking = spawn(ask(pool))
        await asyncio.sleep(0)
        peer, _ = await asyncio.to_thread(listening.accept)
        with peer:
            await asyncio.to_thread(peer.sendall, OK)
            answer = await asking
            assert answer.is_connected()
            peer.recv(1024)
        assert not answer.is_connected()
        pool.close()


async def test_a_question_is_repeated_once(server: Server, pool: KeptConnections) -> None:
    """On a new connection, when the kept one was closed before any byte of the answer. The other kept ones, which are
    as old, are not tried."""
    await asyncio.gather(ask(pool), ask(pool), ask(pool))
    server.replies = [None]
    assert await ask(pool) == TOLD
    assert server.on[3:] == [2, 3]
    server.replies = [None, None]
    with pytest.raises(ConnectionError):
        await ask(pool)
    assert server.on[5:] == [3, 4]


async def test_a_question_on_a_new_connection_is_not_repeated(server: Server, pool: KeptConnections) -> None:
    """What closes that is no old age."""
    server.replies = [None]
    with pytest.raises(ConnectionError):
        await ask(pool)
    assert server.on == [0]


@pytest.mark.parametrize("n", [1, 20, len(OK) - 1])
async def test_half_an_answer_is_none(server: Server, pool: KeptConnections, n: int) -> None:
    """And the question is not repeated: it has been answered."""
    await ask(pool)
    server.replies, server.closes = [OK[:n]], True
    with pytest.raises((ConnectionError, BackendDown)):
        await ask(pool)
    assert len(server.heads) == 2


@pytest.mark.parametrize(
    "reply",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * (1 << 17),
    ],
    ids=["another protocol", "no length", "no chunks", "an upgrade", "endless headers"],
)
async def test_garbage_is_no_answer(server: Server, pool: KeptConnections, reply: bytes) -> None:
    """The connection is closed, and the question not repeated."""
    await ask(pool)
    server.replies = [reply]
    with pytest.raises((BadAnswer, BackendDown)):
        await ask(pool)
    assert len(pool) == 0
    assert len(server.heads) == 2


@pytest.mark.parametrize("rest", [OK, OK[:9], b"garbage"])
async def test_what_follows_an_answer_is_nobodys(server: Server, pool: KeptConnections, rest: bytes) -> None:
    """The answer stands; what comes behind it would be taken for the next one's, so the connection is closed."""
    server.replies = [OK + rest]
    assert await ask(pool) == TOLD
    assert len(pool) == 0


async def test_what_comes_unasked_is_nobodys(server: Server, pool: KeptConnections) -> None:
    """On an idle connection."""
    await ask(pool)
    server.writers[0].write(OK)
    await until_open(pool, 0)
    assert await ask(pool) == TOLD


async def test_a_server_that_says_nothing(server: Server, pool: KeptConnections) -> None:
    """The time is for all of it; the connection is closed."""
    server.is_mute = True
    with pytest.raises(TimeoutError):
        await ask(pool, 0.01)
    assert len(pool) == 0
    with pytest.raises(TimeoutError):
        await ask(pool, 0.0)


async def test_cancelling_closes_the_connection(server: Server, pool: KeptConnections) -> None:
    """What comes of the answer must not be taken for another one's."""
    server.is_mute = True
    asking = asyncio.get_running_loop().create_task(ask(pool))
    await server.asked.wait()
    assert len(pool) == 1
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    assert len(pool) == 0


async def test_closing_ends_what_is_under_way(server: Server, pool: KeptConnections) -> None:
    """A later question opens a new connection."""
    server.is_mute = True
    asking = asyncio.get_running_loop().create_task(ask(pool))
    await server.asked.wait()
    pool.close()
    with pytest.raises(ConnectionError):
        await asking
    server.is_mute = False
    assert await ask(pool) == TOLD


async def test_a_server_that_is_not_there() -> None:
    """The error says why."""
    pool = KeptConnections.of(f"http://127.0.0.1:{free_port()}", None)
    assert pool is not None
    with pytest.raises(ConnectionRefusedError):
        await ask(pool)


async def test_a_name_is_looked_up_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as something listens at the address that it had."""
    pool = KeptConnections.of(server.url.replace("127.0.0.1", "localhost") + "/llama/", None)
    assert pool is not None
    names = looked_up(monkeypatch)
    for _ in range(3):
        await ask(pool)
        pool.drop_idle()
    assert names == ["localhost"]
    assert server.on == [0, 1, 2]
    assert server.heads[0].startswith(b"GET /llama/props HTTP/1.1\r\nHost: localhost:")


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("https://127.0.0.1:8080", None),
        ("http://user:pass@127.0.0.1:8080", None),
        ("http://exämple.org", None),
        ("http://127.0.0.1:8080", "two\r\nlines"),
        ("http://127.0.0.1:8080", "a key"),
    ],
)
def test_what_is_left_to_aiohttp(url: str, key: str | None) -> None:
    """TLS, and what would need care to write."""
    assert KeptConnections.of(url, key) is None


async def test_a_connection_that_a_busy_process_saw_too_late_is_used(
    server: Server, pool: KeptConnections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no sign that the server is gone. A server that is silent while this process has time is."""
    loop = asyncio.get_running_loop()
    assert await ask(pool) == TOLD  # its address is known
    pool.drop_idle()
    monkeypatch.setattr(kept_connections, "QUESTION_CONNECT_S", 0.01)
    monkeypatch.setattr(socket.socket, "connect_ex", lambda *_: errno.EINPROGRESS)  # as from another machine
    connect = loop.sock_connect

    async def seen_late(sock: socket.socket, address: Any) -> None:
        await connect(sock, address)
        await loop.create_future()

    monkeypatch.setattr(loop, "sock_connect", seen_late)
    assert await ask(pool) == TOLD
    pool.drop_idle()

    async def silent(*_: Any) -> None:
        await loop.create_future()

    monkeypatch.setattr(loop, "sock_connect", silent)
    with pytest.raises(TimeoutError):
        await ask(pool)
    assert len(server.writers) == 2


async def test_an_answer_that_a_busy_process_reads_too_late_is_an_answer(
    server: Server, pool: KeptConnections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had come in time."""
    monkeypatch.setattr(connection, "_LATE_S", 0.01)
    assert await ask(pool) == TOLD  # on a connection that is open
    asyncio.get_running_loop().call_soon(time.sleep, 0.2)
    assert await pool.ask("GET", "/", None, 0.1) == TOLD


async def test_waiting_for_a_connection_is_no_time_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a burst a question may wait long for its turn."""
    monkeypatch.setattr(kept_connections, "_N_BURST", 1)
    monkeypatch.setattr(kept_connections, "_WAIT_S", PATIENCE_S)
    go_on, loop = asyncio.Event(), asyncio.get_running_loop()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            await go_on.wait()
            writer.write(OK)

    async with upstream(serve) as url:
        pool = KeptConnections.of(url, None)
        assert pool is not None
        with contextlib.closing(pool):
            first = spawn(ask(pool))
            second = spawn(pool.ask("GET", "/props", None, 0.05))
            loop.call_later(0.1, go_on.set)
            assert await first == await second == TOLD
