"""The list of a directory's snapshots that the page shows: what fills it, and which conversations begin alike."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from xxhash import xxh3_64_digest, xxh3_64_hexdigest

from llamaslot.cache.ids import WIDTH
from llamaslot.store.snapshot import Snapshot
from llamaslot.store.snapshot_store import SnapshotStore
from llamaslot.tasks import in_slices

MOST = 1000  # only so many snapshots are listed, the largest
_BLOCK = 64  # tokens; beginnings are compared in blocks of this length
_HASH = 8  # bytes


class Listing:
    """The list of a store's snapshots for the page. ``rows`` computes it; the tokens of each snapshot are hashed only
    once.
    """

    def __init__(self, store: SnapshotStore) -> None:
        self._store = store
        self._beginnings: dict[str, bytes] = {}

    async def rows(self) -> list[dict[str, Any]]:
        """A JSON object for each of the ``MOST`` largest snapshots; those with the same beginning are next to each
        other. ``n_common``: the number of tokens, in whole blocks of 64, that a snapshot shares with the previous one
        in the list. Canceling is safe.
        """
        catalog = self._store.catalog
        every = sorted(catalog.snapshots.values(), key=lambda its: -catalog.own_bytes(its.id))[:MOST]
        await self._compare(every)
        every.sort(key=lambda its: (its.fingerprint, its.namespace, self._beginnings.get(its.id, b"")))
        last: Snapshot | None = None
        rows = []
        async for id_ in in_slices([its.id for its in every]):
            if (its := catalog.snapshots.get(id_)) is not None:  # it may be gone or changed by now
                rows.append({**self._row(its), "n_common": self._n_common(last, its)})
                last = its
        return rows

    async def _compare(self, snapshots: list[Snapshot]) -> None:
        kept = {its.id for its in snapshots}
        self._beginnings = {id_: blocks for id_, blocks in self._beginnings.items() if id_ in kept}
        async for its in in_slices(snapshots):
            if its.id not in self._beginnings and (tokens := self._tokens(its.id)):
                self._beginnings[its.id] = b"".join(_hashes(tokens))

    def _tokens(self, id_: str) -> bytes:
        """The tokens of a snapshot; empty if no backend serves its model."""
        for library in self._store.libraries:
            with contextlib.suppress(KeyError):
                return library.in_namespaces.tokens(id_)
        return b""

    def _n_common(self, last: Snapshot | None, its: Snapshot) -> int:
        if last is None or (last.fingerprint, last.namespace) != (its.fingerprint, its.namespace):
            return 0
        a, b = self._beginnings.get(last.id, b""), self._beginnings.get(its.id, b"")
        blocks = zip(_cut(a), _cut(b), strict=False)
        n = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], blocks))
        return min(n * _BLOCK, last.n_tokens, its.n_tokens)

    def _row(self, its: Snapshot) -> dict[str, Any]:
        catalog = self._store.catalog
        return {
            "id": its.id,
            "store": self._store.name,
            "kind": its.kind.value,
            "n_tokens": its.n_tokens,
            "size_bytes": catalog.own_bytes(its.id),
            "share_bytes": catalog.share_bytes(its.id),
            "created_at": its.created_at,
            "last_used": catalog.last_used(its.id),
            "n_hits": catalog.n_hits(its.id),
            "value": catalog.value(its.id),
            "is_pinned": its.is_pinned,
            "is_served": its.fingerprint in catalog.fingerprints,
            "model": xxh3_64_hexdigest(its.fingerprint.encode())[:8],
            "request": its.source,
            "namespace": its.namespace,
        }


def _hashes(tokens: bytes) -> Iterator[bytes]:
    size = _BLOCK * WIDTH
    for at in range(0, len(tokens), size):
        yield xxh3_64_digest(tokens[at : at + size])


def _cut(hashes: bytes) -> Iterator[bytes]:
    return (hashes[at : at + _HASH] for at in range(0, len(hashes), _HASH))
