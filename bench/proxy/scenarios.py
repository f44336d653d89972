"""What is measured, each scenario by itself, in rounds in which every target has its turn."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.proxy.load import percentile
from bench.proxy.targets import Kind, Load, LoadFailed, Target, running

MS = 1e3
US = 1e6
_FAST: tuple[Kind, ...] = ("direct", "llamaslot", "against", "nginx", "aiohttp")
_ALL: tuple[Kind, ...] = (*_FAST, "litellm")


@dataclass(slots=True)
class Row:
    """One figure of all targets: a value for each round."""

    what: str
    unit: str
    values: dict[str, list[float]] = field(default_factory=dict)

    def median(self, target: str) -> float | None:
        return median(self.values[target]) if self.values.get(target) else None

    def added(self) -> Row:
        """What each target adds to the direct way, round by round."""
        pairs = {
            target: [
                value - direct for value, direct in zip(values, self.values.get("direct", ()), strict=False)
            ]
            for target, values in self.values.items()
            if target != "direct"
        }
        return Row(f"{self.what}: added", self.unit, pairs)


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure must be, and what it is."""

    what: str
    unit: str
    value: float
    bound: float
    at_least: bool = False

    @property
    def is_met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


@dataclass(slots=True)
class Measured:
    rows: list[Row] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)

    def row(self, what: str) -> Row:
        return next(row for row in self.rows if row.what == what)

    def goal(
        self, what: str, unit: str, value: float | None, bound: float | None, *, at_least: bool = False
    ) -> None:
        """Left out if what it compares was not measured."""
        if value is not None and bound is not None:
            self.goals.append(Goal(what, unit, value, bound, at_least))


@dataclass(slots=True)
class Bench:
    """``only``: kinds of targets that are measured; None: all that a scenario has."""

    load: Load
    n_rounds: int = 5
    is_quick: bool = False
    against: Path | None = None
    only: frozenset[str] | None = None

    def scaled(self, n: int) -> int:
        """Fewer where it must be quick."""
        return max(n // 4, 8) if self.is_quick else n

    @contextlib.contextmanager
    def running(self, kinds: Sequence[Kind], n_slots: int) -> Iterator[list[Target]]:
        wanted = [kind for kind in kinds if self.only is None or kind in self.only]
        with running(wanted, n_slots=n_slots, against=self.against) as targets:
            try:
                yield targets
            finally:
                for target in targets:
                    self.load.do("forget", port=target.port)

    def do(self, target: Target, task: str, **arguments: Any) -> dict[str, Any]:
        """A task of the client at this target, and ``cpu_s`` of the proxy meanwhile."""
        before = target.cpu_s
        answer = self.load.do(task, port=target.port, **arguments) or {}
        return {**answer, "cpu_s": target.cpu_s - before}

    def rounds(
        self, targets: Sequence[Target], rows: dict[str, Row], work: Callable[[Target], dict[str, float]]
    ) -> None:
        """``work`` returns a value for each row. A proxy that fails is left out from then on; llamaslot may not."""
        failed = set[str]()
        for n in range(self.n_rounds):
            turn = n % len(targets)
            for target in [*targets[turn:], *targets[:turn]]:
                if target.kind in failed:
                    continue
                try:
                    sample = work(target)
                except LoadFailed as error:
                    if target.kind in ("direct", "llamaslot"):
                        raise
                    failed.add(target.kind)
                    sys.stderr.write(f"{target.kind} is left out: {error}\n")
                    continue
                for name, value in sample.items():
                    rows[name].values.setdefault(target.kind, []).append(value)


def short(bench: Bench) -> Measured:
    """Added to the first token of a short request alone."""
    first, cpu = Row("50 tokens, 4 slots: first token", "ms"), Row("50 tokens, 4 slots: CPU", "ms")
    n = bench.scaled(100)

    def work(target: Target) -> dict[str, float]:
        mine = n if target.kind != "litellm" else 10
        got = bench.do(target, "short", n=mine, at_once=1)
        return {"first": got["first_s"] * MS, "cpu": got["cpu_s"] / mine * MS}

    with bench.running(_ALL, 4) as targets:
        for target in targets:
            bench.do(target, "short", n=30, at_once=1)
        bench.rounds(targets, {"first": first, "cpu": cpu}, work)
    added = first.added()
    measured = Measured([first, added, cpu])
    measured.goal("50 tokens: added to the first token", "ms", added.median("llamaslot"), 2.5)
    beside = added.median("aiohttp")
    if beside is not None:
        measured.goal(
            "… 1.5 times what the aiohttp proxy adds, and 1 ms",
            "ms",
            added.median("llamaslot"),
            1.5 * beside + 1,
        )
    measured.goal("50 tokens: CPU", "ms", cpu.median("llamaslot"), 2.5)
    return measured


def hot(bench: Bench) -> Measured:
    """Added to the first token of a long conversation's next turn."""
    what = "hot follow-up, 60,000 tokens, 200 new"
    first, cpu = Row(f"{what}: first token", "ms"), Row(f"{what}: CPU", "ms")

    def work(target: Target) -> dict[str, float]:
        n = bench.scaled(10) if target.kind != "litellm" else 3
        bench.do(target, "talk", n_tokens=58_800)
        bench.do(target, "follow", n=1, n_tokens=200)
        got = bench.do(target, "follow", n=n, n_tokens=200)
        return {"first": got["first_s"] * MS, "cpu": got["cpu_s"] / n * MS}

    with bench.running(_ALL, 4) as targets:
        bench.rounds(targets, {"first": first, "cpu": cpu}, work)
    added = first.added()
    measured = Measured([first, added, cpu])
    measured.goal(f"{what}: added to the first token", "ms", added.median("llamaslot"), 6.0)
    measured.goal(f"{what}: CPU", "ms", cpu.median("llamaslot"), 7.0)
    return measured


def paced(bench: Bench) -> Measured:
    """Streams at the pace of a GPU."""
    n_streams, every_ms = 64, 20
    what = f"{n_streams} streams x {1_000 // every_ms} events/s"
    rows = {
        "cpu": Row(f"{what}: CPU per event", "us"),
        "p50": Row(f"{what}: delay, median", "ms"),
        "p99": Row(f"{what}: delay, p99", "ms"),
    }

    def work(target: Target) -> dict[str, float]:
        bench.do(target, "hold", n=n_streams, every_ms=every_ms)
        before = target.cpu_s
        got = bench.load.do("listen", seconds=1.0 if bench.is_quick else 2.0)
        cpu = (target.cpu_s - before) / max(got["n"], 1)
        bench.load.do("release", upstream_port=target.upstream_port)
        return {"cpu": cpu * US, "p50": got["p50_s"] * MS, "p99": got["p99_s"] * MS}

    with bench.running(_FAST, n_streams) as targets:
        bench.rounds(targets, rows, work)
    added = rows["p99"].added()
    measured = Measured([*rows.values(), added])
    measured.goal(f"{what}: CPU per event", "us", rows["cpu"].median("llamaslot"), 60.0)
    measured.goal(f"{what}: added delay, p99", "ms", added.median("llamaslot"), 2.0)
    return measured


def viewers(bench: Bench) -> Measured:
    """The same streams beside cold requests, when nobody and when twenty people look at the page."""
    n_viewers, n_streams, every_ms = 20, 16, 20
    what = f"{n_streams} streams x {1_000 // every_ms} events/s, {{}}: {{}}"
    crowds = {0: "nobody looks", n_viewers: f"{n_viewers} pages are open"}
    units = {"p50": ("delay, median", "ms"), "p99": ("delay, p99", "ms"), "cpu": ("CPU", "% of a core")}
    rows = {
        f"{key} {n}": Row(what.format(name, its[0]), its[1])
        for key, its in units.items()
        for n, name in crowds.items()
    }
    rows["told"] = Row(f"{crowds[n_viewers]}: events that each has received at least", "/s")
    opening = f"{n_viewers} pages are opened in the same moment"
    rows["opening p99"] = Row(what.format(opening, "delay, p99"), "ms")
    rows["opening longest"] = Row(what.format(opening, "longest delay"), "ms")
    audience, every = Load(is_elsewhere=True), dict[tuple[str, int], list[float]]()

    def work(target: Target) -> dict[str, float]:
        seconds, n_pairs = 1.5 if bench.is_quick else 4.0, 4
        delays, cpu_s, n_told = {n: list[float]() for n in crowds}, dict.fromkeys(crowds, 0.0), list[float]()
        opening = list[float]()
        bench.do(target, "hold", n=n_streams, every_ms=every_ms)
        for turn in range(n_pairs):
            for n in (0, n_viewers) if turn % 2 else (n_viewers, 0):
                with ThreadPoolExecutor() as thread:
                    opened = thread.submit(audience.do, "view", port=target.port, n=n)
                    if n:
                        opening.extend(bench.do(target, "listen", seconds=1.0, keep=True)["delays_s"])
                    opened.result()
                got = bench.do(target, "listen", seconds=seconds, cold_per_s=2.0, n_tokens=1_000, keep=True)
                n_told += [audience.do("leave")] * bool(n)
                delays[n] += got["delays_s"]
                cpu_s[n] += got["cpu_s"]
        bench.load.do("release", upstream_port=target.upstream_port)
        for n in crowds:
            every.setdefault((target.kind, n), []).extend(delays[n])
        return {
            **{f"p50 {n}": percentile(delays[n], 0.5) * MS for n in crowds},
            **{f"p99 {n}": percentile(delays[n], 0.99) * MS for n in crowds},
            **{f"cpu {n}": 100 * cpu_s[n] / seconds / n_pairs for n in crowds},
            "told": min(n_told) / seconds,
            "opening p99": percentile(opening, 0.99) * MS,
            "opening longest": max(opening) * MS,
        }

    try:
        with bench.running(("llamaslot", "against"), n_streams + 4) as targets:
            for target in targets:
                bench.do(target, "fill", n=bench.scaled(400), n_tokens=1_000, at_once=8)
                bench.do(target, "short", n=bench.scaled(2_000), at_once=8)  # so many a page lists
            bench.rounds(targets, rows, work)
    finally:
        audience.close()
    # Of all rounds together: one in a hundred is the event behind a cold request, so one round's p99 is chance.
    for key, share in (("p50", 0.5), ("p99", 0.99)):
        rows[key] = Row(f"… {units[key][0]} of all rounds, of that without a page", "times")
        for kind in rows["told"].values:
            with_, without = (percentile(every[kind, n], share) for n in (n_viewers, 0))
            rows[key].values[kind] = [with_ / without]
    measured = Measured(list(rows.values()))
    measured.goal(
        f"p99 of streams, {crowds[n_viewers]}, of that without", "times", rows["p99"].median("llamaslot"), 1.1
    )
    return measured


def flood(bench: Bench) -> Measured:
    """Events as fast as they go."""
    rate, cpu = Row("64 streams, as fast as they go", "events/s"), Row("… CPU per event", "us")
    n_events = bench.scaled(500)

    def work(target: Target) -> dict[str, float]:
        got = bench.do(target, "flood", n=64, n_events=n_events)
        return {"rate": got["per_s"], "cpu": got["cpu_s"] / got["n"] * US}

    with bench.running(_FAST, 64) as targets:
        for target in targets:
            bench.do(target, "flood", n=64, n_events=8)
        bench.rounds(targets, {"rate": rate, "cpu": cpu}, work)
    measured = Measured([rate, cpu])
    nginx, mine = rate.median("nginx"), rate.median("llamaslot")
    if nginx and mine:
        measured.goal("events as fast as they go, of nginx", "times", mine / nginx, 0.75, at_least=True)
    return measured


def crowd(bench: Bench) -> Measured:
    """A thousand streams at once."""
    n = 1_000
    begun, rss = Row(f"{n:,} streams: until all have begun", "s"), Row(f"{n:,} streams: memory", "MB")

    def work(target: Target) -> dict[str, float]:
        got = bench.do(target, "hold", n=n, every_ms=1_000)
        size = target.rss_bytes / 1e6
        bench.load.do("release", upstream_port=target.upstream_port)
        return {"begun": got["begun_s"], "rss": size}

    with bench.running(_FAST, 1_024) as targets:
        for target in targets:
            bench.do(target, "short", n=50, at_once=8)
        bench.rounds(targets, {"begun": begun, "rss": rss}, work)
    measured = Measured([begun, rss])
    beside, mine = begun.median("aiohttp"), begun.median("llamaslot")
    if beside and mine:
        measured.goal(f"{n:,} streams have begun, of the aiohttp proxy's time", "times", mine / beside, 1.5)
    measured.goal(f"{n:,} streams: memory", "MB", rss.median("llamaslot"), 120.0)
    return measured


def whole(bench: Bench) -> Measured:
    """Short answers in one piece, with empty slots."""
    return _whole(bench, n_held=0)


def filled(bench: Bench) -> Measured:
    """The same, when each slot holds a conversation of another user."""
    return _whole(bench, n_held=6_000)


def _whole(bench: Bench, *, n_held: int) -> Measured:
    kinds: tuple[Kind, ...] = ("llamaslot", "against")
    sizes, crowds = (4, 64, 256), (32, 250)
    held = f", which hold {n_held:,} tokens each" if n_held else ""
    measured = Measured()
    with contextlib.ExitStack() as stack:
        pools = {}
        for n_slots in sizes:
            more = ("direct", "nginx", "aiohttp", "litellm") if n_slots == 64 and not n_held else ()
            pools[n_slots] = stack.enter_context(bench.running((*kinds, *more), n_slots))
        rows = {}
        for n_slots in sizes:
            for at_once in crowds:
                what = f"short whole answers, {at_once} at a time, {n_slots} slots{held}"
                rows[n_slots, at_once] = Row(what, "/s"), Row(f"{what}: CPU", "ms")
        speed = dict[tuple[str, int, int], float]()
        n_rounds, bench.n_rounds = bench.n_rounds, 1
        try:
            for n in range(n_rounds):
                for at_once in crowds:
                    for n_slots in (sizes, sizes[::-1])[n % 2]:
                        rate, cpu = rows[n_slots, at_once]
                        work = _answers(bench, n_slots, at_once, n_held, speed)
                        bench.rounds(pools[n_slots], {"rate": rate, "cpu": cpu}, work)
        finally:
            bench.n_rounds = n_rounds
    measured.rows = [row for pair in rows.values() for row in pair]
    for n_slots in sizes:
        at_rest = rows[n_slots, 32][0].median("llamaslot")
        measured.goal(rows[n_slots, 32][0].what, "/s", at_rest, 350.0, at_least=True)
        crowded = rows[n_slots, 250][0].median("llamaslot")
        if at_rest and crowded:
            measured.goal(
                f"… with 250, of that with 32, {n_slots} slots{held}",
                "times",
                crowded / at_rest,
                1.0,
                at_least=True,
            )
    few, many = (rows[n_slots, 32][1].median("llamaslot") for n_slots in (4, 256))
    if few and many:
        measured.goal(f"CPU with 256 slots, of that with 4{held}", "times", many / few, 1.3)
    return measured


def _answers(
    bench: Bench, n_slots: int, at_once: int, n_held: int, speed: dict[tuple[str, int, int], float]
) -> Callable[[Target], dict[str, float]]:
    """For about a second each time."""

    def work(target: Target) -> dict[str, float]:
        key = target.kind, n_slots, at_once
        if n_held:
            bench.do(target, "fill", n=n_slots, n_tokens=n_held, at_once=min(n_slots, 16))
        if key not in speed:
            speed[key] = bench.do(target, "short", n=max(at_once, 60), at_once=at_once, stream=False)["per_s"]
        seconds = 0.4 if bench.is_quick else 1.0
        n = max(min(int(speed[key] * seconds), 4_000), 2 * at_once)
        got = bench.do(target, "short", n=n, at_once=at_once, stream=False)
        return {"rate": got["per_s"], "cpu": got["cpu_s"] / n * MS}

    return work


def beside(bench: Bench) -> Measured:
    """Short requests while a cold prompt of 60,000 tokens comes each second."""
    what = "short request beside 60,000 cold tokens a second: first token"
    rows = {"p50": Row(f"{what}, median", "ms"), "p99": Row(f"{what}, p99", "ms")}

    def work(target: Target) -> dict[str, float]:
        seconds = 2.0 if bench.is_quick else 4.0
        got = bench.do(target, "beside", seconds=seconds, short_per_s=50, cold_tokens=60_000, cold_per_s=1.0)
        return {"p50": got["p50_s"] * MS, "p99": got["p99_s"] * MS}

    with bench.running(_FAST, 16) as targets:
        for target in targets:
            bench.do(target, "short", n=30, at_once=4)
        bench.rounds(targets, rows, work)
    measured = Measured(list(rows.values()))
    other, mine = rows["p99"].median("aiohttp"), rows["p99"].median("llamaslot")
    if other and mine:
        measured.goal(f"{what}, p99, of the aiohttp proxy's", "times", mine / other, 3.0)
    return measured


def health(bench: Bench) -> Measured:
    """``/health``, as ``ab -k -c 64`` asks for it."""
    rate, p99, cpu = (
        Row("`/health`, 64 clients", "/s"),
        Row("`/health`: p99", "ms"),
        Row("`/health`: CPU", "ms"),
    )
    n = bench.scaled(4_000)

    def work(target: Target) -> dict[str, float]:
        mine = n if target.kind != "litellm" else 64
        got = bench.do(target, "health", n=mine, at_once=64)
        return {"rate": got["per_s"], "p99": got["p99_s"] * MS, "cpu": got["cpu_s"] / mine * MS}

    with bench.running(_FAST, 4) as targets:
        for target in targets:
            bench.do(target, "health", n=200, at_once=64)
        bench.rounds(targets, {"rate": rate, "p99": p99, "cpu": cpu}, work)
    measured = Measured([rate, p99, cpu])
    measured.goal("`/health`, 64 clients", "/s", rate.median("llamaslot"), 5_000.0, at_least=True)
    measured.goal("`/health`: p99", "ms", p99.median("llamaslot"), 30.0)
    return measured
