"""The rules of the prototype that llamaslot grew out of, as something to compare with.

A prompt is a list of blocks (of 64 tokens here; words there), known by their hashes. A slot, or a file, matches if at
least 85 % of the blocks that it holds are how the prompt begins; the longest match wins, slots before files. Without a
slot that matches: a free one, else a cold one (of a small context), else the one used longest ago; then the best file
is restored into it. Each answer is saved when it is complete, if it is not small. On disk the oldest goes first, and
nothing is superseded. Small prompts do not take a large slot as long as there is another.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from bench.simulator.disk import FINGERPRINT, Disk
from bench.simulator.server import SimulatedServer
from bench.simulator.users import SentRequest
from llamaslot.cache.ids import common, count
from llamaslot.cache.prefix_index import PrefixIndex
from llamaslot.store import QuotaExceeded, SavedSlot, Snapshot
from llamaslot.tasks import TaskOwner

BLOCK = 64
SIMILARITY = 0.85
SMALL = 1_024


@dataclass(slots=True, eq=False)
class _Slot:
    id: int
    prompt: bytes = b""
    is_busy: bool = False
    used_at: float = 0.0

    @property
    def is_small(self) -> bool:
        return count(self.prompt) < SMALL


class Original:
    """Serves requests first come first served; a match is only looked for among idle slots."""

    def __init__(self, loop: asyncio.AbstractEventLoop, server: SimulatedServer, disk: Disk) -> None:
        self.server, self.disk, self.tasks = server, disk, TaskOwner()
        self._loop = loop
        self._slots = [_Slot(i) for i in range(server.n_slots)]
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._files: PrefixIndex[str] = PrefixIndex()

    def dropped(self, snapshot: Snapshot) -> None:
        self._files.drop(snapshot.id)

    async def run(self) -> None:
        """Nothing goes on besmall requests."""

    async def ask(self, asked: SentRequest) -> None:
        """One request."""
        served, slot = asked.served, await self._slot(asked)
        served.queued_s = self._loop.time() - asked.sent_at
        await self._fill(slot, asked.prompt)
        async with self.server.run(slot.id, asked.prompt, asked.answer, asked.origin) as answered:
            await self.server.first(answered)
            served.ttft_s = self._loop.time() - asked.sent_at
            await self.server.finish(answered)
        served.n_reused, served.answer_s = answered.n_cache, answered.predicted_s
        slot.prompt = asked.prompt
        self.tasks.spawn(self._save(slot), f"slot {slot.id} is saved")

    async def _slot(self, asked: SentRequest) -> _Slot:
        while all(slot.is_busy for slot in self._slots):
            waiting = self._loop.create_future()
            self._waiting.append(waiting)
            await waiting
        idle = [slot for slot in self._slots if not slot.is_busy]
        matches = [(n, slot) for slot in idle if (n := _matching(slot.prompt, asked.prompt))]
        if matches:
            slot = max(matches, key=lambda match: match[0])[1]
        else:
            slot = min(idle, key=lambda slot: (bool(slot.prompt), not slot.is_small, slot.used_at))
        slot.is_busy = True
        return slot

    async def _fill(self, slot: _Slot, prompt: bytes) -> None:
        """Restore the best file, if there is one that is better than what the slot holds."""
        if _matching(slot.prompt, prompt):
            return
        best, n_best = "", 0
        for hit in self._files.match(prompt, 64):
            if _is_match(hit.n_shared, hit.n_tokens) and hit.n_shared > n_best:
                best, n_best = hit.holder, hit.n_shared
        if not best:
            return
        with self.disk.pin(best) as snapshot:
            await self.server.erase(slot.id)
            await self.server.restore(slot.id, snapshot.file_name)
        self.disk.touch(best)

    async def _save(self, slot: _Slot) -> None:
        try:
            if not slot.is_small:
                size = count(self.server.tokens(slot.id)) * self.server.hardware.bytes_per_token
                reservation = await self.disk.reserve(size)
                result = await self.server.save(slot.id, reservation.part_name)
                saved = SavedSlot(
                    tokens_expected=slot.prompt,
                    n_saved=result.n_tokens,
                    n_written=result.n_bytes,
                    fingerprint=FINGERPRINT,
                    checkpoints=(),
                    source="",
                )
                snapshot = await self.disk.commit(reservation, saved)
                self._files.insert(snapshot.id, slot.prompt)
        except QuotaExceeded:
            pass
        finally:
            slot.is_busy, slot.used_at = False, self._loop.time()
            while self._waiting:
                waiting = self._waiting.popleft()
                if not waiting.done():
                    waiting.set_result(None)
                    break

    async def close(self) -> None:
        while len(self.tasks):
            await self.tasks.all_ended()

    def check(self) -> None:
        """Raise AssertionError with the name of the invariant that does not hold after the last request."""
        self.disk.check()
        assert not any(slot.is_busy for slot in self._slots), "no slot is busy"
        assert not self._waiting, "no request waits"


def _is_match(n_shared: int, n_held: int) -> bool:
    blocks = n_held // BLOCK
    return blocks > 0 and n_shared // BLOCK >= SIMILARITY * blocks


def _matching(held: bytes, prompt: bytes) -> int:
    """Blocks in common, 0 for no match."""
    n_shared = common(held, prompt)
    return n_shared // BLOCK if _is_match(n_shared, count(held)) else 0
