"""Of many backends a placement looks closely at a few, and finds what it would find among all."""

from __future__ import annotations

import pytest

from llamaslot.backend.slot_table import SlotTable
from llamaslot.cache.content import Content
from llamaslot.cache.ids import pack
from llamaslot.fleet.dispatch_pass import worth_a_look
from llamaslot.scheduling.cost import Rates
from llamaslot.scheduling.placement import Rules
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.slots import SlotEvent

N = 40
RULES = Rules()


def tables(n_ctx: int = 16_384) -> list[SlotTable]:
    """Of one slot each, that holds a conversation of its own; the last one is used longest ago."""
    found = []
    for number in range(N):
        rates = Rates()
        rates.prefill.observe(0, 1000, 1.0)
        table = SlotTable(f"gpu{number}", 1, n_ctx, rules=RULES, rates=rates)
        holds(table, own(number), used_at=100.0 - number)
        found.append(table)
    return found


def own(number: int) -> bytes:
    return pack(range(1000 * number, 1000 * number + 900))


def holds(table: SlotTable, tokens: bytes, used_at: float) -> None:
    (slot,) = table.slots
    table.take(slot, Request("before", tokens), used_at, has_answer=True)
    event = SlotEvent.KEEP if tokens else SlotEvent.EMPTY
    table.give_back(slot, event, Content(tokens, is_exact=False, is_dirty=bool(tokens)), used_at)


def looked_at(every: list[SlotTable], tokens: bytes) -> list[str]:
    return [table.backend for table in worth_a_look(every, Request("r", tokens))]


@pytest.mark.parametrize("number", [0, 17, 39])
def test_the_one_that_holds_its_tokens_comes_first(number: int) -> None:
    """Wherever it stands; only a few others are looked at."""
    found = looked_at(tables(), own(number) + pack([1]))
    assert found[0] == f"gpu{number}"
    assert len(found) == 8


def test_a_new_conversation_sees_empty_slots_and_those_used_longest_ago() -> None:
    """As its placement would choose."""
    every = tables()
    holds(every[5], b"", used_at=200.0)
    found = looked_at(every, pack(range(90_000, 91_000)))
    assert {"gpu5", "gpu39", "gpu38", "gpu37"} <= set(found)


def test_a_faster_one_is_always_among_them() -> None:
    """It computes the prompt soonest."""
    every = tables()
    for _ in range(20):
        every[7].rates.prefill.observe(0, 1000, 0.1)
    assert "gpu7" in looked_at(every, pack(range(90_000, 91_000)))


def test_slots_that_are_too_small_are_left_out() -> None:
    """Unless all are."""
    small, large = tables(n_ctx=800)[:2], tables()[2:4]
    assert looked_at([*small, *large], own(0)) == ["gpu2", "gpu3"]
    assert looked_at(small, own(0)) == ["gpu0", "gpu1"]
