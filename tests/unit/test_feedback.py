"""What is learned at the end of an answer: snapshots that do not deliver, and what their files lack."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator

import pytest

from bench.virtual import VirtualLoop
from llamaslot.cache.ids import count
from llamaslot.scheduling.request import Request
from tests.support.house import House, tokens_of
from tests.support.stub import StubServer

MINE, OTHER = tokens_of(0, 600), tokens_of(50_000, 600)
fresh = itertools.count(100_000, 1000)


@pytest.fixture
def house() -> Iterator[House]:
    """One slot, and a server that serves at once."""
    house = House(VirtualLoop(), StubServer(1, pace=lambda op: 0.01))
    assert house.leases.table is not None
    house.leases.table.is_cache_kind_sure = True
    yield house
    house.close()


def ask(house: House, tokens: bytes, name: str = "job") -> int:
    client = house.start(house.ask(Request(name, tokens)), name)
    house.finish()
    reused: int = client.result()
    return reused


def on_disk_only(house: House) -> str:
    """``MINE`` is on disk, another context in the slot; its snapshot."""
    ask(house, MINE)
    ask(house, OTHER)
    (snapshot,) = [id_ for id_, one in house.catalog.snapshots.items() if one.tokens == MINE]
    return snapshot


def parted(first: int) -> bytes:
    """``MINE`` but for its last ten tokens, and others from ``first`` on."""
    return MINE[: 4 * 590] + tokens_of(first, 30)


def displace(house: House) -> None:
    """Another context in the slot, one that nobody knows. What was there is not saved, and so replaces nothing."""
    table = house.leases.table
    assert table is not None
    table.can_save = False
    ask(house, tokens_of(next(fresh), 600))
    table.can_save = True


def ended(first: int) -> bytes:
    """``MINE`` but for its last two tokens, which are behind its checkpoint."""
    return MINE[: 4 * 598] + tokens_of(first, 30)


def spoil(house: House, snapshot: str) -> None:
    """Its file brings something else than its header says."""
    house.server.files[f"{snapshot}.kv"] = tokens_of(70_000, count(MINE))


def test_a_snapshot_that_fails_once_is_kept(house: House) -> None:
    """It may have been an accident: a stranger in the slot."""
    snapshot = on_disk_only(house)
    whole = house.server.files[f"{snapshot}.kv"]
    spoil(house, snapshot)
    assert ask(house, parted(90_000)) == 0
    assert snapshot in house.catalog.snapshots
    house.server.files[f"{snapshot}.kv"] = whole
    ask(house, OTHER)
    assert ask(house, parted(80_000)) == 590


def test_a_snapshot_that_fails_twice_is_dropped(house: House, caplog: pytest.LogCaptureFixture) -> None:
    """From disk, with one line, and counted."""
    snapshot = on_disk_only(house)
    spoil(house, snapshot)
    for first in (90_000, 80_000):
        assert ask(house, parted(first)) == 0
        displace(house)
    assert snapshot not in house.catalog.snapshots
    assert f"{snapshot}.kv" not in house.server.files
    lines = [record for record in caplog.records if "twice in a row less" in record.getMessage()]
    assert [record.levelno for record in lines] == [logging.WARNING]
    assert house.metrics.retired._value.get() == 1
    house.check_nothing_is_left()


def test_what_the_prompts_do_not_share_is_no_failure(house: House) -> None:
    """A snapshot of which the first half is used, as predicted, delivers."""
    snapshot = on_disk_only(house)
    for first in (90_000, 80_000, 70_000):
        assert ask(house, MINE[: 4 * 300] + tokens_of(first, 20)) == 300
        ask(house, OTHER)
    assert snapshot in house.catalog.snapshots
