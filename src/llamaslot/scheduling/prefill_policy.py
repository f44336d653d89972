"""Decides which long prefill is computed now and for how long, and how much time other requests get in between.

Pure: numbers come in, decisions go out. A backend computes one long prefill at a time, in chunks. Between two chunks,
running streams and requests with a short prefill get their share of the time, and another long prefill may be next.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from msgspec import Struct

from llamaslot.scheduling.fairness import Shares
from llamaslot.scheduling.prefill_rate import PrefillRate

GRAIN = 256  # tokens; the length of a chunk is a multiple of it


class Pending(Struct, frozen=True):
    """A long prefill that is being computed or waits for its turn.

    ``left_s``: the seconds of computing that are left until its target. ``waited_s``: the seconds since ``came_at`` in
    which it was not computed.
    """

    left_s: float
    waited_s: float
    came_at: float


def rank(pending: Pending, starvation_s: float) -> tuple[float, float]:
    """Return the sort key of a prefill; the one with the smallest key is computed next. The key is the remaining work
    in seconds. It shrinks in proportion while the prefill waits, and is 0 after ``starvation_s``. Among prefills with
    the key 0 the one that came first is next, so no later one overtakes it.
    """
    discount = 1 - pending.waited_s / starvation_s if starvation_s > 0 else 0.0
    return pending.left_s * max(discount, 0.0), pending.came_at


def next_up(pendings: Sequence[Pending], current: int | None, switch_s: float, starvation_s: float) -> int:
    """Return the index of the prefill to compute next. ``current`` is the index of the one that was computed last,
    None if there is none.

    ``current`` goes on unless another prefill is overdue (its ``rank`` is 0), or is ahead by more than ``switch_s``,
    the seconds that an interruption costs. "Ahead" means in rank and also in remaining work. Rank alone does not
    count, because it falls with waiting: two prefills with more work left than ``starvation_s`` would interrupt each
    other again and again (300 times for two of five minutes). So a prefill that was interrupted by a shorter one
    resumes at the latest when it has waited for ``starvation_s``, the rest of the current chunk, and older overdue
    prefills.
    """
    ranks = [rank(pending, starvation_s) for pending in pendings]
    indices = range(len(pendings))
    if current is None:
        return min(indices, key=ranks.__getitem__)
    now, left_s = ranks[current][0], pendings[current].left_s

    def is_ahead(i: int) -> bool:
        is_overdue = ranks[i][0] == 0 and now > 0
        return is_overdue or (ranks[i][0] + switch_s < now and pendings[i].left_s + switch_s < left_s)

    return min((i for i in indices if is_ahead(i)), key=ranks.__getitem__, default=current)


def pause_s(computed_s: float, n_streams: int, decode_share: float) -> float:
    """Return the seconds to pause after a chunk that took ``computed_s``, so that ``n_streams`` running streams get
    ``decode_share`` of the time; 0 without streams.
    """
    if n_streams == 0:
        return 0.0
    return computed_s * decode_share / (1 - decode_share)


def chunk_end(start: int, stop: int, rate: PrefillRate, chunk_s: float) -> int:
    """Return the token at which a chunk ends that begins at token ``start``; at most ``stop``. Computing the chunk
    takes about ``chunk_s`` seconds at ``rate``. It has ``GRAIN`` tokens if no prefill was observed yet.

    The length is a multiple of ``GRAIN`` tokens, so that llama-server computes full batches. If less than half a
    ``GRAIN`` would be left before ``stop``, the chunk ends at ``stop``.
    """
    n_reached = rate.reached(start, chunk_s) - start if rate.known else GRAIN
    n = max(n_reached // GRAIN, 1) * GRAIN
    return stop if start + n + GRAIN // 2 >= stop else start + n


class ServerTime:
    """The compute time that each user got from one llama-server, counted only while other users waited for it.
    llamaslot's own requests (their user is "") are not counted.
    """

    def __init__(self) -> None:
        self._shares = Shares()

    def took(self, users: Collection[str], seconds: float, waiting: Collection[str]) -> bool:
        """Record that requests of ``users`` ran for ``seconds``, while requests of ``waiting`` waited. Each of
        ``users`` is charged an equal part. Returns True if any other user waited.
        """
        others = {user for user in waiting if user}
        for user in users:
            if user:
                self._shares.granted(user, seconds / len(users), others | set(users) - {""}, ())
        return bool(others - set(users))

    def owed_s(self, user: str) -> float:
        """Return by how many seconds ``user`` has received less than its share; negative if it has received more."""
        return self._shares.deficit_s(user)

    def may_hold_back(self, user: str, other: str, grace_s: float) -> bool:
        """True if requests of ``user`` with a short prefill may delay a long prefill of ``other``. They may until
        ``user`` has received ``grace_s`` more than ``other``, and always if both are the same user or one is llamaslot
        itself.
        """
        is_one = user == other or not (user and other)
        return is_one or self.owed_s(user) >= self.owed_s(other) - grace_s

    def keep(self, users: Collection[str]) -> None:
        """Forget all users that are not in ``users``."""
        self._shares.keep(users, users)
