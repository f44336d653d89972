"""A cache of tokenized texts, in pieces between special tokens; common beginnings are stored once.

There is a tree for each namespace of users. A node is a piece of text that begins with a special token (or at the
start of the text) and is followed by another one, and its tokens. A path from the root is the beginning of a text.
Pieces are compared as strings, so no hash has to be trusted. What a text has in common with an earlier one is found
at the speed of memcmp: its special tokens are searched for only behind that.

``SystemPromptCache`` keeps the tokens of whole system prompts by what they were made from.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from msgspec import Struct

from llamaslot.cache.ids import WIDTH, count
from llamaslot.tokens.special_tokens import SpecialTokens, TokenSpan

# Characters. A cut nearer to the previous one saves less than its node costs: 256 characters are ~0.5 ms.
SPACING = 256
_OVERHEAD = 400  # bytes of a node besides its text and its tokens, roughly
_FEW = 4  # children that are compared one by one


class _Piece:
    """A piece of text and its tokens, as a node of a tree. ``key``: the characters from this piece's special token to
    the end of the next one, ``special``, which belongs to the next piece.
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
    """The beginning of a text whose tokens are known: the characters before ``begin``, where the last piece of
    ``path`` ends.
    """

    path: tuple[_Piece, ...]
    begin: int
    tokens: bytes

    @property
    def n_cuts(self) -> int:
        return len(self.path)

    @property
    def special(self) -> str:
        """The special token that starts at ``begin``. Fails if nothing is known."""
        return self.path[-1].special


class TokenizeCache:
    """A cache of at most ``limit_bytes`` of texts and tokens; the ends of the least recently used texts are dropped
    first.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._roots: dict[str, _Piece] = {}
        # Least recently used first. A piece is touched before its parent, so the first is always a leaf.
        self._recent: OrderedDict[_Piece, None] = OrderedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._recent)

    def find(self, text: str, specials: SpecialTokens, whose: str = "") -> Known:
        """The longest known beginning of the text that ends at one of its special tokens. Changes nothing."""
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
        """Store the text up to its last cut, as most recently used.

        ``known``: what ``find`` returned for the text. ``cuts``: the cuts after that; ``ends[i]`` tokens lie before
        ``cuts[i]``.
        """
        if not (known.path or cuts):
            return
        piece = self._roots.setdefault(whose, _Piece(whose, "", b"", None))
        if known.path and known.path[-1] in self._recent:
            path = [*known.path]
            piece = path[-1]
        else:  # pieces of the path have been dropped meanwhile: the end first
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
    """The child of ``piece`` with which ``text`` goes on at ``begin``; None if there is none.

    1. In a conversation that grows, a piece has one child or a few: these are compared with the text.
    2. If there are many, or if the special token that ends the child may be part of a longer one in this text, the
       text is searched for its next cut.
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
    """Of ``marks``, those worth cutting at: each at least SPACING characters after the previous one, or after ``last``
    (the start of the text, or a cut).

    Decided from left to right, so texts with a common beginning have the same cuts there, and a text from one of its
    cuts on has the same cuts as the whole.
    """
    chosen: list[TokenSpan] = []
    for mark in marks:
        if mark.start - last >= SPACING:
            chosen.append(mark)
            last = mark.start
    return chosen


_LIMIT_BYTES = 32 << 20  # entries of 60 kB as a rule: five hundred users with an agent of their own
_ENTRY_BYTES = 200  # bytes of an entry besides its tokens, roughly


class SystemPromptCache:
    """A least-recently-used cache of the tokens of system prompts. Keys are stored as hashes: a wrong hit would only
    cut a prompt elsewhere.
    """

    def __init__(self, limit_bytes: int = _LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._known: dict[bytes, bytes] = {}  # the most recently used last
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._known)

    def find(self, made_from: bytes) -> bytes | None:
        """The tokens stored for the key ``made_from``; None if there are none."""
        if (tokens := self._known.pop(key := _key(made_from), None)) is not None:
            self._known[key] = tokens
        return tokens

    def keep(self, made_from: bytes, tokens: bytes) -> None:
        self._drop(key := _key(made_from))  # another request may have put the same meanwhile
        self._known[key] = tokens
        self.size_bytes += len(tokens) + _ENTRY_BYTES
        while self.size_bytes > self._limit_bytes and len(self._known) > 1:
            self._drop(next(iter(self._known)))

    def _drop(self, key: bytes) -> None:
        if (tokens := self._known.pop(key, None)) is not None:
            self.size_bytes -= len(tokens) + _ENTRY_BYTES


def _key(made_from: bytes) -> bytes:
    return blake2b(made_from, digest_size=32).digest()
