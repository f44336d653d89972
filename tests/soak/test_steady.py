"""Steady load for a long time: nothing grows, and no request fails over a reload, a drain and a restart.

Half an hour, or LLAMASLOT_SOAK_S seconds; LLAMASLOT_SOAK_PAUSE_S (0.1): a client's longest pause between two. Two real
llama-servers with a tiny model; llamaslot is activated by a socket.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest

from tests.support import models
from tests.support.activated import Activated
from tests.support.figures import Figure
from tests.support.inprocess import a_session
from tests.support.real import RealServer

TOTAL_S = float(os.environ.get("LLAMASLOT_SOAK_S", "1800"))
PAUSE_S = float(os.environ.get("LLAMASLOT_SOAK_PAUSE_S", "0.1"))
pytestmark = [pytest.mark.soak, pytest.mark.real, pytest.mark.timeout(TOTAL_S + 600)]

N_CLIENTS, N_CONVERSATIONS = 6, 20
EVERY_S = 1.0
MIB = 2**20
#: What medians of the last third of a stretch may be above those of its first third. Allocators and ring buffers
#: (1,000 decisions, 2,000 requests on the page) settle in the first minutes.
MAY_GROW = {
    "rss": 8 * MIB,
    "n_files": N_CLIENTS,
    "n_tasks": N_CLIENTS,
}  # as many as work by chance


class Sample(NamedTuple):
    rss: int
    n_files: int
    n_tasks: int


class Load:
    """Clients that ask all the time, each on a fresh connection."""

    def __init__(self, url: str) -> None:
        self.url, self.is_over = url, False
        self.n_answered, self.failures = 0, list[str]()

    async def client(self, seed: int) -> None:
        rng = random.Random(seed)
        async with a_session() as session:
            while not self.is_over:
                n = rng.randrange(N_CONVERSATIONS)
                text = f"conversation {n} " * (10 + n)
                body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "stream": True}
                try:
                    await self._ask(session, body)
                except (aiohttp.ClientError, OSError, TimeoutError) as error:
                    self.failures.append(f"{time.strftime('%H:%M:%S')} {error!r}")
                await asyncio.sleep(rng.random() * PAUSE_S)

    async def _ask(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> None:
        timeout = aiohttp.ClientTimeout(total=120)
        async with session.post(self.url + "/v1/chat/completions", json=body, timeout=timeout) as answer:
            text = await answer.text()
        if answer.status != 200 or "[DONE]" not in text or '"error"' in text:
            self.failures.append(f"{time.strftime('%H:%M:%S')} {answer.status} {text[-300:]}")
        self.n_answered += 1


async def test_nothing_grows_and_no_request_fails(tmp_path: Path, figure: Figure) -> None:
    """Two stretches, before and after the restart; a reload and a drain between."""
    model = models.dense(tmp_path)
    shape: dict[str, Any] = {"slots": 2, "context": 2048, "batch": 512}
    async with (
        RealServer(model, tmp_path / "kv0", **shape) as first,
        RealServer(model, tmp_path / "kv1", **shape) as second,
    ):
        backends = [
            {"name": name, "url": server.url, "slot_save_path": str(server.save_dir)}
            for name, server in (("gpu0", first), ("gpu1", second))
        ]
        settings = {"backends": backends, "store": {"meta_dir": str(tmp_path / "meta"), "quota": "20MiB"}}
        async with Activated(tmp_path, settings) as it:
            load = Load(it.url)
            async with asyncio.TaskGroup() as group:
                for seed in range(N_CLIENTS):
                    group.create_task(load.client(seed))
                await asyncio.sleep(TOTAL_S * 0.1)
                stretches = [await _sampled(it, TOTAL_S * 0.35)]
                it.configure(queue={"max_waiting": 100})
                await it.reload()
                await _post(it, "drain?backend=gpu1")
                await asyncio.sleep(TOTAL_S * 0.05)
                await _post(it, "undrain?backend=gpu1")
                await asyncio.sleep(TOTAL_S * 0.05)
                await it.restart()
                await asyncio.sleep(TOTAL_S * 0.1)
                stretches.append(await _sampled(it, TOTAL_S * 0.35))
                load.is_over = True
            log = it.log
    figure(f"{load.n_answered} answers, {len(load.failures)} failures {load.failures[:5]}")
    grown = [_growth(samples) for samples in stretches]
    for each in grown:
        figure(f"grown: {each['rss'] / MIB:.1f} MiB, {each['n_files']:g} files, {each['n_tasks']:g} tasks")
    assert load.failures == []
    assert "Traceback" not in log
    for each in grown:
        assert {name: n for name, n in each.items() if n > MAY_GROW[name]} == {}


async def _sampled(it: Activated, seconds: float) -> list[Sample]:
    samples, ends_at = list[Sample](), time.monotonic() + seconds
    while time.monotonic() < ends_at:
        samples.append(await _sample(it))
        await asyncio.sleep(EVERY_S)
    return samples


async def _sample(it: Activated) -> Sample:
    proc = Path(f"/proc/{it.pid}")
    n_pages = int((proc / "statm").read_text().split()[1])
    async with a_session() as session, session.get(it.url + "/llamaslot/metrics") as answer:
        found = re.search(r"^llamaslot_tasks (\S+)", await answer.text(), re.M)
    assert found is not None
    return Sample(n_pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(proc / "fd")), int(float(found[1])))


def _growth(samples: list[Sample]) -> dict[str, float]:
    n = len(samples) // 3
    return {
        name: statistics.median(getattr(its, name) for its in samples[-n:])
        - statistics.median(getattr(its, name) for its in samples[:n])
        for name in Sample._fields
    }


async def _post(it: Activated, page: str) -> None:
    async with a_session() as session, session.post(f"{it.url}/llamaslot/{page}") as answer:
        assert answer.status == 200
