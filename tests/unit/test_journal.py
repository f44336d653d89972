"""What is noted of each decision, and the line that explains it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from bench.virtual import VirtualLoop
from llamaslot.observe.journal import KEPT, Act, Decision, Journal, Option, Waited, explain
from llamaslot.scheduling.request import Request, User
from llamaslot.scheduling.slots import SlotKey
from tests.support.house import House, tokens_of
from tests.support.stub import Op, StubServer

ON_DISK = Option(SlotKey("gpu0", 2), "snapshot", 30_811, "ls-1", {"restore": 0.6, "prefill": 0.3})
RESIDENT = Option(SlotKey("gpu0", 0), "resident", 900, None, {"evict": 2.0, "prefill": 10.4})


@pytest.fixture
def house() -> Iterator[House]:
    """Two slots, and a server that computes at once and talks for ten seconds. Computing is believed to be so dear
    that waiting is always cheaper."""

    def pace(op: Op) -> float:
        return 10.0 if op.kind == "answer" else 0.01

    house = House(VirtualLoop(), StubServer(2, pace=pace, token_s=1.0))
    house.rates.prefill.observe(0, 1000, 1000.0)
    yield house
    house.close()


def decisions(house: House) -> list[Decision]:
    """The oldest first."""
    return list(house.dispatcher.journal.latest())[::-1]


# -- one line ------------------------------------------------------------------------------------------------------


def test_a_place_is_explained_from_its_numbers() -> None:
    """Where, from what, the terms of its cost, and what else there was."""
    decision = Decision("req-12", 0.0, 31_200, ON_DISK, RESIDENT, slot=SlotKey("gpu0", 2))
    assert explain(decision) == (
        "req-12 31,200 tok -> slot gpu0/2 from snapshot ls-1: 30,811 reused; cost 0.9 s = restore 0.6 + prefill 0.3;"
        " next best slot gpu0/0 resident 12.4 s"
    )


def test_a_wait_is_explained_by_what_it_saves() -> None:
    """For which slot, how long, and what a place that can be had at once would cost."""
    busy = Option(SlotKey("gpu0", 1), "resident", 30_000, None, {"wait": 3.0, "prefill": 0.3})
    wait = Waited(busy, Option(SlotKey("gpu0", 0), "cold", 0, None, {"save": 0.25, "prefill": 12.0}), 3.0)
    assert explain(Decision("req-3", 0.0, 31_200, waits=[wait])) == (
        "req-3 31,200 tok waits for slot gpu0/1 resident: 30,000 reused; cost 3.3 s = wait 3.0 + prefill 0.3;"
        " at once it is slot gpu0/0 cold 12.2 s = save 0.25 + prefill 12.0"
    )


def test_a_save_of_our_own_is_explained() -> None:
    """What was written, how large it is and how long it took."""
    act = Act("save", 0.4, True, 9000, 312_000_000, "ls-7", waited_s=0.1)
    assert explain(Decision("idle-save-3", 0.0, 9000, slot=SlotKey("gpu0", 1), acts=[act])) == (
        "idle-save-3 9,000 tok in slot gpu0/1: save ls-7, 298 MiB in 0.4 s after waiting 0.1 s"
    )


def test_only_the_last_decisions_are_kept() -> None:
    """A ring: the oldest go."""
    journal = Journal(clock=lambda: 1.0)
    for i in range(KEPT + 5):
        journal.begin(f"req-{i}", 1)
    assert len(journal) == KEPT
    assert [decision.id for decision in journal.latest(2)] == [f"req-{KEPT + 4}", f"req-{KEPT + 3}"]


# -- what is noted -------------------------------------------------------------------------------------------------


def test_what_was_expected_and_what_was_reused_are_noted(house: House) -> None:
    """With the place that was chosen, and the one that was not."""
    house.start(house.ask(Request("first", tokens_of(0, 600))), "first")
    house.finish()
    house.start(house.ask(Request("second", tokens_of(0, 700), user=User("key:anna"))), "second")
    house.finish()
    first, second = decisions(house)
    assert (first.user, second.user) == ("", "key:anna")
    assert first.chosen is not None
    assert (first.chosen.source, first.n_expected, first.n_reused) == ("cold", 0, 0)
    assert second.chosen is not None
    assert second.next_best is not None
    assert (second.chosen.source, second.n_expected, second.n_reused) == ("resident", 600, 600)
    assert second.slot == first.slot == second.chosen.slot != second.next_best.slot
    assert second.chosen.cost_s < second.next_best.cost_s


def test_a_wait_is_noted_with_its_reason_and_its_length(house: House) -> None:
    """Two askers of one context: the second waits for the slot of the first, and its wait is one entry."""
    for name in ("first", "second"):
        house.start(house.ask(Request(name, tokens_of(0, 600))), name)
        house.loop.pass_time(1.0)
    house.finish()
    second = decisions(house)[1]
    (wait,) = second.waits
    assert second.chosen is not None
    assert wait.instead is not None
    assert (wait.what.slot, wait.instead.source) == (second.slot, "cold")
    assert wait.what.cost_s < wait.instead.cost_s
    assert wait.seconds == pytest.approx(second.queued_s)
    assert second.queued_s > 0


def test_a_wait_that_was_given_up_has_an_end(house: House) -> None:
    """Its client has gone: nobody waits any more."""
    house.start(house.ask(Request("first", tokens_of(0, 600))), "first")
    house.loop.pass_time(1.0)
    gone = house.start(house.ask(Request("gone", tokens_of(0, 600))), "gone")
    house.loop.settle()
    gone.cancel()
    house.finish()
    (decision,) = [decision for decision in decisions(house) if decision.id == "gone"]
    assert decision.chosen is None
    assert decision.waits[0].seconds is not None


def test_saves_and_restores_are_noted(house: House) -> None:
    """A save of our own is an entry, one for a request stands in the request's."""
    house.start(house.ask(Request("mine", tokens_of(0, 600))), "mine")
    house.finish()
    house.loop.run_until_complete(house.keep_one_on_disk())
    house.start(house.ask(Request("again", tokens_of(0, 700))), "again")
    house.finish()
    acts = {decision.id: decision.acts for decision in decisions(house)}
    (saved,), again = acts["idle-save-1"], acts["again"]
    assert [act.step for act in again] == ["save", "restore", "prefill"]
    assert saved.snapshot == again[1].snapshot
    assert (saved.n_tokens, again[1].n_tokens, again[2].n_tokens) == (600, 600, 99)


def test_a_save_that_failed_is_noted_as_such(house: House) -> None:
    """It took place, and brought nothing."""
    house.catalog.room = 0
    house.start(house.ask(Request("mine", tokens_of(0, 600))), "mine")
    house.finish()
    house.loop.run_until_complete(house.idle_save.save_all())
    (act,) = decisions(house)[-1].acts
    assert (act.step, act.is_done, act.snapshot) == ("save", False, None)


def test_each_decision_is_one_line_at_debug(house: House, caplog: pytest.LogCaptureFixture) -> None:
    """The line that explains it."""
    caplog.set_level(logging.DEBUG, "llamaslot.observe.journal")
    house.start(house.ask(Request("first", tokens_of(0, 600))), "first")
    house.finish()
    assert [record.getMessage() for record in caplog.records] == [explain(decisions(house)[0])]


def test_what_is_noted_is_json(house: House) -> None:
    """All that is served, with its explanation."""
    house.start(house.ask(Request("first", tokens_of(0, 600))), "first")
    house.finish()
    (decision,) = decisions(house)
    told = json.loads(json.dumps(decision.to_json()))
    assert told["text"] == explain(decision)
    assert told["chosen"]["cost_s"] == pytest.approx(sum(told["chosen"]["terms"].values()))
