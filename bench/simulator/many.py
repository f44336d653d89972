"""``python -m bench.simulator.many``: one llamaslot in front of 1, 10, 100 and 1,000 servers, users growing alike.

All servers have the same model and one directory without a quota. The CPU time is that of the dispatcher: arrivals,
placements and what is done at each release, by the clock of its thread.
"""

from __future__ import annotations

import argparse
import math
import resource
import sys
import time
from collections.abc import Coroutine, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.simulator.disk import UNLIMITED, Disk
from bench.simulator.generate import crew, generate
from bench.simulator.machine import Hardware
from bench.simulator.proxy import Proxy
from bench.simulator.result import Spread
from bench.simulator.server import File, SimulatedServer
from bench.simulator.trace import Trace, Turn
from bench.simulator.users import Foresight, Served, Users
from bench.virtual import VirtualLoop
from llamaslot.backend.lease import Lease
from llamaslot.backend.lease_states import Preempted
from llamaslot.fleet.dispatcher import Dispatcher
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.snapshot_value import ByValue
from llamaslot.store.snapshot_table import SnapshotTable
from llamaslot.tasks import TaskOwner


class TimedDispatcher(Dispatcher):
    """Sums up the CPU time that it takes, and counts what it has placed."""

    n_placed, cpu_s, longest_s = 0, 0.0, 0.0
    _depth, _began = 0, 0.0

    def begin(self) -> None:
        if not self._depth:
            self._began = time.thread_time()
        self._depth += 1

    def end(self) -> None:
        self._depth -= 1
        if not self._depth:
            seconds = time.thread_time() - self._began
            self.cpu_s += seconds
            self.longest_s = max(self.longest_s, seconds)

    async def lease(
        self, request: Request, *, is_back: bool = False, preempted: Preempted | None = None
    ) -> Lease:
        self.n_placed += 1
        return await _Steps(self, super().lease(request, is_back=is_back, preempted=preempted))

    def dispatch(self, backend: str | None = None, *, is_arrival: bool = False) -> None:
        self.begin()
        try:
            super().dispatch(backend, is_arrival=is_arrival)
        finally:
            self.end()


@dataclass(frozen=True, slots=True)
class _Steps:
    """``coroutine``, of which only the time counts in which it runs."""

    dispatcher: TimedDispatcher
    coroutine: Coroutine[Any, Any, Lease]

    def __await__(self) -> Generator[Any, Any, Lease]:
        while True:
            self.dispatcher.begin()
            try:
                waits_for = self.coroutine.send(None)
            except StopIteration as done:
                lease: Lease = done.value
                return lease
            finally:
                self.dispatcher.end()
            yield waits_for


@dataclass(frozen=True, slots=True)
class Figures:
    """One run. ``cpu_s``: of the dispatcher; ``all_cpu_s``: of the process, simulated servers and users included."""

    n_backends: int
    n_users: int
    n_requests: int
    placement_s: float
    longest_s: float
    hit_ratio: float
    hit_ratio_follow_up: float
    first: Spread
    follow_up: Spread
    all_cpu_s: float
    peak_bytes: int

    def row(self) -> str:
        cells = (
            f"{self.n_backends:,}",
            f"{self.n_users:,}",
            f"{self.n_requests:,}",
            f"{self.placement_s * 1e3:.2f} / {self.longest_s * 1e3:.0f}",
            f"{self.hit_ratio_follow_up:.3f} / {self.hit_ratio:.3f}",
            f"{self.first.median:.1f} / {self.first.p90:.1f}",
            f"{self.follow_up.median:.2f} / {self.follow_up.p90:.2f}",
            f"{self.all_cpu_s:.0f}",
            f"{self.peak_bytes / 2**30:.1f}",
        )
        return f"| {' | '.join(cells)} |"


HEAD = (
    "| Backends | Users | Requests | Placement, ms of CPU: mean / longest | Reuse: follow-ups / all "
    "| First turns, s: median / p90 | Follow-ups, s | CPU, s | Memory, GiB |\n" + "|---" * 9 + "|"
)


async def _run(
    trace: Trace, loop: VirtualLoop, n_backends: int, n_slots: int
) -> tuple[Users, TimedDispatcher]:
    hardware, files, order = Hardware(), dict[str, File](), ByValue()
    foresight = Foresight(trace, hardware, loop.time)
    servers = [SimulatedServer(loop, n_slots, hardware, f"gpu{n}", files) for n in range(n_backends)]
    proxies = list[Proxy]()

    def drop(snapshot_id: str) -> None:
        for proxy in proxies:
            proxy.table.drop_snapshot(snapshot_id)

    disk = Disk(
        servers[0], SnapshotTable(order), UNLIMITED, now=loop.time, on_drop=lambda dropped: drop(dropped.id)
    )
    for server in servers:
        server.on_begun = foresight.begun
        first = proxies[0] if proxies else None
        proxies.append(Proxy(loop, server, disk, first=first, dispatcher=TimedDispatcher))
    order.saves_s = proxies[0].table.saves_s
    users, beside = Users(trace, loop, proxies[0].ask, foresight), TaskOwner()
    for proxy in proxies:
        beside.spawn(proxy.run(), f"beside {proxy.server.url}")
    await users.run()
    await beside.close()
    for proxy in proxies:
        await proxy.close()
    proxies[0].check()
    dispatcher = proxies[0].dispatcher
    assert isinstance(dispatcher, TimedDispatcher)
    return users, dispatcher


def simulate(n_backends: int, *, users: int, hours: float, seed: int, slots: int = 4) -> Figures:
    """``users``: for each backend. Raises AssertionError when something was left behind or broke a rule."""
    trace = generate(seed, crew(users * n_backends, hours), f"{n_backends} backends")
    loop, began = VirtualLoop(), time.process_time()
    try:
        done, dispatcher = loop.run(_run(trace, loop, n_backends, slots))
    finally:
        loop.close()
    served = done.served
    goes_on = {Turn.FOLLOW_UP, Turn.EDIT}

    def hit_ratio(some: list[Served]) -> float:
        n_known = sum(one.n_known for one in some)
        return sum(one.n_reused for one in some) / n_known if n_known else math.nan

    def ttft(*kinds: Turn) -> Spread:
        return Spread.of(one.ttft_s for one in served if one.request.kind in kinds)

    return Figures(
        n_backends=n_backends,
        n_users=users * n_backends,
        n_requests=len(served),
        placement_s=dispatcher.cpu_s / max(dispatcher.n_placed, 1),
        longest_s=dispatcher.longest_s,
        hit_ratio=hit_ratio(served),
        hit_ratio_follow_up=hit_ratio([one for one in served if one.request.kind in goes_on]),
        first=ttft(Turn.FIRST),
        follow_up=ttft(*goes_on),
        all_cpu_s=time.process_time() - began,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.simulator.many", description=__doc__)
    parser.add_argument("--backends", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--slots", type=int, default=4, help="of each backend")
    parser.add_argument("--users", type=int, default=6, help="for each backend")
    parser.add_argument("--hours", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    sys.stdout.write(HEAD + "\n")
    for n in options.backends:
        figures = simulate(
            n, users=options.users, hours=options.hours, seed=options.seed, slots=options.slots
        )
        sys.stdout.write(figures.row() + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
