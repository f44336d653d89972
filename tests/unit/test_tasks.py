"""Bells: everybody who waits is woken, and nobody is left behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest

from bench.virtual import VirtualLoop
from llamaslot.tasks import ChangeEvent


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    yield loop
    loop.close()


def test_a_bell_wakes_all_who_wait(loop: VirtualLoop) -> None:
    """Each of them, at once and not by a timer; it says nothing about the time before."""
    changes = ChangeEvent()
    changes.notify()
    waiting = [loop.create_task(changes.wait(seconds)) for seconds in (None, 5.0, 500.0)]
    loop.settle()
    assert not any(task.done() for task in waiting)
    began = loop.time()
    changes.notify()
    loop.run(asyncio.wait(waiting))
    assert loop.time() == began
    assert not changes._waiting


def test_who_waits_for_some_time_only_is_woken_by_that(loop: VirtualLoop) -> None:
    """Nobody has rung; the others wait on."""
    changes = ChangeEvent()
    waits = loop.create_task(changes.wait())
    began = loop.time()
    loop.run(changes.wait(2.5))
    assert loop.time() == pytest.approx(began + 2.5)
    assert not waits.done()
    changes.notify()
    loop.run_until_complete(waits)


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e-12])
def test_to_listen_lets_others_run(loop: VirtualLoop, seconds: float) -> None:
    """However short: a loop that asks again and again would keep a whole service still."""
    changes, ran = ChangeEvent(), []

    async def listens() -> None:
        for _ in range(3):
            await changes.wait(seconds)
            ran.append("listener")

    async def others() -> None:
        for _ in range(3):
            await asyncio.sleep(0)
            ran.append("other")

    async def both() -> None:
        await asyncio.gather(listens(), others())

    loop.run(both())
    assert ran.index("other") < 3
    assert ran.count("other") == 3


def test_a_bell_that_rings_all_the_time_lets_others_run(loop: VirtualLoop) -> None:
    """Whoever rings in answer to a ring listens anew each time."""
    changes, n_heard = ChangeEvent(), 0

    async def answers() -> None:
        nonlocal n_heard
        while True:
            await changes.wait(10.0)
            n_heard += 1
            changes.notify()

    task = loop.create_task(answers())
    loop.settle()
    changes.notify()
    loop.pass_time(25.0)
    assert n_heard == 3, "its own ring was before it listened again"
    task.cancel()
    loop.settle()
    assert not changes._waiting


@pytest.mark.parametrize("is_rung", [False, True], ids=["before it rings", "as it rings"])
def test_who_is_cancelled_leaves_nothing(loop: VirtualLoop, is_rung: bool) -> None:
    """And is cancelled indeed, also in the same breath."""
    changes = ChangeEvent()
    waiting = [loop.create_task(changes.wait(seconds)) for seconds in (None, 7.0)]
    loop.settle()
    if is_rung:
        changes.notify()
    for task in waiting:
        task.cancel()
    loop.settle()
    assert all(task.cancelled() for task in waiting)
    assert not changes._waiting
    changes.notify()
    loop.pass_time(10.0)


def test_a_call_is_made_at_each_ring_while_it_lasts(loop: VirtualLoop) -> None:
    """At once, before anybody is woken; then what was there before is there again, whatever has happened."""
    changes, calls = ChangeEvent(), []
    with changes.subscribed(lambda: calls.append("outer")):
        changes.notify()
        with contextlib.suppress(KeyError), changes.subscribed(lambda: calls.append("inner")):
            changes.notify()
            raise KeyError
        changes.notify()
    changes.notify()
    assert calls == ["outer", "outer", "inner", "outer"]
    assert not changes._calls


def test_a_call_may_end_another_and_begin_one() -> None:
    """While the bell rings: each one is called once for it."""
    changes, calls = ChangeEvent(), []
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(changes.subscribed(lambda: calls.append("first")))

        def ends() -> None:
            calls.append("ends")
            first.close()
            second.enter_context(changes.subscribed(lambda: calls.append("begun")))

        with changes.subscribed(ends):
            changes.notify()
        assert calls == ["first", "ends"]
        changes.notify()
        assert calls == ["first", "ends", "begun"]
    assert not changes._calls


def test_the_same_call_twice_is_ended_one_by_one() -> None:
    """Two chunks of one backend, one after the other: the end of the first leaves the second its own."""
    changes, calls = ChangeEvent(), []

    def call() -> None:
        calls.append(1)

    with changes.subscribed(call):
        with changes.subscribed(call):
            changes.notify()
        changes.notify()
    assert len(calls) == 3
    assert not changes._calls
