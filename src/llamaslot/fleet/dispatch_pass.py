"""Which backends a request may go to, and what is found out while the waiting requests are looked at, one after the
other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from msgspec import Struct, field

from llamaslot.backend.leases import Leases
from llamaslot.errors import BackendDown, BackendRestarted, LlamaslotError
from llamaslot.scheduling.plan import Wait
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.slots import SlotKey

_MOST_NAMED = 8  # backends, in one error
_FEW = 8  # up to so many all are told of each change


class DispatchPass(Struct):
    """One pass over all waiting requests: what is found out on the way, for those that come later in it."""

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
        """Record that a request waits, and dispatch again in ``look_in_s``. ``answer_s``: the seconds that its answer
        will take.
        """
        if decision.slot is not None:
            steps_s = decision.place.cost.steps_s if decision.place is not None else 0.0
            self.reserved[decision.slot] = self.reserved.get(decision.slot, 0.0) + steps_s + answer_s
        if decision.for_s is None:
            self.is_short = True
        else:
            self.again_s.append(max(look_in_s, 0.0))


class News:
    """The backends on which something has changed since those that wait for that were told.

    Of many only these are told: each prefill looks again whose turn it is. Told of every change anywhere, those on 40
    backends took half of the dispatcher's time.
    """

    def __init__(self, backends: Mapping[str, Leases]) -> None:
        self._backends = backends
        self._changed: dict[str, None] = {}  # in their order

    def add(self, *backends: str | None) -> None:
        """Something has changed on ``backends``; None is left out."""
        self._changed.update(dict.fromkeys(name for name in backends if name is not None))

    def tell(self) -> None:
        """Tell those that wait for changes of these backends, of few backends those of all."""
        changed, self._changed = self._changed, {}
        for name in changed if len(self._backends) > _FEW else [*self._backends]:
            leases = self._backends.get(name)
            if leases is not None and leases.changes.is_heard:
                leases.changes.notify()


def open_backends(backends: Collection[Leases]) -> list[Leases]:
    """The backends that accept a request now. Backends on which llamaslot does not choose slots, and backends that may
    hang, are included only if there are no others, now or soon.
    """
    open_, is_assisted = list[Leases](), False
    for leases in backends:  # in one loop: with 100 backends it is run several times for each request
        if (table := leases.table) is None:
            continue
        if table.is_assisted and not is_assisted:
            is_assisted = True
            open_.clear()
        if table.is_assisted is is_assisted and leases.is_open:
            open_.append(leases)
    if trusted := [leases for leases in open_ if not leases.is_suspect]:
        return trusted
    return [] if any(leases.is_coming for leases in backends) else open_


def open_to(request: Request, open_: list[Leases], backends: Collection[Leases]) -> list[Leases]:
    """Of the backends in ``open_``, those that have not failed the request; all of them if no other backend can take
    it, now or soon.
    """
    if not request.avoids:
        return open_
    others = [leases for leases in backends if leases.backend not in request.avoids]
    is_possible = any(leases.why_not is None for leases in others)
    return [leases for leases in open_ if leases in others] if is_possible else open_


def why_none(backends: Collection[Leases], *, is_queued: bool) -> LlamaslotError | None:
    """The error for requests when each backend is down or drained. ``is_queued``: for requests that were accepted
    before, which outlast a drain.
    """
    if not backends:
        return BackendRestarted("no backend serves this model any more")
    reasons = [why for leases in backends if (why := leases.why_not) is not None]
    if len(reasons) < len(backends) or (is_queued and any(leases.is_drained for leases in backends)):
        return None
    more = [f"and {len(reasons) - _MOST_NAMED} more"] if len(reasons) > _MOST_NAMED else []
    return BackendDown("; ".join([*reasons[:_MOST_NAMED], *more]))
