"""Chooses which checkpoints of a slot file are worth their bytes on disk. The others are not kept in the store.

Only models that cannot rewind to any token (sliding window, recurrent, hybrid) have checkpoints. Pure: token counts
and sizes come in, token counts go out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

GAP_TOKENS = 512  # a state that saves computing fewer tokens is not worth its bytes
FAR_TOKENS = 8192  # as llama-server's --checkpoint-min-step
_LAST_TURN = 3  # the states of the last turn: at the start of its message, the end of its prompt, and the end
_ROW_BYTES = 8 << 10  # the disk space that saving one token is worth on models without rows


def states_to_keep(
    at: Iterable[int], marks: Iterable[int], *, state_bytes: int = 0, row_bytes: int = 0
) -> list[int]:
    """Choose the states of a slot file that are worth their bytes: its checkpoints and the state at its end. ``at``:
    the token counts after which the file has a state. Returns the token counts of the chosen ones, ascending.

    llama-server leaves up to 32 checkpoints in a file: 3 around the end of each prompt, one at the start of each last
    user message, others 8,192 tokens apart. A state has 63 to 230 MiB on the models that people run, as much as the
    rows of 1,000 to 10,000 tokens.

    ``marks``: token counts to which a later request may go back: the end of the system part, of messages and of the
    prompt, and where conversations parted. ``state_bytes``: of each state. ``row_bytes``: of the rows of one token.

    1. Keep the last state: the conversation goes on there.
    2. For each mark, keep the last state up to it, if it is at least ``GAP_TOKENS`` behind the previous one of these.
    3. Keep a state every ``FAR_TOKENS`` where nothing is marked: a text that is no chat may be edited anywhere.
    4. Of all these, keep the first, with which other conversations begin, and the last three, where most edits are.
       Keep a state between them only if it is at least as many tokens behind the previous one as have rows of a state's
       size. So all states together hardly have more bytes than the rows.
    """
    states = sorted(set(at))
    if not states:
        return []
    chosen, present = {states[-1]}, list[int]()
    for mark in sorted(marks):
        below = _last(states, mark)
        if below - _last(present, mark) >= GAP_TOKENS:
            chosen.add(below)
            present.append(below)
    for state in states:
        if state - _last(present, state) >= FAR_TOKENS and _next(present, state) - state >= GAP_TOKENS:
            chosen.add(state)
            present.append(state)
    return _thinned(sorted(chosen), min(state_bytes // max(row_bytes, _ROW_BYTES), FAR_TOKENS))


def _thinned(states: Sequence[int], apart_tokens: int) -> list[int]:
    kept = list(states[:1])
    for state in states[1:-_LAST_TURN]:
        if state - kept[-1] >= apart_tokens:
            kept.append(state)
    return [*kept, *(state for state in states[-_LAST_TURN:] if state > kept[0])]


def _last(states: Iterable[int], up_to: int) -> int:
    return max((state for state in states if state <= up_to), default=0)


def _next(states: Iterable[int], after: int) -> int:
    return min((state for state in states if state > after), default=after + FAR_TOKENS)
