"""What is listed: snapshots in memory, when they were used, who holds them, and who goes first. No files, no awaits.

Times come in as arguments, in seconds of any one clock.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from llamaslot.cache.content import Kind
from llamaslot.scheduling.eviction import ByValue, Order, Standing
from llamaslot.scheduling.priority_heap import Rank, Ranking
from llamaslot.store.quota import Short
from llamaslot.store.sidecar import Snapshot


class Pin(AbstractContextManager[Snapshot]):
    """Keeps a snapshot's file, from its making (nothing may come between the look and the pin) until it is left.

    Leaving is idempotent. One that is forgotten holds for as long as the process lives: the collector unpins nothing.
    """

    def __init__(self, snapshot: Snapshot, release: Callable[[str], None]) -> None:
        self.snapshot = snapshot
        self._release: Callable[[str], None] | None = release

    def __enter__(self) -> Snapshot:
        return self.snapshot

    def __exit__(self, *_: object) -> None:
        if (release := self._release) is not None:
            self._release = None
            release(self.snapshot.id)


@dataclass(frozen=True, slots=True)
class Prospect:
    """A snapshot that might be saved. ``saves_s``: what it would save each time that it is asked for, against what
    there is on disk already; ``idle_s``: since its last use; ``after``: the snapshot that its conversation goes on
    from."""

    n_tokens: int
    size_bytes: int
    saves_s: float
    kind: Kind = Kind.LEAF
    idle_s: float = 0.0
    after: str | None = None


class Shelf:
    """``snapshots`` can be found, pinned and restored; ``condemned`` ones are dropped but still pinned.

    ``standings`` has when and how often each was used, by id of what is listed. ``order`` says who goes first, and
    learns from what comes back: only from snapshots of ``fingerprint``, the one that is valid now, once it is known.
    """

    def __init__(self, order: Order | None = None) -> None:
        self.order: Order = ByValue() if order is None else order
        self.snapshots: dict[str, Snapshot] = {}
        self.standings: dict[str, Standing] = {}
        self.condemned: dict[str, Snapshot] = {}
        self._fingerprint: str | None = None
        self._pins: Counter[str] = Counter()
        self._ranking = Ranking(self._rank)
        self._now = 0.0

    def __len__(self) -> int:
        """Files: also of what is condemned."""
        return len(self.snapshots) + len(self.condemned)

    @property
    def fingerprint(self) -> str | None:
        return self._fingerprint

    @fingerprint.setter
    def fingerprint(self, fingerprint: str | None) -> None:
        if fingerprint != self._fingerprint:
            self._fingerprint = fingerprint
            self._ranking.look_at_all()

    def add(
        self,
        snapshot: Snapshot,
        now: float,
        *,
        last_used: float | None = None,
        n_hits: int = 0,
        is_branched: bool = False,
    ) -> None:
        """List it. ``last_used`` is now if it is not given; what came before ``now`` is not learned from."""
        self._now = now
        used = now if last_used is None else last_used
        self.snapshots[snapshot.id] = snapshot
        self.standings[snapshot.id] = Standing(
            snapshot.id, snapshot.n_tokens, snapshot.size_bytes, snapshot.kind, used, now, n_hits, is_branched
        )
        self._ranking.put(snapshot.id)

    def hit(self, id_: str, now: float) -> None:
        """Asked for now. Raises KeyError for what is not listed."""
        standing = self.standings[id_]
        if self._is_valid(id_):
            self.order.hit(standing, now)
        standing.n_hits += 1
        standing.is_branched = False
        standing.last_used = standing.counted_until = now
        self._look_again(id_, now)

    def branch(self, id_: str, now: float) -> None:
        """Its conversation goes on without it, from an earlier point. Raises KeyError for what is not listed."""
        standing = self.standings[id_]
        if self._is_valid(id_):
            self.order.passed(standing, now)
        standing.is_branched = True
        self._look_again(id_, now)

    def inherit(self, id_: str, from_id: str, now: float) -> None:
        """One goes further in the same conversation as the other: how often that came back is known of both."""
        self.standings[id_].n_hits += self.standings[from_id].n_hits
        self._look_again(id_, now)

    def take(self, id_: str, now: float) -> bool:
        """No longer listed. True if its files may go at once; False if a pin holds them until ``unpin`` says so."""
        if self._is_valid(id_):
            self.order.gone(self.standings[id_], now)
        snapshot = self.snapshots.pop(id_)
        del self.standings[id_]
        self._ranking.drop(id_)
        if self._pins[id_]:
            self.condemned[id_] = snapshot
            return False
        return True

    def mark(self, id_: str, kind: Kind, is_pinned: bool) -> Snapshot:
        """It is kept for something else. Raises KeyError for what is not listed."""
        self.snapshots[id_] = replace(self.snapshots[id_], kind=kind, is_pinned=is_pinned)
        self.standings[id_].kind = kind
        self._ranking.put(id_)
        return self.snapshots[id_]

    def pin(self, id_: str) -> Snapshot:
        """Raises KeyError for what is not listed."""
        snapshot = self.snapshots[id_]
        self._pins[id_] += 1
        return snapshot

    def unpin(self, id_: str) -> Snapshot | None:
        """The snapshot whose files may go now, if this was the last pin of a condemned one."""
        self._pins[id_] -= 1
        if self._pins[id_]:
            return None
        del self._pins[id_]
        return self.condemned.pop(id_, None)

    # -- who goes ------------------------------------------------------------------------------------------------

    def tend(self, now: float) -> None:
        """Learn from the time that has passed, and look at some ranks again. Called before each choice."""
        self._now = now
        due = self._ranking.turn()
        for id_ in due:
            if self._is_valid(id_):
                self.order.passed(self.standings[id_], now)
        # Only when all is learned: else the first would be ranked by other rates than the last.
        for id_ in due:
            self._ranking.put(id_)

    def victims(self, short_bytes: int, n_short: int, keep: Collection[str], now: float) -> list[Snapshot]:
        """Who goes for ``short_bytes`` bytes and ``n_short`` files; together they may have less, and nobody goes who
        is not needed. Neither ``keep`` nor what is held.

        A pin in its sidecar holds a snapshot as long as it is of use: not once another model is served.
        """
        self._now = now
        victims: list[Snapshot] = []
        over_bytes, n_over = -short_bytes, -n_short
        if over_bytes >= 0 and n_over >= 0:
            return victims
        with contextlib.closing(self._ranking.least_first()) as ranked:
            for id_ in ranked:
                snapshot = self.snapshots[id_]
                if self._is_held(snapshot) or id_ in keep:
                    continue
                victims.append(snapshot)
                over_bytes += snapshot.size_bytes
                n_over += 1
                if over_bytes >= 0 and n_over >= 0:
                    break
        for snapshot in reversed(victims[:-1]):  # what comes later may have made it needless
            if snapshot.size_bytes <= over_bytes and n_over > 0:
                victims.remove(snapshot)
                over_bytes -= snapshot.size_bytes
                n_over -= 1
        return victims

    def loss(self, victims: Collection[Snapshot], now: float) -> float:
        """What would be lost with them, as ``order`` counts it; those of another model are no loss."""
        lost = (
            self.order.worth(self.standings[victim.id], now)
            for victim in victims
            if self._is_valid(victim.id)
        )
        return math.fsum(lost)

    def would_gain(self, prospect: Prospect, short: Short, keep: Collection[str], now: float) -> float:
        """The worth of what would be saved, less that of all that would be evicted for it: seconds saved per second.

        Below 0 it is better not saved; minus infinity when there would be no room even so. Changes nothing.
        """
        victims = self.victims(*short, keep, now)
        if not short.is_met_by(victims):
            return -math.inf
        before = self.standings.get(prospect.after or "")
        n_hits = before.n_hits if before is not None else 0
        standing = Standing(
            "", prospect.n_tokens, prospect.size_bytes, prospect.kind, now - prospect.idle_s, now, n_hits
        )
        return self.order.worth(standing, now, prospect.saves_s) - self.loss(victims, now)

    def _is_held(self, snapshot: Snapshot) -> bool:
        is_other = self.fingerprint is not None and snapshot.fingerprint != self.fingerprint
        return snapshot.id in self._pins or (snapshot.is_pinned and not is_other)

    def _is_valid(self, id_: str) -> bool:
        return self.fingerprint is not None and self.snapshots[id_].fingerprint == self.fingerprint

    def _rank(self, id_: str) -> Rank:
        """Smallest goes first: what another fingerprint made, then as ``order`` says, then what was used first."""
        standing = self.standings[id_]
        return self._is_valid(id_), self.order.rank(standing, self._now), standing.last_used, id_

    def _look_again(self, id_: str, now: float) -> None:
        self._now = now
        self._ranking.put(id_)

    def known(self) -> set[str]:
        """The ids whose files are accounted for here."""
        return self.snapshots.keys() | self.condemned.keys()

    def check(self) -> None:
        """Raises AssertionError naming the invariant."""
        assert self.standings.keys() == self.snapshots.keys(), "standings and snapshots differ"
        assert len(self._ranking) == len(self.snapshots), "not everything is ranked"
        assert self.condemned.keys() <= self._pins.keys(), "condemned without a pin"
        assert not self.snapshots.keys() & self.condemned.keys(), "listed and condemned"
        assert all(n > 0 for n in self._pins.values()), "pins that hold nothing"
