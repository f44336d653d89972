"""A cache of tokenized texts, in pieces between special tokens; common beginnings are stored once.

There is a tree for each user's namespace. A node is a piece of text, and its tokens: it begins with a special token (or
at the start of the text), and ends before another one. A path from the root is the beginning of a text. Pieces are
compared as strings, so no hash has to be trusted. The beginning that a text shares with an earlier one is found at the
speed of memcmp. Only what follows is searched for special tokens.

``PartCache`` keeps the tokens of system parts and of questions, by the JSON from which they were made.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from msgspec import Struct
from xxhash import xxh3_128_digest

from llamaslot.cache.ids import WIDTH, count
from llamaslot.tokens.special_tokens import SpecialTokens, TokenSpan

# Least number of characters between two cuts. A nearer cut saves less time than its node costs: tokenizing 256
# characters takes about 0.5 ms.
SPACING = 256
_OVERHEAD = 400  # bytes of a node besides its text and its tokens, roughly
_FEW = 4  # children that are compared one by one


class _Piece:
    """A node of the tree: a piece of text and its ``tokens``. ``key``: the characters of the piece, and ``special``,
    the special token behind it, with which the next piece begins.
    """

    __slots__ = ("children", "key", "parent", "special", "tokens")

    def __init__(self, key: str, special: str, tokens: bytes, parent: _Piece | None) -> None:
        self.key, self.special, self.tokens, self.parent = key, special, tokens, parent
        self.children: dict[str, _Piece] = {}

    @property
    def size_bytes(self) -> int:
        return sys.getsizeof(self.key) + len(self.tokens) + _OVERHEAD


_NO_PIECE = _Piece("", "", b"", None)


class Known(Struct, frozen=True):
    """The longest beginning of a text whose tokens the cache has. It ends before the character ``begin``, where the
    unknown text begins. ``path``: the cached pieces that make it up. ``tokens``: its tokens.
    """

    path: tuple[_Piece, ...]
    begin: int
    tokens: bytes

    @property
    def n_cuts(self) -> int:
        return len(self.path)

    @property
    def special(self) -> str:
        """The special token that starts at ``begin``. Raises IndexError if ``path`` is empty."""
        return self.path[-1].special


class TokenizeCache:
    """A cache of at most ``limit_bytes`` of texts and tokens. When it is full, it drops the last pieces of the least
    recently used texts.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._roots: dict[str, _Piece] = {}
        # Least recently used first. ``keep`` moves a piece to the end before its parent, so the first is always a leaf.
        self._recent: OrderedDict[_Piece, None] = OrderedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._recent)

    def find(self, text: str, specials: SpecialTokens, whose: str = "") -> Known:
        """The longest beginning of the text that the cache has in the namespace ``whose``. Changes nothing, not even
        the order of use.
        """
        piece, begin, path = self._roots.get(whose, _NO_PIECE), 0, list[_Piece]()
        while (child := _next(piece, text, begin, specials)) is not None:
            path.append(child)
            piece, begin = child, begin + len(child.key) - len(child.special)
        return Known(tuple(path), begin, b"".join([piece.tokens for piece in path]))

    def keep(
        self,
        text: str,
        known: Known,
        cuts: Sequence[TokenSpan],
        ends: Sequence[int],
        tokens: bytes,
        whose: str = "",
    ) -> None:
        """Store the text up to the last of ``cuts``, as the most recently used.

        ``known``: what ``find`` returned for the text. ``cuts``: special tokens behind ``known`` at which the text is
        cut. ``ends[i]``: the number of the text's tokens before ``cuts[i]``. ``tokens``: all tokens of the text.
        """
        if not (known.path or cuts):
            return
        piece = self._roots.setdefault(whose, _Piece(whose, "", b"", None))
        if known.path and known.path[-1] in self._recent:
            path = [*known.path]
            piece = path[-1]
        else:  # the last pieces of the path, or all, were dropped since ``find``
            path = [piece := self._child(piece, old.key, old.special, old.tokens) for old in known.path]
        begin, first = known.begin, count(known.tokens)
        for cut, end in zip(cuts, ends, strict=True):
            key, special = text[begin : cut.end], text[cut.start : cut.end]
            piece = self._child(piece, key, special, tokens[first * WIDTH : end * WIDTH])
            path.append(piece)
            begin, first = cut.start, end
        for used in reversed(path):
            self._recent.move_to_end(used)
        while self.size_bytes > self._limit_bytes:
            self._forget(next(iter(self._recent)))

    def _child(self, parent: _Piece, key: str, special: str, tokens: bytes) -> _Piece:
        if (child := parent.children.get(key)) is None:
            child = parent.children[key] = _Piece(key, special, tokens, parent)
            self._recent[child] = None
            self.size_bytes += child.size_bytes
        return child

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
        """Raise AssertionError with the name of the invariant that does not hold."""
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


def _next(piece: _Piece, text: str, begin: int, specials: SpecialTokens) -> _Piece | None:
    """The child of ``piece`` whose text follows in ``text`` at the character ``begin``; None if no child's does.

    1. In a conversation that grows, a piece has one child or a few: the text is compared with each of them.
    2. If there are many children, or if the special token at the end of the child's key may be part of a longer one in
       this text, the text is searched for its next cut instead.
    """
    if len(piece.children) <= _FEW:
        for key, child in piece.children.items():
            if text.startswith(key, begin):
                if specials.stands_alone(child.special):
                    return child
                break
        else:
            return None
    cut = specials.first(text, begin, SPACING)
    return piece.children.get(text[begin : cut.end]) if cut is not None else None


def spaced(marks: Iterable[TokenSpan], last: int = 0) -> list[TokenSpan]:
    """Those ``marks`` (special tokens, from left to right) that are worth cutting at: each starts at least SPACING
    characters after the previous one of these, the first after the character ``last``.

    The choice depends only on the text to the left. So texts with a common beginning have the same cuts there, and the
    search may begin at any cut.
    """
    chosen: list[TokenSpan] = []
    for mark in marks:
        if mark.start - last >= SPACING:
            chosen.append(mark)
            last = mark.start
    return chosen


_LIMIT_BYTES = 64 << 20  # 1,000 entries of 60 kB: system parts, and the last turns of conversations
_ENTRY_BYTES = 200  # bytes of an entry besides its tokens, roughly


class PartCache:
    """A least-recently-used cache of the tokens of parts of prompts, by the JSON that they are made from. Keys are
    stored as hashes: two keys with the same hash would only let a prompt be cut at a worse place.
    """

    def __init__(self, limit_bytes: int = _LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._known: dict[bytes, bytes] = {}  # the most recently used last
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._known)

    def find(self, made_from: bytes) -> bytes | None:
        """The tokens stored for the key ``made_from``, which becomes the most recently used; None without any."""
        if (tokens := self._known.pop(key := xxh3_128_digest(made_from), None)) is not None:
            self._known[key] = tokens
        return tokens

    def keep(self, made_from: bytes, tokens: bytes) -> None:
        self._drop(
            key := xxh3_128_digest(made_from)
        )  # another request may have stored the same key meanwhile
        self._known[key] = tokens
        self.size_bytes += len(tokens) + _ENTRY_BYTES
        while self.size_bytes > self._limit_bytes and len(self._known) > 1:
            self._drop(next(iter(self._known)))

    def _drop(self, key: bytes) -> None:
        if (tokens := self._known.pop(key, None)) is not None:
            self.size_bytes -= len(tokens) + _ENTRY_BYTES
