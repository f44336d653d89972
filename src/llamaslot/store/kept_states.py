"""Which states of a slot file are worth their bytes. Pure.

llama-server leaves up to 32 checkpoints in a file: 3 around the end of each prompt, one at the start of each last user
message, others 8,192 tokens apart. One is 63 to 230 MiB on the models that people run, as much as the rows of 1,000 to
10,000 tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

GAP_TOKENS = 512  # a state that saves less is not worth its bytes
FAR_TOKENS = 8192  # as llama-server's --checkpoint-min-step


def states_to_keep(
    at: Sequence[int],
    marks: Iterable[int],
    *,
    kept: Iterable[int] = (),
    gap_tokens: int = GAP_TOKENS,
    far_tokens: int = FAR_TOKENS,
) -> list[int]:
    """Choose from the states after ``at`` tokens of a conversation. ``marks``: the numbers of tokens to which a later
    request may go back: the ends of the system part and of messages, of the prompt, where conversations parted.
    ``kept``: states that the store has already on this path. All in any order; ascending in return.

    1. The last one: the conversation goes on there.
    2. For each mark the last one up to it, if that saves ``gap_tokens`` against the one kept before it.
    3. Where nothing is marked, one each ``far_tokens``: what is edited need not be a chat.
    """
    states = sorted(set(at) - set(kept))
    if not states:
        return []
    chosen = {states[-1]}
    present = list(kept)
    for mark in sorted(marks):
        below, there = _last(states, mark), _last(present, mark)
        if below - there >= gap_tokens:
            chosen.add(below)
            present.append(below)
    for state in states:
        if state - _last(present, state) >= far_tokens and _next(present, state) - state >= gap_tokens:
            chosen.add(state)
            present.append(state)
    return sorted(chosen)


def _last(states: Iterable[int], up_to: int) -> int:
    return max((state for state in states if state <= up_to), default=0)


def _next(states: Iterable[int], after: int) -> int:
    return min((state for state in states if state > after), default=after + FAR_TOKENS)
