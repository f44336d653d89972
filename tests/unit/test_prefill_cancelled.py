"""Clients with long prompts that leave at each of the moments at which they can."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from msgspec.structs import replace

from llamaslot.cache.reuse import CacheKind
from llamaslot.scheduling.request import Placement, Request
from llamaslot.scheduling.settings import PrefillSettings
from tests.support.cancelled import CancelledAt
from tests.support.house import tokens_of
from tests.support.mainloop import Paced, long, short

Asks = Coroutine[Any, Any, Any]
COMMON = tokens_of(1, 512)


async def later(seconds: float, asks: Asks) -> None:
    await asyncio.sleep(seconds)
    await asks


def alone(house: Paced) -> Asks:
    """A few chunks, one after the other."""
    return house.ask(long("leaves", 700, 1))


def behind_another(house: Paced) -> Asks:
    """Waits for its turn, has it, and is passed by somebody with less left."""
    house.come(long("another", 400, 2))
    house.start(later(0.6, house.ask(long("passes", 250, 3))), "passes")
    return house.ask(long("leaves", 900, 1))


def beside_a_stream(house: Paced) -> Asks:
    """Pauses after each chunk."""
    house.main.answer_s = 2.0
    house.come(short("stream"))
    house.loop.pass_time(0.2)
    return house.ask(long("leaves", 900, 1))


def beside_short_ones(house: Paced) -> Asks:
    """Is held back, goes on by right, and is interrupted."""
    for i in range(5):
        house.start(later(0.2 + 0.15 * i, house.ask(short(f"short {i}", i, 150))), f"short {i}")
    return house.ask(long("leaves", 900, 1))


def makes_a_trunk(house: Paced) -> Asks:
    """Is asked on the way to keep what another begins with."""
    house.start(
        later(0.1, house.ask(Request("begins alike", COMMON + tokens_of(50_000, 300)))), "begins alike"
    )
    return house.ask(Request("leaves", COMMON + tokens_of(60_000, 600)))


def waits_for_a_trunk(house: Paced) -> Asks:
    """Of somebody who makes it."""
    house.come(Request("maker", COMMON + tokens_of(50_000, 300)))
    house.loop.settle()
    return house.ask(Request("leaves", COMMON + tokens_of(60_000, 300)))


def is_misplaced(house: Paced) -> Asks:
    """Finds its slot empty, and is restored in another attempt."""
    house.loop.run(house.ask(Request("first", COMMON + tokens_of(60_000, 300))))
    house.loop.run(house.idle_save.save_all())
    house.server.slots_[0].tokens = b""
    house.server.slots_[0].checkpoints = ()
    return house.ask(Request("leaves", COMMON + tokens_of(60_000, 600)))


def makes_room(house: Paced) -> Asks:
    """For a request that chooses its slot, and comes back."""
    house.server.batch = 4096
    house.table.settings = replace(house.table.settings, prefill=PrefillSettings(chunk_s=4.0))
    asks = house.ask_unpinned(Request("turn", placement=Placement.SERVER_CHOSEN), tokens_of(70_000, 70))
    house.start(later(0.5, asks), "turn")
    return house.ask(long("leaves", 16_000, 1))


SCENES = [alone, behind_another, beside_a_stream, beside_short_ones, makes_a_trunk]
SCENES += [waits_for_a_trunk, is_misplaced, makes_room]


#: Each scene on each kind of model, and on one of them also as it is woken.
CASES = [(scene, cache_kind, False) for scene in SCENES for cache_kind in CacheKind]
CASES += [
    (scene, cache_kind, True) for scene, cache_kind in zip(SCENES, itertools.cycle(CacheKind), strict=False)
]


@pytest.mark.parametrize(("scene", "cache_kind", "is_late"), CASES)
def test_cancelled_at_every_await_nothing_leaks(
    scene: Callable[[Paced], Asks], cache_kind: CacheKind, is_late: bool
) -> None:
    """Whenever the client leaves, its slot comes back, holding what is believed of it, and everybody else is served."""
    for at in itertools.count():
        with Paced(cache_kind, 3, answer_s=0.01, decode_share=0.5, max_yield_s=0.4) as house:
            cut: CancelledAt[Any] = CancelledAt(scene(house), at, is_late=is_late)
            client = house.start(_await(cut), "the one who leaves")
            others = [one for one in house.clients if one is not client]
            house.drive()
            house.finish()
            assert client.done()
            assert all(other.exception() is None for other in others), "everybody else is served"
            house.check_nothing_is_left()
            if not cut.was_reached:
                assert at > 5, "it awaits something"
                return


async def _await(cut: CancelledAt[Any]) -> Any:
    return await cut
