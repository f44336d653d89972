"""The smallest of many holders whose ranks change all the time, without computing all ranks at each query.

Pure. A heap of ranks as last computed. Each query first recomputes a few of them in turn, so no rank is older than
the last few queries; with at most ``AT_ONCE`` holders all ranks are current.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Generator, Iterator
from itertools import islice
from typing import Any

Rank = tuple[Any, ...]


class Ranking:
    """A heap of holders by ``rank(holder)``, which must be defined for every holder that was ``put`` and not
    dropped.
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

    def add_many(self, holders: Collection[str]) -> None:
        """Add many holders: their ranks are computed by ``rank_some``, or before the next choice."""
        self._ranks.update(dict.fromkeys(holders, ()))
        self._unranked.update(dict.fromkeys(holders))

    def rank_some(self, n: int) -> bool:
        """Compute ``n`` ranks that were put off. Returns whether there are more."""
        for holder in list(islice(self._unranked, n)):
            self.put(holder)
        return bool(self._unranked)

    def put(self, holder: str) -> None:
        """Add ``holder``, or recompute its rank now if it is there already."""
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
        """The next ``n`` holders, in turn, whose ranks are due to be recomputed; call ``put`` for each."""
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
        """Recompute all ranks, as after ``add_many``: after a change that affects all of them."""
        self._heap.clear()
        self.add_many(self._ranks)

    def least_first(self) -> Generator[str, None, None]:
        """All holders by rank; each rank is recomputed before its holder is returned. Nothing may change during the
        iteration.
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
