"""The clock that limits of time are tested on."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.support.idle_clock import IdleClock


def run(main: object) -> None:
    with asyncio.Runner(loop_factory=IdleClock) as runner:
        runner.run(main)  # type: ignore[arg-type]


def test_time_passes_while_nothing_happens() -> None:
    """A sleep lasts as long as it says, by the loop's own time."""

    async def main() -> None:
        now = asyncio.get_running_loop().time
        began = now()
        await asyncio.sleep(0.5)
        assert 0.5 <= now() - began < 0.51

    run(main())


def test_work_takes_no_time() -> None:
    """In the loop, in a thread, and on its way through a socket: no limit passes meanwhile."""

    async def main() -> None:
        now = asyncio.get_running_loop().time
        began = now()
        async with asyncio.timeout(0.005):
            time.sleep(0.02)  # noqa: ASYNC251
            await asyncio.to_thread(time.sleep, 0.02)
        assert now() - began < 0.005

        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(1 << 16):
                writer.write(data)
            writer.close()

        async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            began = now()
            for _ in range(100):
                writer.write(b"x" * 1000)
                assert await reader.readexactly(1000)
            assert now() - began < 0.05
            writer.close()
            assert not await reader.read()

    run(main())


def test_a_limit_passes_where_no_request_comes() -> None:
    """Of the loop's time, in the order of the limits."""

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await asyncio.Event().wait()
        ended: list[float] = []

        async def wait(seconds: float) -> None:
            await asyncio.sleep(seconds)
            ended.append(seconds)

        await asyncio.gather(*map(wait, (0.03, 0.01, 0.02)))
        assert ended == [0.01, 0.02, 0.03]

    run(main())
