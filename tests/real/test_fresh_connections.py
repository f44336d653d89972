"""A request to llama.cpp on a connection of its own, on the loop that serves: uvloop, whose transports have their own
rules.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import orjson
import pytest
import uvloop

from llamaslot.errors import BackendDown
from llamaslot.llama.answers import media_type_of, next_piece, whole
from llamaslot.llama.client import LlamaServer
from llamaslot.llama.transport.connection import ServerConnection
from llamaslot.llama.transport.fresh_connections import FreshConnections
from tests.support import models
from tests.support.inprocess import PATIENCE_S
from tests.support.real import RealServer

pytestmark = pytest.mark.real

Check = Callable[[RealServer, FreshConnections], Awaitable[None]]


def run(tmp_path: Path, check: Check) -> None:
    async def main() -> None:
        async with (
            asyncio.timeout(PATIENCE_S),
            RealServer(models.dense(tmp_path), tmp_path / "kv", slots=1) as server,
        ):
            plain = FreshConnections.of(server.url, None)
            assert plain is not None
            await check(server, plain)

    uvloop.run(main())


async def asked(plain: FreshConnections, n_predict: int, **more: object) -> ServerConnection:
    body = orjson.dumps({"prompt": "hello", "n_predict": n_predict, "stream": True, **more})
    response = await plain.send("POST", "/completion", body, {"Content-Type": "application/json"})
    assert response is not None
    return response


def test_a_stream_token_by_token(tmp_path: Path) -> None:
    """Each event as it comes, to the last; and an answer in one piece."""

    async def check(server: RealServer, plain: FreshConnections) -> None:
        pieces: list[bytes] = []

        def take(piece: bytes) -> bool:
            pieces.append(piece)
            return True

        with contextlib.closing(await asked(plain, 40)) as response:
            assert (response.status, media_type_of(response)) == (200, "text/event-stream")
            assert not await response.pass_to(take)
        assert len(pieces) > 3
        assert b"".join(pieces).count(b"data: ") == 41
        with contextlib.closing(await asked(plain, 4, stream=False)) as response:
            assert orjson.loads(await whole(response))["timings"]["predicted_n"] == 4
        with contextlib.closing(await asked(plain, 4, temperature="x")) as response:
            assert response.status >= 400
            assert "error" in orjson.loads(await whole(response))

    run(tmp_path, check)


def test_closing_ends_a_generation(tmp_path: Path) -> None:
    """llama.cpp notices it at the next token."""

    async def check(server: RealServer, plain: FreshConnections) -> None:
        api = LlamaServer(server.url)
        with contextlib.closing(await asked(plain, 100_000)) as response:
            assert await next_piece(response)
            assert (await api.slots())[0].is_processing
        while (await api.slots())[0].is_processing:  # noqa: ASYNC110  # it tells nobody
            await asyncio.sleep(0.05)
        await api.close()

    run(tmp_path, check)


def test_a_server_that_dies_in_the_middle(tmp_path: Path) -> None:
    """What has come is given, then the error; the next request is refused."""

    async def check(server: RealServer, plain: FreshConnections) -> None:
        with contextlib.closing(await asked(plain, 100_000)) as response:
            assert await next_piece(response)
            await server.kill()
            with pytest.raises(BackendDown, match="before the end of its answer"):
                await whole(response)
        with pytest.raises(ConnectionRefusedError):
            await plain.send("GET", "/health", None, {})

    run(tmp_path, check)


def test_an_answer_that_is_not_read_waits(tmp_path: Path) -> None:
    """In llama.cpp; then it goes on where it was."""

    async def check(server: RealServer, plain: FreshConnections) -> None:
        with contextlib.closing(await asked(plain, 3000)) as response:
            assert await next_piece(response)
            async with asyncio.timeout(PATIENCE_S):
                while not response._is_paused:  # noqa: ASYNC110  # no event comes for it
                    await asyncio.sleep(0.01)
            assert (await whole(response)).rstrip().endswith(b"}")

    run(tmp_path, check)
