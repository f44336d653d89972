"""What a run came to, in figures, and tables of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from llamaslot.bench.simulator.disk import Disk
from llamaslot.bench.simulator.server import SimulatedServer
from llamaslot.bench.simulator.trace import Turn
from llamaslot.bench.simulator.users import Served

_KINDS = {
    "first": {Turn.FIRST},
    "follow-up": {Turn.FOLLOW_UP, Turn.EDIT},
    "side": {Turn.SIDE},
}


@dataclass(frozen=True, slots=True)
class Label:
    """Which run it was; ``disk`` as a share of all contexts, None for as much as is wanted."""

    trace: str
    seed: int
    policy: str
    disk: float | None


@dataclass(frozen=True, slots=True)
class Wait:
    """Seconds until the first token of requests of one kind."""

    n: int
    median_s: float
    p90_s: float
    p99_s: float
    mean_s: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Wait:
        ranked = sorted(seconds)
        if not ranked:
            return cls(0, 0.0, 0.0, 0.0, 0.0)
        p90, p99 = (ranked[min(int(share * len(ranked)), len(ranked) - 1)] for share in (0.9, 0.99))
        return cls(len(ranked), median(ranked), p90, p99, sum(ranked) / len(ranked))


@dataclass(slots=True)
class Result:
    """Tokens are prompt tokens. ``n_known``: what an unlimited cache would have reused; ``n_recomputed``: what was
    computed although it was known. ``stall_longest_s``: for how long at most slot actions kept streams waiting;
    ``stall_stream_s``: all of it, summed up over the streams that waited."""

    label: Label
    n_requests: int
    n_prompt: int
    n_known: int
    n_reused: int
    n_computed: int
    n_recomputed: int
    ttft: dict[str, Wait]
    queued: Wait
    took_s: float
    busy_s: float
    n_saves: int
    n_restores: int
    n_evicted: int
    bytes_saved: int
    bytes_restored: int
    quota_bytes: int
    largest_bytes: int
    stall_longest_s: float
    stall_stream_s: float
    wall_s: float = 0.0

    @property
    def hit_ratio(self) -> float:
        """Of what an unlimited cache would have reused."""
        return self.n_reused / self.n_known if self.n_known else 1.0

    def to_json(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "hit_ratio": self.hit_ratio}


def measured(
    label: Label, served: Sequence[Served], server: SimulatedServer, disk: Disk, took_s: float
) -> Result:
    """Raises AssertionError when tokens have got lost: each one of a prompt is either reused or computed."""
    counts, stalls = server.counts, server.machine.stalls
    n_prompt = sum(one.request.n_prompt for one in served)
    n_reused = sum(one.n_reused for one in served)
    assert n_prompt == n_reused + counts.n_computed, f"{n_prompt} of {n_reused} and {counts.n_computed}"
    return Result(
        label=label,
        n_requests=len(served),
        n_prompt=n_prompt,
        n_known=sum(one.n_known for one in served),
        n_reused=n_reused,
        n_computed=counts.n_computed,
        n_recomputed=sum(one.n_recomputed for one in served),
        ttft={
            name: Wait.of(one.ttft_s for one in served if one.request.kind in kinds)
            for name, kinds in _KINDS.items()
        },
        queued=Wait.of(one.queued_s for one in served),
        took_s=took_s,
        busy_s=server.machine.busy_s,
        n_saves=counts.n_saves,
        n_restores=counts.n_restores,
        n_evicted=disk.n_evicted,
        bytes_saved=counts.bytes_saved,
        bytes_restored=counts.bytes_restored,
        quota_bytes=disk.quota_bytes,
        largest_bytes=disk.largest_bytes,
        stall_longest_s=stalls.longest_s,
        stall_stream_s=stalls.stream_s,
    )


_COLUMNS = (
    "policy     hit  of clairv.  recomputed  vs LRU   TTFT first       follow-up        side            "
    "written  saves  restores evicted  stall max/sum   day   wall"
)


def table(results: Sequence[Result]) -> str:
    """Runs of the same trace and disk together, each compared with LRU and with the clairvoyant one among them."""
    groups: dict[tuple[str, int, float | None], list[Result]] = {}
    for result in results:
        groups.setdefault((result.label.trace, result.label.seed, result.label.disk), []).append(result)
    return "\n\n".join(_group(group) for group in groups.values()) + "\n"


def _group(group: list[Result]) -> str:
    by_policy = {result.label.policy: result for result in group}
    first = group[0]
    disk = "unlimited" if first.label.disk is None else f"{first.quota_bytes / 1e9:.0f} GB"
    share = "" if first.label.disk is None else f" ({first.label.disk:g} of all contexts)"
    lines = [
        f"trace {first.label.trace}, seed {first.label.seed}, disk {disk}{share}: {first.n_requests} requests, "
        f"{first.n_prompt / 1e6:.1f} M prompt tokens, {first.n_known / 1e6:.1f} M of them known; "
        "times in seconds: median/p90/p99",
        _COLUMNS,
    ]
    lru, clairvoyant = by_policy.get("lru"), by_policy.get("clairvoyant")
    lines += [_line(result, lru, clairvoyant) for result in group]
    return "\n".join(lines)


def _line(result: Result, lru: Result | None, clairvoyant: Result | None) -> str:
    of_best = f"{result.n_reused / clairvoyant.n_reused:.4f}" if clairvoyant else "-"
    of_lru = f"{result.n_recomputed / lru.n_recomputed - 1:+.1%}" if lru and lru.n_recomputed else "-"
    waits = (f"{wait.median_s:.1f}/{wait.p90_s:.1f}/{wait.p99_s:.1f}" for wait in result.ttft.values())
    first, follow_up, side = waits
    return (
        f"{result.label.policy:<11}{result.hit_ratio:.4f} {of_best:>8} {result.n_recomputed / 1e6:8.2f} M"
        f" {of_lru:>8}  {first:<16} {follow_up:<16} {side:<15} {result.bytes_saved / 1e9:5.0f} GB"
        f" {result.n_saves:6d} {result.n_restores:8d} {result.n_evicted:7d} "
        f" {result.stall_longest_s:5.1f}/{result.stall_stream_s:6.0f}"
        f"  {result.took_s / 3600:4.1f} h {result.wall_s:5.0f} s"
    )
