"""What is found out while the waiting requests are looked at, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field

from llamaslot.backend.slot_table import SlotTable
from llamaslot.records import dataclass
from llamaslot.scheduling.plan import Wait
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.slots import SlotKey


@dataclass(slots=True)
class DispatchPass:
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


def large_enough(tables: Sequence[SlotTable], request: Request) -> Sequence[SlotTable]:
    """The tables whose slots hold the prompt, if any do: backends of one model may have different contexts."""
    if len(tables) < 2:
        return tables
    return [table for table in tables if table.n_ctx > request.n_tokens] or tables
