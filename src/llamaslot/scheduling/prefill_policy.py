"""Whose long prompt is computed now, how far at a stretch, and what of the time belongs to others.

Pure: what is under way comes in as numbers, decisions come out. A backend computes one long prefill at a time, in
stretches; between two of them everybody else gets what is theirs, and another prefill may be next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sharing:
    """The settings that long prefills obey; see ``prefill`` in the configuration.

    ``decode_share``: of the time, what belongs to streams while some decode. ``stretch_s``: how long a prefill goes on
    before it looks whether somebody else is next. ``max_passed_s``: after so long nobody who comes later is computed
    before it. ``max_held_s``: so long at a time it is held back by requests that need little.
    """

    decode_share: float = 0.1
    stretch_s: float = 0.5
    max_passed_s: float = 120.0
    max_held_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Pending:
    """A long prefill that is under way or waits for its turn.

    ``left_s``: to where somebody can go on from it. ``waited_s``: for how long it was not computed since it came, at
    ``came_at``.
    """

    left_s: float
    waited_s: float
    came_at: float


def rank(pending: Pending, max_passed_s: float) -> tuple[float, float]:
    """Least first: the shortest remaining work, which counts for less the longer it has waited, and for nothing after
    ``max_passed_s``. Then whoever came first is first, and none that comes later gets ahead of him.
    """
    patience = 1 - pending.waited_s / max_passed_s if max_passed_s > 0 else 0.0
    return pending.left_s * max(patience, 0.0), pending.came_at


def next_up(pendings: Sequence[Pending], current: int | None, switch_s: float, max_passed_s: float) -> int:
    """The index of the prefill to compute next. ``current`` goes on unless another is ahead by more than the
    interruption costs (``switch_s``), or has waited for too long.

    Being ahead by what it has waited is not enough for that: of two with more left than ``max_passed_s`` the one that
    waits gains on the one that is computed, and each would be interrupted for the other again and again (300 times for
    two of five minutes). So one that is interrupted gets ahead of that other one only when it is overdue.

    A prefill that has waited for ``max_passed_s`` waits for those that came before it and for the rest of the current
    one, and for no other.
    """
    ranks = [rank(pending, max_passed_s) for pending in pendings]
    everybody = range(len(pendings))
    if current is None:
        return min(everybody, key=ranks.__getitem__)
    now, left_s = ranks[current][0], pendings[current].left_s

    def is_ahead(i: int) -> bool:
        is_overdue = ranks[i][0] == 0 and now > 0
        return is_overdue or (ranks[i][0] + switch_s < now and pendings[i].left_s + switch_s < left_s)

    return min((i for i in everybody if is_ahead(i)), key=ranks.__getitem__, default=current)


def pause_s(computed_s: float, n_streams: int, decode_share: float) -> float:
    """How long to pause after ``computed_s`` of a prefill, beside which each of ``n_streams`` got next to nothing."""
    if n_streams == 0:
        return 0.0
    return computed_s * decode_share / (1 - decode_share)


def stretch_end(start: int, stop: int, reached: int) -> int:
    """Where a stretch from ``start`` on ends whose time is up at about ``reached``; ``stop`` ends it in any case.

    In whole pieces of ``GRAIN`` tokens, so that a server computes full batches, and with no crumb left before the stop.
    """
    n = max((reached - start) // GRAIN, 1) * GRAIN
    return stop if start + n + GRAIN // 2 >= stop else start + n


GRAIN = 256
