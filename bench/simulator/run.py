"""One run: a trace, a policy, a disk."""

from __future__ import annotations

import enum
import math
import time
from dataclasses import dataclass, field

from msgspec.structs import replace

from bench.simulator.baseline import Original
from bench.simulator.disk import UNLIMITED, Disk
from bench.simulator.machine import Hardware
from bench.simulator.orders import AtRandom, ByUse, Foreseen
from bench.simulator.proxy import Proxy
from bench.simulator.result import Label, PrefillFigures, Result, measured
from bench.simulator.server import SimulatedServer
from bench.simulator.trace import Trace
from bench.simulator.users import Foresight, Users
from bench.virtual import VirtualLoop
from llamaslot.scheduling.settings import SchedulingSettings
from llamaslot.scheduling.snapshot_value import ByValue, Order, SnapshotStats
from llamaslot.store.snapshot_table import SnapshotTable
from llamaslot.tasks import TaskOwner


class Policy(enum.StrEnum):
    """LRU, RANDOM and CLAIRVOYANT differ from LLAMASLOT in what they evict, and in nothing else; ALWAYS in that it
    saves after each answer. ORIGINAL is another program."""

    LLAMASLOT = "llamaslot"
    LRU = "lru"
    RANDOM = "random"
    CLAIRVOYANT = "clairvoyant"
    ALWAYS = "always"
    ORIGINAL = "original"


@dataclass(frozen=True, slots=True)
class Setting:
    """``disk`` is the share of all contexts that there is room for; None for as much as is wanted. ``prefill`` names
    the ``settings``."""

    policy: Policy
    disk: float | None = 0.25
    n_slots: int = 4
    hardware: Hardware = field(default_factory=Hardware)
    settings: SchedulingSettings = field(default_factory=SchedulingSettings)
    prefill: str = "shared"

    def quota_bytes(self, trace: Trace) -> int:
        if self.disk is None:
            return UNLIMITED
        return int(self.disk * trace.n_final * self.hardware.bytes_per_token)


LEFT = replace(SchedulingSettings(), chunk_threshold_s=math.inf)
"""All prefill is left to llama-server, and no request yields to another."""


def simulate(trace: Trace, setting: Setting) -> Result:
    """The whole script of all users. Raises AssertionError when something was left behind or broke a rule."""
    started = time.monotonic()
    loop = VirtualLoop()
    faults: list[str] = []
    loop.set_exception_handler(lambda _, context: faults.append(repr(context)))
    try:
        result = loop.run(_Run(trace, setting, loop).run())
    finally:
        loop.close()
    assert not faults, faults
    result.wall_s = time.monotonic() - started
    return result


class _Run:
    def __init__(self, trace: Trace, setting: Setting, loop: VirtualLoop) -> None:
        self.trace, self.setting, self.loop = trace, setting, loop
        self.server = SimulatedServer(loop, setting.n_slots, setting.hardware)
        self.foresight = Foresight(trace, setting.hardware, loop.time)
        self.server.on_begun = self.foresight.begun
        order = self._order()
        self.disk = Disk(
            self.server,
            SnapshotTable(order),
            setting.quota_bytes(trace),
            now=loop.time,
            on_drop=lambda snapshot: self.served_by.dropped(snapshot),
        )
        is_always = setting.policy is Policy.ALWAYS
        self.served_by: Proxy | Original = (
            Original(loop, self.server, self.disk)
            if setting.policy is Policy.ORIGINAL
            else Proxy(loop, self.server, self.disk, settings=setting.settings, saves_each=is_always)
        )
        if isinstance(order, ByValue) and isinstance(self.served_by, Proxy):
            order.saves_s = self.served_by.table.saves_s

    def _order(self) -> Order:
        match self.setting.policy:
            case Policy.LLAMASLOT | Policy.ALWAYS:
                return ByValue()
            case Policy.LRU | Policy.ORIGINAL:
                return ByUse()
            case Policy.RANDOM:
                return AtRandom(self.trace.seed)
            case Policy.CLAIRVOYANT:
                return Foreseen(self._value)

    def _value(self, snapshot: SnapshotStats) -> float:
        """Seconds that its next use saves, per byte and second until then."""
        origin = self.disk.origins.get(snapshot.id)
        if origin is None:
            return math.inf  # a trunk: small, few, and new conversations begin at any time
        in_s, n_shared = self.foresight.next_use(origin, snapshot.n_tokens)
        return self.setting.hardware.prefill_s(0, n_shared) / (max(snapshot.size_bytes, 1) * in_s)

    async def run(self) -> Result:
        started_at = self.loop.time()
        users = Users(self.trace, self.loop, self.served_by.ask, self.foresight)
        beside = TaskOwner()
        beside.spawn(self.served_by.run(), "beside")
        await users.run()
        took_s = self.loop.time() - started_at
        await beside.close()
        await self.served_by.close()
        self.served_by.check()
        setting = self.setting
        label = Label(self.trace.name, self.trace.seed, setting.policy.value, setting.disk, setting.prefill)
        return measured(label, users.served, self.server, self.disk, took_s, self._chunked_prefill())

    def _chunked_prefill(self) -> PrefillFigures:
        counts = self.server.counts
        found = PrefillFigures(counts.n_prefills, counts.n_closed)
        if isinstance(self.served_by, Proxy):
            by, step_s = self.served_by, self.setting.hardware.step_s
            found.waited_s = by.sample("prefill_wait_seconds_sum")
            found.paused_s = by.sample("prefill_pause_seconds_total")
            found.stream_share = (
                by.beside.n_tokens * step_s / by.beside.seconds if by.beside.seconds else None
            )
        return found
