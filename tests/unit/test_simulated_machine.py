"""The main loop of the simulated llama-server: who gets its time, and what that does to the others."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from bench.simulator.machine import Hardware, Machine, Work
from bench.virtual import VirtualLoop

# A batch takes half a second at any depth, a step without one 0.02 s.
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


async def prefill(machine: Machine, slot: int, n: int) -> None:
    await machine.until(machine.start(slot, 0, n, on_end=_ignore), math.inf)


async def answer(machine: Machine, slot: int, n: int) -> None:
    """To a prompt of one token; ``n`` tokens follow on the first."""
    await machine.until(machine.start(slot, 0, 1, n, on_end=_ignore), math.inf)


def _ignore(work: Work) -> None:
    pass


def test_streams_do_not_slow_each_other_down(loop: VirtualLoop) -> None:
    """Each step has a token for each."""
    machine = Machine(loop, FLAT)
    found = ends(loop, machine, (0, answer(machine, 0, 100)), (1, answer(machine, 1, 100)))
    assert found == pytest.approx([2.02, 3.02])
    assert machine.streamed.n_tokens == 200
    assert machine.streamed.seconds == pytest.approx(4.0)


def test_the_lowest_slot_prefills_first_when_the_batch_is_through(loop: VirtualLoop) -> None:
    """One that comes later in a lower slot goes ahead, but not into the batch that is running."""
    machine = Machine(loop, FLAT)
    found = ends(loop, machine, (0, prefill(machine, 3, 2000)), (0.6, prefill(machine, 1, 1000)))
    assert found == pytest.approx([3.0, 2.0])


def test_what_one_prompt_leaves_of_a_batch_is_filled_from_the_next(loop: VirtualLoop) -> None:
    """700 and 800 tokens are three batches, and both prompts of the second one wait for all of it."""
    machine = Machine(loop, FLAT)
    found = ends(loop, machine, (0, prefill(machine, 0, 700)), (0, prefill(machine, 1, 800)))
    assert found == pytest.approx([1.0, 1.5])


def test_a_short_prompt_waits_for_a_long_one_in_a_lower_slot(loop: VirtualLoop) -> None:
    """That is what a scheduler is for: in a higher slot it would have been through after a batch."""
    machine = Machine(loop, FLAT)
    found = ends(loop, machine, (0, prefill(machine, 1, 5000)), (0.6, prefill(machine, 2, 100)))
    assert found == pytest.approx([5.0, 5.1])
    found = ends(loop, machine, (0, prefill(machine, 1, 5000)), (0.6, prefill(machine, 0, 100)))
    assert found == pytest.approx([5.1, 1.5])


def test_beside_a_prefill_a_stream_gets_one_token_for_each_batch(loop: VirtualLoop) -> None:
    """Ten batches of half a second: ten tokens, and the other ninety at full speed after them."""
    machine = Machine(loop, FLAT)
    found = ends(loop, machine, (0, answer(machine, 0, 100)), (0.01, prefill(machine, 1, 5000)))
    assert found == pytest.approx([0.02 + 5 + 90 / 50, 5.02])
    assert machine.streamed.longest_gap_s == pytest.approx(0.5)


def test_an_answer_goes_on_in_the_step_after_its_prompt(loop: VirtualLoop) -> None:
    """Its first token comes with the last batch, the second with the next step."""
    machine = Machine(loop, FLAT)

    async def stream() -> None:
        work = machine.start(0, 0, 600, 1, on_end=_ignore)
        await machine.until(work, 600)
        assert loop.time() == pytest.approx(started + 0.6)
        await machine.until(work, math.inf)

    started = loop.time()
    assert ends(loop, machine, (0, stream())) == pytest.approx([0.62])


def test_an_action_waits_for_the_step_and_stops_everything(loop: VirtualLoop) -> None:
    """And one after the other: two of them are one stall for a stream."""
    machine = Machine(loop, FLAT)
    works = (0.0, answer(machine, 0, 100)), (1.01, machine.act(2.0)), (1.5, machine.act(3.0))
    assert ends(loop, machine, *works) == pytest.approx([7.02, 3.02, 6.02])
    assert machine.stalls.longest_s == pytest.approx(5.0)
    assert machine.stalls.stream_s == pytest.approx(5.0)
    assert machine.streamed.longest_gap_s == pytest.approx(5.02)


def test_three_actions_beside_a_prefill_wait_for_three_batches(loop: VirtualLoop) -> None:
    """Whoever sends them one after the other gets a batch in between each time."""
    machine = Machine(loop, FLAT)

    async def three() -> None:
        for _ in range(3):
            await machine.act(0.1)

    found = ends(loop, machine, (0, prefill(machine, 0, 5000)), (0.1, three()))
    assert found == pytest.approx([5.3, 1.8])


def test_a_question_is_answered_between_two_steps(loop: VirtualLoop) -> None:
    """At once by an idle server, else after the batch; it delays nobody."""
    machine = Machine(loop, FLAT)
    assert ends(loop, machine, (0, machine.between_steps())) == pytest.approx([0.0])
    works = (0, prefill(machine, 0, 2000)), (0.7, machine.between_steps()), (0.8, machine.between_steps())
    assert ends(loop, machine, *works) == pytest.approx([2.0, 1.0, 1.0])


def test_a_closed_prefill_goes_on_for_the_batch_that_runs_and_one_more(loop: VirtualLoop) -> None:
    """What it has computed by then is there; time goes to whoever is next only after that."""
    machine, reached = Machine(loop, FLAT), list[tuple[float, int]]()
    started = loop.time()

    async def closed(after_s: float, n: int) -> None:
        def note(work: Work) -> None:
            reached.append((loop.time() - started, work.at))

        work = machine.start(0, 0, n, on_end=note)
        await asyncio.sleep(after_s)
        machine.close(work)
        machine.close(work)
        await machine.until(work, math.inf)

    found = ends(loop, machine, (0, closed(0.7, 5000)), (0, prefill(machine, 1, 1000)))
    assert found == pytest.approx([1.5, 2.5])
    ((at_s, n_reached),) = reached
    assert at_s == pytest.approx(1.5)
    assert n_reached == 1500


def test_a_prefill_closed_near_its_end_is_through_anyway(loop: VirtualLoop) -> None:
    """Nothing was gained by closing it."""
    machine = Machine(loop, FLAT)

    async def closed() -> None:
        work = machine.start(0, 0, 1000, on_end=_ignore)
        await asyncio.sleep(0.2)
        machine.close(work)
        await machine.until(work, math.inf)
        assert work.at == 1000

    assert ends(loop, machine, (0, closed())) == pytest.approx([1.0])


def test_who_waits_for_some_tokens_hears_of_them_at_the_end_of_a_batch(loop: VirtualLoop) -> None:
    """Also one who begins to wait on the way."""
    machine, heard = Machine(loop, FLAT), list[tuple[float, int]]()

    async def watched() -> None:
        started = loop.time()
        work = machine.start(0, 0, 5000, on_end=_ignore)
        await machine.until(work, 0)
        for goal in (1, 501, 1700, 5000):
            await machine.until(work, goal)
            heard.append((round(loop.time() - started, 6), work.at))

    ends(loop, machine, (0, watched()))
    assert heard == [(0.5, 500), (1.0, 1000), (2.0, 2000), (5.0, 5000)]


@pytest.mark.parametrize("seed", range(5))
def test_leaps_are_no_more_than_many_steps(loop: VirtualLoop, seed: int) -> None:
    """Somebody who asks all the time has each step taken by itself: everything ends at the same time as without him."""
    rng = random.Random(seed)
    hardware = Hardware()
    plan = [
        (rng.uniform(0, 30), rng.choice(["prefill", "answer", "act"]), rng.randint(1, 9000))
        for _ in range(12)
    ]

    def run(*, is_asked: bool) -> tuple[list[float], float, int, float]:
        machine = Machine(loop, hardware)
        works: list[tuple[float, Coroutine[Any, Any, None]]] = []
        for slot, (at, kind, n) in enumerate(plan):
            match kind:
                case "prefill":
                    work = prefill(machine, slot, n)
                case "answer":
                    work = answer(machine, slot, n // 9)
                case _:
                    work = machine.act(n / 4000)
            works.append((at, work))

        async def ask() -> None:
            for _ in range(5000):
                await machine.between_steps()
                await asyncio.sleep(0.011)

        found = ends(loop, machine, *works, *([(0.0, ask())] if is_asked else []))
        streamed = machine.streamed
        return found[: len(works)], streamed.longest_gap_s, streamed.n_tokens, streamed.seconds

    found, gap_s, n_tokens, seconds = run(is_asked=True)
    expected, *streamed = run(is_asked=False)
    assert found == pytest.approx(expected)
    assert streamed == [pytest.approx(gap_s), n_tokens, pytest.approx(seconds)]


def test_a_prefill_takes_what_its_depth_takes() -> None:
    """2,000 tokens/s at the top, half of that at a depth of 40,000; ``reached`` is the inverse."""
    hardware = Hardware()
    assert hardware.prefill_s(0, 100) == pytest.approx(0.05, rel=0.01)
    assert hardware.prefill_s(40_000, 40_100) == pytest.approx(0.1, rel=0.01)
    assert hardware.reached(12_345, hardware.prefill_s(12_345, 50_000)) == pytest.approx(50_000)
