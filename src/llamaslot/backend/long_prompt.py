"""A prompt that is computed ahead of its request: how far it is, and what that has taken."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llamaslot.backend.lease import Lease
from llamaslot.formats.comments import Comment
from llamaslot.llama.sse import PrefillStats


@dataclass(frozen=True, slots=True)
class Prefilling:
    """How far a prompt of ``n_tokens`` is: ``n_done`` tokens are there, of which ``n_reused`` were before, after
    ``seconds`` of computing."""

    n_done: int
    n_tokens: int
    n_reused: int
    seconds: float

    def __str__(self) -> str:
        return Comment.PREFILL.format(n_done=self.n_done, n_tokens=self.n_tokens)


Report = Callable[[object], None]  # what happens now: a text, or what has one


def no_report(_: object) -> None:
    """A ``Report`` that ignores what happens."""


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
    n_stopped: int = 0  # interruptions for other requests
    paused_s: float = 0.0  # of which for streams
    waited_s: float = 0.0  # for its turn, in all

    @property
    def user(self) -> str:
        return self.lease.request.user.id

    @property
    def last(self) -> int:
        return self.stops[-1]

    @property
    def prefill_stats(self) -> PrefillStats:
        return PrefillStats(self.n_reused, self.at, self.seconds)

    @property
    def so_far(self) -> PrefillStats | None:
        return self.prefill_stats if self.has_begun else None

    @property
    def target(self) -> int:
        """Where to stop next: a boundary of its own, or where others wait for a trunk."""
        stops = [*self.stops, *self.lease.pool.trunks_to_come(self.lease.slot_id)]
        return min(
            (at for at in stops if at > self.at or (at == self.at and not self.has_begun)), default=self.last
        )
