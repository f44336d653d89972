"""A simulated llama-server: what of ``llama.api.LlamaServer`` the engine uses, over a Machine. No sockets, no files."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass

from llamaslot.bench.simulator.machine import Hardware, Machine
from llamaslot.core.tokens import common, count, head
from llamaslot.errors import SlotActionFailed
from llamaslot.llama.api import Progress, Props, SlotAction, SlotInfo

N_CTX = 65_536
_EVENT_EACH = 8_192  # tokens of a prefill for each event of progress


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
    is_working: bool = False


@dataclass(slots=True)
class Counts:
    """What the server was asked to do."""

    n_saves: int = 0
    n_restores: int = 0
    n_erases: int = 0
    bytes_saved: int = 0
    bytes_restored: int = 0
    n_computed: int = 0  # prompt tokens


@dataclass(eq=False)
class Answer:
    """A client's own request whose first token is there."""

    n_cache: int
    n_prompt: int
    prompt_s: float
    predicted_s: float = 0.0
    n_left: int = 0


class SimulatedServer:
    """Sent to a slot at work, or restored into one that was not erased: an AssertionError, for it is a bug."""

    url = "simulated"

    def __init__(self, loop: asyncio.AbstractEventLoop, n_slots: int, hardware: Hardware) -> None:
        self.hardware, self.machine, self.counts = hardware, Machine(loop, hardware), Counts()
        self.files: dict[str, File] = {}
        self.on_begun: Callable[[Origin], None] = lambda origin: None  # a client's own request is there
        self._loop = loop
        self._slots = [_Slot(i) for i in range(n_slots)]

    @property
    def n_slots(self) -> int:
        return len(self._slots)

    def tokens(self, slot_id: int) -> bytes:
        """What the slot really holds."""
        return self._slots[slot_id].tokens

    # -- requests ------------------------------------------------------------------------------------------------

    async def prefill(self, slot_id: int, tokens: bytes) -> AsyncGenerator[Progress]:
        """As ``LlamaServer.prefill``. Closing it early leaves in the slot what was computed."""
        slot = self._begin(slot_id)
        try:
            async with contextlib.aclosing(self._compute(slot, tokens)) as events:
                async for event in events:
                    yield event
        finally:
            slot.is_working = False

    @contextlib.asynccontextmanager
    async def run(
        self, slot_id: int, tokens: bytes, answer: bytes, origin: Origin, *, is_cold: bool = False
    ) -> AsyncIterator[Answer]:
        """A client's own request: entered with the first token; ``finish`` decodes the rest."""
        slot = self._begin(slot_id)
        self.on_begun(origin)
        if is_cold:
            slot.tokens = b""
        try:
            last = Progress(0, 0, 0, 0.0)
            async with contextlib.aclosing(self._compute(slot, tokens)) as events:
                async for event in events:
                    last = event
            slot.origin = origin
            answered = Answer(last.cache, last.total, last.seconds, n_left=count(answer) - 1)
            yield answered
            if answered.n_left == 0:
                slot.tokens = tokens + head(answer, count(answer) - 1)  # the last one is never computed
        finally:
            slot.is_working = False

    async def finish(self, slot_id: int, answered: Answer) -> None:
        """Decode the rest of the answer."""
        started = self._loop.time()
        await self.machine.decode(slot_id, answered.n_left)
        answered.predicted_s, answered.n_left = self._loop.time() - started, 0

    def _begin(self, slot_id: int) -> _Slot:
        slot = self._slots[slot_id]
        assert not slot.is_working, f"a request was sent to slot {slot_id}, which is at work"
        slot.is_working = True
        slot.n_used += 1
        return slot

    async def _compute(self, slot: _Slot, tokens: bytes) -> AsyncGenerator[Progress]:
        n = count(tokens)
        assert 0 < n < N_CTX, f"a prompt of {n} tokens"
        n_cache = min(common(slot.tokens, tokens), n - 1)
        slot.tokens = head(slot.tokens, n_cache)
        started = self._loop.time()
        yield Progress(n, n_cache, n_cache, 0.0)
        done = n_cache
        while done < n:
            upto = min(done + _EVENT_EACH, n)
            try:
                await self.machine.prefill(slot.id, done, upto)
            finally:
                reached = self.machine.reached[slot.id]
                self.counts.n_computed += reached - done
                slot.tokens = head(tokens, reached)
            done = upto
            yield Progress(n, n_cache, done, self._loop.time() - started)

    # -- slot actions --------------------------------------------------------------------------------------------

    async def save(self, slot_id: int, filename: str) -> SlotAction:
        slot = self._acted(slot_id)
        size = count(slot.tokens) * self.hardware.bytes_per_token
        seconds = self.hardware.action_s + size / self.hardware.save_bytes_per_s
        await self.machine.act(seconds)
        self.files[filename] = File(slot.tokens, slot.origin)
        self.counts.n_saves += 1
        self.counts.bytes_saved += size
        return SlotAction(count(slot.tokens), size, seconds)

    async def erase(self, slot_id: int) -> None:
        slot = self._acted(slot_id)
        await self.machine.act(self.hardware.action_s)
        slot.tokens, slot.origin = b"", None
        self.counts.n_erases += 1

    async def restore(self, slot_id: int, filename: str) -> SlotAction:
        slot = self._acted(slot_id)
        assert not slot.tokens, f"a restore into slot {slot_id}, which was not erased"
        if (file := self.files.get(filename)) is None:
            raise SlotActionFailed("no such file", 400)
        size = count(file.tokens) * self.hardware.bytes_per_token
        seconds = self.hardware.action_s + size / self.hardware.restore_bytes_per_s
        await self.machine.act(seconds)
        slot.tokens, slot.origin = file.tokens, file.origin
        self.counts.n_restores += 1
        self.counts.bytes_restored += size
        return SlotAction(count(file.tokens), size, seconds)

    def _acted(self, slot_id: int) -> _Slot:
        slot = self._slots[slot_id]
        assert not slot.is_working, f"an action was sent to slot {slot_id}, which is at work"
        return slot

    # -- questions -----------------------------------------------------------------------------------------------

    async def slots(self) -> list[SlotInfo]:
        return [
            SlotInfo(slot.id, slot.is_working, count(slot.tokens) if slot.n_used else None, slot.n_used)
            for slot in self._slots
        ]

    async def props(self) -> Props:
        return Props(len(self._slots), N_CTX, "", "simulated")
