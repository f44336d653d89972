"""Tells which backends a request may go to, and keeps what is found out while the waiting requests are looked at one
after the other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from msgspec import Struct, field

from llamaslot.backend.leases import Leases
from llamaslot.errors import BackendDown, BackendRestarted, LlamaslotError
from llamaslot.scheduling.plan import Wait
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.slots import SlotKey

_MOST_NAMED = 8  # an error names at most so many backends
_FEW = 8  # with at most so many backends, those that wait on any of them are told of each change


class DispatchPass(Struct):
    """One pass over all waiting requests. It keeps what is found out for one request for the requests after it."""

    # Counted again only after a slot was leased. Otherwise 250 requests that wait for 64 slots cause 16,000 checks.
    n_idle: int
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

    Of many backends, only the tasks that wait on these are told. Each waiting prefill then decides again if it is
    next. When all prefills on 40 backends were told of each change, this took half of the dispatcher's time.
    """

    def __init__(self, backends: Mapping[str, Leases]) -> None:
        self._backends = backends
        self._changed: dict[str, None] = {}  # in the order of the changes

    def add(self, *backends: str | None) -> None:
        """Record a change on each of ``backends``; None is skipped."""
        self._changed.update(dict.fromkeys(name for name in backends if name is not None))

    def tell(self) -> None:
        """Notify the tasks that wait for changes on these backends. With few backends, notify the tasks on all."""
        changed, self._changed = self._changed, {}
        for name in changed if len(self._backends) > _FEW else [*self._backends]:
            leases = self._backends.get(name)
            if leases is not None and leases.changes.is_heard:
                leases.changes.notify()


def open_backends(backends: Collection[Leases]) -> list[Leases]:
    """Return the backends that accept a request now. Backends on which llamaslot stands aside are included only if it
    chooses slots on no connected backend. Suspect backends are included only if no other backend accepts requests, now
    or soon.
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
    """Return the backends in ``open_`` that have not failed ``request``. If no other backend can take it, now or soon,
    return ``open_``.
    """
    if not request.avoids:
        return open_
    others = [leases for leases in backends if leases.backend not in request.avoids]
    is_possible = any(leases.why_not is None for leases in others)
    return [leases for leases in open_ if leases in others] if is_possible else open_


def why_none(backends: Collection[Leases], *, is_queued: bool) -> LlamaslotError | None:
    """Return the error for requests if there is no backend, or each is down or drained; else None. ``is_queued``: for
    requests that were accepted before; these wait until a drain has ended.
    """
    if not backends:
        return BackendRestarted("no backend serves this model any more")
    reasons = [why for leases in backends if (why := leases.why_not) is not None]
    if len(reasons) < len(backends) or (is_queued and any(leases.is_drained for leases in backends)):
        return None
    more = [f"and {len(reasons) - _MOST_NAMED} more"] if len(reasons) > _MOST_NAMED else []
    return BackendDown("; ".join([*reasons[:_MOST_NAMED], *more]))
