"""The simulated llama-server: who gets its time, and what that does to the others."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from llamaslot.bench.simulator.machine import Hardware, Machine
from llamaslot.bench.virtual import VirtualLoop

FLAT = Hardware(halved_at=1e12, prefill_tokens_per_s=1000.0, decode_tokens_per_s=50.0, batch=500)


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    yield loop
    loop.close()


def ends(loop: VirtualLoop, machine: Machine, *works: tuple[float, Coroutine[Any, Any, None]]) -> list[float]:
    """Each work is begun after so many seconds; when they end, counted from now."""
    started = loop.time()

    async def one(delay_s: float, work: Coroutine[Any, Any, None]) -> float:
        await asyncio.sleep(delay_s)
        await work
        return loop.time() - started

    async def all_of_them() -> list[float]:
        return await asyncio.gather(*(one(*work) for work in works))

    found = loop.run(all_of_them())
    assert machine.is_idle
    return found


def test_streams_do_not_slow_each_other_down(loop: VirtualLoop) -> None:
    """Each step has a token for each."""
    machine = Machine(loop, FLAT)
    found = ends(loop, machine, (0, machine.decode(0, 100)), (1, machine.decode(1, 100)))
    assert found == pytest.approx([2.0, 3.0])


def test_the_lowest_slot_prefills_first(loop: VirtualLoop) -> None:
    """One that comes later in a lower slot goes ahead, and the other one goes on after it."""
    machine = Machine(loop, FLAT)
    found = ends(loop, machine, (0, machine.prefill(3, 0, 2000)), (1, machine.prefill(1, 0, 1000)))
    assert found == pytest.approx([3.0, 2.0])


def test_beside_a_prefill_a_stream_gets_one_token_for_each_batch(loop: VirtualLoop) -> None:
    """Ten batches of half a second: ten tokens, and the other ninety at full speed after them."""
    machine = Machine(loop, FLAT)
    found = ends(loop, machine, (0, machine.decode(0, 100)), (0, machine.prefill(1, 0, 5000)))
    assert found == pytest.approx([5 + 90 / 50, 5.0])


def test_an_action_stops_everything(loop: VirtualLoop) -> None:
    """And one after the other: two of them are one stall for a stream."""
    machine = Machine(loop, FLAT)
    works = (0.0, machine.decode(0, 100)), (1.0, machine.act(2.0)), (1.5, machine.act(3.0))
    assert ends(loop, machine, *works) == pytest.approx([7.0, 3.0, 6.0])
    assert machine.stalls.longest_s == pytest.approx(5.0)
    assert machine.stalls.stream_s == pytest.approx(5.0)


def test_a_prefill_that_is_stopped_has_computed_its_part(loop: VirtualLoop) -> None:
    """Closing the connection leaves in the slot what was computed; time goes to whoever is next."""
    machine = Machine(loop, FLAT)

    async def stopped() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(machine.prefill(0, 0, 5000), 1.5)

    found = ends(loop, machine, (0, stopped()), (0, machine.prefill(1, 0, 1000)))
    assert machine.reached[0] == 1500
    assert found == pytest.approx([1.5, 2.5])
