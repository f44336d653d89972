"""Spaces: what is computed in one of them is found, and so used or timed, from no other.

A space is a user's where users are isolated, and one of its own for each setting of LoRA scales. All of them are in the
same prefix indexes: each sequence stands there behind a mark, a few ids that no vocabulary has, so that sequences of
two spaces have nothing in common.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from hashlib import blake2b
from itertools import islice
from typing import Generic, NamedTuple, Protocol, TypeVar

from llamaslot.cache.ids import WIDTH, pack
from llamaslot.cache.prefix_index import Shared

H = TypeVar("H")
_N_MARK = 4  # ids of 15 bits each: 60 bits of a hash tell spaces apart
_FIRST_ID = 0x100000  # vocabularies end long before; the characters of a frozen index end at 0x10FFFF


class Space(NamedTuple):
    """``user``: whose it is, "" where users share everything. ``lora``: the scales that a request has set, in
    llama-server's own words (JSON); "" for those that the server was started with."""

    user: str = ""
    lora: str = ""

    @property
    def text(self) -> str:
        """For a sidecar: "" for what everybody shares. No header, and so no name, has a line feed in it."""
        return f"{self.user}\n{self.lora}" if self.lora else self.user

    @classmethod
    def of_text(cls, text: str) -> Space:
        user, _, lora = text.partition("\n")
        return cls(user, lora)


SHARED = Space()
#: What the operator has computed ahead, where users are isolated: theirs to go on from, and nobody's to add to.
PUBLIC = Space("public")


@functools.lru_cache(maxsize=1024)
def mark(space: Space) -> bytes:
    """What a sequence of ``space`` begins with in an index."""
    if space == SHARED:
        return b""
    bits = int.from_bytes(blake2b(space.text.encode(), digest_size=8).digest())
    return pack([_FIRST_ID + (bits >> 15 * i & 0x7FFF) for i in range(_N_MARK)])


class Index(Protocol[H]):
    """What is needed of an index; ``PrefixIndex`` and ``SnapshotIndex`` are such, and what joins several."""

    def tokens(self, holder: H) -> bytes: ...
    def match(self, query: bytes, limit: int | None = None) -> list[Shared[H]]: ...
    def hits(self, query: bytes) -> Iterator[Shared[H]]: ...
    def longest_full_prefix(self, query: bytes, exclude: Collection[H] = ()) -> Shared[H] | None: ...


class InSpaces(Generic[H]):
    """An index as it is seen from spaces. Whatever is inserted into ``index`` stands behind the mark of its own."""

    def __init__(self, index: Index[H], space_of: Callable[[H], Space]) -> None:
        """``space_of`` raises KeyError for an unknown holder."""
        self.index, self._space_of = index, space_of

    def tokens(self, holder: H) -> bytes:
        """Raises KeyError for an unknown holder."""
        return self.index.tokens(holder)[len(mark(self._space_of(holder))) :]

    def match(self, query: bytes, spaces: Collection[Space], limit: int | None = None) -> list[Shared[H]]:
        """As ``PrefixIndex.match``, in any of ``spaces``."""
        if not query:
            return []
        found = [self._match(query, space, limit) for space in spaces]
        if len(found) == 1:
            return found[0]
        return sorted((hit for hits in found for hit in hits), key=_order)[:limit]

    def _match(self, query: bytes, space: Space, limit: int | None) -> list[Shared[H]]:
        if not (marked := mark(space)):
            return self.index.match(query, limit)
        return list(islice(self._hits(marked, query), limit))

    def _hits(self, marked: bytes, query: bytes) -> Iterator[Shared[H]]:
        n = len(marked) // WIDTH
        for hit in self.index.hits(marked + query):
            if hit.n_shared <= n:
                return  # another space, whose mark may begin alike
            yield Shared(hit.holder, hit.n_shared - n, hit.n_tokens - n)

    def cover(self, tokens: bytes, space: Space, exclude: Collection[H] = ()) -> int:
        """As ``PrefixIndex.cover``."""
        hits = self._hits(mark(space), tokens) if tokens else iter(())
        return next((hit.n_shared for hit in hits if hit.holder not in exclude), 0)

    def longest_full_prefix(
        self, query: bytes, spaces: Collection[Space], exclude: Collection[H] = ()
    ) -> Shared[H] | None:
        """As ``PrefixIndex.longest_full_prefix``, in any of ``spaces``."""
        best: Shared[H] | None = None
        for space in spaces:
            marked = mark(space)
            n = len(marked) // WIDTH
            hit = self.index.longest_full_prefix(marked + query, exclude)
            if hit is not None and hit.n_tokens > n and (best is None or hit.n_tokens - n > best.n_tokens):
                best = Shared(hit.holder, hit.n_shared - n, hit.n_tokens - n)
        return best


def _order(hit: Shared[H]) -> tuple[int, int]:
    return -hit.n_shared, hit.n_tokens
