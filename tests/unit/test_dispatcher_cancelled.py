"""Clients that leave at each of the moments at which they can."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from bench.virtual import VirtualLoop
from llamaslot.backend.lease import Lease
from llamaslot.cache.reuse import CacheKind
from llamaslot.scheduling.request import Placement, Request, User
from llamaslot.scheduling.slots import SlotState
from tests.support.cancelled import CancelledAt
from tests.support.house import House, tokens_of
from tests.support.stub import StubServer

Cut = Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]]


def furnished(n_slots: int = 2) -> House:
    """Every slot is hot with an unsaved context of 600 tokens; each op takes 10 ms."""
    house = House(VirtualLoop(), StubServer(n_slots, pace=lambda op: 0.01))
    jobs = [Request(f"first {i}", tokens_of(10_000 * (i + 1), 600)) for i in range(n_slots)]
    house.loop.run(_all([house.ask(job) for job in jobs]))
    assert all(slot.state is SlotState.HOT for slot in house.leases.table.slots)  # type: ignore[union-attr]
    return house


async def _all(asked: list[Coroutine[Any, Any, Any]]) -> None:
    await asyncio.gather(*asked)


async def leases(house: House, cut: Cut) -> None:
    """Queued behind two others, then granted."""
    with await cut(house.dispatcher.lease(Request("a", tokens_of(1, 300)))):
        pass


async def prepares(house: House, cut: Cut) -> None:
    """Saves the victim, erases, restores, and computes the rest."""
    with await house.dispatcher.lease(Request("a", house.saved_tokens + tokens_of(1, 500))) as lease:
        assert [type(step).__name__ for step in lease.plan.steps] == ["Save", "Erase", "Restore", "PrefillTo"]  # type: ignore[union-attr]
        await cut(house.executor.prepare(lease, lambda _: None))


async def keeps_a_shared_prefix(house: House, cut: Cut) -> None:
    """Computes what others will begin with, saves it, and computes the rest: on a model that cannot go back."""
    house.leases.table.cache_kind = CacheKind.RECURRENT  # type: ignore[union-attr]
    with await house.dispatcher.lease(Request("a", tokens_of(1, 900))) as lease:
        lease.table.expect_trunk(lease.request, 500, lease.slot_id, house.loop.time())
        await cut(house.executor.prepare(lease, lambda _: None))


async def takes_unpinned(house: House, cut: Cut) -> None:
    """Waits until nobody is between two steps, saves all slots, sends, settles."""

    async def turn(lease: Lease) -> None:
        async with house.exclusive.section(lease, lambda _: None) as turn:
            async with house.server.run_unpinned(tokens_of(1, 300)):
                pass
            await turn.settle()

    with await house.dispatcher.lease(Request("a", placement=Placement.SERVER_CHOSEN)) as lease:
        await cut(turn(lease))


async def takes_two(house: House, cut: Cut) -> None:
    """The same for n = 2, from its lease to its end."""
    await cut(house.ask(Request("a", tokens_of(1, 300), n_children=1)))


async def writes_back(house: House, cut: Cut) -> None:
    """Saves what is dirty."""
    await cut(house.idle_save.save_all())


def come(house: House) -> None:
    for i in range(2):
        job = Request(f"other {i}", tokens_of(50_000 + 5000 * i, 500), user=User(f"other {i}"))
        house.start(house.ask(job), job.id)
    house.loop.settle()


@pytest.mark.parametrize("is_late", [False, True], ids=["while it waits", "as it is woken"])
@pytest.mark.parametrize(
    "scene", [leases, prepares, keeps_a_shared_prefix, takes_unpinned, takes_two, writes_back]
)
@pytest.mark.parametrize("others", ["no others", "after others", "before others"])
def test_cancelled_at_every_await_nothing_leaks(
    scene: Callable[[House, Cut], Coroutine[Any, Any, None]], is_late: bool, others: str
) -> None:
    """Whenever the client leaves, all is given back, and everybody else is served."""
    for at in itertools.count():
        house = furnished()
        try:
            house.loop.run(house.keep_one_on_disk())
            if others == "after others" or scene is leases:
                come(house)
            cuts: list[CancelledAt[Any]] = []

            def cut(
                coroutine: Coroutine[Any, Any, Any], at: int = at, cuts: list[CancelledAt[Any]] = cuts
            ) -> Awaitable[Any]:
                cuts.append(CancelledAt(coroutine, at, is_late=is_late))
                return cuts[-1]

            client = house.start(scene(house, cut), "the one who leaves")
            if others == "before others":
                come(house)
            house.finish()
            house.check_nothing_is_left()
            assert client.done()
            if not cuts[0].was_reached:
                assert at > 0 or (scene is writes_back and others == "after others"), "it awaits something"
                return
        finally:
            house.close()
