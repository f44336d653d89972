"""Where a trunk may end: at a point from which several conversations go on, each its own way."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from llamaslot.cache.ids import common, count

MIN_TOKENS = 256  # fewer are computed about as fast as they are read
NEAR_TOKENS = 64  # a snapshot that ends so near is as good


def branch(others: Iterable[tuple[int, Callable[[], bytes]]]) -> int:
    """How many tokens a prompt shares with two other conversations, 0 if that is not worth a trunk.

    ``others``: for each who shares something with the prompt, how much, and a function that gives all of its tokens.
    Only who goes on otherwise than the prompt counts: its own conversation so far does not. Holders that go on together
    where the prompt has left them are one conversation: a slot and its snapshot, for one. What the prompt shares with
    one other conversation may be chance, such as the first word of both questions; what it shares with two is what all
    of them begin with.
    """
    first: bytes | None = None
    for n_shared, tokens in sorted(others, key=lambda other: -other[0]):
        if n_shared < MIN_TOKENS:
            return 0
        held = tokens()
        if count(held) <= n_shared + NEAR_TOKENS:
            continue
        if first is None:
            first = held
        elif common(first, held) <= n_shared + NEAR_TOKENS:
            return n_shared
    return 0
