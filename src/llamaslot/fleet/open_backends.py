"""Tells which backends of a pool a request may go to, and notifies the tasks that wait for changes on them.

What is asked at each request is counted once, and kept until a backend comes, goes, opens or closes: in a pool of 1,000
backends a loop over all of them takes 0.1 to 0.5 ms, and each placement made a dozen.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cached_property

from llamaslot.backend.leases import Leases
from llamaslot.backend.slot_table import SlotTable
from llamaslot.errors import BackendDown, BackendRestarted, LlamaslotError
from llamaslot.scheduling.request import Request

_MOST_NAMED = 8  # backends, in one error


class OpenBackends:
    """Connected backends, with what a placement asks of all of them. ``tables``: their slots by backend."""

    def __init__(self, leases: Iterable[Leases]) -> None:
        self.leases = [each for each in leases if each.table is not None]
        self.tables = {each.backend: each.table for each in self.leases if each.table is not None}
        self.is_assisted = any(table.is_assisted for table in self.tables.values())
        self.is_any_exclusive = any(each.exclusive is not None for each in self.leases)
        self.least_ctx = min((table.n_ctx for table in self.tables.values()), default=0)
        self.n_slots = sum(len(table.slots) for table in self.tables.values())
        self._n_idle_of = {name: table.n_idle for name, table in self.tables.items()}
        self.n_idle = sum(self._n_idle_of.values())

    def __bool__(self) -> bool:
        return bool(self.leases)

    @property
    def first(self) -> SlotTable:
        """The slots of any of the backends, of which there is at least one."""
        return next(iter(self.tables.values()))

    @property
    def most_idle(self) -> SlotTable:
        """The table with the most idle slots. There must be at least one table."""
        return max(self.tables.values(), key=lambda table: table.n_idle)

    @cached_property
    def libraries(self) -> list[list[SlotTable]]:
        """For each directory of snapshots, the tables of the backends that share it: they have the same snapshots."""
        groups = dict[int, list[SlotTable]]()
        for table in self.tables.values():
            groups.setdefault(id(table.model_snapshots), []).append(table)
        return [*groups.values()]

    def idle_changed(self, table: SlotTable) -> None:
        """A slot of ``table`` is idle now, or no longer."""
        if self.tables.get(table.backend) is table:
            self.n_idle += table.n_idle - self._n_idle_of[table.backend]
            self._n_idle_of[table.backend] = table.n_idle

    def check(self) -> None:
        """Raise AssertionError naming the invariant that does not hold."""
        n_idle = sum(table.n_idle for table in self.tables.values())
        assert self.n_idle == n_idle, f"idle slots are counted: {self.n_idle}, not {n_idle}"


class PoolBackends(dict[str, Leases]):
    """The leases of the backends of a pool, by name."""

    def __init__(self) -> None:
        super().__init__()
        self._connected: OpenBackends | None = None
        self._open: OpenBackends | None = None
        self._news: dict[str, None] = {}  # backends with changes that ``tell`` has not told, in their order
        self._has_waiting = False

    def changed(self) -> None:
        """A backend has come, gone, opened or closed."""
        self._connected = self._open = None

    def idle_changed(self, table: SlotTable) -> None:
        """A slot of ``table`` is idle now, or no longer."""
        for kept in (self._connected, self._open):
            if kept is not None:
                kept.idle_changed(table)

    def note_changes(self, *backends: str | None) -> None:
        """Record that ``tell`` must tell of a change on each of ``backends``; None is skipped."""
        self._news.update(dict.fromkeys(name for name in backends if name is not None))

    def note_queue(self, *, has_waiting: bool) -> None:
        """Record whether any request waits. A change of this is one on each backend that is loaded on demand, because
        its model is loaded or unloaded accordingly. All prefills need not decide again.
        """
        if has_waiting != self._has_waiting:
            self._has_waiting = has_waiting
            self.note_changes(*(name for name, leases in self.items() if leases.is_on_demand))

    def tell(self) -> None:
        """Notify the tasks that wait for changes on the backends noted since the last call. Each waiting prefill there
        then decides again if it is next. When all prefills on 40 backends were told of each change, this took half of
        the dispatcher's time.
        """
        news, self._news = self._news, {}
        for name in news:
            leases = self.get(name)
            if leases is not None and leases.changes.is_heard:
                leases.changes.notify()

    @property
    def connected(self) -> OpenBackends:
        """The backends that are connected, whether or not they accept requests."""
        if self._connected is None:
            self._connected = OpenBackends(self.values())
        return self._connected

    @property
    def open(self) -> OpenBackends:
        """The backends that accept a request now. Backends on which llamaslot stands aside are included only if it
        chooses slots on no connected backend. Suspect backends are included only if no other backend accepts requests,
        now or soon.
        """
        if self._open is None:
            self._open = OpenBackends(_open(self.values(), is_assisted=self.connected.is_assisted))
        return self._open

    def open_to(self, request: Request) -> OpenBackends:
        """Return the open backends that have not failed ``request``. If no other backend can take it, now or soon,
        return all open ones. If ``request`` is exclusive, backends that have an exclusive request already are left
        out, because a backend has at most one at a time.
        """
        here = self.open
        if request.avoids:
            others = [leases for leases in self.values() if leases.backend not in request.avoids]
            if any(leases.why_not is None for leases in others):
                here = OpenBackends(leases for leases in here.leases if leases in others)
        if request.is_exclusive and here.is_any_exclusive:
            here = OpenBackends(leases for leases in here.leases if leases.exclusive is None)
        return here

    def why_none(self, *, is_queued: bool) -> LlamaslotError | None:
        """Return the error for requests if there is no backend, or each is down or drained; else None. ``is_queued``:
        for requests that were accepted before; these wait until a drain has ended, unless a reload has removed the
        backend.
        """
        if self.open:
            return None
        if not self:
            return BackendRestarted("no backend serves this model any more")
        reasons = [why for leases in self.values() if (why := leases.why_not) is not None]
        may_return = any(leases.is_drained and not leases.is_removed for leases in self.values())
        if len(reasons) < len(self) or (is_queued and may_return):
            return None
        more = [f"and {len(reasons) - _MOST_NAMED} more"] if len(reasons) > _MOST_NAMED else []
        return BackendDown("; ".join([*reasons[:_MOST_NAMED], *more]))

    def check(self) -> None:
        """Raise AssertionError naming the invariant that does not hold."""
        for leases in self.values():
            leases.check()
        kept, self._open = self.open.leases, None
        assert kept == self.open.leases, "a backend tells when it opens or closes"
        self.connected.check()
        self.open.check()


def _open(backends: Collection[Leases], *, is_assisted: bool) -> list[Leases]:
    open_ = [
        leases
        for leases in backends
        if leases.table is not None and leases.table.is_assisted is is_assisted and leases.is_open
    ]
    if trusted := [leases for leases in open_ if not leases.is_suspect]:
        return trusted
    return [] if any(leases.is_coming for leases in backends) else open_
