"""A simulated llama-server: what of ``llama.client.LlamaServer`` the engine uses, over a Machine. No sockets, no
files."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass

from bench.simulator.machine import Hardware, Machine, Work
from llamaslot.cache.ids import common, count, head
from llamaslot.errors import SlotActionFailed
from llamaslot.llama.answers import Progress, Props, SlotAction, SlotInfo

N_CTX = 65_536


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose context it is: after which of its requests, counted from 0, of which conversation."""

    conversation: int
    index: int


@dataclass(frozen=True, slots=True)
class File:
    tokens: bytes
    origin: Origin | None


@dataclass(slots=True, eq=False)
class _Slot:
    id: int
    tokens: bytes = b""
    origin: Origin | None = None
    n_used: int = 0
    is_working: bool = False  # also after its connection was closed, until the server is through with it


@dataclass(slots=True)
class Counts:
    """What the server was asked to do. ``n_prefills``: without an answer; ``n_closed`` of them on the way."""

    n_saves: int = 0
    n_restores: int = 0
    n_erases: int = 0
    bytes_saved: int = 0
    bytes_restored: int = 0
    n_computed: int = 0  # prompt tokens
    n_prefills: int = 0
    n_closed: int = 0


@dataclass(eq=False)
class Answer:
    """A client's own request that has begun."""

    n_cache: int
    n_prompt: int
    work: Work
    begun_at: float
    prompt_s: float = 0.0
    predicted_s: float = 0.0


class SimulatedServer:
    """Sent to a slot at work, or restored into one that was not erased: an AssertionError, for it is a bug."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        n_slots: int,
        hardware: Hardware,
        url: str = "simulated",
        files: dict[str, File] | None = None,
    ) -> None:
        """``files``: those of a directory that it shares with other servers."""
        self.url = url
        self.hardware = hardware
        self.machine = Machine(loop, hardware)
        self.counts = Counts()
        self.files: dict[str, File] = {} if files is None else files
        self.on_begun: Callable[[Origin], None] = lambda origin: None  # a client's own request is there
        self._loop = loop
        self._slots = [_Slot(i) for i in range(n_slots)]

    @property
    def n_slots(self) -> int:
        return len(self._slots)

    def tokens(self, slot_id: int) -> bytes:
        """What the slot really holds."""
        return self._slots[slot_id].tokens

    def lose(self, slot_id: int) -> None:
        """The slot is emptied without notice, like a restart that cannot be seen."""
        self._slots[slot_id].tokens = b""

    # -- requests ------------------------------------------------------------------------------------------------

    async def prefill(
        self, slot_id: int, tokens: bytes, lora: str = "", written: bytes | None = None
    ) -> AsyncGenerator[Progress]:
        """As ``LlamaServer.prefill``: an event when it begins and one for each batch. Closed early it goes on for up to
        two batches, and what was computed stays in the slot."""
        self.counts.n_prefills += 1
        n = count(tokens)
        async with self._sent(slot_id, tokens, b"", self.hardware.ids_s) as (work, n_cache):
            await self.machine.until(work, 0)
            begun_at = self._loop.time()
            yield Progress(n, n_cache, n_cache, 0.0)
            while work.at < n:
                await self.machine.until(work, work.at + 1)
                yield Progress(n, n_cache, work.at, self._loop.time() - begun_at)

    @contextlib.asynccontextmanager
    async def run(
        self, slot_id: int, tokens: bytes, answer: bytes, origin: Origin, *, no_cache: bool = False
    ) -> AsyncIterator[Answer]:
        """A client's own request: entered when it begins, with what is reused; then ``first`` and ``finish``."""
        self.on_begun(origin)
        slot = self._slots[slot_id]
        if no_cache:
            slot.tokens = b""
        async with self._sent(slot_id, tokens, answer, self.hardware.text_s) as (work, n_cache):
            await self.machine.until(work, 0)
            slot.origin = origin
            yield Answer(n_cache, count(tokens), work, self._loop.time())

    async def first(self, answered: Answer) -> None:
        """Wait for the first token."""
        await self.machine.until(answered.work, answered.n_prompt)
        answered.prompt_s = self._loop.time() - answered.begun_at

    async def finish(self, answered: Answer) -> None:
        """Wait for the rest of the answer."""
        started = self._loop.time()
        await self.machine.until(answered.work, math.inf)
        answered.predicted_s = self._loop.time() - started

    @contextlib.asynccontextmanager
    async def _sent(
        self, slot_id: int, tokens: bytes, answer: bytes, s_per_token: float
    ) -> AsyncIterator[tuple[Work, int]]:
        """The request in its slot, and how much is reused. Leaving closes the connection."""
        slot, n = self._slots[slot_id], count(tokens)
        assert not slot.is_working, f"a request was sent to slot {slot_id}, which is at work"
        assert 0 < n < N_CTX, f"a prompt of {n} tokens"
        slot.is_working = True
        slot.n_used += 1
        try:
            await asyncio.sleep(self.hardware.request_s + n * s_per_token)
        except asyncio.CancelledError:
            slot.is_working = False
            raise
        n_cache = min(common(slot.tokens, tokens), n - 1)
        slot.tokens = head(slot.tokens, n_cache)
        n_answer = max(count(answer) - 1, 0)

        def end(work: Work) -> None:
            self.counts.n_computed += work.at - n_cache
            # The last token of an answer is never computed.
            slot.tokens = head(tokens, work.at) + head(answer, n_answer - work.n_left if work.at == n else 0)
            slot.is_working = False

        work = self.machine.start(slot_id, n_cache, n, n_answer, on_end=end)
        try:
            yield work, n_cache
        finally:
            if not work.is_over:
                self.counts.n_closed += 1
                self.machine.close(work)

    # -- slot actions --------------------------------------------------------------------------------------------

    async def save(self, slot_id: int, filename: str) -> SlotAction:
        slot = self._acted(slot_id)
        size = count(slot.tokens) * self.hardware.bytes_per_token
        seconds = self.hardware.action_s + size / self.hardware.save_bytes_per_s
        await self._act(seconds)
        self.files[filename] = File(slot.tokens, slot.origin)
        self.counts.n_saves += 1
        self.counts.bytes_saved += size
        return SlotAction(count(slot.tokens), size, seconds)

    async def erase(self, slot_id: int) -> None:
        slot = self._acted(slot_id)
        await self._act(self.hardware.erase_s)
        slot.tokens, slot.origin = b"", None
        self.counts.n_erases += 1

    async def restore(self, slot_id: int, filename: str) -> SlotAction:
        slot = self._acted(slot_id)
        assert not slot.tokens, f"a restore into slot {slot_id}, which was not erased"
        if (file := self.files.get(filename)) is None:
            raise SlotActionFailed("no such file", 400)
        size = count(file.tokens) * self.hardware.bytes_per_token
        seconds = self.hardware.action_s + size / self.hardware.restore_bytes_per_s
        await self._act(seconds)
        slot.tokens, slot.origin = file.tokens, file.origin
        self.counts.n_restores += 1
        self.counts.bytes_restored += size
        return SlotAction(count(file.tokens), size, seconds)

    def _acted(self, slot_id: int) -> _Slot:
        slot = self._slots[slot_id]
        assert not slot.is_working, f"an action was sent to slot {slot_id}, which is at work"
        return slot

    async def _act(self, seconds: float) -> None:
        await asyncio.sleep(self.hardware.request_s)
        await self.machine.act(seconds)

    # -- questions -----------------------------------------------------------------------------------------------

    async def slots(self) -> list[SlotInfo]:
        """Answered between two steps."""
        await asyncio.sleep(self.hardware.request_s)
        await self.machine.between_steps()
        return [
            SlotInfo(slot.id, slot.is_working, count(slot.tokens) if slot.n_used else None, slot.n_used)
            for slot in self._slots
        ]

    async def props(self) -> Props:
        return Props(len(self._slots), N_CTX, "", "simulated")
