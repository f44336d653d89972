"""Which backends a request may go to, and what is found out while the waiting requests are looked at, one after the
other.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence

from msgspec import Struct, field

from llamaslot.backend.leases import Leases
from llamaslot.backend.slot_table import SlotTable
from llamaslot.errors import BackendDown, BackendRestarted, LlamaslotError
from llamaslot.scheduling.plan import Wait
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.slots import SlotKey

_N_NEAREST, _N_OTHERS = 4, 4
_MOST_NAMED = 8  # backends, in one error


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


def open_backends(backends: Collection[Leases]) -> list[Leases]:
    """The backends that accept a request now. Those on which llamaslot does not choose slots, and those that may hang,
    only if there are no others, now or soon.
    """
    attached = [leases for leases in backends if leases.table is not None]
    assisted = [leases for leases in attached if leases.table is not None and leases.table.is_assisted]
    open_ = [leases for leases in assisted or attached if leases.is_open]
    if trusted := [leases for leases in open_ if not leases.is_suspect]:
        return trusted
    return [] if any(leases.is_coming for leases in backends) else open_


def open_to(request: Request, open_: list[Leases], backends: Collection[Leases]) -> list[Leases]:
    """Those of ``open_`` that have not failed the request; all if no other backend can take it, now or soon."""
    if not request.avoids:
        return open_
    others = [leases for leases in backends if leases.backend not in request.avoids]
    is_possible = any(leases.why_not is None for leases in others)
    return [leases for leases in open_ if leases in others] if is_possible else open_


def why_none(backends: Collection[Leases], *, is_queued: bool) -> LlamaslotError | None:
    """The error for requests if each backend is down or drained. ``is_queued``: for those that were accepted before:
    they outlast a drain.
    """
    if not backends:
        return BackendRestarted("no backend serves this model any more")
    reasons = [why for leases in backends if (why := leases.why_not) is not None]
    if len(reasons) < len(backends) or (is_queued and any(leases.is_drained for leases in backends)):
        return None
    more = [f"and {len(reasons) - _MOST_NAMED} more"] if len(reasons) > _MOST_NAMED else []
    return BackendDown("; ".join([*reasons[:_MOST_NAMED], *more]))


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
