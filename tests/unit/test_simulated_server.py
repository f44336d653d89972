"""The simulated llama-server and the proxy around it: what is told when, and what becomes of what is closed."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace

import pytest

from bench.simulator.disk import UNLIMITED, Disk
from bench.simulator.machine import Hardware
from bench.simulator.proxy import Proxy
from bench.simulator.run import LEFT
from bench.simulator.server import Origin, SimulatedServer
from bench.simulator.trace import Text, Trace, TraceRequest, Turn
from bench.simulator.users import SentRequest, Served
from bench.virtual import VirtualLoop
from llamaslot.cache.ids import count
from llamaslot.llama.answers import Progress
from llamaslot.scheduling.settings import SchedulingSettings
from llamaslot.store.snapshot_table import SnapshotTable

# A batch takes half a second at any depth; to send a request takes 0.1 s and no more for a longer one.
FLAT = Hardware(
    halved_at=1e12, prefill_tokens_per_s=1000.0, decode_tokens_per_s=50.0, batch=500, request_s=0.1,
    ids_s=0.0, text_s=0.0,
)  # fmt: skip
QUICK = replace(FLAT, request_s=0.01)
TRACE = Trace("", 1, ())


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    yield loop
    loop.close()


@functools.cache
def text(key: int, n: int) -> bytes:
    return TRACE.text(Text(key, n))


# -- the server ----------------------------------------------------------------------------------------------------


async def events(server: SimulatedServer, slot: int, tokens: bytes) -> list[Progress]:
    return [event async for event in server.prefill(slot, tokens)]


def test_a_prefill_tells_what_is_reused_before_anything_is_computed_then_each_batch(
    loop: VirtualLoop,
) -> None:
    """Counted from when its first tokens went into a batch."""
    server = SimulatedServer(loop, 2, FLAT)
    loop.run(events(server, 1, text(1, 300)))
    told = loop.run(events(server, 1, text(1, 1500)))
    assert [(event.cache, event.processed) for event in told] == [
        (300, 300), (300, 800), (300, 1300), (300, 1500)
    ]  # fmt: skip
    assert [event.seconds for event in told] == pytest.approx([0.0, 0.5, 1.0, 1.2])


def test_nothing_is_told_of_a_prompt_behind_another_one(loop: VirtualLoop) -> None:
    """Events come for those only whose tokens are in the batch."""
    server, told_at = SimulatedServer(loop, 2, FLAT), list[float]()
    started = loop.time()

    async def behind() -> None:
        async for _ in server.prefill(1, text(2, 200)):
            told_at.append(loop.time() - started)

    async def both() -> None:
        await asyncio.gather(events(server, 0, text(1, 2000)), behind())

    loop.run(both())
    assert told_at == pytest.approx([2.1, 2.3])


def test_a_longer_prompt_takes_longer_to_send(loop: VirtualLoop) -> None:
    """Also if nothing of it is to be computed: that is the price of sending a prompt in pieces."""
    server = SimulatedServer(loop, 1, replace(FLAT, ids_s=1e-5))
    loop.run(events(server, 0, text(1, 10_000)))
    started = loop.time()
    loop.run(events(server, 0, text(1, 10_000)))
    assert loop.time() - started == pytest.approx(0.1 + 0.1 + 1 / 50)


def test_a_closed_prefill_keeps_its_slot_at_work_until_it_ends(loop: VirtualLoop) -> None:
    """And keeps there what was computed meanwhile; a question is answered between two batches."""
    server = SimulatedServer(loop, 1, FLAT)
    started = loop.time()
    seen: list[tuple[float, bool, int | None]] = []

    async def close() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.7):
                await events(server, 0, text(1, 5000))
        while True:
            (info,) = await server.slots()
            seen.append((round(loop.time() - started, 3), info.is_processing, info.n_tokens))
            if not info.is_processing:
                return
            await asyncio.sleep(0.02)

    loop.run(close())
    assert seen == [(1.1, True, 0), (1.6, False, 1500)]
    assert server.counts.n_computed == 1500
    assert server.counts.n_closed == 1
    (first, *_) = loop.run(events(server, 0, text(1, 5000)))
    assert first.cache == 1500


def test_what_was_sent_but_not_read_when_its_client_left_leaves_no_trace(loop: VirtualLoop) -> None:
    """The slot is as it was."""
    server = SimulatedServer(loop, 1, FLAT)

    async def leave() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await events(server, 0, text(1, 5000))

    loop.run(leave())
    (info,) = loop.run(server.slots())
    assert not info.is_processing
    assert server.counts.n_computed == 0


# -- the proxy -----------------------------------------------------------------------------------------------------


class Stage:
    """The engine around a simulated server, and people who ask."""

    def __init__(
        self,
        loop: VirtualLoop,
        *,
        n_slots: int = 2,
        settings: SchedulingSettings | None = None,
        hardware: Hardware = QUICK,
    ) -> None:
        self.loop, self.server = loop, SimulatedServer(loop, n_slots, hardware)
        self.disk = Disk(
            self.server,
            SnapshotTable(),
            UNLIMITED,
            now=loop.time,
            on_drop=lambda snapshot: self.proxy.dropped(snapshot),
        )
        self.proxy = Proxy(loop, self.server, self.disk, settings=settings)

    async def ask(self, prompt: bytes, n_answer: int = 5, after_s: float = 0.0, key: int = 0) -> Served:
        await asyncio.sleep(after_s)
        add = (Text(1000 + key, count(prompt)),)
        request = TraceRequest(0, 0, 0.0, key, Turn.FIRST, 0, add, Text(2000 + key, n_answer))
        served = Served(request, 0)
        asked = SentRequest(served, prompt, 0, text(2000 + key, n_answer), Origin(key, 0), self.loop.time())
        await self.proxy.ask(asked)
        return served

    def run(self, *asked: Awaitable[Served]) -> list[Served]:
        async def all_of_them() -> list[Served]:
            return await asyncio.gather(*asked)

        found = self.loop.run(all_of_them())
        self.loop.run(self.proxy.close())
        self.proxy.check()
        return found


def rush(loop: VirtualLoop, settings: SchedulingSettings | None) -> tuple[Served, Served]:
    """A short question a second after a long prompt that has the lower slot."""
    stage = Stage(loop, settings=settings)
    long, short = stage.run(stage.ask(text(1, 20_000), key=1), stage.ask(text(2, 100), after_s=1.0, key=2))
    return long, short


def test_a_short_question_does_not_wait_for_a_long_prompt_in_a_lower_slot(loop: VirtualLoop) -> None:
    """As it does when prefill is left to llama-server."""
    long, short = rush(loop, None)
    left_long, left_short = rush(loop, LEFT)
    assert left_short.ttft_s > 15
    assert short.ttft_s < 2
    assert long.ttft_s < 1.35 * left_long.ttft_s


def test_a_slot_that_was_emptied_behind_its_back_is_left_for_a_snapshot(loop: VirtualLoop) -> None:
    """Nothing but the place is asked for again, and the client is told what was reused in the end."""
    stage, prompt = Stage(loop), text(1, 6000)
    stage.run(stage.ask(prompt))
    (slot,) = (slot for slot in stage.proxy.table.slots if slot.content.n_tokens == 6000)
    lease = stage.proxy.idle_save._lease(slot)
    assert lease is not None
    loop.run(stage.proxy.idle_save._save(lease))
    stage.server.lose(slot.id)
    (served,) = stage.run(stage.ask(prompt + text(3, 50)))
    assert served.n_reused == 6000
    assert stage.proxy.sample("completions_replanned_total") == 1


def test_what_is_held_nowhere_is_computed_once(loop: VirtualLoop) -> None:
    """A long prefill that was expected to find its beginning, and did not, goes on as one that computes all."""
    stage, prompt = Stage(loop), text(1, 6000)
    stage.run(stage.ask(prompt))
    n_before = stage.server.counts.n_computed
    for slot in range(stage.server.n_slots):
        stage.server.lose(slot)
    (served,) = stage.run(stage.ask(prompt + text(3, 3000)))
    assert served.n_reused == 0
    assert stage.server.counts.n_computed - n_before <= 9000 + 2 * FLAT.batch


def test_a_request_costs_a_handful_of_events(loop: VirtualLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long its prompt and its answer are, unless somebody wants to hear of each batch."""
    stage, n_timers = Stage(loop, settings=LEFT, hardware=Hardware()), 0
    call_at: Callable[..., asyncio.TimerHandle] = loop.call_at

    def counted(*args: object, **kwargs: object) -> asyncio.TimerHandle:
        nonlocal n_timers
        n_timers += 1
        return call_at(*args, **kwargs)

    monkeypatch.setattr(loop, "call_at", counted)
    (served,) = stage.run(stage.ask(text(1, 60_000), n_answer=2000))
    assert served.ttft_s > 40
    assert n_timers < 15
