"""What llama.cpp does with a kept connection, and what is made of that."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import uvloop

from llamaslot.errors import BackendDown
from llamaslot.llama.client import LlamaServer
from llamaslot.llama.transport.kept_connections import KeptConnections
from tests.support import models
from tests.support.real import RealServer
from tests.support.wire import until_open

pytestmark = pytest.mark.real


@pytest_asyncio.fixture
async def real(tmp_path: Path) -> AsyncIterator[RealServer]:
    async with RealServer(models.dense(tmp_path), tmp_path / "kv", slots=1) as server:
        yield server


@pytest_asyncio.fixture
async def pool(real: RealServer) -> AsyncIterator[KeptConnections]:
    pool = KeptConnections.of(real.url, None)
    assert pool is not None
    yield pool
    pool.close()


async def status(pool: KeptConnections, path: str = "/health") -> int:
    return (await pool.ask("GET", path, None, 10.0)).status


async def test_a_connection_lasts_for_a_hundred_questions(real: RealServer, pool: KeptConnections) -> None:
    """llama.cpp says so in its last answer. An error is the last one, too."""
    for _ in range(99):
        assert await status(pool) == 200
    assert len(pool) == 1
    assert await status(pool) == 200
    assert len(pool) == 0
    assert await status(pool, "/nothing") == 404
    assert len(pool) == 0


async def test_it_closes_what_is_idle(real: RealServer, pool: KeptConnections) -> None:
    """After 5 s; llamaslot closes it before. The next question has a connection of its own."""
    assert await status(pool) == 200
    begun = time.monotonic()
    await until_open(pool, 0)
    assert time.monotonic() - begun < 4.9
    assert await status(pool) == 200


async def test_a_server_that_dies_and_comes_back(real: RealServer) -> None:
    """On the same port. What is asked meanwhile says that it is down, and what is asked then has an answer, though the
    connections that were kept are those of another process."""
    api = LlamaServer(real.url)
    before = await api.props()
    await asyncio.gather(*(api.tokenize("x", add_special=False) for _ in range(3)))
    await real.kill()
    with pytest.raises(BackendDown, match="refuses the connection"):
        await api.props()
    await real.start()
    assert (await api.props()).boot_id != before.boot_id
    await api.slots()
    await api.close()


def test_on_the_loop_that_serves(tmp_path: Path) -> None:
    """uvloop, whose transports are no subclasses of asyncio's: used again, replaced, ended."""

    async def run() -> None:
        async with RealServer(models.dense(tmp_path), tmp_path / "kv", slots=1) as server:
            pool = KeptConnections.of(server.url, None)
            assert pool is not None
            for _ in range(100):
                assert await status(pool) == 200
            assert await status(pool) == 200
            await server.restart()
            assert await status(pool) == 200
            assert await status(pool, "/nothing") == 404
            assert len(pool) == 0
            asking = asyncio.get_running_loop().create_task(status(pool))
            await asyncio.sleep(0)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            await server.kill()
            with pytest.raises(ConnectionRefusedError):
                await status(pool)
            pool.close()

    uvloop.run(run())


async def test_kept_connections_do_not_keep_it_from_stopping(real: RealServer) -> None:
    """Ended as an operator would: it closes what is idle, and is gone at once."""
    api = LlamaServer(real.url)
    await asyncio.gather(*(api.slots() for _ in range(4)))
    begun = time.monotonic()
    await real.stop()
    stopped_s = time.monotonic() - begun
    await api.close()
    assert stopped_s < 3.0
