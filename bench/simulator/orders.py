"""The orders of eviction that llamaslot's own (``scheduling.snapshot_value.ByValue``) is compared with."""

from __future__ import annotations

import random
from collections.abc import Callable

from llamaslot.scheduling.snapshot_value import SnapshotStats


class ByUse:
    """Starts with the least recently used snapshot: the usual policy. Learns nothing."""

    def rank(self, stats: SnapshotStats, now: float) -> float:
        return stats.last_used

    def hit(self, stats: SnapshotStats, now: float) -> None: ...

    def passed(self, stats: SnapshotStats, now: float) -> None: ...

    def gone(self, stats: SnapshotStats, now: float) -> None: ...


class AtRandom(ByUse):
    """Starts with any snapshot."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def rank(self, stats: SnapshotStats, now: float) -> float:
        return random.Random(f"{self._seed} {stats.id} {now}").random()


class Foreseen(ByUse):
    """Starts with the snapshot of the smallest ``value``, which is per byte and knows the future."""

    def __init__(self, value: Callable[[SnapshotStats], float]) -> None:
        self._value = value

    def rank(self, stats: SnapshotStats, now: float) -> float:
        return self._value(stats)
