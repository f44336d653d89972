"""The state of a prompt that is computed ahead of its request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from msgspec import Struct

from llamaslot.backend.lease import Lease
from llamaslot.formats.comments import Comment
from llamaslot.scheduling.plan import PrefillStats


class Prefilling(Struct, frozen=True):
    """The progress of a prefill: of ``n_tokens``, ``n_done`` are present, of which ``n_reused`` were there before,
    after ``seconds`` of computing.
    """

    n_done: int
    n_tokens: int
    n_reused: int
    seconds: float

    def __str__(self) -> str:
        return Comment.PREFILL.format(n_done=self.n_done, n_tokens=self.n_tokens)


Report = Callable[[object], None]  # the present activity: a text, or an object with one


def no_report(_: object) -> None:
    """A ``Report`` that ignores its argument."""


class Chunk(Struct, eq=False):
    """The part of a prompt that llama-server computes now, up to ``end`` tokens. ``is_cut``: it is sent as a part of
    the prompt, so it ends by itself. ``is_by_right``: the prompt has been postponed for too long, so requests with a
    short prefill no longer delay it. ``limit``: once it may be interrupted.
    """

    end: int
    is_cut: bool
    is_by_right: bool
    since: float
    limit: asyncio.Timeout | None = None


class LongPrompt(Struct, eq=False):
    """A prefill in progress. ``at``: tokens that are present; ``stops``: where to stop on the way, and finally.
    ``report``: called on progress; ``may_replan``: it may be given up for a better place.
    """

    lease: Lease
    stops: Sequence[int]
    report: Report
    may_replan: bool
    at: int
    came_at: float
    has_begun: bool = False
    n_reused: int = 0  # found by the first chunk
    chunk: Chunk | None = None
    # No interruption before that many tokens: a sliding window that is stopped before it is full keeps nothing.
    no_stop_before: int = 0
    seconds: float = 0.0  # of computing
    counted_s: float = 0.0  # of these, seconds while other users waited
    is_keeping: bool = False  # it is having a shared prefix saved, and does not wait for a turn
    n_stopped: int = 0  # interruptions for other requests
    paused_s: float = 0.0  # seconds of these for running streams
    waited_s: float = 0.0  # for its turn, in total
    gives_way_to: str = ""  # what it waits for now

    @property
    def user(self) -> str:
        return self.lease.request.user.id

    @property
    def users(self) -> set[str]:
        """The user of the prompt, and the users whose requests wait for a shared prefix from it."""
        return {self.user, *self.lease.table.users_awaiting(self.lease.slot_id)}

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
        """The number of tokens at which the prefill stops next: a stop of its own, or the end of a shared prefix that
        other requests wait for.
        """
        stops = [*self.stops, *self.lease.table.expected_trunks(self.lease.slot_id)]
        return min(
            (at for at in stops if at > self.at or (at == self.at and not self.has_begun)), default=self.last
        )
