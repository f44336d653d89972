"""A long prompt that is computed ahead of its own request: how far it is, and what that has taken."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from llamaslot.backend.lease import Lease, Report
from llamaslot.llama.sse import Earlier


@dataclass(slots=True, eq=False)
class LongPrompt:
    """A prefill that is under way. ``at``: tokens that are there; ``stops``: where to stop on the way, and at last.
    ``report``: told what happens; ``may_replan``: it may be given up for a better place."""

    lease: Lease
    stops: Sequence[int]
    report: Report
    may_replan: bool
    at: int
    came_at: float
    has_begun: bool = False
    n_reused: int = 0  # found by the first stretch
    end: int = 0  # of the stretch that is computed
    is_cut: bool = False  # that stretch ends by itself after a while
    limit: asyncio.Timeout | None = None  # of that stretch, once it may be interrupted
    since: float = 0.0  # its beginning
    # Before that many tokens no interruption: a sliding window stopped before it is full keeps nothing.
    no_stop_before: int = 0
    is_by_right: bool = False  # after it was held back for too long: not for a request that needs little
    seconds: float = 0.0  # of computing
    counted_s: float = 0.0  # of these, while other users waited
    is_keeping: bool = False  # has a trunk saved, and waits for no turn
    n_stopped: int = 0  # interruptions for somebody else
    paused_s: float = 0.0  # of which for streams
    waited_s: float = 0.0  # for its turn, in all

    @property
    def user(self) -> str:
        return self.lease.job.user.id

    @property
    def last(self) -> int:
        return self.stops[-1]

    @property
    def earlier(self) -> Earlier:
        return Earlier(self.n_reused, self.at, self.seconds)

    @property
    def so_far(self) -> Earlier | None:
        return self.earlier if self.has_begun else None

    @property
    def target(self) -> int:
        """Where to stop next: a boundary of its own, or where others wait for a trunk."""
        stops = [*self.stops, *self.lease.pool.trunks_to_come(self.lease.slot_id)]
        return min(
            (at for at in stops if at > self.at or (at == self.at and not self.has_begun)), default=self.last
        )
