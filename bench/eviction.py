"""What choosing victims costs: ``python -m bench.eviction [n_snapshots]``.

CPU time of the event loop's thread, for there the choice is made: each save looks at the ranks of some snapshots again
(``tend``), and when the disk is full chooses who goes (``victims``), who is then dropped. Snapshots of one to ten
conversations each begin alike, like those of agents; a save comes every ten virtual seconds.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import quantiles

from llamaslot.backend.slot_table import SlotTable
from llamaslot.cache.content import SnapshotKind
from llamaslot.cache.ids import pack
from llamaslot.scheduling.cost import Rates
from llamaslot.scheduling.placement import Rules
from llamaslot.scheduling.snapshot_value import ByValue
from llamaslot.store import WithTokens
from llamaslot.store.snapshot_table import SnapshotTable

MODEL = "model"
BYTES_PER_TOKEN = 56_000
# Tokens: few, so that 10,000 snapshots fit in memory; comparing more is memcmp.
N_SHARED, N_OWN = 1_000, 1_000


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU seconds of each save, in order."""

    n_snapshots: int
    choosing_s: list[float]
    adding_s: list[float]

    def __str__(self) -> str:
        return f"{self.n_snapshots:6d} snapshots: choosing {_said(self.choosing_s)}; listing {_said(self.adding_s)}"


def _said(seconds: list[float]) -> str:
    cuts = quantiles(seconds, n=100)
    return f"median {cuts[49] * 1e3:.2f} ms, 99 % {cuts[98] * 1e3:.2f} ms"


def snapshots(rng: random.Random) -> Iterator[WithTokens]:
    """Conversations of twenty agents, without an end."""
    agents = [pack(rng.choices(range(100_000), k=N_SHARED)) for _ in range(20)]
    for serial in range(1_000_000):
        tokens = rng.choice(agents) + pack(rng.choices(range(100_000), k=rng.randrange(100, 2 * N_OWN)))
        size_bytes = len(tokens) // 4 * BYTES_PER_TOKEN
        kind = SnapshotKind.TRUNK if serial % 500 == 0 else SnapshotKind.LEAF
        yield WithTokens.of(
            tokens,
            id=f"ls-{serial:016x}",
            size_bytes=size_bytes,
            fingerprint=MODEL,
            created_at=0.0,
            checkpoints=(),
            source="bench",
            kind=kind,
        )


def measure(n_snapshots: int, n_saves: int = 500, seed: int = 1) -> Cost:
    """A full disk with this many, and then so many saves."""
    rng = random.Random(seed)
    order, table = ByValue(), SlotTable("bench", 1, 1 << 20, rules=Rules(), rates=Rates())
    order.saves_s = table.saves_s
    listed, coming, now = SnapshotTable(order), snapshots(rng), 0.0
    listed.eviction.fingerprints = frozenset({MODEL})
    for _ in range(n_snapshots):
        snapshot = next(coming)
        now += 10.0
        table.add_snapshot(snapshot)
        listed.add(snapshot.listed, now)
    cost = Cost(n_snapshots, [], [])
    free_bytes = 0
    for _ in range(n_saves):
        snapshot = next(coming)
        now += 10.0
        if rng.random() < 0.5:
            listed.hit(rng.choice(list(listed.snapshots)), now)
        started = time.thread_time()
        listed.eviction.tend(now)
        victims = listed.eviction.victims(snapshot.size_bytes - free_bytes, 0, (), now)
        for victim in victims:
            listed.take(victim.id, now)
            listed.release(victim)
        chosen = time.thread_time()
        free_bytes += sum(victim.size_bytes for victim in victims) - snapshot.size_bytes
        for victim in victims:
            table.drop_snapshot(victim.id)
        table.add_snapshot(snapshot)
        listed.add(snapshot.listed, now)
        cost.choosing_s.append(chosen - started)
        cost.adding_s.append(time.thread_time() - chosen)
    return cost


if __name__ == "__main__":
    for n in map(int, sys.argv[1:] or ("100", "1000", "10000")):
        sys.stdout.write(f"{measure(n)}\n")
