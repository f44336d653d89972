"""The state of a prompt that llamaslot computes ahead of the client's request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from msgspec import Struct, field

from llamaslot.backend.lease import Lease
from llamaslot.formats.comments import Comment
from llamaslot.llama.token_lists import TokenList
from llamaslot.scheduling.plan import PrefillStats


class Prefilling(Struct, frozen=True):
    """The progress of a prefill to ``n_tokens``. The slot has the first ``n_done`` tokens; ``n_reused`` of these it
    had before. ``seconds``: the time spent on computing.
    """

    n_done: int
    n_tokens: int
    n_reused: int
    seconds: float

    def __str__(self) -> str:
        return Comment.PREFILL.format(n_done=self.n_done, n_tokens=self.n_tokens)


Report = Callable[[object], None]  # takes the present activity, a text or an object whose str() is one


def no_report(_: object) -> None:
    """A ``Report`` that ignores its argument."""


class Chunk(Struct, eq=False):
    """The part of a prompt that llama-server computes now, up to ``end`` tokens. ``is_cut``: only this part was sent,
    so the computation ends by itself; otherwise the prompt was sent as far as the next stop, and is interrupted.
    ``is_by_right``: the prompt has been delayed long enough, so requests with a short prefill do not interrupt this
    chunk before its full time. ``limit``: the timeout that interrupts it; None until it has begun.
    """

    end: int
    is_cut: bool
    is_by_right: bool
    since: float
    limit: asyncio.Timeout | None = None


class LongPrompt(Struct, eq=False):
    """A prefill in progress. ``at``: the number of prompt tokens that the slot has. ``stops``: the token counts at
    which the prefill stops, the last one being its end. ``report``: called with each progress. ``may_replan``:
    RetryPlacement may be raised if the slot holds too little.
    """

    lease: Lease
    stops: Sequence[int]
    report: Report
    may_replan: bool
    at: int
    came_at: float
    has_begun: bool = False
    n_reused: int = 0  # tokens that the first chunk found in the slot
    chunk: Chunk | None = None
    # No interruption before so many tokens: a sliding window that is stopped before it is full keeps nothing.
    no_stop_before: int = 0
    seconds: float = 0.0  # of computing
    counted_s: float = 0.0  # the part of ``seconds`` in which other users waited
    is_keeping: bool = False  # a shared prefix is being saved, so the prefill does not wait for a turn
    n_stopped: int = 0  # chunks that were interrupted
    paused_s: float = 0.0  # the part of ``waited_s`` that went to running streams
    waited_s: float = 0.0  # the time spent on waiting for turns
    gives_way_to: str = ""  # the reason why it waits now, for users to read
    tokens: TokenList = field(default_factory=TokenList)

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
        """The token count at which the prefill stops next: one of ``stops``, or the end of a shared prefix that other
        requests wait for.
        """
        stops = [*self.stops, *self.lease.table.expected_trunks(self.lease.slot_id)]
        return min(
            (at for at in stops if at > self.at or (at == self.at and not self.has_begun)), default=self.last
        )
