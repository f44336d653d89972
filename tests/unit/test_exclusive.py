"""Turns: requests for which llama-server chooses the slots by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from bench.virtual import VirtualLoop
from llamaslot.cache.namespaces import Namespace
from llamaslot.errors import BackendRestarted, SlotNotEmptied
from llamaslot.llama.answers import SlotInfo
from llamaslot.scheduling.request import Placement, Request, User
from llamaslot.scheduling.settings import QueueLimits
from tests.support.house import House, outcome, tokens_of
from tests.support.stub import StubServer

ANNA, BERT = Namespace("key:anna"), Namespace("key:bert")


@pytest.fixture
def house() -> Iterator[House]:
    """Two free slots; what is asked of the server waits until it is served."""
    house = House(VirtualLoop(), StubServer(2), limits=QueueLimits(max_waiting=2, max_wait_s=5.0))
    yield house
    house.close()


def answering(house: House, job: Request) -> asyncio.Task[Any]:
    """A client of ``job`` whose answer has begun."""
    client = house.start(house.ask(job), job.id)
    while not any(op.kind == "answer" for op in house.server.pending):
        house.loop.settle()
        house.server.serve(next(op for op in house.server.pending if op.kind in ("send", "batch")))
        house.loop.settle()
    return client


def test_a_turn_does_not_wait_for_an_answer_that_was_left_behind(house: House) -> None:
    """It goes on to its end in a slot of its own; everybody is served meanwhile."""
    answering(house, Request("leaves", tokens_of(1, 90))).cancel()
    turn = house.start(
        house.ask_unpinned(Request("turn", placement=Placement.SERVER_CHOSEN), tokens_of(5000, 70)), "turn"
    )
    house.loop.pass_time(2.0)
    for _ in range(4):
        for op in house.server.pending[:]:
            if op.kind != "notice":
                house.server.serve(op)
        house.loop.pass_time(0.1)
    assert outcome(turn) is None
    assert [op.kind for op in house.server.pending] == ["notice"]
    house.finish()
    house.check_nothing_is_left()


def test_no_request_takes_a_first_step_during_an_exclusive_one(house: House) -> None:
    """Not before the server was seen to work on it."""
    turn = house.start(
        house.ask_unpinned(Request("turn", placement=Placement.SERVER_CHOSEN), tokens_of(5000, 70)), "turn"
    )
    house.loop.settle()
    later = house.start(house.ask(Request("later", tokens_of(1, 90))), "later")
    house.loop.settle()
    assert [op.kind for op in house.server.pending] == ["send"]
    assert house.dispatcher.n_waiting == 1
    house.server.serve(house.server.pending[0])
    house.loop.pass_time(1.0)
    assert house.dispatcher.n_waiting == 0, "the gate opens when it has landed, not when it ends"
    assert not turn.done()
    house.finish()
    assert outcome(turn) is None
    assert outcome(later) is None
    house.check_nothing_is_left()


def test_a_turn_waits_for_who_is_between_two_steps(house: House) -> None:
    """A slot that is leased but idle is one that a stranger could land in."""
    stepping = house.start(house.ask(Request("stepping", tokens_of(1, 500))), "stepping")
    house.loop.settle()
    house.start(
        house.ask_unpinned(Request("turn", placement=Placement.SERVER_CHOSEN), tokens_of(5000, 70)), "turn"
    )
    house.loop.settle()
    assert [op.kind for op in house.server.pending] == ["send"], "the prefill of the other one, and no more"
    while not stepping.done():
        house.server.serve(house.server.pending[0])
        house.loop.settle()
    house.finish()
    house.check_nothing_is_left()


def test_contexts_in_the_way_of_a_turn_are_saved_first(house: House) -> None:
    """Whatever it overwrites is found again."""
    own = [tokens_of(9000 * i, 500) for i in (1, 2)]
    for i in (0, 1):
        house.start(house.ask(Request(f"first {i}", own[i])), "first")
    house.finish()
    house.start(
        house.ask_unpinned(Request("turn", placement=Placement.SERVER_CHOSEN), tokens_of(5000, 70)), "turn"
    )
    house.start(house.ask(Request("two", tokens_of(100, 90), n_children=1)), "two")
    house.finish()
    before = house.server.n_computed
    for i in (0, 1):
        house.start(house.ask(Request(f"next {i}", own[i] + tokens_of(1, 2))), "next")
    house.finish()
    assert house.server.n_computed - before <= 2 * 3
    house.check_nothing_is_left()


def test_n_waits_for_as_many_idle_slots_as_it_needs(house: House) -> None:
    """llama-server would let it wait inside, and everybody behind it."""
    first = answering(house, Request("answering", tokens_of(1, 90)))
    two = house.start(house.ask(Request("two", tokens_of(5000, 90), n_children=1)), "two")
    house.loop.pass_time(3.0)
    assert not any(op.slot == 0 and op.kind == "send" for op in house.server.pending)
    house.finish()
    assert outcome(first) is None
    assert outcome(two) is None
    assert house.server.slots_[0].tokens == b"" or house.server.slots_[1].tokens == b"", (
        "a child's slot is cleared"
    )
    house.check_nothing_is_left()


def test_who_waits_for_an_owner_s_slot_in_a_turn_is_not_kept_waiting(house: House) -> None:
    """A slot that became a child's will not hold the context again: its owner takes it from the disk."""
    own = tokens_of(9000, 500)
    house.start(house.ask(Request("first", own)), "first")
    house.finish()
    two = house.start(house.ask(Request("two", tokens_of(100, 90), n_children=1)), "two")
    for _ in range(20):
        for op in [op for op in house.server.pending if op.kind != "answer"]:
            house.server.serve(op)
        house.loop.pass_time(0.3)
    assert not two.done()
    assert house.leases.table is not None
    assert all(slot.leased_by == "two" for slot in house.leases.table.slots)
    assert house.leases.table.view(Request("owner", own), 0.0, {}).shared == {}
    assert len(house.leases.table.model_snapshots.snapshots) == 1
    house.finish()
    house.check_nothing_is_left()


def test_a_prefill_of_another_pool_is_not_waited_for(house: House) -> None:
    """The slots are forgotten while a turn waits for a prefill, and the next table has one as well.

    Asking for that again and again, without letting the loop go on, kept a whole service still.
    """
    old = [house.start(house.ask(Request(f"old {i}", tokens_of(9000 * i, 500))), "old") for i in (1, 2)]
    house.loop.settle()
    turn = house.start(
        house.ask_unpinned(Request("turn", placement=Placement.SERVER_CHOSEN), tokens_of(5000, 70)), "turn"
    )
    house.loop.settle()
    new = house.start(house.ask(Request("new", tokens_of(7000, 500))), "new")
    house.loop.settle()
    house.dispatcher.detach("stub")
    house.loop.run(house.meet())
    house.loop.pass_time(2.0)
    assert isinstance(outcome(turn), BackendRestarted)
    house.finish()
    assert all(client.done() for client in old)
    assert new.done()
    house.check_nothing_is_left()


def test_a_turn_that_was_prepared_on_a_server_that_is_gone_sends_nothing(house: House) -> None:
    """The new one is met while the old one is asked for its slots: a stranger would land where nobody expects him."""
    real_slots = house.server.slots

    async def slots() -> list[SlotInfo]:
        infos = await real_slots()
        if not house.server.n_boots:
            house.restart()
            house.notice(is_down=False)
            await house.meet()
        return infos

    house.server.slots = slots  # type: ignore[method-assign]
    turn = house.start(
        house.ask_unpinned(Request("turn", placement=Placement.SERVER_CHOSEN), tokens_of(5000, 70)), "turn"
    )
    house.loop.settle()
    assert house.server.pending == []
    assert isinstance(outcome(turn), BackendRestarted)
    house.check_nothing_is_left()


def test_a_turn_finds_nothing_of_another_user_wherever_it_lands(house: House) -> None:
    """What idle slots hold of his is saved, and they are emptied first."""
    own = tokens_of(9000, 500)
    house.start(house.ask(Request("anna's", own, namespace=ANNA)), "anna's")
    house.finish()
    house.server.lands = lambda _: house.slots["anna's"]
    house.start(
        house.ask_unpinned(Request("bert's", placement=Placement.SERVER_CHOSEN, namespace=BERT), own),
        "bert's",
    )
    house.finish()
    assert house.server.n_computed == 2 * 500
    assert [snapshot.tokens for snapshot in house.catalog.snapshots.values()] == [own]
    house.check_nothing_is_left()


def test_a_turn_of_the_same_user_goes_on_from_what_is_there(house: House) -> None:
    """What is his own is left in its slot."""
    own = tokens_of(9000, 500)
    house.start(house.ask(Request("anna's", own, namespace=ANNA)), "anna's")
    house.finish()
    house.server.lands = lambda _: house.slots["anna's"]
    house.start(
        house.ask_unpinned(Request("again", placement=Placement.SERVER_CHOSEN, namespace=ANNA), own), "again"
    )
    house.finish()
    assert house.server.n_computed == 500 + 1
    house.check_nothing_is_left()


def test_a_turn_waits_for_the_answer_of_another_user(house: House) -> None:
    """It may end at any moment, and then llama-server could choose the slot with what is his in it."""
    theirs = answering(house, Request("anna's", tokens_of(1, 90), namespace=ANNA))
    own = Request("bert's", placement=Placement.SERVER_CHOSEN, namespace=BERT)
    turn = house.start(house.ask_unpinned(own, tokens_of(5000, 70)), "bert's")
    house.loop.pass_time(3.0)
    assert [op.kind for op in house.server.pending] == ["answer"]
    house.finish()
    assert outcome(theirs) is None
    assert outcome(turn) is None
    house.check_nothing_is_left()


def steered(house: House, job: Request) -> asyncio.Task[Any]:
    """A client of ``job``, whose prompt was computed but for one token, up to where it would be sent."""

    async def ask() -> None:
        with await house.dispatcher.lease(job) as lease:
            here = await house.executor.prepare(lease, lambda _: None)
            await house.exclusive.evict_competitors(lease, here)

    return house.start(ask(), job.id)


def test_nothing_is_sent_where_another_user_is_in_the_way_and_nothing_can_be_emptied(house: House) -> None:
    """llama-server would go on from what is his."""
    assert house.leases.table is not None
    house.start(house.ask(Request("anna's", tokens_of(9000, 500), namespace=ANNA)), "anna's")
    house.finish()
    house.leases.table.can_save = house.leases.table.can_erase = False
    client = steered(
        house, Request("bert's", tokens_of(9000, 499), namespace=BERT, placement=Placement.STEERED)
    )
    house.finish()
    assert isinstance(outcome(client), SlotNotEmptied)
    house.check_nothing_is_left()


@pytest.mark.parametrize(("user", "is_left"), [(BERT, False), (ANNA, True)], ids=["another's", "his own"])
def test_an_answer_that_another_user_has_guessed_is_not_found(
    house: House, user: Namespace, is_left: bool
) -> None:
    """Nobody knows the tokens of what a slot was answered: they may be those of the prompt that goes on with them."""
    prompt, answer = tokens_of(9000, 500), tokens_of(20_000, 60)
    house.start(house.ask(Request("anna's", prompt, namespace=ANNA), answer), "anna's")
    house.finish()
    steered(house, Request("guess", prompt + answer[:-4], namespace=user, placement=Placement.STEERED))
    house.finish()
    held = house.server.slots_[house.slots["anna's"]].tokens
    assert (held[: len(prompt)] == prompt) == is_left
    house.check_nothing_is_left()


def test_the_answer_that_another_user_gets_is_not_found_either(house: House) -> None:
    """Before who guesses it is sent it is through, and saved."""
    prompt = tokens_of(9000, 500)
    theirs = answering(house, Request("anna's", prompt, namespace=ANNA))
    guess = steered(
        house, Request("bert's", prompt + tokens_of(20_000, 30), namespace=BERT, placement=Placement.STEERED)
    )
    for _ in range(100):
        house.loop.settle()
        for op in [op for op in house.server.pending if op.kind != "answer"]:
            house.server.serve(op)
        house.loop.pass_time(0.7)
    assert not guess.done()
    house.finish()
    assert outcome(theirs) is None
    assert outcome(guess) is None
    assert not any(slot.tokens.startswith(prompt) and slot.namespace is ANNA for slot in house.server.slots_)
    house.check_nothing_is_left()


def talking(house: House, name: str, seconds: float) -> asyncio.Task[Any]:
    """A client of the user of that name, whose answer begins at once and takes so long."""
    user = User(f"key:{name}")
    job = Request(
        name, tokens_of(10_000 * (len(house.slots) + 1), 60), user=user, namespace=Namespace(user.id)
    )
    house.slots[name] = -1

    async def ask() -> None:
        with await house.dispatcher.lease(job) as lease:
            house.slots[name] = lease.slot_id
            lease.begin_request()
            lease.mark_processing()
            await asyncio.sleep(seconds)
            lease.finish(lease.content)

    return house.start(ask(), name)


@pytest.fixture
def isolated() -> Iterator[House]:
    """Three slots, for which requests wait as long as it takes. Nothing that is asked of the server takes time."""
    server = StubServer(3, pace=lambda _: 0.0)
    house = House(VirtualLoop(), server, limits=QueueLimits(return_grace_s=0.0))
    yield house
    house.close()


def test_others_go_on_while_a_turn_waits_for_the_answer_of_another_user(isolated: House) -> None:
    """Slots are free: for a minute nobody notices, and then for a while only."""
    house = isolated
    anna = talking(house, "anna", 600.0)
    house.loop.settle()
    turn = house.start(
        house.ask_unpinned(
            Request("turn", placement=Placement.SERVER_CHOSEN, namespace=BERT), tokens_of(5000, 70)
        ),
        "turn",
    )
    waited_s: list[float] = []
    while not anna.done():
        came = house.loop.time()
        other = talking(house, f"other {came}", 0.5)
        while not other.done():
            house.loop.pass_time(0.5)
        waited_s.append(house.loop.time() - came - 0.5)
        house.loop.pass_time(4.0)
    house.loop.pass_time(60.0)
    assert max(waited_s[:10]) < 1.0, "the gate is open"
    assert 5.0 < max(waited_s) < 600.0 / 3, "for a while it is shut"
    assert sum(waited_s) <= 600.0 / 2 + 5.0, "and for at least as long it is open"
    assert outcome(turn) is None
    house.check_nothing_is_left()


def test_an_exclusive_request_is_sent_though_others_are_always_at_work(isolated: House) -> None:
    """Answers that overlap leave no moment without: the gate is shut until the last one has ended."""
    house = isolated
    talking(house, "anna 0", 8.0)
    house.loop.settle()
    turn = house.start(
        house.ask_unpinned(
            Request("turn", placement=Placement.SERVER_CHOSEN, namespace=BERT), tokens_of(5000, 70)
        ),
        "turn",
    )
    for n in range(1, 20):
        house.loop.pass_time(5.0)
        talking(house, f"anna {n}", 8.0)
        house.loop.settle()
    house.loop.pass_time(30.0)
    assert outcome(turn) is None
    house.check_nothing_is_left()


def test_no_user_is_charged_for_waiting_for_the_exclusive_section(isolated: House) -> None:
    """While others' answers run, the one that waits has nothing."""
    house, bert = isolated, User("key:bert")
    talking(house, "anna", 50.0)
    house.loop.settle()
    job = Request("turn", placement=Placement.SERVER_CHOSEN, user=bert, namespace=BERT)
    turn = house.start(house.ask_unpinned(job, tokens_of(5000, 70)), "turn")
    house.loop.settle()
    had_s: list[float] = []
    took = house.dispatcher.queue._shares.took

    def noted(booked: Any, seconds: float) -> None:
        if booked.user == bert.id:
            had_s.append(seconds)
        took(booked, seconds)

    house.dispatcher.queue._shares.took = noted  # type: ignore[method-assign]
    house.loop.pass_time(60.0)
    assert outcome(turn) is None
    assert had_s
    assert sum(had_s) < 5.0
    house.check_nothing_is_left()
