"""Who is served when: the queue, and what becomes of it when the server goes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from bench.virtual import VirtualLoop
from llamaslot.errors import (
    BackendDown,
    QueueFull,
)
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.settings import QueueLimits
from tests.support.house import House, outcome, outcome_of, tokens_of
from tests.support.stub import StubServer


@pytest.fixture
def house() -> Iterator[House]:
    """Two free slots; what is asked of the server waits until it is served."""
    house = House(VirtualLoop(), StubServer(2), limits=QueueLimits(max_waiting=2, max_wait_s=5.0))
    yield house
    house.close()


def fill(house: House) -> list[asyncio.Task[Any]]:
    """Both slots at work for strangers."""
    clients = [
        house.start(house.ask(Request(f"stranger {i}", tokens_of(9000 * (i + 1), 100))), "stranger")
        for i in (0, 1)
    ]
    house.loop.settle()
    return clients


def test_jobs_are_served_in_their_order(house: House) -> None:
    """First come, first served."""
    fill(house)
    order: list[str] = []

    async def waits(job: Request) -> None:
        with await house.dispatcher.lease(job):
            order.append(job.id)

    jobs = [Request(name, tokens_of(500 * i, 90)) for i, name in enumerate(("a", "b"), 1)]
    for job in jobs:
        house.start(waits(job), job.id)
        house.loop.settle()
    assert [house.dispatcher.position(job) for job in jobs] == [1, 2]
    house.finish()
    assert order == ["a", "b"]
    assert [house.dispatcher.position(job) for job in jobs] == [0, 0]
    house.check_nothing_is_left()


def test_who_comes_when_too_many_wait_is_sent_away(house: House) -> None:
    """503 at once, with a time to come again."""
    fill(house)
    waiting = [house.start(house.dispatcher.lease(Request(f"w{i}")), "waits") for i in range(2)]
    late = house.start(house.dispatcher.lease(Request("late")), "late")
    house.loop.settle()
    error = outcome(late)
    assert isinstance(error, QueueFull)
    assert error.status == 503
    assert error.retry_after_s
    assert not any(task.done() for task in waiting)
    for task in waiting:
        task.cancel()
    house.finish()
    house.check_nothing_is_left()


def test_a_request_that_need_not_wait_is_served_though_none_may_wait(house: House) -> None:
    """``max_waiting`` limits those who wait, not those who are served at once."""
    house.dispatcher.queue.limits = QueueLimits(max_waiting=0)
    client = house.start(house.ask(Request("a", tokens_of(1, 90))), "a")
    house.finish()
    assert outcome(client) is None


def test_who_has_waited_too_long_is_sent_away(house: House) -> None:
    """And leaves the queue."""
    fill(house)
    client = house.start(house.dispatcher.lease(Request("a")), "a")
    house.loop.pass_time(4.9)
    assert not client.done()
    house.loop.pass_time(0.2)
    assert isinstance(outcome(client), QueueFull)
    house.finish()
    house.check_nothing_is_left()


def test_a_request_that_waits_for_one_slot_blocks_no_other(house: House) -> None:
    """A follow-up waits for its own slot; a stranger who comes later takes the free one."""
    own = tokens_of(1, 5000)
    house.server.token_s = 1.0
    house.start(house.ask(Request("first", own)), "first")
    while not any(op.kind == "answer" for op in house.server.pending):
        house.loop.settle()
        house.server.serve(house.server.pending[0])
        house.loop.settle()
    follows = house.start(house.ask(Request("follows", own + tokens_of(7000, 5))), "follows")
    house.loop.settle()
    assert house.dispatcher.n_waiting == 1
    house.start(house.ask(Request("stranger", tokens_of(9000, 90))), "stranger")
    house.loop.settle()
    table = house.leases.table
    assert table is not None
    assert sorted(slot.leased_by or "" for slot in table.slots) == ["first", "stranger"]
    house.finish()
    assert outcome_of(follows) == 5000
    house.check_nothing_is_left()


def test_those_who_wait_are_told_when_the_server_is_down(house: House) -> None:
    """At once; and so is who comes later, until it is back."""
    fill(house)
    waits = house.start(house.dispatcher.lease(Request("waits")), "waits")
    house.loop.settle()
    house.restart()
    house.notice(is_down=True)
    house.loop.settle()
    late = house.start(house.dispatcher.lease(Request("late")), "late")
    house.loop.settle()
    assert isinstance(outcome(waits), BackendDown)
    assert isinstance(outcome(late), BackendDown)
    house.loop.run(house.meet())
    again = house.start(house.ask(Request("again", tokens_of(1, 90))), "again")
    house.finish()
    assert outcome(again) is None
    house.check_nothing_is_left()


def test_those_who_wait_go_on_waiting_while_a_restarted_server_is_met(house: House) -> None:
    """They get a slot of the new process."""
    fill(house)
    waits = house.start(house.ask(Request("waits", tokens_of(1, 90))), "waits")
    house.loop.settle()
    house.restart()
    house.notice(is_down=False)
    house.loop.settle()
    assert not waits.done()
    house.loop.run(house.meet())
    house.finish()
    assert outcome(waits) is None
    house.check_nothing_is_left()
