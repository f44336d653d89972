"""Several long prompts, and requests that choose their slots themselves: who is computed when, and how often."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from itertools import pairwise
from typing import Any

import pytest

from llamaslot.cache.ids import common
from llamaslot.cache.reuse import CacheKind
from llamaslot.errors import BackendRestarted
from llamaslot.scheduling.request import Placement, Request
from llamaslot.scheduling.settings import QueueLimits
from tests.support.house import outcome, tokens_of
from tests.support.mainloop import BATCH, BATCH_S, CHUNK_S, Paced, long, short, talk

EVERY = pytest.mark.parametrize("cache_kind", list(CacheKind))


def order_of(house: Paced, *jobs: Request) -> list[str]:
    """Their names, by when each of them came to its first token."""
    assert all(job.id in house.first_s for job in jobs)
    return sorted((job.id for job in jobs), key=lambda name: house.asked_at[name] + house.first_s[name])


def n_sent_to(house: Paced, job: Request) -> int:
    slot = house.slots[job.id]
    return sum(to == slot for to, _ in house.server.sent)


# -- several long ones -------------------------------------------------------------------------------------------------


@EVERY
def test_of_two_long_ones_the_shorter_goes_first(cache_kind: CacheKind) -> None:
    """Though it came later; the longer one then goes on from where it was."""
    with Paced(cache_kind, 2, answer_s=0.001) as house:
        house.begin()
        longer, shorter = long("longer", 8000, 1), long("shorter", 2000, 2)
        clients = [house.come(longer)]
        house.until(1.5)
        clients.append(house.come(shorter))
        house.wait(*clients)
        assert order_of(house, longer, shorter) == ["shorter", "longer"]
        assert house.first_s["shorter"] < 2.0 + CHUNK_S + BATCH_S
        assert house.first_s["longer"] < 10.0 + 0.3
        assert house.server.n_computed == 10_000
        if cache_kind is not CacheKind.DENSE:
            assert n_sent_to(house, longer) == 2, "interrupted once"
            assert n_sent_to(house, shorter) == 1


@EVERY
def test_the_one_with_less_left_is_not_interrupted(cache_kind: CacheKind) -> None:
    """For somebody who came with more, or with about as much."""
    with Paced(cache_kind, 3, answer_s=0.001) as house:
        house.begin()
        jobs = [long("first", 5000, 1), long("longer", 5000, 2), long("about as long", 3500, 3)]
        clients = [house.come(jobs[0])]
        house.until(1.5)
        clients += [house.come(job) for job in jobs[1:]]
        house.wait(*clients)
        assert order_of(house, *jobs) == ["first", "about as long", "longer"]
        assert house.server.n_computed == 13_500
        if cache_kind is not CacheKind.DENSE:
            assert [n for _, n in house.server.sent] == [4999, 3499, 4999]


@EVERY
def test_one_that_has_waited_too_long_is_not_passed(cache_kind: CacheKind) -> None:
    """Somebody with little left comes again and again. After ``starvation_s`` it waits for the one that is computed,
    at most for its chunk, and is then computed to its end."""
    with Paced(cache_kind, 4, answer_s=0.001, starvation_s=3.0) as house:
        house.begin()
        first, patient = long("first", 2000, 1), long("patient", 6000, 2)
        clients = [house.come(first), house.come(patient)]
        for i in range(14):
            house.until(0.9 * (i + 1))
            clients.append(house.come(long(f"passes {i}", 1000, 3 + i)))
        house.wait(*clients)
        waited_s = house.first_s["patient"] - 6.0
        assert 3.0 - 0.5 <= waited_s <= 3.0 + 1.0 + CHUNK_S + BATCH_S
        through_at = house.began + house.first_s["patient"]
        last = [
            work.slot
            for work in house.main.works
            if through_at - 5.5 < work.began < through_at and work.n_tokens
        ]
        assert set(last) == {house.slots["patient"]}, "in one go"
        assert house.server.n_computed == 2000 + 6000 + 14 * 1000


@EVERY
def test_to_be_computed_is_not_to_wait(cache_kind: CacheKind) -> None:
    """However long a chunk goes on while nobody else is there: then somebody who comes with little left is ahead."""
    with Paced(cache_kind, 2, answer_s=0.001, starvation_s=5.0) as house:
        house.begin()
        longer, shorter = long("longer", 20_000, 1), long("shorter", 1000, 2)
        clients = [house.come(longer)]
        house.until(8.0)
        clients.append(house.come(shorter))
        house.wait(*clients)
        assert house.first_s["shorter"] < 1.0 + CHUNK_S + BATCH_S


@EVERY
def test_they_are_not_interrupted_for_each_other_again_and_again(cache_kind: CacheKind) -> None:
    """Three that take a few times as long as anybody may be passed: each is interrupted once or twice."""
    with Paced(cache_kind, 3, starvation_s=6.0, batch=512, answer_s=0.001) as house:
        house.begin()
        jobs = [long(f"long {i}", 15_000 - 500 * i, i) for i in range(3)]
        clients = []
        for i, job in enumerate(jobs):
            house.until(0.7 * i)
            clients.append(house.come(job))
        house.wait(*clients)
        slots = [work.slot for work in house.main.works if work.n_tokens > 1]
        n_switches = sum(a != b for a, b in pairwise(slots))
        assert n_switches <= 3 * 2
        assert house.server.n_computed == 45_000 - 1500
        if cache_kind is not CacheKind.DENSE:
            assert len(house.server.sent) <= 3 + n_switches


@EVERY
def test_one_that_has_just_begun_is_the_one_that_goes_on(cache_kind: CacheKind) -> None:
    """Its first chunk counts as its own: another one gets ahead of it by what an interruption costs, and not before
    by that much."""
    with Paced(cache_kind, 2, answer_s=0.001, starvation_s=4.0) as house:
        house.rates.interruption.seconds = 1.0
        house.begin()
        longer, shorter = long("longer", 12_000, 1), long("shorter", 9500, 2)
        clients = [house.come(longer)]
        house.until(1.0)
        clients.append(house.come(shorter))
        house.until(4.0)
        slot = house.slots[shorter.id]
        began = [work.began for work in house.main.of(slot)]
        assert began, "it is ahead by more than that"
        assert not [work for work in house.main.of(1 - slot) if work.began > began[0]]
        house.wait(*clients)


@EVERY
def test_one_that_waits_for_streams_is_passed_by_one_that_is_overdue_by_then(cache_kind: CacheKind) -> None:
    """Nothing happens but that time passes: whoever wakes up and is not next any more wakes the one who is."""
    with Paced(cache_kind, 3, decode_share=0.9, starvation_s=1.5) as house:
        house.main.answers_s[0] = 1000.0
        house.come(short("stream"))
        house.loop.pass_time(1.0)
        house.begin()
        patient = long("patient", 6000, 1)
        house.come(patient)
        house.until(0.8)
        n_done = len(house.main.of(house.slots[patient.id]))
        house.come(long("passes", 1000, 2))  # which is ahead, and waits for the end of the pause
        house.until(8.0)
        assert not house.main.of(house.slots["passes"])
        assert len(house.main.of(house.slots[patient.id])) > n_done
        for client in list(house.clients):
            house.leave(client)


@pytest.mark.parametrize("cache_kind", [CacheKind.SWA, CacheKind.RECURRENT])
def test_a_long_one_is_restored_between_two_batches(cache_kind: CacheKind) -> None:
    """Each of its slot actions would wait for a batch of the one that is computed. That goes on as soon as they are
    over, for it has less left."""
    with Paced(cache_kind, 2, answer_s=0.001) as house:
        house.talk()
        house.loop.run(house.idle_save.save_all())
        house.wait(house.come(long("over", 600, 1)), house.come(long("too", 600, 2)))
        house.loop.run(house.idle_save.save_all())
        house.begin()
        client = house.come(long("current", 3000, 3))
        house.until(1.05)
        back = Request("back", talk(0).tokens + tokens_of(1, 6000))
        clients = [client, house.come(back)]
        house.until(2.0)
        works = [work for work in house.main.works if work.ended > house.began + 1.05]
        own = [n for n, work in enumerate(works) if work.slot == house.slots["back"]]
        assert [works[n].kind for n in own] == ["erase", "restore"]
        assert own == [1, 2], "the batch that was under way, and then at once"
        assert works[3].began - works[2].ended < 0.05
        house.wait(*clients)
        assert order_of(house, long("current", 3000, 3), back) == ["current", "back"]


@pytest.mark.parametrize("cache_kind", [CacheKind.SWA, CacheKind.RECURRENT])
def test_while_a_shared_prefix_is_saved_the_next_one_waits_for_just_that(cache_kind: CacheKind) -> None:
    """A batch of it would be in the way of the save."""
    with Paced(cache_kind, 2, answer_s=0.001) as house:
        house.begin()
        maker = long("maker", 10_000, 1, n_system=1000, boundaries=(1000,))
        clients = [house.come(maker)]
        house.until(0.5)
        clients.append(house.come(long("other", 3000, 2)))
        house.until(1.5)
        kinds = [(work.kind, work.slot) for work in house.main.works if work.n_tokens != BATCH]
        other = house.slots["other"]
        (save,) = (work for work in house.main.works if work.kind == "save")
        began = house.main.of(other)[0].began
        assert kinds[-1] == ("save", house.slots["maker"])
        assert save.ended <= began < save.ended + 0.05
        house.wait(*clients)
        assert order_of(house, maker, long("other", 3000, 2)) == ["other", "maker"]


# -- requests that choose their slots ----------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("kind", ["unpinned", "two"])
@pytest.mark.parametrize("where", [0, 1])
def test_a_long_prefill_makes_room_after_a_while(cache_kind: CacheKind, kind: str, where: int) -> None:
    """For a request for which llama-server chooses the slots, wherever it lands; then it goes on from where it was, in
    its slot or from the disk. Every token is computed once."""
    with Paced(cache_kind, 2, batch=512, answer_s=0.001) as house:
        house.server.lands = lambda idle: idle[where % len(idle)]
        house.begin()
        job = long("stranger", 20_000)
        client = house.come(job)
        house.until(1.0)
        asks: Coroutine[Any, Any, Any]
        if kind == "unpinned":
            asks = house.ask_unpinned(Request("turn", placement=Placement.SERVER_CHOSEN), tokens_of(1, 70))
        else:
            asks = house.ask(Request("turn", tokens_of(1, 70), n_children=1))
        turn = house.start(asks, "turn")
        if kind == "unpinned":
            house.until(3.0)
            house.wait(house.come(short("short")))
            assert house.first_s["short"] < 1.0, "meanwhile others take their first steps"
        house.wait(turn)
        assert 8.0 <= house.now - house.began < 8.0 + 2 * CHUNK_S + 1.0
        assert not client.done()
        house.wait(client)
        assert outcome(client) is None
        n_short = 100 if kind == "unpinned" else 0
        assert 20_070 + n_short <= house.server.n_computed <= 20_080 + n_short
        assert house.first_s["stranger"] < 20.0 + 2.5


@EVERY
def test_one_that_waits_for_its_turn_behind_a_prefill_is_not_waited_for(cache_kind: CacheKind) -> None:
    """A request with several answers has its prompt computed, and then waits until others are through: they go on."""
    with Paced(cache_kind, 3, answer_s=0.001) as house:
        house.begin()
        other, two = long("other", 4000, 1), long("two", 1000, 2, n_children=1)
        clients = [house.come(other)]
        house.until(0.5)
        clients.append(house.come(two))
        house.wait(*clients)
        assert house.first_s["other"] <= 5.0 + 0.4
        assert house.server.n_computed == 5000


@EVERY
def test_one_that_is_nearly_through_makes_no_room(cache_kind: CacheKind) -> None:
    """Nor one that has been computed for a few seconds only: to go away and come back costs more than that."""
    with Paced(cache_kind, 2, batch=512, answer_s=0.001) as house:
        house.begin()
        client = house.come(long("stranger", 9500))
        house.until(1.0)
        turn = house.start(
            house.ask_unpinned(Request("turn", placement=Placement.SERVER_CHOSEN), tokens_of(1, 70)), "turn"
        )
        house.until(9.0)
        assert not turn.done()
        house.wait(client, turn)
        assert len({n for _, n in house.server.sent}) == len(house.server.sent), "in one go"
        assert house.first_s["stranger"] == pytest.approx(9.5, abs=0.4)


def test_a_shut_gate_keeps_no_prefill_from_making_room() -> None:
    """After a minute nobody else may take a first step: then most of all."""
    with Paced(CacheKind.DENSE, 9, batch=4096, answer_s=0.001, chunk_s=4.0) as house:
        house.begin()
        clients = [house.come(long(f"stranger {i}", 40_000, i)) for i in range(8)]
        house.until(1.0)
        turn = house.start(
            house.ask_unpinned(Request("turn", placement=Placement.SERVER_CHOSEN), tokens_of(1, 70)), "turn"
        )
        house.wait(turn)
        assert 60.0 < house.now - house.began < 8 * 8.0 + 8 * 4.0 + 1.0
        for client in clients:
            house.leave(client)


@EVERY
def test_the_request_that_made_room_is_next(cache_kind: CacheKind) -> None:
    """It waits behind the request that it made room for, and ahead of all who have come meanwhile."""
    with Paced(cache_kind, 1, batch=512, answer_s=0.001) as house:
        house.begin()
        client = house.come(long("stranger", 12_000))
        house.until(1.0)
        turn = house.start(
            house.ask_unpinned(Request("turn", placement=Placement.SERVER_CHOSEN), tokens_of(1, 70)), "turn"
        )
        late = house.come(long("late", 600, 5))
        house.wait(turn, client, late)
        assert house.first_s["stranger"] < house.first_s["late"] + 1.0
        assert 12_670 <= house.server.n_computed <= 12_690


@EVERY
def test_while_it_makes_room_the_queue_may_be_full(cache_kind: CacheKind) -> None:
    """It had its place before all the others: it is not sent away."""
    with Paced(cache_kind, 1, batch=512, answer_s=0.001) as house:
        house.dispatcher.queue.limits = QueueLimits(max_waiting=1)
        house.begin()
        client = house.come(long("stranger", 12_000))
        house.until(1.0)
        turn = house.start(
            house.ask_unpinned(Request("turn", placement=Placement.SERVER_CHOSEN), tokens_of(1, 70)), "turn"
        )
        house.until(2.0)
        late = house.come(long("late", 600, 5))
        house.wait(turn, client, late)
        assert outcome(client) is None


# -- faults ------------------------------------------------------------------------------------------------------------


@EVERY
def test_a_chunk_that_is_refused_costs_no_answer(cache_kind: CacheKind) -> None:
    """Its own request computes everything, without trusting what is in the slot; the others go on."""
    with Paced(cache_kind, 2, answer_s=0.001) as house:
        house.begin()
        refused, other = long("refused", 2000, 1), long("other", 3000, 2)
        clients = [house.come(refused), house.come(other)]
        house.until(1.2)
        house.fail_next("batch")
        house.wait(*clients)
        assert [outcome(client) for client in clients] == [None, None]
        assert clients[0].result() == 0
        slot = house.slots[refused.id]
        assert house.server.slots_[slot].tokens == refused.tokens


@EVERY
@pytest.mark.parametrize("waits_for", ["another", "somebody first", "streams"])
def test_a_waiting_exclusive_request_is_told_of_a_restart(cache_kind: CacheKind, waits_for: str) -> None:
    """At once when it is noticed: his slot is another's now. Nothing is sent to the new process for him."""
    with Paced(cache_kind, 3, decode_share=0.9, answer_s=1000.0) as house:
        if waits_for == "streams":
            house.come(short("stream"))
            house.loop.pass_time(0.5)
        house.begin()
        client = house.come(long("waits", 5000, 1))
        house.until(0.8)
        if waits_for == "another":
            house.come(long("another", 590, 2))
        elif waits_for == "somebody first":
            house.main.answer_s = 0.001
            house.start(asks_for_ever(house), "first")
        house.until(1.4)
        while any(op.slot == house.slots["waits"] for op in house.server.pending):
            house.loop.pass_time(0.02)
        n_sent = sum(n > 600 for _, n in house.server.sent)
        house.restart()
        house.notice(is_down=False)
        house.come(long("newcomer", 600, 3))
        house.loop.settle()
        house.loop.run(house.meet())
        house.loop.pass_time(0.05)
        assert isinstance(outcome(client), BackendRestarted)
        assert sum(n > 600 for _, n in house.server.sent) == n_sent
        for one in list(house.clients):
            one.cancel()


async def asks_for_ever(house: Paced) -> None:
    for i in range(1000):
        await asyncio.gather(*(house.ask(short(f"first {i} {j}", 2 * i + j, 190)) for j in range(2)))


def test_names_tell_prompts_apart() -> None:
    """Of this file's own prompts none begins like another."""
    jobs: list[Any] = [long("a", 900, 1), long("b", 900, 2), short("c", 1), talk(0), talk(1)]
    assert all(not common(a.tokens, b.tokens) for a in jobs for b in jobs if a is not b)
