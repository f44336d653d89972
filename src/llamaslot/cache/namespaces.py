"""Namespaces: a lookup in one namespace never finds content that was computed in another one. So no request can reuse
that content, or learn from its response time that the content exists.

Where users are isolated, each user has a namespace. Each setting of LoRA scales has one too. All namespaces share the
same prefix indexes: each sequence is stored behind a mark, a few ids that no vocabulary has. So sequences of two
namespaces have no common prefix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from hashlib import blake2b
from itertools import islice
from typing import Generic, NamedTuple, Protocol, TypeVar

from llamaslot.cache.ids import WIDTH, pack
from llamaslot.cache.prefix_index import Near, PrefixIndex, Shared

H = TypeVar("H")
_N_MARK = 4  # ids of 15 bits each: a hash of 60 bits distinguishes namespaces
_FIRST_ID = 0x100000  # above the ids of any vocabulary


class Namespace(NamedTuple):
    """Requests find only content with the same ``user`` and the same ``lora``. ``user``: the owner; "" where users
    share everything. ``lora``: the LoRA scales that the request sets, as llama-server writes them (JSON); "" for the
    scales of the server's command line.
    """

    user: str = ""
    lora: str = ""

    @property
    def text(self) -> str:
        """The namespace as text for a sidecar; "" for the shared one. A line feed separates the fields: a user name,
        which comes from a header, has none.
        """
        return f"{self.user}\n{self.lora}" if self.lora else self.user

    @classmethod
    def of_text(cls, text: str) -> Namespace:
        user, _, lora = text.partition("\n")
        return cls(user, lora)


SHARED = Namespace()
#: Content prewarmed by the operator, where users are isolated: every user may resume from it, no user may add to it.
PUBLIC = Namespace("public")


@functools.lru_cache(maxsize=1024)
def marker(namespace: Namespace) -> bytes:
    """The mark of ``namespace``: the packed ids that stand in front of each of its sequences in an index. Empty for the
    shared namespace.
    """
    if namespace == SHARED:
        return b""
    bits = int.from_bytes(blake2b(namespace.text.encode(), digest_size=8).digest())
    return pack([_FIRST_ID + (bits >> 15 * i & 0x7FFF) for i in range(_N_MARK)])


class Index(Protocol[H]):
    """The interface of a prefix index, implemented by ``PrefixIndex`` and ``Joined``."""

    def tokens(self, holder: H) -> bytes: ...
    def match(self, query: bytes, limit: int | None = None) -> list[Shared[H]]: ...
    def hits(self, query: bytes) -> Iterator[Shared[H]]: ...
    def longest_full_prefix(self, query: bytes) -> Shared[H] | None: ...


class InNamespaces(Generic[H]):
    """A view of an index, restricted to namespaces. Sequences in ``index`` must stand behind the marks of their
    namespaces.
    """

    def __init__(self, index: Index[H], namespace_of: Callable[[H], Namespace]) -> None:
        """``namespace_of`` raises KeyError for an unknown holder."""
        self.index, self._namespace_of = index, namespace_of

    def tokens(self, holder: H) -> bytes:
        """The sequence of ``holder``, without the mark of its namespace. Raises KeyError for an unknown holder."""
        return self.index.tokens(holder)[len(marker(self._namespace_of(holder))) :]

    def match(
        self, query: bytes, namespaces: Collection[Namespace], limit: int | None = None
    ) -> list[Shared[H]]:
        """As ``PrefixIndex.match``, among the holders in any of ``namespaces``."""
        if not query:
            return []
        found = [self._match(query, namespace, limit) for namespace in namespaces]
        if len(found) == 1:
            return found[0]
        return sorted((hit for hits in found for hit in hits), key=_order)[:limit]

    def near(self, query: bytes, namespaces: Collection[Namespace], least: int, share: float) -> Near[H]:
        """As ``PrefixIndex.near``, among the holders in any of ``namespaces``. Holders that share little are left out
        only if ``namespaces`` is just the shared one and the index is one tree; otherwise all holders are returned.
        """
        if query and isinstance(self.index, PrefixIndex) and {marker(each) for each in namespaces} == {b""}:
            return self.index.near(query, least, share)
        hits = self.match(query, namespaces)
        known = {hit.holder: hit.n_shared for hit in hits}
        return Near(hits, 0, lambda holder: known.get(holder, 0))

    def _match(self, query: bytes, namespace: Namespace, limit: int | None) -> list[Shared[H]]:
        if not (marked := marker(namespace)):
            return self.index.match(query, limit)
        return list(islice(self._hits(marked, query), limit))

    def _hits(self, marked: bytes, query: bytes) -> Iterator[Shared[H]]:
        n = len(marked) // WIDTH
        for hit in self.index.hits(marked + query):
            if hit.n_shared <= n:
                return  # another namespace, whose mark has the same first ids
            yield Shared(hit.holder, hit.n_shared - n, hit.n_tokens - n)

    def cover(self, tokens: bytes, namespace: Namespace) -> int:
        """The length in tokens of the longest prefix of ``tokens`` that a holder in ``namespace`` shares."""
        hits = self._hits(marker(namespace), tokens) if tokens else iter(())
        return next((hit.n_shared for hit in hits), 0)

    def longest_full_prefix(self, query: bytes, namespaces: Collection[Namespace]) -> Shared[H] | None:
        """As ``PrefixIndex.longest_full_prefix``, among the holders in any of ``namespaces``."""
        best: Shared[H] | None = None
        for namespace in namespaces:
            marked = marker(namespace)
            n = len(marked) // WIDTH
            hit = self.index.longest_full_prefix(marked + query)
            if hit is not None and hit.n_tokens > n and (best is None or hit.n_tokens - n > best.n_tokens):
                best = Shared(hit.holder, hit.n_shared - n, hit.n_tokens - n)
        return best


def _order(hit: Shared[H]) -> tuple[int, int]:
    return -hit.n_shared, hit.n_tokens
