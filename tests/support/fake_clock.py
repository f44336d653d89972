"""Clocks of the fake server: one that runs with the wall clock, and one that ticks by hand."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from dataclasses import dataclass
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float: ...
    async def sleep(self, seconds: float) -> None: ...


class WallClock:
    """Real time, ``scale`` times slower or faster: with 0.01, a fake second lasts 10 ms."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def now(self) -> float:
        return asyncio.get_running_loop().time() / self.scale

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds * self.scale)


class HandClock:
    """Time stands still until ``advance``. A sleep of zero seconds only lets others run."""

    def __init__(self, start: float = 1000.0) -> None:
        self._now = start
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    def now(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now + seconds, next(self._order), future))
        await future

    async def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass: sleepers wake in order, and what they do on waking happens at their own time."""
        end = self._now + seconds
        await self.settle()
        while self._sleepers and self._sleepers[0][0] <= end:
            at, _, future = heapq.heappop(self._sleepers)
            self._now = max(self._now, at)
            if not future.done():
                future.set_result(None)
                await self.settle()
        self._now = end
        await self.settle()

    async def settle(self, rounds: int = 20) -> None:
        """Let what is ready run, the sockets of the loop included."""
        for _ in range(rounds):
            await asyncio.sleep(0)


@dataclass
class Pace:
    """What the fake's work costs, in seconds of its clock. All 0: everything is done as soon as it is requested."""

    step_s: float = 0.0  # each step
    prompt_token_s: float = 0.0  # each prompt token in a step
    token_s: float = 0.0  # each decoding slot in a step
    byte_s: float = 0.0  # each byte saved or restored

    def of_step(self, n_prompt: int, n_decoding: int) -> float:
        return self.step_s + n_prompt * self.prompt_token_s + n_decoding * self.token_s
