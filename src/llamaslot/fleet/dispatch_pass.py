"""What is found out while the waiting requests are looked at, one after the other."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from msgspec import Struct, field

from llamaslot.backend.slot_table import SlotTable
from llamaslot.scheduling.plan import Wait
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.slots import SlotKey

_N_NEAREST, _N_OTHERS = 4, 4


class DispatchPass(Struct):
    """One pass over all waiting requests."""

    # Counted again only after a slot was leased: otherwise 250 waiting for 64 slots are 16,000 checks.
    n_idle: int
    n_slots: int
    # Slots that requests wait for, and for how many seconds they will use them.
    reserved: dict[SlotKey, float] = field(default_factory=dict)
    again_s: list[float] = field(default_factory=list)  # seconds until the next dispatch
    n_behind: int = 0  # requests that leave the last idle slot to others
    is_short: bool = False  # an earlier request waits for any slot at all
    is_spared: bool = False  # an idle slot is denied to a request

    def waits(self, decision: Wait, look_in_s: float, answer_s: float) -> None:
        """Record that a request waits, and dispatch again in ``look_in_s``. ``answer_s``: seconds that its answer
        will take.
        """
        if decision.slot is not None:
            steps_s = decision.place.cost.steps_s if decision.place is not None else 0.0
            self.reserved[decision.slot] = self.reserved.get(decision.slot, 0.0) + steps_s + answer_s
        if decision.for_s is None:
            self.is_short = True
        else:
            self.again_s.append(max(look_in_s, 0.0))


def worth_a_look(tables: Sequence[SlotTable], request: Request) -> Sequence[SlotTable]:
    """The tables that ``request`` may be placed on. A view of one takes 0.1 ms, so of many backends only some are
    looked at: those whose slots share most with it, and of those with an idle slot the ones that would compute it
    soonest, with an empty slot and used longest ago first. None whose slots are too small for the prompt, if others are
    large enough: backends of one model may have different contexts.
    """
    if len(tables) < 2:
        return tables
    tables = [table for table in tables if table.n_ctx > request.n_tokens] or tables
    if len(tables) <= _N_NEAREST + _N_OTHERS:
        return tables
    shared = {table.backend: _n_shared(table, request) for table in tables}

    def loss(table: SlotTable) -> tuple[float, float]:
        seconds = table.rates.prefill.seconds(0, request.n_tokens)
        # An empty slot has never been used, or is the oldest.
        return round(seconds, 2), min(
            slot.used_at if slot.content.n_tokens else 0 for slot in table.slots if slot.is_idle
        )

    nearest = heapq.nlargest(_N_NEAREST, tables, key=lambda table: (shared[table.backend], table.n_idle > 0))
    others = (table for table in tables if table.n_idle and table not in nearest)
    return [*nearest, *heapq.nsmallest(_N_OTHERS, others, key=loss)]


def _n_shared(table: SlotTable, request: Request) -> int:
    hits = table.residents.match(request.tokens, request.reads, 1)
    return hits[0].n_shared if hits else 0
