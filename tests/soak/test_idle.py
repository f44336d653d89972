"""Ten thousand clients that have connected and ask nothing, or never finish asking."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from llamaslot.http.connections import raise_file_limit
from tests.support.fake import FakeServer
from tests.support.figures import Figure
from tests.support.stack import Proxy

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

N_CLIENTS = 10_000
TIMEOUT_S = 8


def resident_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


async def connect(port: int, sent: bytes) -> asyncio.Transport:
    transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, "127.0.0.1", port)
    if sent:
        transport.write(sent)
    return transport


@contextlib.asynccontextmanager
async def connected(port: int, n: int, sent: bytes = b"") -> AsyncIterator[list[asyncio.Transport]]:
    clients: list[asyncio.Transport] = []
    try:
        while len(clients) < n:
            some = min(200, n - len(clients))
            clients += await asyncio.gather(*(connect(port, sent) for _ in range(some)))
            # Answered once those before it are accepted: the kernel drops what its queue has no room for, unnoticed.
            await answer_s(f"http://127.0.0.1:{port}")
        yield clients
    finally:
        for client in clients:
            client.abort()


async def answer_s(url: str) -> float:
    began = time.monotonic()
    async with aiohttp.request(
        "POST", url + "/completion", json={"prompt": "hi", "n_predict": 2}
    ) as response:
        assert response.status == 200
        await response.read()
    return time.monotonic() - began


async def test_clients_that_ask_nothing(tmp_path: Path, figure: Figure) -> None:
    """Each takes little memory; others are served meanwhile; who has begun to ask is cut off in time."""
    raise_file_limit()
    n = min(N_CLIENTS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 500)
    settings = {"listen": {"read_timeout_s": TIMEOUT_S, "max_connections": n + 100}}
    async with FakeServer(tmp_path / "kv", slots=2) as fake:
        proxy = Proxy(fake, tmp_path / "front", quota="1GiB", settings=settings)  # type: ignore[arg-type]
        await proxy.start()
        try:
            async with asyncio.timeout(30):
                while True:
                    with contextlib.suppress(AssertionError):  # the server is not met yet
                        await answer_s(proxy.url)
                        break
                    await asyncio.sleep(0.1)
            alone_s = statistics.median([await answer_s(proxy.url) for _ in range(20)])
            before = resident_kib(proxy.pid)
            async with connected(proxy.port, n):
                async with asyncio.timeout(30):
                    among_s = statistics.median([await answer_s(proxy.url) for _ in range(20)])
                each = (resident_kib(proxy.pid) - before) / n
            figure(
                f"{n} idle clients: {each:.1f} KiB each; answers in {alone_s * 1e3:.1f} and {among_s * 1e3:.1f} ms"
            )
            assert each < 32
            after = []
            for _ in range(3):
                async with connected(proxy.port, n, b"POST /completion HTTP/1.1\r\nHost: x\r\nX: ") as slow:
                    assert (await answer_s(proxy.url)) < 5
                    async with asyncio.timeout(TIMEOUT_S + 60):
                        while not all(client.is_closing() for client in slow):  # noqa: ASYNC110  # no event for all
                            await asyncio.sleep(0.5)
                assert (await answer_s(proxy.url)) < 5
                after.append(resident_kib(proxy.pid) - before)
            figure(f"after {n} clients that never ended their header, three times: {after} KiB more")
            assert after[-1] < after[0] + 16_384, "what was taken once is used again"
        finally:
            await proxy.stop()
        assert "Traceback" not in proxy.log
