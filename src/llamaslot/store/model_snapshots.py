"""The snapshots that the current model can use, found by their tokens.

A slot table ends with its llama-server process; snapshots on disk do not. So their index belongs to the backend, is
passed to each new slot table of the same model, and survives a restart of llamaslot as files.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from llamaslot.cache.content import Content
from llamaslot.cache.ids import NEGLIGIBLE_TOKENS, count
from llamaslot.cache.layered_index import LayeredIndex
from llamaslot.cache.namespaces import InNamespaces, Namespace, marker
from llamaslot.cache.prefix_index import Changes
from llamaslot.llama.identity import Identity
from llamaslot.store import Catalog, Snapshot, WithTokens
from llamaslot.store.disk_index_rebuild import DiskIndexRebuild
from llamaslot.store.overlap import PrefixOverlap
from llamaslot.tasks import TaskOwner

_FEW = 64  # unread snapshots for which a connection waits: 20 ms
_READ_AT_ONCE = 32
_AT_ONCE = 4  # snapshots of a whole directory that are compared with others, per change


def content_of(snapshot: WithTokens) -> Content:
    """The content of a slot that was just saved as ``snapshot``, or restored from it."""
    namespace = Namespace.of_text(snapshot.namespace)
    return Content(snapshot.tokens, True, False, snapshot.checkpoints, snapshot.id, namespace=namespace)


class ModelSnapshots:
    """The snapshots of one model, and their index. ``on_change`` is called after each change."""

    def __init__(
        self, index: LayeredIndex | None = None, on_change: Callable[[LayeredIndex], None] | None = None
    ) -> None:
        self.index = LayeredIndex() if index is None else index
        self.snapshots: dict[str, Snapshot] = {}
        self.in_namespaces = InNamespaces(self.index, self.namespace_of)
        self.overlap = PrefixOverlap(self.in_namespaces, self.snapshots)
        self.on_change = on_change
        self.changes = Changes()  # of the index
        self.n_unread = 0  # snapshots on disk whose tokens are being read: no request is placed before

    def __repr__(self) -> str:
        return f"<ModelSnapshots {len(self.snapshots)} snapshots, {self.index!r}>"

    def namespace_of(self, snapshot_id: str) -> Namespace:
        """Raises KeyError for an unknown id."""
        return Namespace.of_text(self.snapshots[snapshot_id].namespace)

    def snapshot_at(self, tokens: bytes, namespace: Namespace) -> Snapshot | None:
        """The snapshot that ends where ``tokens`` end, or a little before."""
        hit = self.in_namespaces.longest_full_prefix(tokens, (namespace,))
        is_near = hit is not None and hit.n_tokens >= count(tokens) - NEGLIGIBLE_TOKENS
        return self.snapshots.get(hit.holder) if hit is not None and is_near else None

    def add(self, snapshot: WithTokens) -> None:
        """Add one snapshot. Idempotent."""
        self.put(snapshot.listed, snapshot.tokens)
        self.changed()

    def put(self, snapshot: Snapshot, tokens: bytes) -> None:
        """Add one of many: ``changed`` must follow, so that no generation is made of the first few only."""
        self.snapshots[snapshot.id] = snapshot
        if snapshot.id not in self.index:
            marked = marker(self.namespace_of(snapshot.id)) + tokens
            self.index.insert(snapshot.id, marked)
            self.changes.note(marked)
            self.overlap.added(snapshot.id, tokens)
        else:
            self.overlap.put(snapshot.id)

    def drop(self, snapshot_id: str) -> None:
        """Remove one snapshot. Idempotent."""
        self.remove(snapshot_id)
        self.changed()

    def remove(self, snapshot_id: str) -> None:
        """Remove one of many: ``changed`` must follow. Idempotent."""
        marked = marker(self.namespace_of(snapshot_id)) if snapshot_id in self.snapshots else b""
        tokens = self.in_namespaces.tokens(snapshot_id) if snapshot_id in self.snapshots else b""
        snapshot = self.snapshots.pop(snapshot_id, None)
        self.index.drop(snapshot_id)
        self.changes.note(marked + tokens)
        if snapshot is not None:
            self.overlap.dropped(snapshot, tokens)

    def changed(self) -> None:
        self.overlap.compute_some(_AT_ONCE)
        if self.on_change is not None:
            self.on_change(self.index)

    def check(self) -> None:
        """Raise AssertionError naming the invariant that does not hold."""
        self.index.check()
        self.overlap.check()
        assert self.index.holders() == self.snapshots.keys(), "snapshots are indexed"


class Libraries:
    """The library of the model that one backend runs now. Its generations are in ``directory``."""

    def __init__(self, catalog: Catalog, directory: Path, tasks: TaskOwner) -> None:
        self._catalog, self._directory, self._tasks = catalog, directory, tasks
        self.current: ModelSnapshots | None = None
        self._identity: Identity | None = None
        self._renewal: DiskIndexRebuild | None = None
        self._reading: asyncio.Task[None] | None = None

    async def of(self, identity: Identity, is_usable: Callable[[Snapshot], bool]) -> ModelSnapshots:
        """The library of this model, with the snapshots of the catalog that ``is_usable`` accepts. If the model is
        the same as before, the library is too. Canceling is safe: the next call goes on where this one ended.

        Many snapshots that are not in the index on disk (after a crash, or without its files) are read afterwards:
        await ``complete`` before a request is placed.
        """
        await self._stop_reading()
        if self.current is None or self._identity is None or not identity.is_same(self._identity):
            await self._open(identity)
        assert self.current is not None
        library = self.current
        # From here on, drops reach this library too, and each save adds its snapshot.
        found = {id_: snapshot for id_, snapshot in self._catalog.snapshots.items() if is_usable(snapshot)}
        for id_ in library.index.holders() - found.keys():
            library.remove(id_)
        for id_ in library.index.holders() & found.keys():
            library.snapshots[id_] = found.pop(id_)
            library.overlap.put(id_)
        if not found:
            library.changed()
            return library
        library.n_unread = len(found)
        self._reading = self._tasks.spawn(self._read(library, list(found)), "read snapshots")
        if len(found) <= _FEW:
            await self.complete()
        return library

    async def _read(self, library: ModelSnapshots, ids: list[str]) -> None:
        """Add snapshots with the tokens of their files. Canceling is safe."""
        try:
            for at in range(0, len(ids), _READ_AT_ONCE):
                # Broken ones are dropped, or we lacked open files: not offered then.
                for read in await self._catalog.verify_some(ids[at : at + _READ_AT_ONCE]):
                    if read.id in self._catalog.snapshots:  # not yet gone
                        library.put(read.listed, read.tokens)
                library.n_unread = max(len(ids) - at - _READ_AT_ONCE, 0)
        finally:
            library.n_unread = 0
        library.changed()

    async def complete(self) -> None:
        """Wait until every usable snapshot can be found. Canceling is safe."""
        while (reading := self._reading) is not None and not reading.done():
            await asyncio.wait([reading])

    async def _stop_reading(self) -> None:
        while (reading := self._reading) is not None and not reading.done():
            reading.cancel()
            await asyncio.wait([reading])

    async def _open(self, identity: Identity) -> None:
        """The first model, or another one than before: start with the generation on disk, if it is of this model."""

        def is_same(namespace: str) -> bool:
            other = Identity.from_text(namespace)
            return other is not None and identity.is_same(other)

        self.current = None
        if self._renewal is not None:
            await self._renewal.end()  # both would write to the same directory
        renewal = DiskIndexRebuild(
            self._directory, identity.to_text(), self._tasks, is_same, self._catalog.write_manifest
        )
        library = ModelSnapshots(LayeredIndex(await renewal.open()))

        def consider(index: LayeredIndex) -> None:
            if not library.n_unread:  # else a generation would be made of the first few only
                renewal.consider(index)

        library.on_change = consider
        self.current, self._identity, self._renewal = library, identity, renewal

    def drop(self, snapshot_id: str) -> None:
        """Remove the dropped snapshot. Idempotent."""
        if self.current is not None:
            self.current.drop(snapshot_id)
