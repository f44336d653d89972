"""Which snapshots somebody came back to, and which were left behind when a conversation was edited."""

from __future__ import annotations

from typing import Any

import pytest

from bench.virtual import VirtualLoop
from llamaslot.cache.content import SnapshotKind
from llamaslot.cache.ids import head, pack
from llamaslot.scheduling.request import Request
from llamaslot.store import WithTokens
from llamaslot.store.model_snapshots import ModelSnapshots
from tests.support.house import House, tokens_of
from tests.support.stub import StubServer

SYSTEM, MINE, YOURS = pack(range(1_000)), pack(range(2_000, 6_000)), pack(range(7_000, 9_000))
EDITED = pack(range(10_000, 11_000))


def snapshot(id_: str, tokens: bytes, **more: Any) -> WithTokens:
    fields: dict[str, Any] = {"size_bytes": len(tokens), "fingerprint": "m", "checkpoints": (), **more}
    return WithTokens.of(tokens, id=id_, created_at=0.0, source="test", **fields)


def left(new: WithTokens, *there: WithTokens) -> str | None:
    """What ``new`` leaves behind of what is there."""
    library = ModelSnapshots()
    for each in (*there, new):
        library.add(each)
    return library.abandoned_by(new, similarity_min=0.85)


# -- left behind ---------------------------------------------------------------------------------------------------


def test_an_edited_message_leaves_the_old_branch_behind() -> None:
    """They share half of what was said, and with no other conversation more than the system part."""
    old, other = snapshot("old", SYSTEM + MINE), snapshot("other", SYSTEM + YOURS)
    new = snapshot("new", SYSTEM + head(MINE, 2_000) + EDITED)
    assert left(new, old, other) == "old"


def test_a_trunk_tells_what_all_begin_with() -> None:
    """With nobody else there the trunk says how far the system part goes."""
    trunk, old = snapshot("trunk", SYSTEM, kind=SnapshotKind.TRUNK), snapshot("old", SYSTEM + MINE)
    assert left(snapshot("new", SYSTEM + head(MINE, 2_000) + EDITED), trunk, old) == "old"
    assert left(snapshot("new", SYSTEM + EDITED), trunk, old) is None


def test_another_conversation_branches_no_snapshot() -> None:
    """The system part alone is no conversation."""
    others = snapshot("a", SYSTEM + MINE), snapshot("b", SYSTEM + YOURS)
    assert left(snapshot("new", SYSTEM + EDITED), *others) is None


def test_in_doubt_no_snapshot_is_branched() -> None:
    """With only one other there is no telling where the system part ends."""
    assert left(snapshot("new", SYSTEM + EDITED), snapshot("only", SYSTEM + MINE)) is None


def test_going_on_branches_no_snapshot() -> None:
    """From its end, or from within its last answer: the older one is superseded, not left."""
    old, other = snapshot("old", SYSTEM + MINE), snapshot("other", SYSTEM + YOURS)
    assert left(snapshot("new", SYSTEM + MINE + EDITED), old, other) is None
    assert left(snapshot("new", SYSTEM + head(MINE, 3_900) + EDITED), old, other) is None
    assert left(snapshot("new", SYSTEM + head(MINE, 2_000)), old, other) is None


# -- who is asked for ----------------------------------------------------------------------------------------------


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
