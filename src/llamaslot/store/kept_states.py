"""Which states of a slot file are worth their bytes. Pure.

llama-server leaves up to 32 checkpoints in a file: 3 around the end of each prompt, one at the start of each last user
message, others 8,192 tokens apart. One is 63 to 230 MiB on the models that people run, as much as the rows of 1,000 to
10,000 tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

GAP_TOKENS = 512  # a state that saves less is not worth its bytes
FAR_TOKENS = 8192  # as llama-server's --checkpoint-min-step
_LAST_TURN = 3  # states: the start of its message, the end of its prompt, the end
_ROW_BYTES = 8 << 10  # so much of the disk a token is worth on models without rows


def states_to_keep(
    at: Iterable[int], marks: Iterable[int], *, state_bytes: int = 0, row_bytes: int = 0
) -> list[int]:
    """Choose from the states after ``at`` tokens of a conversation, each of ``state_bytes``. ``marks``: the numbers of
    tokens to which a later request may go back: the ends of the system part and of messages, of the prompt, where
    conversations parted. ``row_bytes``: of the rows of a token. All in any order; ascending in return.

    1. The last one: the conversation goes on there.
    2. For each mark the last one up to it, if that saves ``GAP_TOKENS`` against the one kept before it.
    3. Where nothing is marked, one each ``FAR_TOKENS``: what is edited need not be a chat.
    4. Of these only the first, with which other conversations begin, and the last three, where most edits are, need not
       be worth as much per byte as rows are: another one must save as many tokens as have rows of its size. So all
       together hardly weigh more than the rows.
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
