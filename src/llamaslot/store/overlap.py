"""For each snapshot: how many of its tokens other snapshots also cover. Evicting it costs only the rest."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from llamaslot.cache.content import SnapshotKind
from llamaslot.cache.namespaces import InNamespaces, Namespace
from llamaslot.cache.reuse import CacheKind, usable
from llamaslot.store import Snapshot

# Number of other snapshots compared, on models that resume only from few points: the longest common prefixes first.
_N_NEAREST = 8


class PrefixOverlap:
    """The covered tokens of the ``snapshots`` in ``index``. A result is kept until a snapshot near it is added or
    dropped.

    An added or dropped snapshot changes only the result of its nearest neighbour: two snapshots that share as much
    with it share that with each other too. Only a shared-prefix snapshot affects many, on models that resume only
    from few points.
    """

    def __init__(self, index: InNamespaces[str], snapshots: Mapping[str, Snapshot]) -> None:
        self._index, self._snapshots = index, snapshots
        self._cache_kind = CacheKind.DENSE
        self._found: dict[str, int] = {}
        self._unknown: dict[str, None] = {}  # not yet computed, oldest first

    @property
    def cache_kind(self) -> CacheKind:
        return self._cache_kind

    @cache_kind.setter
    def cache_kind(self, cache_kind: CacheKind) -> None:
        if cache_kind is not self._cache_kind:
            self._cache_kind = cache_kind
            self._unknown |= dict.fromkeys(self._found)
            self._found.clear()

    def n_tokens(self, id_: str) -> int:
        """Tokens from its beginning that other snapshots cover; 0 until ``compute_some`` has computed it.

        For a shared-prefix snapshot only whole shorter snapshots count: a longer one is larger, and is evicted before
        it.
        """
        return self._found.get(id_, 0)

    def compute_some(self, n: int) -> None:
        """Compute the result of ``n`` snapshots that have none yet. With a large index each takes up to a
        millisecond.
        """
        for id_ in list(islice(self._unknown, n)):
            self._compute(id_)

    def put(self, id_: str) -> None:
        """A snapshot was added to the index, as one of many: computed later."""
        if id_ not in self._found:
            self._unknown[id_] = None

    def added(self, id_: str, tokens: bytes) -> None:
        """A snapshot was added to the index."""
        self._compute(id_, tokens)
        self._compute_around(self._snapshots[id_], tokens, self._snapshots[id_].n_tokens)

    def dropped(self, snapshot: Snapshot, tokens: bytes) -> None:
        """A snapshot was dropped from the index."""
        self._unknown.pop(snapshot.id, None)
        self._compute_around(snapshot, tokens, self._found.pop(snapshot.id, 0))

    def _compute_around(self, snapshot: Snapshot, tokens: bytes, n_instead: int) -> None:
        """``n_instead``: a lower bound of the result of those that begin with an added or dropped shared prefix."""
        namespaces = (Namespace.of_text(snapshot.namespace),)
        for hit in self._index.match(tokens, namespaces, 2):
            if hit.holder in self._found and hit.holder != snapshot.id:
                self._compute(hit.holder)
        if snapshot.kind is not SnapshotKind.TRUNK:
            return
        trunks = [id_ for id_ in self._found if self._snapshots[id_].kind is SnapshotKind.TRUNK]
        for id_ in (id_ for id_ in trunks if self._snapshots[id_].namespace == snapshot.namespace):
            self._compute(id_)
        if self._cache_kind is CacheKind.DENSE:
            return
        n = snapshot.n_tokens
        for hit in self._index.match(tokens, namespaces):
            if hit.n_shared < n:
                break
            other = self._snapshots.get(hit.holder)
            is_leaf = other is not None and other.kind is not SnapshotKind.TRUNK
            if is_leaf and self._found.get(hit.holder, n + 1) <= n:
                self._found[hit.holder] = n_instead

    def _compute(self, id_: str, tokens: bytes | None = None) -> None:
        self._unknown.pop(id_, None)
        if (snapshot := self._snapshots.get(id_)) is not None:
            self._found[id_] = self._find(snapshot, self._index.tokens(id_) if tokens is None else tokens)

    def _find(self, snapshot: Snapshot, tokens: bytes) -> int:
        namespaces = (Namespace.of_text(snapshot.namespace),)
        if self._cache_kind is CacheKind.DENSE and snapshot.kind is not SnapshotKind.TRUNK:
            nearest = self._index.match(tokens, namespaces, 2)
            return max((hit.n_shared for hit in nearest if hit.holder != snapshot.id), default=0)
        whole = self._index.longest_full_prefix(tokens, namespaces, exclude={snapshot.id})
        n_best = whole.n_tokens if whole is not None else 0
        if snapshot.kind is SnapshotKind.TRUNK:
            return n_best
        for hit in self._index.match(tokens, namespaces, _N_NEAREST):
            other = self._snapshots.get(hit.holder)
            if other is not None and hit.holder != snapshot.id:
                n = usable(
                    self._cache_kind, hit.n_shared, hit.n_tokens, other.checkpoints, snapshot.n_tokens + 1
                )
                n_best = max(n_best, n)
        return n_best

    def check(self) -> None:
        """Raise AssertionError naming the invariant that does not hold."""
        assert not self._found.keys() & self._unknown.keys(), "what is known is not looked for"
        assert self._found.keys() | self._unknown.keys() == self._snapshots.keys(), (
            "covers are of all snapshots"
        )
