"""Where a prompt parts from what is held, and whether much of what was computed there is lost by it.

Two conversations part sooner or later; that costs nobody anything. What costs is a difference with the same text on
both sides of it: a date in the system prompt, an id, tools in another order, an old message that was shortened. So a
difference is judged by what stands behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

from llamaslot.cache.ids import WIDTH, common, count

#: Fewer tokens than that, computed again, are not worth a word.
LOST_MIN = 1024
#: So much of a prompt found again is enough, whatever the rest is.
ENOUGH = 0.9

_WINDOW = 24  # tokens in a row that are no accident
_MOST_PROBES = 1000  # of 0.05 ms each in a context of 60,000 tokens
_SAME_CONVERSATION = 0.7  # of what both have behind the difference
_SAME_SYSTEM = 0.5  # of the system part behind it: tools in another order count too


@dataclass(frozen=True, slots=True)
class Parting:
    """``at``: the tokens that a prompt shares with a holder of ``n_held``. ``n_lost``: tokens of the prompt that stand
    in the holder too, behind the difference, and that nobody holds as a prefix."""

    at: int
    n_held: int
    n_lost: int


def can_lose(n_prompt: int, n_shared: int, n_held: int) -> bool:
    """Whether both go on behind what they share for long enough to look closer."""
    return min(n_prompt, n_held) - n_shared > LOST_MIN


def parting(tokens: bytes, held: bytes, n_best: int, n_system: int) -> Parting | None:
    """How ``tokens`` part from ``held``, if that is the same conversation or the same system part with a difference
    in it, and ``LOST_MIN`` tokens or more are lost by that.

    ``n_best``: tokens of the longest prefix that anybody holds. ``n_system``: of system part and tools, 0 when unknown.
    Takes 1 ms as a rule, with 60,000 tokens on each side, and 50 ms where much is alike in many short pieces.
    """
    n = common(tokens, held)
    if not can_lose(count(tokens), n, count(held)):
        return None
    runs = alike(tokens, held, n)
    n_alike = sum(end - begin for begin, end in runs)
    n_in_system = sum(max(min(end, n_system) - begin, 0) for begin, end in runs)
    is_same = n_alike >= _SAME_CONVERSATION * (min(count(tokens), count(held)) - n)
    if not is_same and not (n < n_system and n_in_system >= _SAME_SYSTEM * (n_system - n)):
        return None
    n_lost = sum(max(end - max(begin, n_best), 0) for begin, end in runs)
    return Parting(n, count(held), n_lost) if n_lost >= LOST_MIN else None


def alike(tokens: bytes, held: bytes, n: int) -> list[tuple[int, int]]:
    """What of ``tokens`` behind the first ``n`` stands somewhere behind the first ``n`` of ``held``: pieces from the
    left to the right, as [begin, end) in ``tokens``. In whatever order they stand there; short ones are passed over.
    """
    behind = held[n * WIDTH :]
    runs: list[tuple[int, int]] = []
    at, n_probes = n, 0
    while True:
        step = 4
        while True:
            begin = at + step
            window = tokens[begin * WIDTH : (begin + _WINDOW) * WIDTH]
            if count(window) < _WINDOW or n_probes >= _MOST_PROBES:
                return runs
            n_probes += 1
            if (where := _find(behind, window)) >= 0:
                break
            step += step // 2 + 4
        # What was looked at before has no window in common, but the piece may begin between that and here.
        while begin > at and where > 0 and _at(tokens, begin - 1) == _at(behind, where - 1):
            begin, where = begin - 1, where - 1
        end = begin + common(tokens, behind[where * WIDTH :], begin)
        runs.append((begin, end))
        at = end
    return runs


def _find(tokens: bytes, window: bytes) -> int:
    """The index of the first token of ``window`` in ``tokens``; -1 when it does not stand there."""
    where = tokens.find(window)
    while where > 0 and where % WIDTH:
        where = tokens.find(window, where + 1)
    return where // WIDTH if where >= 0 else -1


def _at(tokens: bytes, i: int) -> bytes:
    return tokens[i * WIDTH : (i + 1) * WIDTH]
