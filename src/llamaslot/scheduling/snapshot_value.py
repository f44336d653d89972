"""Ranks snapshots for eviction. The value of a snapshot is the seconds that a hit of it saves, times its expected hits
per second, per byte. The snapshot with the lowest value is evicted first.

This module only ranks. ``store/eviction.py`` chooses what is evicted, and says who does what. Pure: times come in as
arguments, in seconds of any one clock.

The hit rate is learned by kind of snapshot (``ReuseClass``) and by the age since the last use, as in LHD (Beckmann,
Chen, Cidon: "LHD: improving cache hit rate by maximizing hit density", NSDI 2018).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Protocol, TypeGuard

from msgspec import Struct, field

from llamaslot.cache.content import SnapshotKind
from llamaslot.scheduling.json_numbers import is_number

N_BUCKETS = 52  # of ages: the last begins after half a year
N_LENGTHS = 26  # of contexts: the last begins at 370,000 tokens
_EDGES = [2.0 ** (b / 2) - 1.0 for b in range(N_BUCKETS + 1)]
_WIDTHS = [end - start for start, end in pairwise(_EDGES)]
_LEAST_S = 1e-6  # seconds that each token saves at least, so that snapshots that save nothing are ordered too


class ReuseClass(enum.StrEnum):
    """Classes of snapshots with a similar hit rate. A new class may be added here: stored hit rates of all other
    classes stay valid.
    """

    FRESH = "fresh"  # a conversation without a hit so far
    RETURNING = "returning"  # a conversation with at least one hit
    TRUNK = "trunk"  # the common beginning of several conversations


class SnapshotStats(Struct):
    """Size and use of one snapshot.

    ``size_bytes``: the bytes of it that no other snapshot needs. ``read_bytes``: the bytes that its restore reads.
    ``n_covered``: how many of its first tokens other snapshots hold too. ``counted_until``: up to this time the
    ``HitRateModel`` knows that the snapshot had no hit.
    """

    id: str
    n_tokens: int
    size_bytes: int
    kind: SnapshotKind
    last_used: float
    counted_until: float
    n_hits: int = 0
    read_bytes: int = 0
    n_covered: int = 0

    def saves_s(self, prefill_s: Callable[[int, int], float], restore_s: Callable[[int], float]) -> float:
        """Return the seconds that each hit of this snapshot saves, at least 0. Without it, the prompt is computed from
        its first token, or the covered tokens are restored from another snapshot and the others are computed,
        whichever is faster. These seconds, less the seconds of its own restore, are saved.
        """
        n, n_covered, own_s = self.n_tokens, self.n_covered, restore_s(self.read_bytes)
        without_s = prefill_s(0, n)
        if n_covered:
            rest_s = restore_s(self.read_bytes * n_covered // n) + prefill_s(n_covered, n)
            without_s = min(without_s, rest_s)
        return max(without_s - own_s, 0.0)

    @property
    def reuse_class(self) -> ReuseClass:
        if self.kind is SnapshotKind.TRUNK:
            return ReuseClass.TRUNK
        return ReuseClass.RETURNING if self.n_hits else ReuseClass.FRESH


def bucket_of(age_s: float) -> int:
    """Return the bucket of an age. There are two for each doubling: bucket 0 ends at 0.4 s, bucket 1 at 1 s, bucket 2
    at 1.8 s, bucket 3 at 3 s.
    """
    return min(int(2.0 * math.log2(max(age_s, 0.0) + 1.0)), N_BUCKETS - 1)


def length_of(n_tokens: int) -> int:
    """Return the bucket of a length in tokens. There are two for each doubling, from 64 tokens on."""
    return min(int(2.0 * math.log2(max(n_tokens, 64) / 64)), N_LENGTHS - 1)


class _Tally(Struct):
    """For one class of snapshots and each bucket of age: the number of hits, and the seconds in which snapshots of
    that age existed.

    The seconds are scaled to contexts of usual length: for a length that is hit half as often, half the seconds count.
    """

    hits: list[float] = field(default_factory=lambda: [0.0] * N_BUCKETS)
    seconds: list[float] = field(default_factory=lambda: [0.0] * N_BUCKETS)
    n_events: float = 0.0

    def fade(self) -> None:
        self.hits = [hits / 2 for hits in self.hits]
        self.seconds = [seconds / 2 for seconds in self.seconds]
        self.n_events /= 2


class _Lengths(Struct):
    """For each bucket of length: the hits of snapshots, and the number of hits that would be expected if length did
    not matter.
    """

    hits: list[float] = field(default_factory=lambda: [0.0] * N_LENGTHS)
    expected: list[float] = field(default_factory=lambda: [0.0] * N_LENGTHS)

    def factors(self, few: float) -> list[float]:
        """Return for each bucket of length its hit rate, relative to the mean of all lengths. ``few`` hits at the mean
        rate are added to each bucket, so that few data give a factor near 1.
        """
        usual = (sum(self.hits) + few) / (sum(self.expected) + few)
        return [(n + few) / (m * usual + few) for n, m in zip(self.hits, self.expected, strict=True)]

    def fade(self) -> None:
        self.hits = [hits / 2 for hits in self.hits]
        self.expected = [expected / 2 for expected in self.expected]


class HitRateModel:
    """Learns the hits per second of snapshots, by class and by age since the last use, times a factor for the length
    of the context (a single question, or a conversation near its end, is seldom hit).

    The first estimate of a bucket is ``PRIORS``. It is scaled to the number of all hits seen, then to the number of
    hits of the class. Each of these estimates weighs as much as ``_FEW`` hits against the data, so few data change it
    little. Old data fades: after 2 * ``MEMORY`` events of a class, and then after each ``MEMORY``, all its counts are
    halved.
    """

    MEMORY = 3_000
    _FEW = 2.0  # hits; the weight of an estimate against the data
    _OFTEN = 16  # events after which rates and densities are computed again

    #: Hits per second at age t are ``p / (t + s)``: (p, s). Most hits come within minutes.
    PRIORS: Mapping[ReuseClass, tuple[float, float]] = {
        ReuseClass.FRESH: (0.5, 60.0),
        ReuseClass.RETURNING: (0.8, 60.0),
        ReuseClass.TRUNK: (3.0, 300.0),
    }

    def __init__(self) -> None:
        self._tallies = {reuse_class: _Tally() for reuse_class in ReuseClass}
        self._lengths = _Lengths()
        self._derive()
        self._n_new = 0
        self._seconds_new = self._seconds = 0.0

    def __repr__(self) -> str:
        seen = ", ".join(
            f"{reuse_class} {sum(tally.hits):.0f}" for reuse_class, tally in self._tallies.items()
        )
        return f"<HitRateModel hits: {seen}>"

    # -- learning ------------------------------------------------------------------------------------------------

    def hit(self, reuse_class: ReuseClass, age_s: float, n_tokens: int) -> None:
        """Record a hit of a snapshot of ``n_tokens`` whose last use was ``age_s`` ago."""
        self._tallies[reuse_class].hits[bucket_of(age_s)] += 1.0
        self._lengths.hits[length_of(n_tokens)] += 1.0
        self._event(reuse_class)

    def gone(self, reuse_class: ReuseClass) -> None:
        """Record that a snapshot can no longer be hit, because it was evicted, superseded or lost."""
        self._event(reuse_class)

    def waited(self, reuse_class: ReuseClass, from_s: float, to_s: float, n_tokens: int) -> None:
        """Record that a snapshot of ``n_tokens`` had no hit between the ages ``from_s`` and ``to_s``."""
        start, end = max(from_s, 0.0), to_s
        if not start < end < math.inf:
            return
        seconds, rates = self._tallies[reuse_class].seconds, self._derived[reuse_class].rates
        self._seconds_new += end - start
        n_expected, factor = 0.0, self.factor(n_tokens)
        for at in range(bucket_of(start), N_BUCKETS):
            edge = _EDGES[at + 1] if at + 1 < N_BUCKETS else math.inf
            part = min(end, edge) - start
            if part > 0:
                seconds[at] += part * factor
                n_expected += part * rates[at]
            if end <= edge:
                break
            start = edge
        self._lengths.expected[length_of(n_tokens)] += n_expected

    def _event(self, reuse_class: ReuseClass) -> None:
        self._n_new += 1
        tally = self._tallies[reuse_class]
        tally.n_events += 1
        if tally.n_events >= 2 * self.MEMORY:
            tally.fade()
        if sum(self._lengths.hits) >= 2 * self.MEMORY:
            self._lengths.fade()

    # -- results -------------------------------------------------------------------------------------------------

    def density(self, reuse_class: ReuseClass, age_s: float, n_tokens: int) -> float:
        """Return the expected hits per second of a snapshot of this class, age and length, over the holding time for
        which this mean is highest (the Gittins index of the rates).

        It is above the rate at this age where a later rate is higher: during a coffee break few users return at once,
        but many within the hour. It is never below the rate.
        """
        densities = self._now()[reuse_class].densities
        x = 2.0 * math.log2(max(age_s, 0.0) + 1.0)
        at = min(int(x), N_BUCKETS - 1)
        part = min(x - at, 1.0)
        return (densities[at] + part * (densities[at + 1] - densities[at])) * self.factor(n_tokens)

    def factor(self, n_tokens: int) -> float:
        """Return the hit rate of contexts of ``n_tokens`` relative to the mean of all lengths."""
        return self._factors[length_of(n_tokens)]

    def _now(self) -> dict[ReuseClass, _Derived]:
        if self._n_new >= self._OFTEN or self._seconds_new > 0.1 * self._seconds + 60.0:
            self._derive()
            self._seconds += self._seconds_new
            self._n_new, self._seconds_new = 0, 0.0
        return self._derived

    def _derive(self) -> None:
        n_hits = sum(sum(tally.hits) for tally in self._tallies.values())
        n_expected = sum(self._n_expected(reuse_class) for reuse_class in ReuseClass)
        # The rate of all hits relative to the priors.
        scale = (n_hits + self._FEW) / (n_expected + self._FEW)
        self._derived = {reuse_class: _Derived(self._rates(reuse_class, scale)) for reuse_class in ReuseClass}
        self._factors = self._lengths.factors(self._FEW)

    def _n_expected(self, reuse_class: ReuseClass) -> float:
        seconds = self._tallies[reuse_class].seconds
        return sum(s * prior for s, prior in zip(seconds, _PRIOR_RATES[reuse_class], strict=True))

    def _rates(self, reuse_class: ReuseClass, scale: float) -> list[float]:
        tally, few = self._tallies[reuse_class], self._FEW
        scale = (sum(tally.hits) + few) / (self._n_expected(reuse_class) + few / scale)
        return [
            (hits + few) / (seconds + few / (scale * prior))
            for hits, seconds, prior in zip(tally.hits, tally.seconds, _PRIOR_RATES[reuse_class], strict=True)
        ]

    # -- storage -------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        reuse_classes = {
            reuse_class.value: {"hits": tally.hits, "seconds": tally.seconds, "n_events": tally.n_events}
            for reuse_class, tally in self._tallies.items()
        }
        return {
            "classes": reuse_classes,
            "lengths": {"hits": self._lengths.hits, "expected": self._lengths.expected},
        }

    @classmethod
    def from_json(cls, data: object) -> HitRateModel:
        """Return the object that ``to_json`` has written as ``data``. A missing or invalid part gets its initial
        value.
        """
        hit_rates = cls()
        for reuse_class, tally in hit_rates._tallies.items():
            kept = _part(_part(data, "classes"), reuse_class.value)
            hits, seconds, n_events = kept.get("hits"), kept.get("seconds"), [kept.get("n_events")]
            if _are_counts(hits) and _are_counts(seconds) and _are_counts(n_events, 1):
                tally.hits, tally.seconds = [float(n) for n in hits], [float(s) for s in seconds]
                tally.n_events = float(n_events[0])
        kept = _part(data, "lengths")
        hits, expected = kept.get("hits"), kept.get("expected")
        if _are_counts(hits, N_LENGTHS) and _are_counts(expected, N_LENGTHS):
            hit_rates._lengths = _Lengths([float(n) for n in hits], [float(n) for n in expected])
        hit_rates._derive()
        return hit_rates


class _Derived:
    """What is computed from the tallies of one class: its ``rates`` by bucket of age, and its ``densities`` at the
    beginning of each bucket and at the end of the last.
    """

    __slots__ = ("densities", "rates")

    def __init__(self, rates: list[float]) -> None:
        self.rates, self.densities = rates, _best_densities(rates)


def _part(data: object, key: str) -> Mapping[str, Any]:
    part = data.get(key) if isinstance(data, Mapping) else None
    return part if isinstance(part, Mapping) else {}


def _prior_rates(p: float, s: float) -> list[float]:
    """Return the initial estimate of a class: for each bucket of age the mean of ``p / (t + s)`` hits per second."""
    return [p * math.log((_EDGES[b + 1] + s) / (_EDGES[b] + s)) / _WIDTHS[b] for b in range(N_BUCKETS)]


_PRIOR_RATES = {reuse_class: _prior_rates(p, s) for reuse_class, (p, s) in HitRateModel.PRIORS.items()}


def _best_densities(rates: list[float]) -> list[float]:
    """Return for the beginning of each bucket of age the highest mean of hits per second over any number of buckets
    from there on, and last the rate of the last bucket. Only the time until the first hit counts: after a hit the
    snapshot has a new age.
    """
    best: list[float] = []
    # Ranges of falling density: hits, seconds, the share that remains after it.
    ahead: list[tuple[float, float, float]] = []
    for rate, width in zip(reversed(rates), reversed(_WIDTHS), strict=True):
        hits = -math.expm1(-rate * width)
        seconds, left = hits / rate, 1.0 - hits
        while ahead and ahead[-1][0] * seconds > hits * ahead[-1][1]:  # extend the range while that is better
            more_hits, more_seconds, more_left = ahead.pop()
            hits, seconds, left = hits + left * more_hits, seconds + left * more_seconds, left * more_left
        ahead.append((hits, seconds, left))
        best.append(hits / seconds)
    return [*reversed(best), rates[-1]]


def _are_counts(values: Any, n: int = N_BUCKETS) -> TypeGuard[list[float]]:
    return (
        isinstance(values, list)
        and len(values) == n
        and all(is_number(value) and value >= 0 for value in values)
    )


# -- order of eviction -------------------------------------------------------------------------------------------


class Order(Protocol):
    """An order of eviction. It ranks snapshots, and is told of their hits and evictions."""

    def rank(self, stats: SnapshotStats, now: float) -> float:
        """Return the rank of a snapshot; the one with the smallest rank is evicted first."""

    def hit(self, stats: SnapshotStats, now: float) -> None:
        """Record a hit of a snapshot; ``stats`` is its state before the hit."""

    def passed(self, stats: SnapshotStats, now: float) -> None:
        """Record that the snapshot had no hit from ``stats.counted_until`` until ``now``."""

    def gone(self, stats: SnapshotStats, now: float) -> None:
        """Record that the snapshot can no longer be hit."""


class ByValue:
    """An order of eviction in which the snapshot with the smallest value per byte goes first.

    ``saves_s`` returns the seconds that each hit of a snapshot saves. The owner of this object sets it, because only
    the owner knows the speeds of the backends.
    """

    def __init__(self, hit_rates: HitRateModel | None = None) -> None:
        self.hit_rates = HitRateModel() if hit_rates is None else hit_rates
        self.saves_s: Callable[[SnapshotStats], float] = lambda stats: stats.n_tokens / 1000

    def rank(self, stats: SnapshotStats, now: float) -> float:
        return self.worth(stats, now) / max(stats.size_bytes, 1)

    def worth(self, stats: SnapshotStats, now: float) -> float:
        """Return the expected seconds that a snapshot saves, per second that it is kept."""
        saves_s = max(self.saves_s(stats), _LEAST_S * stats.n_tokens)
        return saves_s * self.hit_rates.density(stats.reuse_class, now - stats.last_used, stats.n_tokens)

    def hit(self, stats: SnapshotStats, now: float) -> None:
        self.passed(stats, now)
        self.hit_rates.hit(stats.reuse_class, now - stats.last_used, stats.n_tokens)

    def passed(self, stats: SnapshotStats, now: float) -> None:
        used = stats.last_used
        self.hit_rates.waited(stats.reuse_class, stats.counted_until - used, now - used, stats.n_tokens)
        stats.counted_until = max(now, stats.counted_until)

    def gone(self, stats: SnapshotStats, now: float) -> None:
        self.passed(stats, now)
        self.hit_rates.gone(stats.reuse_class)
