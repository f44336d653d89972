"""Keeps what is found out while the waiting requests are looked at one after the other, and tells of it afterwards."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct, field

from llamaslot.backend.leases import Leases
from llamaslot.scheduling.plan import Wait
from llamaslot.scheduling.slots import SlotKey


class DispatchPass(Struct):
    """One pass over all waiting requests. It keeps what is found out for one request for the requests after it."""

    n_slots: int
    # By slot that requests wait for: the seconds for which these requests will use it.
    reserved: dict[SlotKey, float] = field(default_factory=dict)
    again_s: list[float] = field(default_factory=list)  # seconds until the next dispatch
    n_behind: int = 0  # long prompts that leave the last idle slot to other requests
    is_short: bool = False  # an earlier request would take any slot, and got none
    is_spared: bool = False  # fairness has denied an idle slot to a request

    def waits(self, decision: Wait, look_in_s: float, answer_s: float) -> None:
        """Record that a request waits as in ``decision``, and must be placed again in ``look_in_s`` seconds.
        ``answer_s``: the seconds that its answer will take.
        """
        if decision.slot is not None:
            steps_s = decision.place.cost.steps_s if decision.place is not None else 0.0
            self.reserved[decision.slot] = self.reserved.get(decision.slot, 0.0) + steps_s + answer_s
        if decision.for_s is None:
            self.is_short = True
        else:
            self.again_s.append(max(look_in_s, 0.0))


class News:
    """The backends on which something has changed since the tasks that wait for changes were last told.

    Only the tasks that wait on these are told. Each waiting prefill then decides again if it is next. When all
    prefills on 40 backends were told of each change, this took half of the dispatcher's time.
    """

    def __init__(self, backends: Mapping[str, Leases]) -> None:
        self._backends = backends
        self._changed: dict[str, None] = {}  # in the order of the changes
        self._has_waiting = False

    def add(self, *backends: str | None) -> None:
        """Record a change on each of ``backends``; None is skipped."""
        self._changed.update(dict.fromkeys(name for name in backends if name is not None))

    def note_queue(self, *, has_waiting: bool) -> None:
        """Record whether any request waits. A change of this is one on each backend that is loaded on demand, because
        its model is loaded or unloaded accordingly. All prefills need not decide again.
        """
        if has_waiting != self._has_waiting:
            self._has_waiting = has_waiting
            self.add(*(name for name, leases in self._backends.items() if leases.is_on_demand))

    def tell(self) -> None:
        """Notify the tasks that wait for changes on these backends."""
        changed, self._changed = self._changed, {}
        for name in changed:
            leases = self._backends.get(name)
            if leases is not None and leases.changes.is_heard:
                leases.changes.notify()
