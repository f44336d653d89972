"""A ``StubServer`` at the pace of llama-server's main loop, and clients with long and short prompts for it.

Times are those of the virtual loop: a millisecond for each token of a prompt, 128 of them in a batch.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from bench.virtual import VirtualLoop
from llamaslot.backend.slot_table import SlotTable
from llamaslot.cache.reuse import CacheKind
from llamaslot.errors import BackendDown, UpstreamError
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.settings import PrefillSettings
from tests.support.house import SETTINGS, House, tokens_of
from tests.support.stub import Op, StubServer

TOKEN_S, BATCH = 0.001, 128
BATCH_S = TOKEN_S * BATCH
ACTION_S, DISK_S, SEND_S = 0.01, 0.005, 0.001
CHUNK_S = PrefillSettings().chunk_s


@dataclass(frozen=True, slots=True)
class Work:
    """One piece of work of the main loop: a batch (perhaps of a prompt whose client has gone) or a slot action."""

    kind: str
    slot: int
    began: float
    ended: float
    n_tokens: int

    @property
    def seconds(self) -> float:
        return self.ended - self.began


class MainLoop:
    """Does one thing at a time, to its end: slot actions first, then a batch of the lowest slot with a prompt."""

    def __init__(self, loop: VirtualLoop, server: StubServer, answer_s: float) -> None:
        self.loop, self.server, self.answer_s = loop, server, answer_s
        self.answers_s: dict[int, float] = {}  # of a slot, instead of ``answer_s``
        self.works: list[Work] = []
        self._is_busy = False
        server.pace = self._pace

    def _pace(self, op: Op) -> float | None:
        if _is_work(op):
            self._soon()
            return None
        if op.kind == "answer" and op.slot is not None:
            return self.answers_s.get(op.slot, self.answer_s)
        return DISK_S if op.kind in ("reserve", "commit", "verify") else SEND_S

    def _soon(self) -> None:
        """Go on when all ready tasks have run: what follows a batch in its slot comes before another slot's batch."""
        self.loop.call_later(1e-6, self._go_on)

    def _go_on(self) -> None:
        work = [op for op in self.server.pending if _is_work(op)]
        if self._is_busy or not work:
            return
        op = min(work, key=lambda op: (op.n_tokens > 0, op.slot))
        assert op.slot is not None
        took_s = op.n_tokens * self.server.token_s or ACTION_S
        self._is_busy = True
        self.loop.call_later(took_s, self._done, op.slot, self.server.n_boots, self.loop.time(), op.n_tokens)

    def _done(self, slot: int, n_boots: int, began: float, n_tokens: int) -> None:
        self._is_busy = False
        ops = [op for op in self.server.pending if op.slot == slot and _is_work(op)]
        if (
            ops and n_boots == self.server.n_boots
        ):  # a batch whose client has left meanwhile is a notice by now
            self.works.append(Work(ops[0].kind, slot, began, self.loop.time(), n_tokens))
            self.server.serve(ops[0])
        self._soon()

    def of(self, slot: int, since: float = 0.0) -> list[Work]:
        """The batches of ``slot`` that began at ``since`` or later."""
        return [work for work in self.works if work.slot == slot and work.n_tokens and work.began >= since]


def _is_work(op: Op) -> bool:
    return op.n_tokens > 0 or op.kind in ("save", "erase", "restore")


class Paced(House):
    """A house whose server is paced by ``main``."""

    def __init__(
        self,
        cache_kind: CacheKind = CacheKind.DENSE,
        n_slots: int = 3,
        *,
        batch: int = BATCH,
        answer_s: float = 0.5,
        room: int = 1000,
        **sharing: float,
    ) -> None:
        loop, server = VirtualLoop(), StubServer(n_slots, batch=batch, token_s=TOKEN_S, cache_kind=cache_kind)
        self.main = MainLoop(loop, server, answer_s)
        self.asked_at: dict[str, float] = {}
        super().__init__(
            loop, server, room=room, settings=replace(SETTINGS, prefill=PrefillSettings(**sharing))
        )

    @property
    def table(self) -> SlotTable:
        assert self.leases.table is not None
        return self.leases.table

    @property
    def now(self) -> float:
        return self.loop.time()

    def come(self, job: Request, answer: bytes = b"") -> asyncio.Task[Any]:
        """Start a client that asks now."""
        self.asked_at[job.id] = self.now
        return self.start(self.ask(job, answer), job.id)

    def wait(self, *clients: asyncio.Task[Any]) -> None:
        """Wait until these clients have ended."""
        self.loop.run(_gather(clients))

    def drive(self) -> None:
        """Run until all clients have ended, in whatever way."""
        if self.clients:
            self.loop.run(asyncio.wait(set(self.clients)))

    def leave(self, client: asyncio.Task[Any]) -> None:
        client.cancel()
        self.loop.settle()

    def leave_after(self, client: asyncio.Task[Any], seconds: float) -> None:
        """The client leaves after ``seconds``; its slot is abandoned."""
        self.loop.pass_time(seconds)
        self.leave(client)
        self.loop.pass_time(4.0)

    def fail_next(self, kind: str) -> None:
        (op,) = (op for op in self.server.pending if op.kind == kind)
        self.server.fail(op, BackendDown("no connection") if kind == "send" else UpstreamError(500, b"{}"))

    def until_leased(self, client: asyncio.Task[Any]) -> None:
        """Wait until ``client`` has a slot, and its prompt is computed there."""
        self.loop.pass_time(0.02)
        assert not client.done()

    def until(self, seconds: float) -> None:
        """Let time pass until ``seconds`` after the beginning of the test, which ``begin`` has set."""
        self.loop.pass_time(max(self.began + seconds - self.now, 0.0))

    def begin(self) -> None:
        self.began = self.now
        self.server.n_computed = 0
        self.server.sent.clear()
        self.main.works.clear()

    def talk(self, n: int = 1) -> None:
        """Have ``n`` conversations of 600 tokens, in the lowest slots that are free. Each gives its slot back."""
        for i in range(n):
            self.loop.run(self.ask(talk(i)))
        self.loop.pass_time(1.0)

    def __enter__(self) -> Paced:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Let all clients get to their end, and check that nothing is left. After a failure only close."""
        try:
            if kind is None:
                self.finish()
                self.check_nothing_is_left()
        finally:
            self.close()


async def _gather(clients: tuple[asyncio.Task[Any], ...]) -> None:
    await asyncio.gather(*clients)


def talk(i: int, n_more: int = 0) -> Request:
    """Conversation ``i`` of 600 tokens, and a follow-up of it that is ``n_more`` tokens longer."""
    return Request(f"talk {i} + {n_more}", tokens_of(10_000_000 + 100_000 * i, 600 + n_more))


def long(name: str, n: int, at: int = 1, **more: Any) -> Request:
    """A long prompt that has no prefix in common with another one."""
    return Request(name, tokens_of(20_000_000 + 1_000_000 * at, n), **more)


def short(name: str, at: int = 1, n: int = 100) -> Request:
    """A prompt that is computed in one batch."""
    return Request(name, tokens_of(90_000_000 + 1000 * at, n))
