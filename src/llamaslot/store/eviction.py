"""Decides which snapshots of a directory are evicted. Touches no files and never awaits. Times come in as arguments, in
seconds of any one clock.

Who does what in an eviction:

1. ``Quota`` decides *when*, and how much: before a reservation that does not fit. ``beyond_limits`` does so at the
   start and after a change of limits.
2. ``scheduling/snapshot_value.py`` says what a snapshot is worth. ``_rank`` puts snapshots of models that no backend
   serves before all others.
3. ``victims`` chooses in that order, and passes over what *must stay now*: snapshots that are pinned (``_must_stay``),
   and those in ``keep``. These are ids that the save names, and, as long as others are enough, ``spare``: the snapshots
   that queued requests need (``Catalog.reserve``).
4. ``Catalog._drop`` unlists the victims. ``Quota.remove`` unlinks those of their files that no other snapshot needs.
5. In a shared store, ``shared_store.Neighbours`` also evicts snapshots of other llamaslots, by last use, not by value.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from itertools import islice
from typing import Any

from llamaslot.scheduling.snapshot_value import ByValue, Order, SnapshotStats
from llamaslot.store.file_references import Departure, FileReferences
from llamaslot.store.quota import Deficit, Quota
from llamaslot.store.snapshot import Snapshot

Rank = tuple[Any, ...]


class Eviction:
    """Ranks the snapshots of one directory, and chooses those to evict. ``snapshots``, ``stats`` (usage by id),
    ``files`` and ``pins`` (number by id) are those of the ``SnapshotTable``, which tells of each change.

    ``order`` ranks snapshots by value, and learns hit rates from those of the models that backends serve, which
    ``fingerprints`` name.
    """

    def __init__(
        self,
        snapshots: Mapping[str, Snapshot],
        stats: Mapping[str, SnapshotStats],
        files: FileReferences,
        pins: Mapping[str, int],
        order: Order | None,
    ) -> None:
        self.order: Order = ByValue() if order is None else order
        self._snapshots, self._stats, self._files, self._pins = snapshots, stats, files, pins
        self._fingerprints = frozenset[str]()
        self._ranking = Ranking(self._rank)
        self._now = 0.0

    def __len__(self) -> int:
        """The number of snapshots that may be ranked."""
        return len(self._ranking)

    @property
    def fingerprints(self) -> frozenset[str]:
        return self._fingerprints

    @fingerprints.setter
    def fingerprints(self, fingerprints: frozenset[str]) -> None:
        if fingerprints != self._fingerprints:
            self._fingerprints = fingerprints
            self._ranking.recompute_all()

    # -- changes -------------------------------------------------------------------------------------------------

    def changed(self, id_: str, now: float | None = None) -> None:
        """Rank a snapshot that is new, or whose size or usage has changed, at the time ``now``; None: the last time."""
        self._now = self._now if now is None else now
        self._ranking.put(id_)

    def add_many(self, ids: Collection[str], now: float) -> None:
        """Add the snapshots of a whole directory. Ranking takes 20 us for each: ``rank_some`` does it in portions, or
        ``victims`` when it needs the order.
        """
        self._now = now
        self._ranking.add_many(ids)

    def rank_some(self, n: int) -> bool:
        """Rank ``n`` of the snapshots that ``add_many`` has added. Returns True if more of them are unranked."""
        return self._ranking.rank_some(n)

    def learn(self, event: Callable[[SnapshotStats, float], None], id_: str, now: float) -> None:
        """Call ``event``, a method of ``order``, with the usage of a snapshot before a change, if a backend serves its
        model.
        """
        if self._is_served(id_):
            event(self._stats[id_], now)

    def forget(self, id_: str) -> None:
        """Remove a snapshot that is no longer listed."""
        self._ranking.drop(id_)

    def tend(self, now: float) -> None:
        """Let ``order`` learn from the time that has passed, for some of the snapshots, and rank these anew. Called
        before each reservation.
        """
        self._now = now
        due = self._ranking.turn()
        for id_ in due:
            self.learn(self.order.passed, id_, now)
        # Rank only after all have been learned from: else the first rank would use other rates than the last.
        for id_ in due:
            self._ranking.put(id_)

    # -- the choice ----------------------------------------------------------------------------------------------

    def beyond_limits(self, quota: Quota, now: float) -> list[Snapshot]:
        """The snapshots to evict so that the limits hold (bytes, number of files, free space on the disk), although
        nothing is to be saved. If the disk would be too full even without them, free space does not count.
        """
        victims = self.enough(quota.short(), (), now)
        return victims if victims is not None else self.victims(*quota.short_of_quota(), (), now)

    def enough(self, short: Deficit, keep: Collection[str], now: float) -> list[Snapshot] | None:
        """Choose as ``victims`` does; None if all that may go are not enough."""
        victims = self.victims(*short, keep, now)
        return victims if short.is_met_by(self._files.freed_bytes(victims), len(victims)) else None

    def victims(self, short_bytes: int, n_short: int, keep: Collection[str], now: float) -> list[Snapshot]:
        """Choose the snapshots to evict so that at least ``short_bytes`` bytes and ``n_short`` places for snapshots
        become free. Changes nothing. Lowest rank first; no more than necessary; none in ``keep``, and none that must
        stay (``_must_stay``). If these are not enough, returns all that may go: the caller must check.

        Evicting a snapshot frees only those files that no remaining snapshot needs.
        """
        self._now = now
        victims: list[Snapshot] = []
        departure = Departure(self._files)
        over_bytes, n_over = -short_bytes, -n_short
        if over_bytes >= 0 and n_over >= 0:
            return victims
        with contextlib.closing(self._ranking.least_first()) as ranked:
            for id_ in ranked:
                snapshot = self._snapshots[id_]
                if self._must_stay(snapshot) or id_ in keep:
                    continue
                victims.append(snapshot)
                over_bytes += departure.add(snapshot)
                n_over += 1
                if over_bytes >= 0 and n_over >= 0:
                    break
        for snapshot in reversed(victims[:-1]):  # a later victim may have made this one unnecessary
            freed_bytes = departure.needed_for(snapshot)
            if freed_bytes <= over_bytes and n_over > 0:
                victims.remove(snapshot)
                departure.take_back(snapshot)
                over_bytes -= freed_bytes
                n_over -= 1
        return victims

    def _must_stay(self, snapshot: Snapshot) -> bool:
        """True if a snapshot must not be evicted now: a request or a step uses it (``pin``), or its sidecar marks it as
        pinned (prewarmed, or pinned on the page) and a backend serves its model.
        """
        is_other_model = bool(self._fingerprints) and snapshot.fingerprint not in self._fingerprints
        return snapshot.id in self._pins or (snapshot.is_pinned and not is_other_model)

    def _rank(self, id_: str) -> Rank:
        """The sort key of a snapshot; the smallest is evicted first. Snapshots of models that no backend serves come
        first, then those of least value by ``order``; of equal ones, the least recently used.
        """
        stats = self._stats[id_]
        stats.n_covered = self._files.n_covered(self._snapshots[id_])
        return self._is_served(id_), self.order.rank(stats, self._now), stats.last_used, id_

    def _is_served(self, id_: str) -> bool:
        return self._snapshots[id_].fingerprint in self._fingerprints


class Ranking:
    """Finds the snapshot with the smallest rank, among many whose ranks change all the time, without computing all
    ranks for each query. ``rank`` must work for each id from ``put`` until ``drop``.

    A heap keeps each rank as it was computed last. Before each query the caller recomputes some ranks in turn, so a
    rank is wrong for a few queries at most. With at most ``AT_ONCE`` snapshots all ranks are recomputed.
    """

    AT_ONCE = 128

    def __init__(self, rank: Callable[[str], Rank]) -> None:
        self._rank = rank
        self._ranks: dict[str, Rank] = {}  # () until computed
        self._unranked: dict[str, None] = {}
        self._heap: list[tuple[Rank, str]] = []  # contains outdated ranks too
        self._turn: Iterator[str] = iter(())

    def __len__(self) -> int:
        return len(self._ranks)

    def add_many(self, ids: Collection[str]) -> None:
        """Add ``ids`` without computing their ranks. ``rank_some`` computes these ranks, at the latest before the
        next query.
        """
        self._ranks.update(dict.fromkeys(ids, ()))
        self._unranked.update(dict.fromkeys(ids))

    def rank_some(self, n: int) -> bool:
        """Compute at most ``n`` of the ranks that ``add_many`` left out. Returns True if any of them are still left."""
        for id_ in list(islice(self._unranked, n)):
            self.put(id_)
        return bool(self._unranked)

    def put(self, id_: str) -> None:
        """Add ``id_``, or, if it was added before, compute its rank again."""
        self._unranked.pop(id_, None)
        rank = self._rank(id_)
        if self._ranks.get(id_) != rank:
            self._ranks[id_] = rank
            heapq.heappush(self._heap, (rank, id_))
            if len(self._heap) > 4 * len(self._ranks) + self.AT_ONCE:
                self._rebuild()

    def drop(self, id_: str) -> None:
        """Remove ``id_``. Idempotent."""
        self._ranks.pop(id_, None)
        self._unranked.pop(id_, None)

    def turn(self, n: int = AT_ONCE) -> list[str]:
        """Return the next ``n`` ids in a fixed round through all; all ids if there are no more than ``n``. The
        caller then calls ``put`` for each, because its rank may be outdated. While more than ``n`` are unranked, rank
        ``n`` of these instead, and return none: all 10,000 at once took 0.1 s of a start that found slots to save.
        """
        if self.rank_some(n):
            return []
        found: list[str] = []
        n = min(n, len(self._ranks))
        while len(found) < n:
            id_ = next(self._turn, None)
            if id_ is None:
                self._turn = iter(list(self._ranks))
            elif id_ in self._ranks:
                found.append(id_)
        return found

    def recompute_all(self) -> None:
        """Forget all ranks because a change has affected all. They are computed again as after ``add_many``."""
        self._heap.clear()
        self.add_many(self._ranks)

    def least_first(self) -> Generator[str, None, None]:
        """Yield all ids, smallest rank first. The rank of each is computed again before it is yielded. The caller
        must not change the ranking during the iteration, and must close the iterator if it stops early.
        """
        self.rank_some(len(self._unranked))
        looked: list[tuple[Rank, str]] = []
        seen: set[str] = set()
        grown: set[str] = set()
        try:
            while self._heap:
                rank, id_ = heapq.heappop(self._heap)
                if id_ in seen or self._ranks.get(id_) != rank:
                    continue
                now = self._ranks[id_] = self._rank(id_)
                # Not yet the smallest. If all ranks have grown at once, their old order is used.
                if now > rank and id_ not in grown and len(grown) < self.AT_ONCE:
                    grown.add(id_)
                    heapq.heappush(self._heap, (now, id_))
                    continue
                seen.add(id_)
                looked.append((now, id_))
                yield id_
        finally:
            for entry in looked:
                heapq.heappush(self._heap, entry)

    def _rebuild(self) -> None:
        self._heap = [(rank, id_) for id_, rank in self._ranks.items()]
        heapq.heapify(self._heap)
