"""Where a prompt diverges from a cached sequence, and whether that makes llama-server recompute much known text.

A divergence between two conversations is normal and costs nothing. A divergence with the same text on both sides of
it is expensive: a date in the system prompt, an id, tools in another order, an old message that was shortened. So
this module compares what follows the divergence.
"""

from __future__ import annotations

from msgspec import Struct

from llamaslot.cache.ids import WIDTH, common, count

#: Fewer recomputed tokens than this are not reported.
LOST_MIN = 1024
#: If this share of a prompt is reused, nothing is reported.
ENOUGH = 0.9

_WINDOW = 24  # a common run of so many tokens is not chance
_MOST_PROBES = 1000  # 0.05 ms each in a context of 60,000 tokens
_SAME_CONVERSATION = 0.7  # share of the text after the divergence that must be common
_SAME_SYSTEM = 0.5  # the same for the system part: tools in another order count too


class Parting(Struct, frozen=True):
    """``at``: tokens that the prompt shares with a holder of ``n_held`` tokens. ``n_lost``: tokens of the prompt
    after the divergence that the holder contains too, but no cached prefix covers.
    """

    at: int
    n_held: int
    n_lost: int


def can_lose(n_prompt: int, n_shared: int, n_held: int) -> bool:
    """Whether both sequences continue after the common prefix for long enough to justify a closer look."""
    return min(n_prompt, n_held) - n_shared > LOST_MIN


def parting(tokens: bytes, held: bytes, n_best: int, n_system: int) -> Parting | None:
    """Compare ``tokens`` with ``held``. Returns the divergence if both are the same conversation, or have the same
    system part, and at least ``LOST_MIN`` tokens are recomputed because of it; else None.

    ``n_best``: tokens of the longest cached prefix of any holder. ``n_system``: tokens of the system part and tools,
    0 if unknown. Takes 1 ms as a rule with 60,000 tokens on each side, 50 ms if many short pieces are common.
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
    """The pieces of ``tokens`` after the first ``n`` that ``held`` contains anywhere after its first ``n``. Returns
    ranges [begin, end) in ``tokens``, ascending, whatever their order in ``held``; short pieces are skipped.
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
        # The windows before this one are not common, but the common piece may begin before this window.
        while begin > at and where > 0 and _at(tokens, begin - 1) == _at(behind, where - 1):
            begin, where = begin - 1, where - 1
        end = begin + common(tokens, behind[where * WIDTH :], begin)
        runs.append((begin, end))
        at = end
    return runs


def _find(tokens: bytes, window: bytes) -> int:
    """The index of the first token of ``window`` in ``tokens``; -1 if it is not there."""
    where = tokens.find(window)
    while where > 0 and where % WIDTH:
        where = tokens.find(window, where + 1)
    return where // WIDTH if where >= 0 else -1


def _at(tokens: bytes, i: int) -> bytes:
    return tokens[i * WIDTH : (i + 1) * WIDTH]
