"""Several prefix indexes that answer as one."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import islice

from llamaslot.cache.prefix_index import PrefixIndex, Shared


class Joined:
    """A read-only union of the indexes in ``layers``, each of which may change. A holder is in one of them. Only the
    order of hits with equal length and equal share may differ from that of one ``PrefixIndex``.
    """

    def __init__(self, *layers: PrefixIndex[str]) -> None:
        self.layers = layers

    def __repr__(self) -> str:
        return f"<Joined {self.layers}>"

    def _filled(self) -> list[PrefixIndex[str]]:
        return [layer for layer in self.layers if len(layer)] or [self.layers[0]]

    def tokens(self, holder: str) -> bytes:
        """The sequence of ``holder``. Raises KeyError for an unknown one."""
        for layer in self.layers:
            if holder in layer:
                return layer.tokens(holder)
        raise KeyError(holder)

    def match(self, query: bytes, limit: int | None = None) -> list[Shared[str]]:
        """The holders that share a prefix with ``query``, as ``PrefixIndex.match``."""
        layers = self._filled()
        return layers[0].match(query, limit) if len(layers) == 1 else list(islice(self.hits(query), limit))

    def hits(self, query: bytes) -> Iterator[Shared[str]]:
        """The holders that share a prefix with ``query``, one by one, as ``PrefixIndex.hits``."""
        layers = self._filled()
        if len(layers) == 1:
            return layers[0].hits(query)
        return heapq.merge(*(layer.hits(query) for layer in layers), key=_order)

    def longest_full_prefix(self, query: bytes) -> Shared[str] | None:
        """The longest holder that is wholly a prefix of ``query``; None if there is none."""
        found = [layer.longest_full_prefix(query) for layer in self._filled()]
        return max((hit for hit in found if hit is not None), key=lambda hit: hit.n_tokens, default=None)


def _order(hit: Shared[str]) -> tuple[int, int]:
    return -hit.n_shared, hit.n_tokens
