"""What a run came to, in figures, and tables of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from bench.simulator.disk import Disk
from bench.simulator.machine import Hardware
from bench.simulator.server import SimulatedServer
from bench.simulator.trace import Turn
from bench.simulator.users import LONG_S, Served

_KINDS = {
    "first": {Turn.FIRST},
    "follow-up": {Turn.FOLLOW_UP, Turn.EDIT},
    "side": {Turn.SIDE},
}


@dataclass(frozen=True, slots=True)
class Label:
    """Which run it was; ``disk`` as a share of all contexts, None for as much as is wanted. ``prefill``: the rules for
    long prompts."""

    trace: str
    seed: int
    policy: str
    disk: float | None
    prefill: str = "shared"


@dataclass(frozen=True, slots=True)
class Spread:
    """Of the requests of one kind: seconds, or a ratio."""

    n: int
    median: float
    p90: float
    p99: float
    mean: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        ranked = sorted(values)
        if not ranked:
            return cls(0, 0.0, 0.0, 0.0, 0.0)
        p90, p99 = (ranked[min(int(share * len(ranked)), len(ranked) - 1)] for share in (0.9, 0.99))
        return cls(len(ranked), median(ranked), p90, p99, sum(ranked) / len(ranked))

    def __str__(self) -> str:
        return f"{self.mean:.1f}/{self.median:.1f}/{self.p90:.1f}/{self.p99:.1f}"


@dataclass(slots=True)
class PrefillFigures:
    """What llamaslot computed ahead of clients' own requests: ``n`` requests for that, ``n_closed`` of them on the
    way.

    ``waited_s`` for others, of which ``paused_s`` for streams. ``stream_share``: of its full speed, what a stream had
    while there were long prompts; None if these are unknown.
    """

    n: int = 0
    n_closed: int = 0
    waited_s: float = 0.0
    paused_s: float = 0.0
    stream_share: float | None = None


@dataclass(slots=True)
class Result:
    """Tokens are prompt tokens. ``n_known``: what an unlimited cache would have reused; ``n_recomputed``: what was
    computed although it was known, and ``n_twice`` the part of that in first turns: conversations that begin together.
    ``ttft``: by kind of request. ``little``: seconds from their slot to their first token of all that need little;
    ``slowed``: of long prompts, these over those that their computation takes alone. ``stream_share``: of the full
    speed, what streams had; ``slow_stream``: what one in ten has no more of. ``stall_longest_s``: for how long at most
    slot actions kept streams waiting; ``stall_stream_s``: all of it, summed up over the streams that waited."""

    label: Label
    n_requests: int
    n_prompt: int
    n_known: int
    n_reused: int
    n_computed: int
    n_recomputed: int
    n_twice: int
    ttft: dict[str, Spread]
    queued: Spread
    little: Spread
    slowed: Spread
    prefills: PrefillFigures
    stream_share: float
    slow_stream: float
    gap_longest_s: float
    took_s: float
    busy_s: float
    n_saves: int
    n_restores: int
    n_evicted: int
    bytes_saved: int
    bytes_added: int
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
    label: Label,
    served: Sequence[Served],
    server: SimulatedServer,
    disk: Disk,
    took_s: float,
    prefills: PrefillFigures,
) -> Result:
    """Raises AssertionError when tokens have got lost: each one of a prompt is either reused or computed."""
    counts, stalls, streamed = server.counts, server.machine.stalls, server.machine.streamed
    hardware = server.hardware
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
        n_twice=sum(one.n_recomputed for one in served if one.request.kind is Turn.FIRST),
        ttft={
            name: Spread.of(one.ttft_s for one in served if one.request.kind in kinds)
            for name, kinds in _KINDS.items()
        },
        queued=Spread.of(one.queued_s for one in served),
        little=Spread.of(one.ttft_s - one.queued_s for one in served if _alone_s(one, hardware) <= LONG_S),
        slowed=Spread.of(_slowed(served, hardware)),
        prefills=prefills,
        stream_share=streamed.n_tokens * hardware.step_s / streamed.seconds if streamed.seconds else 1.0,
        slow_stream=_slow_stream(served, hardware),
        gap_longest_s=streamed.longest_gap_s,
        took_s=took_s,
        busy_s=server.machine.busy_s,
        n_saves=counts.n_saves,
        n_restores=counts.n_restores,
        n_evicted=disk.n_evicted,
        bytes_saved=counts.bytes_saved,
        bytes_added=disk.added_bytes,
        bytes_restored=counts.bytes_restored,
        quota_bytes=disk.quota_bytes,
        largest_bytes=disk.largest_bytes,
        stall_longest_s=stalls.longest_s,
        stall_stream_s=stalls.stream_s,
    )


def _alone_s(one: Served, hardware: Hardware) -> float:
    return hardware.prefill_s(one.n_reused, one.request.n_prompt)


def _slowed(served: Sequence[Served], hardware: Hardware) -> Iterator[float]:
    for one in served:
        if (alone_s := _alone_s(one, hardware)) > LONG_S:
            yield (one.ttft_s - one.queued_s) / alone_s


def _slow_stream(served: Sequence[Served], hardware: Hardware) -> float:
    shares = [
        (one.request.answer.n - 1) * hardware.step_s / one.answer_s for one in served if one.answer_s > 0
    ]
    return sorted(shares)[len(shares) // 10] if shares else 1.0


_COLUMNS = (
    "policy      prefill             hit  of clairv.  recomputed  vs LRU   "
    "written  saves  restores evicted  stall max/sum    day   wall"
)
_WAITING = (
    "policy      prefill           first turns              follow-ups               small requests           "
    "little, from slot    long: slower          streams: all  slow beside   gap     chunks closed   twice"
)


def table(results: Sequence[Result]) -> str:
    """Runs of the same trace and disk together, each compared with LRU and with the clairvoyant one among them."""
    groups: dict[tuple[str, int, float | None], list[Result]] = {}
    for result in results:
        groups.setdefault((result.label.trace, result.label.seed, result.label.disk), []).append(result)
    return "\n\n".join(_group(group) for group in groups.values()) + "\n"


def _group(group: list[Result]) -> str:
    by_policy = {result.label.policy: result for result in reversed(group)}
    first = group[0]
    disk = "unlimited" if first.label.disk is None else f"{first.quota_bytes / 1e9:.0f} GB"
    share = "" if first.label.disk is None else f" ({first.label.disk:g} of all contexts)"
    lines = [
        f"trace {first.label.trace}, seed {first.label.seed}, disk {disk}{share}: {first.n_requests} requests, "
        f"{first.n_prompt / 1e6:.1f} M prompt tokens, {first.n_known / 1e6:.1f} M of them known",
        _COLUMNS,
    ]
    lru, clairvoyant = by_policy.get("lru"), by_policy.get("clairvoyant")
    lines += [_line(result, lru, clairvoyant) for result in group]
    lines += ["seconds to the first token, ratios, shares of full speed: mean/median/p90/p99", _WAITING]
    lines += [_waiting(result) for result in group]
    return "\n".join(lines)


def _name(result: Result) -> str:
    return f"{result.label.policy:<11} {result.label.prefill:<17}"


def _line(result: Result, lru: Result | None, clairvoyant: Result | None) -> str:
    of_best = f"{result.n_reused / clairvoyant.n_reused:.4f}" if clairvoyant else "-"
    of_lru = f"{result.n_recomputed / lru.n_recomputed - 1:+.1%}" if lru and lru.n_recomputed else "-"
    return (
        f"{_name(result)} {result.hit_ratio:.4f} {of_best:>8} {result.n_recomputed / 1e6:8.2f} M"
        f" {of_lru:>8} {result.bytes_saved / 1e9:6.0f} GB"
        f" {result.n_saves:6d} {result.n_restores:8d} {result.n_evicted:7d} "
        f" {result.stall_longest_s:5.1f}/{result.stall_stream_s:6.0f}"
        f"  {result.took_s / 3600:5.2f} h {result.wall_s:4.0f} s"
    )


def _waiting(result: Result) -> str:
    first, follow_up, side = result.ttft.values()
    prefills = result.prefills
    beside = f"{prefills.stream_share:.2f}" if prefills.stream_share is not None else "-"
    return (
        f"{_name(result)} {first!s:<24} {follow_up!s:<24} {side!s:<24} {result.little!s:<20} {result.slowed!s:<21}"
        f" {result.stream_share:5.2f} {result.slow_stream:5.2f} {beside:>6}"
        f" {result.gap_longest_s:5.1f} {prefills.n:9d} {prefills.n_closed:7d} {result.n_twice / 1e3:5.0f} k"
    )
