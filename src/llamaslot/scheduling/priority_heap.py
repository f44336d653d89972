"""Finds the holder with the smallest rank, among many holders whose ranks change all the time, without computing all
ranks for each query. A holder is the id of a snapshot.

Pure. A heap keeps each rank as it was computed last. Before each query the caller recomputes some ranks in turn, so a
rank is wrong for a few queries at most. With at most ``AT_ONCE`` holders all ranks are recomputed.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Generator, Iterator
from itertools import islice
from typing import Any

Rank = tuple[Any, ...]


class Ranking:
    """A heap of holders by ``rank(holder)``. ``rank`` must work for each holder from ``put`` until ``drop``."""

    AT_ONCE = 128

    def __init__(self, rank: Callable[[str], Rank]) -> None:
        self._rank = rank
        self._ranks: dict[str, Rank] = {}  # () until computed
        self._unranked: dict[str, None] = {}
        self._heap: list[tuple[Rank, str]] = []  # contains outdated ranks too
        self._turn: Iterator[str] = iter(())

    def __len__(self) -> int:
        return len(self._ranks)

    def add_many(self, holders: Collection[str]) -> None:
        """Add ``holders`` without computing their ranks. ``rank_some`` computes these ranks, at the latest before the
        next query.
        """
        self._ranks.update(dict.fromkeys(holders, ()))
        self._unranked.update(dict.fromkeys(holders))

    def rank_some(self, n: int) -> bool:
        """Compute at most ``n`` of the ranks that ``add_many`` left out. Returns True if any of them are still left."""
        for holder in list(islice(self._unranked, n)):
            self.put(holder)
        return bool(self._unranked)

    def put(self, holder: str) -> None:
        """Add ``holder``, or, if it was added before, compute its rank again."""
        self._unranked.pop(holder, None)
        rank = self._rank(holder)
        if self._ranks.get(holder) != rank:
            self._ranks[holder] = rank
            heapq.heappush(self._heap, (rank, holder))
            if len(self._heap) > 4 * len(self._ranks) + self.AT_ONCE:
                self._rebuild()

    def drop(self, holder: str) -> None:
        """Remove ``holder``. Idempotent."""
        self._ranks.pop(holder, None)
        self._unranked.pop(holder, None)

    def turn(self, n: int = AT_ONCE) -> list[str]:
        """Return the next ``n`` holders in a fixed round through all; all holders if there are no more than ``n``. The
        caller then calls ``put`` for each, because its rank may be outdated.
        """
        self.rank_some(len(self._unranked))
        found: list[str] = []
        n = min(n, len(self._ranks))
        while len(found) < n:
            holder = next(self._turn, None)
            if holder is None:
                self._turn = iter(list(self._ranks))
            elif holder in self._ranks:
                found.append(holder)
        return found

    def recompute_all(self) -> None:
        """Forget all ranks because a change has affected all. They are computed again as after ``add_many``."""
        self._heap.clear()
        self.add_many(self._ranks)

    def least_first(self) -> Generator[str, None, None]:
        """Yield all holders, smallest rank first. The rank of each is computed again before it is yielded. The caller
        must not change the ranking during the iteration, and must close the iterator if it stops early.
        """
        self.rank_some(len(self._unranked))
        looked: list[tuple[Rank, str]] = []
        seen: set[str] = set()
        grown: set[str] = set()
        try:
            while self._heap:
                rank, holder = heapq.heappop(self._heap)
                if holder in seen or self._ranks.get(holder) != rank:
                    continue
                now = self._ranks[holder] = self._rank(holder)
                # Not yet the smallest. If all ranks have grown at once, their old order is used.
                if now > rank and holder not in grown and len(grown) < self.AT_ONCE:
                    grown.add(holder)
                    heapq.heappush(self._heap, (now, holder))
                    continue
                seen.add(holder)
                looked.append((now, holder))
                yield holder
        finally:
            for entry in looked:
                heapq.heappush(self._heap, entry)

    def _rebuild(self) -> None:
        self._heap = [(rank, holder) for holder, rank in self._ranks.items()]
        heapq.heapify(self._heap)
