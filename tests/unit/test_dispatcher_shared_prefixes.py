"""Trunks, from the first conversation that makes one to those that begin with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from bench.virtual import VirtualLoop
from llamaslot.backend.slot_table import SlotTable
from llamaslot.cache.content import SnapshotKind
from llamaslot.cache.ids import head
from llamaslot.cache.reuse import CacheKind
from llamaslot.errors import SlotActionFailed
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.slots import SlotState
from llamaslot.store import Snapshot
from llamaslot.store.giving_out import Given
from tests.support.house import House, tokens_of
from tests.support.stub import StubServer

N = 1000
SYSTEM = tokens_of(1, N)


def opening(user: int, n_own: int = 300) -> Request:
    """The first turn of a conversation: the system prompt, and a question of its own."""
    return Request(f"user {user}", SYSTEM + tokens_of(10_000 * user, n_own), n_system=N)


def house_of(cache_kind: CacheKind, n_slots: int = 3, room: int = 1000) -> House:
    house = House(VirtualLoop(), StubServer(n_slots, pace=lambda op: 0.01), room=room)
    house.cache_kind = table_of(house).cache_kind = cache_kind
    return house


def table_of(house: House) -> SlotTable:
    assert house.leases.table is not None
    return house.leases.table


def trunks(house: House) -> list[Snapshot]:
    return [snapshot for snapshot in house.catalog.snapshots.values() if snapshot.kind is SnapshotKind.TRUNK]


@pytest.fixture(params=[CacheKind.RECURRENT, CacheKind.SWA])
def house(request: pytest.FixtureRequest) -> Iterator[House]:
    """Of a model that cannot go back; everything takes 10 ms."""
    house = house_of(request.param)
    yield house
    house.finish()
    house.check_nothing_is_left()
    house.close()


def test_the_first_conversation_makes_the_trunk(house: House) -> None:
    """It ends exactly where the system part does, and nothing was computed twice for it."""
    house.loop.run(house.ask(opening(1)))
    (trunk,) = trunks(house)
    assert trunk.n_tokens == N
    assert house.server.files[trunk.file_name] == SYSTEM
    assert house.server.n_computed <= N + 300 + 2  # the first token after a stop is asked for by the next


def test_the_next_conversation_begins_with_it(house: House) -> None:
    """All of it but what a sliding window needs again."""
    house.loop.run(house.ask(opening(1)))
    assert house.loop.run(house.ask(opening(2))) >= N - 5


def test_one_that_is_there_is_not_made_again(house: House) -> None:
    """Nor while it goes on, or when others begin."""
    for user in (1, 2, 3, 4):
        house.loop.run(house.ask(opening(user)))
    assert len(trunks(house)) == 1


def test_two_that_arrive_together_make_one(house: House) -> None:
    """The second waits for what the first computes, and computes its own part only."""

    async def both() -> tuple[int, int]:
        return await asyncio.gather(house.ask(opening(1)), house.ask(opening(2)))

    reused = house.loop.run(both())
    assert len(trunks(house)) == 1
    assert min(reused) == 0
    assert max(reused) >= N - 5
    assert house.server.n_computed <= N + 2 * 300 + 20


def test_the_conversation_goes_on_as_one_of_its_own(house: House) -> None:
    """Its slot is as unsaved as if there were no trunk; once it is saved, the trunk stays."""
    house.loop.run(house.ask(opening(1)))
    (slot,) = (slot for slot in table_of(house).slots if slot.state is SlotState.HOT)
    assert slot.content.is_dirty
    assert slot.content.snapshot is None
    assert house.loop.run(house.idle_save.save_all()) == 1
    assert sorted(snapshot.n_tokens for snapshot in house.catalog.snapshots.values()) == [N, N + 300]


def test_what_goes_on_from_a_restored_trunk_is_not_the_trunk(house: House) -> None:
    """Whoever restored it and went on saves a conversation, which supersedes nothing."""
    for user in (1, 2):
        house.loop.run(house.ask(opening(user, 60)))
    house.loop.run(house.idle_save.save_all())
    house.loop.run(house.ask(opening(2, 360)))
    assert house.loop.run(house.idle_save.save_all()) == 1
    assert len(trunks(house)) == 1


def test_a_long_system_prompt_does_not_make_two_conversations_one(house: House) -> None:
    """It is nine tenths of what both hold: each keeps its slot."""
    contents = [opening(user, 120) for user in (1, 2)]
    for job in contents:
        house.loop.run(house.ask(job))
    held = {slot.content.tokens for slot in table_of(house).slots}
    assert held >= {job.tokens for job in contents}


def test_a_shared_prefix_that_cannot_be_saved_costs_no_answer(house: House) -> None:
    """The next conversation tries again."""
    house.server.pace = lambda op: None if op.kind == "save" else 0.01
    asked = house.start(house.ask(opening(1)), "first")
    house.loop.pass_time(20.0)
    (save,) = house.server.pending
    house.server.pace = lambda op: 0.01
    house.server.fail(save, SlotActionFailed("no", 500))
    house.finish()
    assert asked.done()
    assert not asked.exception()
    assert trunks(house) == []
    house.loop.run(house.ask(opening(2)))
    assert len(trunks(house)) == 1


def test_a_client_that_leaves_while_the_trunk_is_saved_leaves_it_behind(house: House) -> None:
    """Who waits for it gets it."""
    house.server.pace = lambda op: None if op.kind == "save" else 0.01
    first = house.start(house.ask(opening(1)), "first")
    house.loop.settle()
    second = house.start(house.ask(opening(2)), "second")
    house.loop.pass_time(1.0)
    (save,) = house.server.pending
    first.cancel()
    house.loop.settle()
    house.server.pace = lambda op: 0.01
    house.server.serve(save)
    house.finish()
    assert second.result() >= N - 5
    assert len(trunks(house)) == 1


def test_who_waits_for_a_trunk_that_will_not_come_makes_it(house: House) -> None:
    """The first client leaves before it is computed."""
    first = house.start(house.ask(opening(1)), "first")
    house.loop.settle()
    second = house.start(house.ask(opening(2)), "second")
    house.loop.pass_time(0.04)
    assert house.server.n_computed < N
    first.cancel()
    house.finish()
    assert not second.exception()
    assert len(trunks(house)) == 1


def test_what_shares_more_does_not_hide_it(house: House) -> None:
    """Twenty conversations whose first question begins as the new one does, each unusable beyond the trunk."""
    for user in range(1, 21):
        job = opening(user)
        text = job.tokens + tokens_of(900_000 + 1000 * user, 300)
        house.loop.run(house.ask(Request(job.id, SYSTEM + tokens_of(5, 40) + text[4 * N :], n_system=N)))
        house.loop.run(house.idle_save.save_all())
    table_of(house).cache_kind = house.cache_kind  # nothing was learned that would help
    asks = Request("new", SYSTEM + tokens_of(5, 40) + tokens_of(700_000, 300), n_system=N)
    assert house.loop.run(house.ask(asks)) >= N - 5


# -- dense ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def dense() -> Iterator[House]:
    house = house_of(CacheKind.DENSE, n_slots=4)
    yield house
    house.finish()
    house.check_nothing_is_left()
    house.close()


def plain(user: int, n_own: int = 600) -> Request:
    """Nobody has said where the system part ends."""
    return Request(f"user {user}", SYSTEM + tokens_of(10_000 * user, n_own))


def test_the_third_conversation_cuts_the_trunk(dense: House) -> None:
    """Where the first two part from it."""
    for user in (1, 2):
        dense.loop.run(dense.ask(plain(user)))
        assert trunks(dense) == []
    dense.loop.run(dense.ask(plain(3)))
    (trunk,) = trunks(dense)
    assert trunk.n_tokens == N
    assert dense.server.files[trunk.file_name] == SYSTEM


def test_of_five_that_arrive_together_one_computes_what_they_share(dense: House) -> None:
    """The others wait for it: one agent has sent them all, as a rule."""

    async def all_of_them() -> list[int]:
        return await asyncio.gather(*(dense.ask(opening(user)) for user in range(1, 6)))

    reused = sorted(dense.loop.run(all_of_them()))
    assert len(trunks(dense)) == 1
    assert reused[0] == 0
    assert reused[1] >= N
    assert dense.server.n_computed <= N + 5 * 300 + 20


def test_follow_ups_make_none(dense: House) -> None:
    """Two conversations and what they go on with: nothing new begins."""
    for n_own in (600, 700, 800):
        for user in (1, 2):
            dense.loop.run(dense.ask(plain(user, n_own)))
    assert trunks(dense) == []


def test_it_is_no_reason_to_take_or_keep_a_hot_slot(dense: House) -> None:
    """With the trunk on disk a newcomer leaves those alone that only begin like it."""
    for user in (1, 2, 3):
        dense.loop.run(dense.ask(plain(user)))
    before = [slot.content for slot in table_of(dense).slots if slot.state is SlotState.HOT]
    dense.loop.run(dense.ask(plain(4)))
    after = [slot.content for slot in table_of(dense).slots]
    assert len(before) == 2, "the third has cut back one of the two, and made the trunk of it"
    assert all(content in after for content in before)


def test_the_second_conversation_leaves_the_first_one_its_slot(dense: House) -> None:
    """And its snapshot, where nine tenths are common and nobody has made a trunk yet."""
    contents = [opening(user, 120) for user in (1, 2)]
    dense.loop.run(dense.ask(contents[0]))
    dense.loop.run(dense.idle_save.save_all())
    dense.loop.run(dense.ask(contents[1]))
    dense.loop.run(dense.idle_save.save_all())
    held = {slot.content.tokens for slot in table_of(dense).slots}
    assert held >= {job.tokens for job in contents}
    assert {dense.server.files[one.file_name] for one in dense.catalog.snapshots.values()} >= {
        contents[0].tokens
    }


def test_a_slot_that_is_taken_for_another_conversation_is_none_of_the_old_one() -> None:
    """With a single slot: what the first has on disk is not superseded by the second, which is longer."""
    house = house_of(CacheKind.DENSE, n_slots=1)
    for user, n_own in ((1, 120), (2, 300)):
        house.loop.run(house.ask(opening(user, n_own)))
        house.loop.run(house.idle_save.save_all())
    assert sorted(one.n_tokens for one in house.catalog.snapshots.values()) == [N, N + 120, N + 300]
    house.close()


def test_what_was_cut_for_another_conversation_outlives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine tenths of it are the system part, which the other one was given alone; and that one is longer."""
    house = house_of(CacheKind.DENSE, n_slots=1)

    @asynccontextmanager
    async def cut(snapshot: Snapshot, n_tokens: int, spare: object = ()) -> AsyncIterator[Given]:
        house.server.files["cut"] = head(house.server.files[snapshot.file_name], n_tokens)
        yield Given("cut", snapshot.size_bytes, n_tokens)

    monkeypatch.setattr(house.catalog, "given_out", cut)
    foreign = Request("foreign", tokens_of(900_000, 1500))
    for request in (opening(1, 120), foreign, opening(2, 300)):
        house.loop.run(house.ask(request))
        house.loop.run(house.idle_save.save_all())
    assert sorted(one.n_tokens for one in house.catalog.snapshots.values()) == [N + 120, N + 300, 1500]
    house.close()


def test_small_ones_are_not_worth_it(dense: House) -> None:
    """A hundred tokens are computed again."""
    for user in (1, 2, 3, 4):
        job = plain(user)
        dense.loop.run(dense.ask(Request(job.id, head(SYSTEM, 100) + job.tokens[4 * N :])))
    assert trunks(dense) == []


def test_one_that_costs_more_to_write_than_to_compute_is_not_made() -> None:
    """A slow disk."""
    house = house_of(CacheKind.RECURRENT)
    house.rates.save.bytes_per_s = 1e6
    house.loop.run(house.ask(opening(1)))
    assert trunks(house) == []
    house.close()
