"""Long prompts and what their slots really hold: what is found missing, what was stopped on the way, what is saved."""

from __future__ import annotations

import pytest

from llamaslot.backend.lease_states import MAX_REPLANS, RetryPlacement
from llamaslot.cache.ids import count, head
from llamaslot.cache.reuse import CacheKind
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.slots import SlotState
from tests.support.house import tokens_of
from tests.support.mainloop import BATCH, BATCH_S, CHUNK_S, Paced, long, short, talk
from tests.support.stub import StubSlot

EVERY = pytest.mark.parametrize("cache_kind", list(CacheKind))
N = 3000
CONTEXT = tokens_of(1, N)
FOLLOW_UPS = pytest.mark.parametrize("n_new", [50, 700], ids=["short", "long"])


def follow_up(n_new: int) -> Request:
    return Request("follow-up", CONTEXT + tokens_of(500_000, n_new))


def emptied(cache_kind: CacheKind, *, is_saved: bool) -> Paced:
    """A context of 3,000 tokens that is believed to be in slot 0, and is not."""
    house = Paced(cache_kind, 2)
    house.loop.run(house.ask(Request("first", CONTEXT)))
    if is_saved:
        house.loop.run(house.idle_save.save_all())
    assert house.table.slots[0].content.tokens == CONTEXT
    empty(house.server.slots_[0])
    house.begin()
    return house


def empty(slot: StubSlot) -> None:
    slot.tokens, slot.checkpoints = b"", ()


# -- what is missing ---------------------------------------------------------------------------------------------------


@EVERY
@FOLLOW_UPS
def test_a_context_that_is_gone_is_restored(cache_kind: CacheKind, n_new: int) -> None:
    """It is on disk. That its slot is empty is seen before more than two batches are computed for nothing."""
    with emptied(cache_kind, is_saved=True) as house:
        job = follow_up(n_new)
        client = house.come(job)
        house.until(2 * BATCH_S + 0.1)
        assert "restore" in {op.kind for op in house.server.pending} | {
            work.kind for work in house.main.works
        }
        house.wait(client)
        assert house.metrics.replanned._value.get() == 1
        assert house.server.n_computed <= 2 * BATCH + n_new + 10
        assert client.result() >= N - 10


@EVERY
@FOLLOW_UPS
def test_without_a_snapshot_it_is_computed_once(cache_kind: CacheKind, n_new: int) -> None:
    """The second attempt goes on from the batch or two that the first has computed."""
    with emptied(cache_kind, is_saved=False) as house:
        job = follow_up(n_new)
        house.wait(house.come(job))
        assert house.metrics.replanned._value.get() == 1
        assert house.server.n_computed <= N + n_new + 5
        assert house.server.slots_[house.slots[job.id]].tokens == job.tokens


@EVERY
@FOLLOW_UPS
def test_a_server_that_keeps_nothing_is_not_asked_for_ever(cache_kind: CacheKind, n_new: int) -> None:
    """It loses what is in a slot each time that something begins in it: after two attempts that is how it is."""
    with emptied(cache_kind, is_saved=True) as house:
        loses(house, MAX_REPLANS)
        job = follow_up(n_new)
        house.wait(house.come(job))
        assert house.metrics.replanned._value.get() == MAX_REPLANS
        assert house.server.n_computed <= MAX_REPLANS * 2 * BATCH + N + n_new + 10
        if cache_kind is not CacheKind.DENSE and n_new == 700:
            sent = [n for _, n in house.server.sent if n == N + n_new - 1]
            assert len(sent) == MAX_REPLANS + 1, "the last attempt is not stopped for that"


def loses(house: Paced, n_times: int) -> None:
    """The server loses the context as something begins in its slot."""
    begin, n_lost = house.server._begin, 0

    def begin_anew(slot_id: int) -> StubSlot:
        nonlocal n_lost
        slot = begin(slot_id)
        if count(slot.tokens) >= N and n_lost < n_times:
            n_lost += 1
            empty(slot)
        return slot

    house.server._begin = begin_anew  # type: ignore[method-assign]


@EVERY
def test_what_is_computed_again_gives_way_as_well(cache_kind: CacheKind) -> None:
    """How much of it is there is what was found. By what was expected it would be through at once."""
    with emptied(cache_kind, is_saved=True) as house:
        loses(house, MAX_REPLANS)
        client = house.come(follow_up(250))
        house.until(1.5)
        assert house.metrics.replanned._value.get() == MAX_REPLANS
        house.rates.interruption.seconds = 0.3  # more than the 250 tokens take
        asks = short("short")
        house.wait(house.come(asks))
        assert not client.done()
        waits_s = 2 * CHUNK_S + BATCH_S if cache_kind is CacheKind.DENSE else BATCH_S
        assert house.first_s[asks.id] < waits_s + 0.1 + 0.03
        house.wait(client)


@EVERY
def test_a_little_that_is_missing_is_computed(cache_kind: CacheKind) -> None:
    """To look for another place costs more than that."""
    with emptied(cache_kind, is_saved=True) as house:
        house.server.slots_[0].tokens = head(CONTEXT, N - 60)
        job = follow_up(700)
        house.wait(house.come(job))
        assert house.metrics.replanned._value.get() == 0
        assert house.slots[job.id] == 0
        assert not [work for work in house.main.works if work.kind == "restore"]


@EVERY
def test_what_the_first_attempt_has_cost_is_told(cache_kind: CacheKind) -> None:
    """The client reads what its whole request took."""
    with emptied(cache_kind, is_saved=True) as house:

        async def attempt() -> RetryPlacement:
            with await house.dispatcher.lease(follow_up(700)) as lease:
                with pytest.raises(RetryPlacement) as again:
                    await house.executor.prepare(lease, lambda _: None, may_replan=True)
                assert lease.content is not None
                assert lease.content.is_exact
                assert lease.content.n_tokens == house.server.n_computed
            return again.value

        prefill_stats = house.loop.run(attempt()).prefill_stats
        assert prefill_stats is not None
        assert prefill_stats.n_reused == 0
        assert 0 < prefill_stats.n_tokens <= 2 * BATCH
        assert prefill_stats.seconds >= BATCH_S


@EVERY
def test_a_slot_that_is_emptied_while_it_waits_for_its_turn(cache_kind: CacheKind) -> None:
    """Half of a long prompt is computed when a shorter one passes, and gone when it goes on: what is left of it is
    computed again, and nothing that is not there is believed to be there."""
    with Paced(cache_kind, 2) as house:
        house.begin()
        longer, shorter = long("longer", 6000, 1), long("shorter", 1000, 2)
        clients = [house.come(longer)]
        house.until(2.0)
        clients.append(house.come(shorter))
        house.until(2.7)
        slot = house.server.slots_[house.slots["longer"]]
        assert not slot.is_working
        empty(slot)
        house.wait(*clients)
        assert house.metrics.replanned._value.get() == 0, "nobody else has it either"
        assert slot.tokens == longer.tokens
        assert house.server.n_computed <= 7000 + 2300


# -- sliding windows ---------------------------------------------------------------------------------------------------


def test_a_window_that_is_not_full_is_not_interrupted() -> None:
    """Nothing of it could be gone on from."""
    with Paced(CacheKind.SWA, 2) as house:
        house.server.window = house.table.rewind_model.window = 1000
        house.begin()
        client, asks = house.come(long("stranger", 4000)), short("short")
        house.until(0.3)
        house.wait(house.come(asks))
        assert 0.7 <= house.first_s["short"] <= 0.7 + 2 * BATCH_S + 0.1
        house.wait(client)
        assert house.server.n_computed == 4100


def test_one_that_loses_all_when_it_is_interrupted_is_interrupted_less() -> None:
    """Nobody knows how long its window is. Short requests come all the time: it gets to its end all the same, and what
    is computed again for that is no more than once or twice as much."""
    with Paced(CacheKind.SWA, 2, answer_s=0.01) as house:
        house.server.window, house.table.rewind_model.window = 3000, None
        house.begin()
        client, n_asked = house.come(long("stranger", 4000)), 0
        while not client.done():
            house.loop.pass_time(0.4)
            house.wait(house.come(short(f"short {n_asked}", n_asked)))
            n_asked += 1
        assert house.server.slots_[house.slots["stranger"]].tokens == long("stranger", 4000).tokens
        assert house.server.n_computed - 100 * n_asked <= 3 * 4000


# -- what was stopped --------------------------------------------------------------------------------------------------


@EVERY
def test_who_leaves_in_a_prefill_goes_on_from_there(cache_kind: CacheKind) -> None:
    """What was computed stays in the slot, its exact end known once the server is through with its batch."""
    with Paced(cache_kind, 2) as house:
        house.begin()
        job = long("stranger", 6000)
        client = house.come(job)
        house.until(2.5)
        house.leave(client)
        house.loop.pass_time(4.0)
        (slot,) = (slot for slot in house.table.slots if slot.state is SlotState.HOT)
        n_done = slot.content.n_tokens
        assert slot.content.is_exact
        assert 2400 <= n_done == house.server.n_computed <= 2800
        again = Request("again", job.tokens + tokens_of(1, 10))
        assert house.loop.run(house.ask(again)) == n_done
        assert house.server.n_computed == 6010


@EVERY
@pytest.mark.parametrize("is_saved_by", ["idle save", "somebody who needs the slot"])
def test_what_was_stopped_on_the_way_can_be_saved(cache_kind: CacheKind, is_saved_by: str) -> None:
    """And gone on from, restored. A sliding window goes back by one token before: without a checkpoint near its end
    nothing of the file could be used. The others are saved as they are."""
    with Paced(cache_kind, 1) as house:
        house.begin()
        job = long("stranger", 6000)
        house.leave_after(house.come(job), 2.5)
        n_done = house.table.slots[0].content.n_tokens
        n_sent = len(house.server.sent)
        if is_saved_by == "idle save":
            house.loop.run(house.idle_save.save_all())
            content = house.table.slots[0].content
            assert content.is_exact
            assert not content.is_dirty
            if cache_kind is CacheKind.SWA:
                assert content.checkpoints[-1] == n_done - 1 == house.server.slots_[0].checkpoints[-1]
        house.wait(house.come(long("other", 600, 5)))
        went_back = house.server.sent[n_sent : n_sent + 1] == [(0, n_done)]
        assert went_back == (cache_kind is CacheKind.SWA)
        house.server.n_computed = 0
        again = Request("again", job.tokens + tokens_of(1, 10))
        assert house.loop.run(house.ask(again)) >= n_done - 2
        assert house.server.n_computed <= 6010 - n_done + 3


def test_a_sliding_window_does_not_go_back_where_a_checkpoint_is_near() -> None:
    """A prompt that was computed to its end has left one."""
    with Paced(CacheKind.SWA, 2) as house:
        house.talk()
        house.begin()
        assert house.loop.run(house.idle_save.save_all()) == 1
        assert house.server.sent == []


def test_a_sliding_window_that_cannot_go_back_is_not_saved() -> None:
    """Nobody knows then what its slot holds, and nobody believes anything."""
    with Paced(CacheKind.SWA, 2) as house:
        house.begin()
        house.leave_after(house.come(long("stranger", 6000)), 2.5)
        save = house.start(house.idle_save.save_all(), "idle save")
        house.loop.settle()
        house.fail_next("send")
        house.wait(save)
        assert house.catalog.snapshots == {}
        assert house.table.slots[0].state is SlotState.ABANDONED, "the server may be at work in it"
        house.loop.pass_time(3.0)
        assert house.table.slots[0].state is SlotState.SUSPECT  # type: ignore[comparison-overlap]


@EVERY
def test_short_ones_are_looked_at_as_well(cache_kind: CacheKind) -> None:
    """A follow-up that is computed by its own request finds its slot empty: it is stopped after a batch or two."""
    with Paced(cache_kind, 2) as house:
        house.talk(2)
        house.loop.run(house.idle_save.save_all())
        empty(house.server.slots_[1])
        house.begin()
        house.wait(house.come(talk(1, 20)), house.come(short("short")))
        assert house.metrics.replanned._value.get() == 1
        assert house.server.n_computed <= 2 * BATCH + 100 + 30
