"""What a slot can reuse of a prompt, by kind of model: measured on tiny GGUFs with llama.cpp of October 2026.

Dense models can go back to any token. Recurrent ones can only go on from their exact end, or from a checkpoint. With
a sliding window the tokens before the new end must still be there: a live slot keeps ``window + ubatch`` of them, a
restored one just the window; otherwise it takes a checkpoint, of which the last token is computed again.
"""

from __future__ import annotations

from tests.support.fake_types import FakeSlot, Shape, Task

MAX_CHECKPOINTS = 32


def usable(slot: FakeSlot, shared: int, n_prompt: int, shape: Shape) -> tuple[int, int]:
    """Return how many tokens need not be computed (one always is), and the lowest position whose KV is then
    in memory.
    """
    n_past = min(shared, n_prompt - 1)
    if n_past <= 0:
        return 0, 0
    if shape.kind == "dense":
        return n_past, 0
    if shape.kind == "recurrent":
        if n_past == slot.n_tokens:
            return n_past, 0
        return max((at for at in slot.checkpoints if at <= n_past), default=0), 0
    if slot.lowest < max(0, n_past - shape.window):
        return n_past, slot.lowest
    at = max((at for at in slot.checkpoints if at - 1 <= n_past), default=0)
    lowest = max(0, at - shape.window)
    return (min(n_past, max(lowest + 1, at - 1)), lowest) if at else (0, 0)


def begin(slot: FakeSlot, shared: int, task: Task, shape: Shape) -> int:
    """Cut the slot back to what can be reused of the ``shared`` tokens, and return how many tokens that are.

    If computing begins so near the prompt's end that checkpoints are made there, one is made where it begins. So a
    request for the last token of what a slot holds leaves a checkpoint before that token.
    """
    n_cache, slot.lowest = usable(slot, shared, task.n_prompt, shape)
    slot.cut(n_cache)
    if shape.kind != "dense" and n_cache >= max(1, task.n_prompt - min(shape.batch, shape.ubatch + 4)):
        note(slot, n_cache)
    return n_cache


def marks(task: Task, shape: Shape) -> list[int]:
    """Return where a prompt's batches are cut and checkpoints are made: near its end, and before each user message."""
    if shape.kind == "dense":
        return []
    near_end = (task.n_prompt - min(shape.batch, shape.ubatch + 4), task.n_prompt - 4)
    return sorted(at for at in {*near_end, *task.user_marks} if task.n_cache < at < task.n_prompt)


def note(slot: FakeSlot, at: int) -> None:
    """Make a checkpoint at ``at`` tokens."""
    slot.checkpoints = sorted({*slot.checkpoints, at})[-MAX_CHECKPOINTS:]


def lowest_live(slot: FakeSlot, shape: Shape) -> int:
    """The lowest position still in memory, after tokens were added to a slot with a sliding window."""
    cells = -(-(shape.window + shape.ubatch) // 256) * 256
    return max(slot.lowest, slot.n_tokens - cells) if shape.kind == "swa" else 0
