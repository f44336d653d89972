"""Which long prefill is computed now, for how long, and how much time belongs to other requests.

Pure: numbers come in, decisions go out. A backend computes one long prefill at a time, in chunks. Between two chunks
running streams and requests with a short prefill get their share, and another prefill may be next.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from msgspec import Struct

from llamaslot.scheduling.fairness import Shares


class PrefillSharing(Struct, frozen=True):
    """The settings of long prefills; see ``prefill`` in the configuration.

    ``decode_share``: share of the time that belongs to streams while any decode. ``chunk_s``: seconds of a chunk,
    after which another prefill may be next. ``starvation_s``: a prefill that has waited this long is not overtaken by
    later ones. ``max_yield_s``: the longest time at once for which requests with a short prefill postpone it.
    """

    decode_share: float = 0.1
    chunk_s: float = 0.5
    starvation_s: float = 120.0
    max_yield_s: float = 2.0


class Pending(Struct, frozen=True):
    """A long prefill that is running or waits for its turn.

    ``left_s``: seconds to the next point from which a request can resume. ``waited_s``: seconds since ``came_at`` in
    which it was not computed.
    """

    left_s: float
    waited_s: float
    came_at: float


def rank(pending: Pending, starvation_s: float) -> tuple[float, float]:
    """The sort key of a waiting prefill; the smallest is computed next. This is the shortest remaining work, which
    counts for less the longer the prefill has waited, and for nothing after ``starvation_s``: then the oldest is
    next, and no later one overtakes it.
    """
    discount = 1 - pending.waited_s / starvation_s if starvation_s > 0 else 0.0
    return pending.left_s * max(discount, 0.0), pending.came_at


def next_up(pendings: Sequence[Pending], current: int | None, switch_s: float, starvation_s: float) -> int:
    """The index of the prefill to compute next.

    ``current`` goes on unless another one is ahead by more than an interruption costs (``switch_s``), or has waited
    for too long. The credit for waiting alone does not interrupt a prefill: otherwise, of two prefills with more
    left than ``starvation_s``, the waiting one would gain on the running one, and they would interrupt each other
    again and again (300 times for two of five minutes). So a prefill that was interrupted overtakes the other one
    only when it has waited for ``starvation_s``. It then waits only for older ones and for the rest of the current
    one.
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
    """Seconds to pause after a prefill has run for ``computed_s``, so that ``n_streams`` running streams get their
    share of the time; 0 without streams."""
    if n_streams == 0:
        return 0.0
    return computed_s * decode_share / (1 - decode_share)


def chunk_end(start: int, stop: int, reached: int) -> int:
    """The end of a chunk from ``start`` on that should last until about ``reached``; at most ``stop``.

    A multiple of ``GRAIN`` tokens, so that the server computes full batches, without a small rest before ``stop``.
    """
    n = max((reached - start) // GRAIN, 1) * GRAIN
    return stop if start + n + GRAIN // 2 >= stop else start + n


GRAIN = 256


class ServerTime:
    """The compute time of one llama-server by user, counted only while other users waited. Requests of llamaslot
    itself (whose user has no name) are not counted.
    """

    def __init__(self) -> None:
        self._shares = Shares()

    def took(self, users: Collection[str], seconds: float, waiting: Collection[str]) -> bool:
        """Record that ``users`` used ``seconds`` in equal parts while ``waiting`` waited. Returns whether another
        user waited.
        """
        others = {user for user in waiting if user}
        for user in users:
            if user:
                self._shares.granted(user, seconds / len(users), others | set(users) - {""}, ())
        return bool(others - set(users))

    def owed_s(self, user: str) -> float:
        """The seconds that ``user`` has received less than its part; negative if it has received more."""
        return self._shares.deficit_s(user)

    def may_hold_back(self, user: str, other: str, grace_s: float) -> bool:
        """Whether requests with a short prefill of ``user`` may delay a long one of ``other``: until ``user`` has
        received ``grace_s`` more than ``other``.
        """
        is_one = user == other or not (user and other)
        return is_one or self.owed_s(user) >= self.owed_s(other) - grace_s

    def keep(self, users: Collection[str]) -> None:
        """Forget all users that are not in ``users``."""
        self._shares.keep(users, users)
