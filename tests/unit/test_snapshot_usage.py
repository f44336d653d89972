"""Which snapshots requests came back to."""

from __future__ import annotations

import pytest

from bench.virtual import VirtualLoop
from llamaslot.scheduling.request import Request
from tests.support.house import House, tokens_of
from tests.support.stub import StubServer


def test_going_on_in_a_slot_is_a_hit_of_the_snapshot_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was restored, but somebody has come back; another conversation in that slot is no hit."""
    house = House(VirtualLoop(), StubServer(1))
    hits: list[str] = []
    monkeypatch.setattr(house.catalog, "touch", hits.append)
    mine, yours = tokens_of(1_000, 500), tokens_of(5_000, 500)
    try:

        def ask(tokens: bytes) -> None:
            house.start(house.ask(Request("turn", tokens)), "turn")
            house.finish()

        ask(mine)
        house.start(house.idle_save.save_all(), "idle save")
        house.finish()
        (saved,) = house.catalog.snapshots
        assert hits == []
        ask(mine + tokens_of(2_000, 100))
        assert hits == [saved]
        ask(yours)
        assert hits == [saved]
    finally:
        house.close()


def test_what_supersedes_inherits_the_hits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved, gone on with, saved again: the conversation is no new one."""
    house = House(VirtualLoop(), StubServer(1))
    heirs: list[tuple[str, str]] = []
    monkeypatch.setattr(house.catalog, "inherit", lambda new, old: heirs.append((new, old)))
    mine = tokens_of(1_000, 500)
    try:
        for tokens in (mine, mine + tokens_of(2_000, 400)):
            house.start(house.ask(Request("turn", tokens)), "turn")
            house.finish()
            before = list(house.catalog.snapshots)
            house.start(house.idle_save.save_all(), "idle save")
            house.finish()
        (new,) = house.catalog.snapshots
        assert heirs == [(new, before[0])]
    finally:
        house.close()
