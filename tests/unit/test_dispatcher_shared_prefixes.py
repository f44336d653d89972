"""What several conversations begin with: computed once, by the first that needs it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from bench.virtual import VirtualLoop
from llamaslot.backend.slot_table import SlotTable
from llamaslot.cache.content import SnapshotKind
from llamaslot.cache.ids import NEGLIGIBLE_TOKENS, head
from llamaslot.cache.reuse import CacheKind
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.slots import SlotState
from llamaslot.store import Snapshot
from llamaslot.store.restore_file import Given
from tests.support.house import House, tokens_of
from tests.support.stub import StubServer

N = 1000
SYSTEM = tokens_of(1, N)


def opening(user: int, n_own: int = 300) -> Request:
    """The first turn of a conversation: the system prompt, and a question of its own."""
    tokens = SYSTEM + tokens_of(10_000 * user, n_own)
    return Request(f"user {user}", tokens, boundaries=(N,), n_system=N)


def house_of(cache_kind: CacheKind, n_slots: int = 3, room: int = 1000) -> House:
    house = House(VirtualLoop(), StubServer(n_slots, pace=lambda op: 0.01), room=room)
    house.cache_kind = table_of(house).cache_kind = cache_kind
    return house


def table_of(house: House) -> SlotTable:
    assert house.leases.table is not None
    return house.leases.table


def trunks(house: House) -> list[Snapshot]:
    return [snapshot for snapshot in house.catalog.snapshots.values() if snapshot.kind is SnapshotKind.TRUNK]


def is_kept(house: House, request: Request) -> bool:
    """Whether its tokens are in a slot or on disk."""
    held = [slot.content.tokens for slot in table_of(house).slots]
    return any(tokens.startswith(request.tokens) for tokens in [*held, *house.server.files.values()])


@pytest.fixture(params=[CacheKind.RECURRENT, CacheKind.SWA])
def house(request: pytest.FixtureRequest) -> Iterator[House]:
    """Of a model that cannot go back; everything takes 10 ms."""
    house = house_of(request.param)
    yield house
    house.finish()
    house.check_nothing_is_left()
    house.close()


def test_the_first_conversation_saves_the_system_part_on_its_way(house: House) -> None:
    """After ten turns without a pause its slot could not go back there. Nothing is computed twice for it."""
    house.loop.run(house.ask(opening(1)))
    (trunk,) = trunks(house)
    assert house.server.files[trunk.file_name] == SYSTEM
    assert house.server.n_computed <= N + 300 + 2  # the first token after a stop is asked for by the next


def test_the_next_conversation_begins_with_it(house: House) -> None:
    """All of it but what a sliding window needs again; in another slot, and it is not saved again."""
    for user in (1, 2):
        reused = house.loop.run(house.ask(opening(user)))
    assert reused >= N - 5
    held = {slot.content.tokens for slot in table_of(house).slots}
    assert held >= {opening(user).tokens for user in (1, 2)}
    for user in (3, 4):
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


def test_the_third_conversation_saves_what_no_system_message_names(house: House) -> None:
    """Where the first two part from it, for those after it."""
    for user in (1, 2, 3):
        house.loop.run(house.ask(plain(user)))
        assert [house.server.files[trunk.file_name] for trunk in trunks(house)] == [SYSTEM] * (user == 3)
    assert house.loop.run(house.ask(plain(4))) >= N - NEGLIGIBLE_TOKENS


def test_what_goes_on_from_a_shared_prefix_is_a_conversation_of_its_own(house: House) -> None:
    """It is unsaved, and once it is saved the shared prefix stays."""

    async def both() -> None:
        await asyncio.gather(house.ask(opening(1, 60)), house.ask(opening(2, 60)))

    house.loop.run(both())
    assert house.loop.run(house.idle_save.save_all()) == 2
    house.loop.run(house.ask(opening(2, 360)))
    assert house.loop.run(house.idle_save.save_all()) == 1
    assert len(trunks(house)) == 1


def test_a_long_system_prompt_does_not_make_two_conversations_one(house: House) -> None:
    """It is nine tenths of what both hold: neither is lost."""
    for user in (1, 2):
        house.loop.run(house.ask(opening(user, 120)))
    assert is_kept(house, opening(1, 120))
    assert is_kept(house, opening(2, 120))


def test_what_shares_more_does_not_hide_it(house: House) -> None:
    """Twenty conversations whose first question begins as the new one does, each unusable beyond the system prompt."""
    for user in range(1, 21):
        job = opening(user)
        text = job.tokens + tokens_of(900_000 + 1000 * user, 300)
        tokens = SYSTEM + tokens_of(5, 40) + text[4 * N :]
        house.loop.run(house.ask(Request(job.id, tokens, boundaries=(N,), n_system=N)))
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


def test_each_conversation_begins_with_what_another_one_has_computed(dense: House) -> None:
    """Whether that is in a slot or on disk, and though nothing ends there; no snapshot is made for it."""
    reused = [dense.loop.run(dense.ask(plain(user))) for user in (1, 2)]
    dense.loop.run(dense.idle_save.save_all())
    reused += [dense.loop.run(dense.ask(plain(user))) for user in (3, 4)]
    assert reused[0] == 0
    assert min(reused[1:]) >= N
    assert trunks(dense) == []


def test_one_that_computes_what_a_busy_slot_has_saves_it_for_the_next(dense: House) -> None:
    """While the first is answered, others can neither go on in its slot nor read it. With what is on disk none is
    saved."""
    dense.server.pace = lambda op: 60.0 if op.kind == "answer" else 0.01
    asked = []
    for user in (1, 2, 3, 4):
        asked.append(dense.start(dense.ask(opening(user)), f"user {user}"))
        dense.loop.pass_time(5.0)
        assert len(trunks(dense)) == (user > 1)
    dense.finish()
    assert [task.result() >= N for task in asked] == [False, False, True, True]


def test_of_five_that_arrive_together_one_computes_what_they_share(dense: House) -> None:
    """The others wait for it: one agent has sent them all, as a rule."""

    async def all_of_them() -> list[int]:
        return await asyncio.gather(*(dense.ask(opening(user)) for user in range(1, 6)))

    reused = sorted(dense.loop.run(all_of_them()))
    assert len(trunks(dense)) == 1
    assert reused[0] == 0
    assert reused[1] >= N
    assert dense.server.n_computed <= N + 5 * 300 + 20


def test_a_common_beginning_is_no_reason_to_take_a_hot_slot(dense: House) -> None:
    """With it on disk a newcomer leaves those alone that only begin like it."""
    for user in (1, 2, 3):
        dense.loop.run(dense.ask(plain(user)))
        dense.loop.run(dense.idle_save.save_all())
    before = [slot.content for slot in table_of(dense).slots if slot.state is SlotState.HOT]
    dense.loop.run(dense.ask(plain(4)))
    after = [slot.content for slot in table_of(dense).slots]
    assert len(before) == 3
    assert all(content in after for content in before)


def test_a_slot_that_is_taken_for_another_conversation_is_none_of_the_old_one() -> None:
    """With a single slot: what the first has on disk is not superseded by the second, which is longer."""
    house = house_of(CacheKind.DENSE, n_slots=1)
    for user, n_own in ((1, 120), (2, 300)):
        house.loop.run(house.ask(opening(user, n_own)))
        house.loop.run(house.idle_save.save_all())
    assert sorted(one.n_tokens for one in house.catalog.snapshots.values()) == [N + 120, N + 300]
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
