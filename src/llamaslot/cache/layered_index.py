"""The prefix index of the snapshots. Recent additions are in a radix tree in memory, the *overlay*. All others are in
a read-only index on disk, the *generation*.

It answers like one ``PrefixIndex``; only the order of hits with equal length and equal share may differ. Making a new
generation takes seconds, so ``store/disk_index_rebuild.py`` does it in another process:

1. ``is_due`` says that it is time. ``seal`` returns the input of the new generation. Later additions go into a new
   overlay. The sealed overlay no longer changes, so another thread can read it; drops from it are recorded.
2. ``adopt`` takes the finished generation, applies the recorded drops and discards the sealed overlay.
   If no generation could be made, ``unseal`` merges both overlays again.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator
from itertools import chain, islice
from typing import NamedTuple, Protocol

from llamaslot.cache.disk_index import DiskIndex
from llamaslot.cache.ids import WIDTH
from llamaslot.cache.prefix_index import PrefixIndex, Shared

# A new generation is made after more additions than both NEW_MIN and NEW_SHARE of the present generation, or after more
# drops than both GONE_MIN and GONE_SHARE of it. After fewer it costs more than it saves.
NEW_MIN = 1_000
NEW_SHARE = 0.1
GONE_MIN = 200  # a fifth of the smallest generation
GONE_SHARE = 0.2


class Layer(Protocol):
    """The methods of a layer that ``Layered`` calls."""

    def __contains__(self, holder: object) -> bool: ...
    def __len__(self) -> int: ...
    def holders(self) -> Collection[str]: ...
    def tokens(self, holder: str) -> bytes: ...
    def drop(self, holder: str) -> None: ...
    def match(self, query: bytes, limit: int | None = None) -> list[Shared[str]]: ...
    def hits(self, query: bytes) -> Iterator[Shared[str]]: ...
    def longest_full_prefix(self, query: bytes, exclude: Collection[str] = ()) -> Shared[str] | None: ...
    def check(self) -> None: ...


class Sealed:
    """An overlay that another thread reads meanwhile, so its tree never changes: a dropped holder stays in the tree and
    is left out of the answers.
    """

    def __init__(self, index: PrefixIndex[str]) -> None:
        self.index = index
        self.gone: set[str] = set()

    def __contains__(self, holder: object) -> bool:
        return holder in self.index and holder not in self.gone

    def __len__(self) -> int:
        return len(self.index) - len(self.gone)

    def holders(self) -> Collection[str]:
        return self.index.holders() - self.gone

    def tokens(self, holder: str) -> bytes:
        if holder in self.gone:
            raise KeyError(holder)
        return self.index.tokens(holder)

    def drop(self, holder: str) -> None:
        if holder in self.index:
            self.gone.add(holder)

    def match(self, query: bytes, limit: int | None = None) -> list[Shared[str]]:
        return list(islice(self.hits(query), None if limit is None else max(limit, 0)))

    def hits(self, query: bytes) -> Iterator[Shared[str]]:
        return (hit for hit in self.index.hits(query) if hit.holder not in self.gone)

    def longest_full_prefix(self, query: bytes, exclude: Collection[str] = ()) -> Shared[str] | None:
        return self.index.longest_full_prefix(query, {*self.gone, *exclude} if exclude else self.gone)

    def check(self) -> None:
        self.index.check()
        assert self.gone <= self.index.holders(), "what is dropped from the sealed overlay was in it"


class Sowing(NamedTuple):
    """The input of a new generation: the sequences in ``added``, and all sequences of the old generation except those
    of the holders in ``gone``.
    """

    added: PrefixIndex[str]
    gone: tuple[str, ...]


class Layered:
    """Several indexes that answer as one ``PrefixIndex``. Each holder is in exactly one of them."""

    def _layers(self) -> list[Layer]:
        raise NotImplementedError

    def __contains__(self, holder: object) -> bool:
        return any(holder in layer for layer in self._layers())

    def __len__(self) -> int:
        return sum(map(len, self._layers()))

    def holders(self) -> set[str]:
        return set().union(*(layer.holders() for layer in self._layers()))

    def tokens(self, holder: str) -> bytes:
        """The sequence of ``holder``. Raises KeyError for an unknown one."""
        for layer in self._layers():
            if holder in layer:
                return layer.tokens(holder)
        raise KeyError(holder)

    def match(self, query: bytes, limit: int | None = None) -> list[Shared[str]]:
        """The holders of all layers that share a prefix with ``query``, as ``PrefixIndex.match``."""
        layers = self._layers()
        if len(layers) == 1:
            return layers[0].match(query, limit)
        if limit is None:
            return sorted(chain.from_iterable(layer.match(query) for layer in layers), key=_order)
        return list(islice(self.hits(query), max(limit, 0)))

    def hits(self, query: bytes) -> Iterator[Shared[str]]:
        """The holders of all layers that share a prefix with ``query``, one by one, as ``PrefixIndex.hits``."""
        layers = self._layers()
        if len(layers) == 1:
            return layers[0].hits(query)
        return heapq.merge(*(layer.hits(query) for layer in layers), key=_order)

    def cover(self, tokens: bytes, exclude: Collection[str] = ()) -> int:
        """The longest prefix of ``tokens`` that a holder of any layer shares, in tokens, as ``PrefixIndex.cover``."""
        firsts = (
            next((hit.n_shared for hit in layer.hits(tokens) if hit.holder not in exclude), 0)
            for layer in self._layers()
        )
        return max(firsts)

    def longest_full_prefix(self, query: bytes, exclude: Collection[str] = ()) -> Shared[str] | None:
        """The longest holder of any layer that is wholly a prefix of ``query``, as the method of ``PrefixIndex``."""
        found = [layer.longest_full_prefix(query, exclude) for layer in self._layers()]
        return max((hit for hit in found if hit is not None), key=lambda hit: hit.n_tokens, default=None)

    def check(self) -> None:
        """Raise AssertionError with the name of the first invariant that does not hold."""
        for layer in self._layers():
            layer.check()
        assert len(self.holders()) == len(self), "each holder is in one layer"


class Joined(Layered):
    """A read-only union of the indexes in ``layers``; to change it, change the layers themselves."""

    def __init__(self, *layers: Layer) -> None:
        self.layers = layers

    def __repr__(self) -> str:
        return f"<Joined {self.layers}>"

    def _layers(self) -> list[Layer]:
        return [layer for layer in self.layers if len(layer)] or [self.layers[0]]


class LayeredIndex(Layered):
    """An index of snapshot ids by their tokens: an overlay for additions, and a generation on disk (``base``, None
    before the first). Not thread-safe: it belongs to the event loop.
    """

    def __init__(self, base: DiskIndex | None = None) -> None:
        self.base = base
        self._overlay: PrefixIndex[str] = PrefixIndex()
        self._sealed: Sealed | None = None
        self._noted: set[str] = set()  # dropped from the base or the sealed overlay since ``seal``
        self._n_sown = 0  # the number of holders the next generation should have
        self._n_stay = 0  # holders that stay in the overlay because the last generation could not store them

    def __repr__(self) -> str:
        sealed = f", {len(self._sealed)} sealed" if self._sealed else ""
        return f"<LayeredIndex {len(self._overlay)} new{sealed}, base {self.base}>"

    def _layers(self) -> list[Layer]:
        layers: list[Layer] = [self._overlay]
        if self._sealed is not None:
            layers.append(self._sealed)
        if self.base is not None:
            layers.append(self.base)
        return layers

    def insert(self, holder: str, tokens: bytes) -> None:
        """Set the sequence of ``holder`` to ``tokens``, in the overlay. Raises ValueError, and changes nothing, if the
        bytes do not end on a whole token.
        """
        if len(tokens) % WIDTH == 0:
            self.drop(holder)
        self._overlay.insert(holder, tokens)

    def drop(self, holder: str) -> None:
        """Remove ``holder`` from the index. Idempotent."""
        for layer in self._layers():
            if holder in layer:
                layer.drop(holder)
                if self._sealed is not None and layer is not self._overlay:
                    self._noted.add(holder)

    # -- generations -----------------------------------------------------------------------------------------------

    @property
    def is_due(self) -> bool:
        """True if a new generation should be made (see ``NEW_MIN``). False while one is being made."""
        if self._sealed is not None:
            return False
        # ``n_new`` is a lower bound: some of the ``_n_stay`` holders may have been dropped.
        n_new, n_all, n_gone = len(self._overlay) - self._n_stay, 0, 0
        if self.base is not None:
            n_gone = len(self.base.gone)
            n_all = len(self.base) + n_gone
        return n_new > max(NEW_MIN, NEW_SHARE * n_all) or n_gone > max(GONE_MIN, GONE_SHARE * n_all)

    def seal(self) -> Sowing:
        """Close the overlay, open a new one, and return the input of the next generation. A call of ``adopt`` or
        ``unseal`` must follow.
        """
        assert self._sealed is None, "one generation at a time"
        self._n_sown = len(self)
        self._sealed, self._overlay = Sealed(self._overlay), PrefixIndex()
        return Sowing(self._sealed.index, tuple(self.base.gone) if self.base is not None else ())

    def adopt(self, base: DiskIndex) -> None:
        """Use ``base``, the generation made from the result of ``seal``, instead of the old one and the sealed overlay.
        Sequences that it could not store (``disk_index.is_freezable``) go into the overlay.
        """
        assert self._sealed is not None, "a generation was begun"
        stay: list[tuple[str, bytes]] = []
        if len(base) != self._n_sown:
            for layer in self._layers()[1:]:
                stay += [(holder, layer.tokens(holder)) for holder in layer.holders() if holder not in base]
        for holder in self._noted:
            base.drop(holder)
        for holder, tokens in stay:
            self._overlay.insert(holder, tokens)
        self._n_stay = len(stay)
        self.base, self._sealed = base, None
        self._noted.clear()

    def unseal(self) -> None:
        """Give up the generation begun by ``seal``: the sealed overlay, less the drops and with the additions since
        then, is the overlay again. Idempotent.
        """
        if self._sealed is None:
            return
        index = self._sealed.index
        for holder in self._sealed.gone:
            index.drop(holder)
        for holder in self._overlay.holders():
            index.insert(holder, self._overlay.tokens(holder))
        self._overlay, self._sealed = index, None
        self._noted.clear()

    def check(self) -> None:
        """Raise AssertionError with the name of the first invariant that does not hold."""
        super().check()
        assert not (self._noted and self._sealed is None), "notes are taken while a generation is made"


def _order(hit: Shared[str]) -> tuple[int, int]:
    return -hit.n_shared, hit.n_tokens
