"""How much of a common prefix llama-server can really use."""

from __future__ import annotations

import enum
from collections.abc import Iterable

# llama-server makes a checkpoint this many tokens before the end of each prompt that it computes.
CHECKPOINT_BACK = 4
# A sliding window needs the token before the checkpoint again: of 5,000 tokens 4,995 were reused, 4,996 by a recurrent
# model (seen running on xllamacpp 2026.10.11549).
_SWA_BACK = 1


class Memory(enum.Enum):
    """How a model remembers.

    DENSE can go back to any token. RECURRENT can only go on from the exact end of what it holds, or from a checkpoint;
    SWA (sliding window) from a checkpoint, and from near the end as far as its window reaches.
    """

    DENSE = "dense"
    SWA = "swa"
    RECURRENT = "recurrent"


def usable(
    memory: Memory,
    n_shared: int,
    n_held: int | None,
    checkpoints: Iterable[int],
    n_prompt: int,
) -> int:
    """Tokens of a prompt of ``n_prompt`` that need not be computed, where ``n_shared`` are common with what is held.

    ``n_held`` is how much is held, None when that is not known exactly. One token of a prompt is always computed.
    """
    limit = min(n_shared, n_prompt - 1)
    if limit <= 0:
        return 0
    if memory is Memory.DENSE:
        return limit
    if (
        memory is Memory.SWA
    ):  # the exact end is no sure place to go on from: what the window still needs may be gone
        return max((at - _SWA_BACK for at in checkpoints if _SWA_BACK < at <= limit), default=0)
    if n_held is not None and n_held <= limit:
        return n_held
    return max((at for at in checkpoints if at <= limit), default=0)


def checkpoints_after(kept: Iterable[int], n_reused: int, stops: Iterable[int]) -> tuple[int, ...]:
    """The checkpoints of a slot after prompts ending at each of ``stops`` were computed on ``n_reused`` tokens."""
    made = {stop - CHECKPOINT_BACK for stop in stops if stop - CHECKPOINT_BACK > n_reused}
    return tuple(sorted(made | {at for at in kept if at <= n_reused}))
