"""Who is least among many whose ranks change all the time, without a look at each of them.

Pure. A heap of the ranks as they were when last looked at. Whoever asks looks again at some before, in turn, so that no
rank is older than the last few questions; with at most ``AT_ONCE`` holders all ranks are as of now.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator, Iterator
from typing import Any

Rank = tuple[Any, ...]


class Ranking:
    """Holders in the order of ``rank(holder)``, which must be defined for all that were ``put`` and not dropped."""

    AT_ONCE = 128

    def __init__(self, rank: Callable[[str], Rank]) -> None:
        self._rank = rank
        self._ranks: dict[str, Rank] = {}
        self._heap: list[tuple[Rank, str]] = []  # also has ranks that are no longer true
        self._turn: Iterator[str] = iter(())

    def __len__(self) -> int:
        return len(self._ranks)

    def put(self, holder: str) -> None:
        """New, or changed so that its rank should be looked at now."""
        rank = self._rank(holder)
        if self._ranks.get(holder) != rank:
            self._ranks[holder] = rank
            heapq.heappush(self._heap, (rank, holder))
            if len(self._heap) > 4 * len(self._ranks) + self.AT_ONCE:
                self._rebuild()

    def drop(self, holder: str) -> None:
        """Idempotent."""
        self._ranks.pop(holder, None)

    def turn(self, n: int = AT_ONCE) -> list[str]:
        """The next ``n`` whose turn it is to be looked at again: ``put`` does that."""
        found: list[str] = []
        n = min(n, len(self._ranks))
        while len(found) < n:
            holder = next(self._turn, None)
            if holder is None:
                self._turn = iter(list(self._ranks))
            elif holder in self._ranks:
                found.append(holder)
        return found

    def look_at_all(self) -> None:
        """Every rank has changed at once. Takes its time."""
        self._ranks = {holder: self._rank(holder) for holder in self._ranks}
        self._rebuild()

    def least_first(self) -> Generator[str, None, None]:
        """All holders by rank; each is looked at again before it is given. Nothing may change while it is read."""
        looked: list[tuple[Rank, str]] = []
        seen: set[str] = set()
        grown: set[str] = set()
        try:
            while self._heap:
                rank, holder = heapq.heappop(self._heap)
                if holder in seen or self._ranks.get(holder) != rank:
                    continue
                now = self._ranks[holder] = self._rank(holder)
                # Not its turn yet. When all ranks have grown at once, their old order has to do.
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
