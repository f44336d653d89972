"""A cache of tokenized texts, in pieces between special tokens; common beginnings are stored once.

There is a tree for each namespace of users. A node is a piece of text that begins with a special token (or at the
start of the text) and is followed by another one, and its tokens. A path from the root is the beginning of a text.
Pieces are compared as strings, in a dict, so no hash has to be trusted.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llamaslot.cache.ids import WIDTH, count
from llamaslot.tokens.special_tokens import TokenSpan

# Characters. A cut nearer to the previous one saves less than its node costs: 256 characters are ~0.5 ms.
SPACING = 256
_OVERHEAD = 400  # bytes of a node besides its text and its tokens, roughly


class _Piece:
    """``key``: the characters from this piece's special token to the end of the next one, which belongs to the next
    piece.
    """

    __slots__ = ("children", "key", "parent", "tokens")

    def __init__(self, key: str, tokens: bytes, parent: _Piece | None) -> None:
        self.key, self.tokens, self.parent = key, tokens, parent
        self.children: dict[str, _Piece] = {}

    @property
    def size_bytes(self) -> int:
        return sys.getsizeof(self.key) + len(self.tokens) + _OVERHEAD


_NO_PIECE = _Piece("", b"", None)


@dataclass(frozen=True, slots=True)
class Known:
    """The beginning of a text whose tokens are known: ``ends[i]`` of them lie before the i-th cut."""

    tokens: bytes
    ends: tuple[int, ...]

    @property
    def n_cuts(self) -> int:
        return len(self.ends)


class TokenizeCache:
    """At most ``limit_bytes`` of texts and tokens; the ends of the least recently used texts are dropped first."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._roots: dict[str, _Piece] = {}
        # Least recently used first. A piece is touched before its parent, so the first is always a leaf.
        self._recent: OrderedDict[_Piece, None] = OrderedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._recent)

    def find(self, text: str, cuts: Sequence[TokenSpan], whose: str = "") -> Known:
        """The longest known beginning of the text that ends at one of the cuts. Changes nothing."""
        piece, begin, n_tokens = self._roots.get(whose, _NO_PIECE), 0, 0
        tokens: list[bytes] = []
        ends: list[int] = []
        for cut in cuts:
            child = piece.children.get(text[begin : cut.end])
            if child is None:
                break
            tokens.append(child.tokens)
            n_tokens += count(child.tokens)
            ends.append(n_tokens)
            piece, begin = child, cut.start
        return Known(b"".join(tokens), tuple(ends))

    def keep(
        self, text: str, cuts: Sequence[TokenSpan], ends: Sequence[int], tokens: bytes, whose: str = ""
    ) -> None:
        """Store the text up to its last cut as most recently used; ``ends[i]`` tokens lie before ``cuts[i]``."""
        if not cuts:
            return
        piece, begin, first = self._roots.setdefault(whose, _Piece(whose, b"", None)), 0, 0
        path: list[_Piece] = []
        for cut, end in zip(cuts, ends, strict=True):
            key = text[begin : cut.end]
            child = piece.children.get(key)
            if child is None:
                child = piece.children[key] = _Piece(key, tokens[first * WIDTH : end * WIDTH], piece)
                self._recent[child] = None
                self.size_bytes += child.size_bytes
            path.append(child)
            piece, begin, first = child, cut.start, end
        for used in reversed(path):
            self._recent.move_to_end(used)
        while self.size_bytes > self._limit_bytes:
            self._forget(next(iter(self._recent)))

    def _forget(self, leaf: _Piece) -> None:
        assert leaf.parent is not None, "the root is never dropped"
        assert not leaf.children, "leaves go first"
        root = leaf.parent
        del root.children[leaf.key]
        if root.parent is None and not root.children:
            del self._roots[root.key]
        del self._recent[leaf]
        self.size_bytes -= leaf.size_bytes

    def check(self) -> None:
        """Raises AssertionError with the name of the invariant that does not hold."""
        found: list[_Piece] = []
        rest = list(self._roots.values())
        while rest:
            piece = rest.pop()
            for key, child in piece.children.items():
                assert (child.key, child.parent) == (key, piece), "a child knows its key and its parent"
                found.append(child)
                rest.append(child)
        order = {piece: i for i, piece in enumerate(self._recent)}
        assert set(found) == set(order), "every piece has its turn"
        assert all(p.parent not in order or order[p] < order[p.parent] for p in found if p.parent), (
            "leaves go first"
        )
        assert self.size_bytes == sum(p.size_bytes for p in found) <= self._limit_bytes, (
            "the size is what is there"
        )


def spaced(marks: Iterable[TokenSpan]) -> list[TokenSpan]:
    """The marks worth cutting at: each at least SPACING characters after the start or the previous one.

    Decided from left to right, so texts with a common beginning have the same cuts there, and a text from one of its
    cuts on has the same cuts as the whole.
    """
    chosen: list[TokenSpan] = []
    last = 0
    for mark in marks:
        if mark.start - last >= SPACING:
            chosen.append(mark)
            last = mark.start
    return chosen
