"""Where a shared-prefix snapshot may end: at a point after which several conversations differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from llamaslot.cache.ids import NEGLIGIBLE_TOKENS, common, count

MIN_TOKENS = 256  # fewer are computed about as fast as they are restored


def branch(others: Iterable[tuple[int, Callable[[], bytes]]]) -> int:
    """How many tokens a prompt shares with two other conversations; 0 if a shared-prefix snapshot is not worth it
    there.

    ``others``: for each holder with a common prefix, its length in tokens, and a function that returns all tokens of
    the holder. The prompt's own conversation (a holder that is a prefix of the prompt) does not count. Holders that
    agree with each other after they diverge from the prompt count as one conversation, for example a slot and its
    snapshot. A prefix shared with one other conversation may be chance, such as the same first word of two questions;
    with two it is a common beginning.
    """
    first: bytes | None = None
    for n_shared, tokens in sorted(others, key=lambda other: -other[0]):
        if n_shared < MIN_TOKENS:
            return 0
        held = tokens()
        if count(held) <= n_shared + NEGLIGIBLE_TOKENS:
            continue
        if first is None:
            first = held
        elif common(first, held) <= n_shared + NEGLIGIBLE_TOKENS:
            return n_shared
    return 0
