"""The snapshots that a model can use, found by their tokens. Lookups also find *pending saves*, which are not snapshots
yet: slots being saved, and shared prefixes that a running prefill will save. Requests may wait for them.

A slot table ends with its llama-server process, and snapshots on disk do not. So their index belongs to the directory.
All backends of the same model share it, and it survives a restart of llamaslot as a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from msgspec import Struct

from llamaslot.cache.changes import Changes
from llamaslot.cache.content import Content, SnapshotKind
from llamaslot.cache.ids import NEGLIGIBLE_TOKENS, common, count
from llamaslot.cache.namespaces import InNamespaces, Namespace, marker
from llamaslot.cache.prefix_index import PrefixIndex
from llamaslot.llama.identity import Identity
from llamaslot.scheduling.slots import SlotKey
from llamaslot.store import Catalog, Snapshot, WithTokens
from llamaslot.store.index_file import IndexFile
from llamaslot.tasks import TaskOwner

_FEW = 64  # connecting waits until the snapshots are read if these are so few: 20 ms
_READ_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class PendingSave:
    """Content that ``backend`` is saving, or will save, and that is no snapshot before the commit. ``until``: when the
    commit is expected, by the clock of the placements. ``slot``: for a shared prefix that is still to be computed, the
    slot of the request that computes it; else None. ``users``: the users whose requests wait for it.
    """

    holder: str
    content: Content
    until: float
    backend: str
    slot: SlotKey | None = None
    users: set[str] = field(default_factory=set, compare=False)


class PendingSnapshots:
    """The pending saves of all backends of one model. ``index`` has the tokens of each under its ``holder``, behind the
    mark of its namespace.
    """

    def __init__(self) -> None:
        self.index: PrefixIndex[str] = PrefixIndex()
        self._entries: dict[str, PendingSave] = {}
        # Shared prefixes to come, by slot and holder, and indexed for each backend. In one index with 400 servers, the
        # search for those of one slot took half of the time of a request, and 16 of other backends hid a snapshot.
        self._trunks: dict[SlotKey, dict[str, PendingSave]] = {}
        self._trunk_indexes: dict[str, PrefixIndex[str]] = {}
        self._serial = itertools.count()
        self.changes = Changes()  # sequences added to and removed from ``index``

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, holder: str) -> PendingSave | None:
        return self._entries.get(holder)

    def namespace_of(self, holder: str) -> Namespace:
        """The namespace of a pending save. Raises KeyError for an unknown holder."""
        return self._entries[holder].content.namespace

    def trunk_index(self, backend: str) -> PrefixIndex[str]:
        """The index of the shared prefixes that requests on ``backend`` will save. Only requests there wait for them:
        on another backend it is not known how long that takes.
        """
        return self._trunk_indexes.setdefault(backend, PrefixIndex())

    def add(self, content: Content, until: float, backend: str, slot: SlotKey | None = None) -> PendingSave:
        name = "leaving" if slot is None else "prefix"
        entry = PendingSave(f"{name}-{next(self._serial)}", content, until, backend, slot)
        self._entries[entry.holder] = entry
        if slot is not None:
            self._trunks.setdefault(slot, {})[entry.holder] = entry
        marked = marker(content.namespace) + content.tokens
        self._index_of(entry).insert(entry.holder, marked)
        self.changes.note(marked)
        return entry

    def end(self, entry: PendingSave) -> None:
        """Remove a pending save, which is a snapshot now or has failed. Idempotent."""
        if self._entries.pop(entry.holder, None) is not None:
            if entry.slot is not None:
                del self._trunks[entry.slot][entry.holder]
                if not self._trunks[entry.slot]:
                    del self._trunks[entry.slot]
            self._index_of(entry).drop(entry.holder)
            self.changes.note(marker(entry.content.namespace) + entry.content.tokens)

    def _index_of(self, entry: PendingSave) -> PrefixIndex[str]:
        return self.index if entry.slot is None else self.trunk_index(entry.backend)

    def end_of(self, backend: str) -> None:
        """Remove all pending saves of ``backend``, whose process is gone or may hang, so that no request waits for them
        any more.
        """
        for entry in [entry for entry in self._entries.values() if entry.backend == backend]:
            self.end(entry)

    def trunks_of(self, slot: SlotKey) -> list[PendingSave]:
        """The shared prefixes that the request in ``slot`` is going to save."""
        return [*self._trunks.get(slot, {}).values()]

    def check(self) -> None:
        """Raise AssertionError naming the invariant that does not hold."""
        trunks = {holder for of_slot in self._trunks.values() for holder in of_slot}
        indexed = list[str]()
        for index in (self.index, *self._trunk_indexes.values()):
            index.check()
            indexed += index.holders()
        assert sorted(indexed) == sorted(self._entries), "what is leaving is indexed"
        assert set(self.index.holders()) == self._entries.keys() - trunks, "shared prefixes are indexed apart"


def content_of(snapshot: WithTokens) -> Content:
    """The content of a slot that was just saved as ``snapshot``, or into which it was restored."""
    namespace = Namespace.of_text(snapshot.namespace)
    return Content(snapshot.tokens, True, False, snapshot.checkpoints, snapshot.id, namespace=namespace)


def supersedes(new: WithTokens, old: WithTokens, similarity_min: float) -> bool:
    """True if ``new`` makes ``old`` unnecessary: it continues the same conversation and is at least as long, with the
    share ``similarity_min`` of the tokens of ``old`` in common. Never true if ``old`` is a shared prefix or pinned.

    ``old`` need not be a whole prefix of ``new``: the client sends the answer in ``old`` back as text, whose tokens may
    differ, so both may diverge within that answer.
    """
    if old.kind is not SnapshotKind.LEAF or old.is_pinned or new.n_tokens < old.n_tokens:
        return False
    return common(new.tokens, old.tokens) >= similarity_min * old.n_tokens


class ModelSnapshots:
    """The snapshots of one model with the ``index`` of their tokens, and the pending saves. ``file``: the copy of the
    index on disk.

    ``set_aside``: by id, the time until which a snapshot is offered to no request, by the clock of the placements. It
    could not be given out, for a reason that may pass.
    """

    def __init__(self, index: PrefixIndex[str] | None = None, file: IndexFile | None = None) -> None:
        self.index = PrefixIndex[str]() if index is None else index
        self.file = file
        self.snapshots: dict[str, Snapshot] = {}
        self.set_aside: dict[str, float] = {}
        self.in_namespaces = InNamespaces(self.index, self.namespace_of)
        self.changes = Changes()  # sequences added to and removed from ``index``
        self.pending = PendingSnapshots()
        self.n_unread = 0  # snapshots on disk that are not in ``index`` yet: until 0, no request is placed

    def __repr__(self) -> str:
        return f"<ModelSnapshots {len(self.snapshots)} snapshots, {self.index!r}>"

    def namespace_of(self, snapshot_id: str) -> Namespace:
        """The namespace of a snapshot. Raises KeyError for an unknown id."""
        return Namespace.of_text(self.snapshots[snapshot_id].namespace)

    def snapshot_at(self, tokens: bytes, namespace: Namespace) -> Snapshot | None:
        """The longest snapshot in ``namespace`` that is wholly a prefix of ``tokens`` and lacks at most
        ``NEGLIGIBLE_TOKENS`` of them; None if there is none.
        """
        hit = self.in_namespaces.longest_full_prefix(tokens, (namespace,))
        is_near = hit is not None and hit.n_tokens >= count(tokens) - NEGLIGIBLE_TOKENS
        return self.snapshots.get(hit.holder) if hit is not None and is_near else None

    def add(self, snapshot: WithTokens) -> None:
        """Add one snapshot to the index. Idempotent."""
        self.put(snapshot.listed, snapshot.tokens)
        self.changed()

    def load(self, index: PrefixIndex[str], usable: Mapping[str, Snapshot]) -> None:
        """Add those of the ``usable`` snapshots that are in ``index``, which was read from the file and must not be
        used after that.
        """
        for id_ in index.holders() - usable.keys():
            index.drop(id_)
        self.snapshots.update((id_, usable[id_]) for id_ in index.holders())
        for id_ in self.index.holders() - index.holders():
            index.insert(id_, self.index.tokens(id_))
        self.index.become(index)
        self.changes.note_many()

    def put(self, snapshot: Snapshot, tokens: bytes) -> None:
        """Add one of many snapshots: call ``changed`` after the last one."""
        self.snapshots[snapshot.id] = snapshot
        if snapshot.id not in self.index:
            marked = marker(self.namespace_of(snapshot.id)) + tokens
            self.index.insert(snapshot.id, marked)
            self.changes.note(marked)

    def drop(self, snapshot_id: str) -> None:
        """Remove one snapshot from the index. Idempotent."""
        self.remove(snapshot_id)
        self.changed()

    def remove(self, snapshot_id: str) -> None:
        """Remove one of many snapshots: call ``changed`` after the last. Idempotent."""
        marked = marker(self.namespace_of(snapshot_id)) if snapshot_id in self.snapshots else b""
        tokens = self.in_namespaces.tokens(snapshot_id) if snapshot_id in self.snapshots else b""
        self.snapshots.pop(snapshot_id, None)
        self.set_aside.pop(snapshot_id, None)
        self.index.drop(snapshot_id)
        self.changes.note(marked + tokens)

    def changed(self) -> None:
        # While some are unread, the file would have only the first few snapshots.
        if self.file is not None and not self.n_unread:
            self.file.consider(self.index, self.changes)

    def check(self) -> None:
        """Raise AssertionError naming the invariant that does not hold."""
        self.index.check()
        assert self.index.holders() == self.snapshots.keys(), "snapshots are indexed"


class _Library(Struct, eq=False):
    """The snapshots of one model that ``is_usable`` accepts, the file of their index, and two tasks. ``loading`` reads
    that file; it is None once its result is in ``snapshots``. ``reading`` waits for that, and then reads the snapshots
    that the file lacks.
    """

    identity: Identity
    snapshots: ModelSnapshots
    file: IndexFile
    is_usable: Callable[[Snapshot], bool]
    loading: asyncio.Task[PrefixIndex[str]] | None
    reading: asyncio.Task[None] | None = None

    @property
    def is_reading(self) -> bool:
        return self.reading is not None and not self.reading.done()

    async def complete(self) -> None:
        while self.reading is not None and self.is_reading:
            await asyncio.wait([self.reading])

    async def end(self) -> None:
        """Stop reading and writing. Canceling is safe."""
        for task in (self.loading, self.reading):
            if task is not None:
                task.cancel()
        await self.complete()
        await self.file.end()


class Libraries:
    """The *libraries* (``ModelSnapshots``) of the models whose snapshots are in one directory. Backends of the same
    model share one.

    A library is kept while any backend runs its model or had it last. The index of each library has a file of its own
    in ``directory``.
    """

    def __init__(self, catalog: Catalog, directory: Path, tasks: TaskOwner) -> None:
        self._catalog, self._directory, self._tasks = catalog, directory, tasks
        self._by_backend: dict[str, _Library] = {}
        self._opening = asyncio.Lock()

    def __iter__(self) -> Iterator[ModelSnapshots]:
        """Iterate over the libraries, each once."""
        return (library.snapshots for library in dict.fromkeys(self._by_backend.values()))

    def current(self, backend: str) -> ModelSnapshots | None:
        """The library of the model that ``backend`` runs or had last; None if it never had one."""
        library = self._by_backend.get(backend)
        return library.snapshots if library is not None else None

    async def of(
        self, backend: str, identity: Identity, is_usable: Callable[[Snapshot], bool]
    ) -> ModelSnapshots:
        """The library of the model that ``backend`` runs now, with the snapshots of the catalog that ``is_usable``
        accepts. If this backend had the same model last, or another one has it, their library is used again. Canceling
        is safe: the next call goes on where this one ended.

        A task reads the index file, and then the snapshots that it lacks. If they are more than a few, this returns
        before that: await ``complete`` before a request is placed. The file of 10,000 took 0.1 s, a fifth of a start.
        """
        async with self._opening:  # else two backends would open the same model twice
            its = await self._library_of(backend, identity, is_usable)
            # From here on the library hears of each drop and of each new snapshot.
            library, its.is_usable = its.snapshots, is_usable
            usable = self._usable(its)
            for id_ in library.index.holders() - usable.keys():
                library.remove(id_)
            for id_ in library.index.holders():
                library.snapshots[id_] = usable.pop(id_)
            library.n_unread = len(usable)
            if not usable and its.loading is None:
                library.changed()
            elif not its.is_reading:
                its.reading = self._tasks.spawn(self._read(its), "read snapshots")
            if len(usable) <= _FEW:
                await its.complete()
            return library

    def _usable(self, its: _Library) -> dict[str, Snapshot]:
        listed = self._catalog.snapshots
        return {id_: snapshot for id_, snapshot in listed.items() if its.is_usable(snapshot)}

    async def _read(self, its: _Library) -> None:
        """Add all usable snapshots to the library: those in the index file, and the others with the tokens in their own
        files. It goes on until none is left, also of those that come meanwhile. Canceling is safe.
        """
        library, tried = its.snapshots, set[str]()
        try:
            loaded = None if its.loading is None else await its.loading
            while True:
                usable = self._usable(its)
                if its.loading is not None and loaded is not None:
                    library.load(loaded, usable)
                    its.loading = None
                ids = list(usable.keys() - library.index.holders() - tried)
                if not ids:
                    break
                tried.update(ids)
                for at in range(0, len(ids), _READ_AT_ONCE):
                    library.n_unread = len(ids) - at
                    # The result lacks broken snapshots, and those that cannot be read now: no request finds them.
                    for read in await self._catalog.verify_some(ids[at : at + _READ_AT_ONCE]):
                        if read.id in self._catalog.snapshots:  # not yet gone
                            library.put(read.listed, read.tokens)
        finally:
            library.n_unread = 0
        library.changed()

    async def complete(self) -> None:
        """Wait until the tokens of all snapshots of all libraries are read, so that lookups find them. Canceling is
        safe.
        """
        for library in list(self._by_backend.values()):
            await library.complete()

    async def _library_of(
        self, backend: str, identity: Identity, is_usable: Callable[[Snapshot], bool]
    ) -> _Library:
        had = self._by_backend.get(backend)
        if had is not None and identity.is_same(had.identity):
            return had
        others = (library for library in self._by_backend.values() if identity.is_same(library.identity))
        library = next(others, None)
        if had is not None:
            del self._by_backend[backend]
            if had not in self._by_backend.values():
                await had.end()  # the next library may use the same file
        if library is None:
            library = await self._open(identity, is_usable)
        self._by_backend[backend] = library
        return library

    async def _open(self, identity: Identity, is_usable: Callable[[Snapshot], bool]) -> _Library:
        """Make a library, and start to read the index in the file, if there is one of this model."""
        texts = {snapshot.fingerprint for snapshot in self._catalog.snapshots.values()}
        await asyncio.to_thread(self._sweep, texts, identity.key)
        taken = {its.file.path for its in self._by_backend.values()}
        paths = (self._directory / f"{identity.key}-{n}" for n in itertools.count(1))
        file = IndexFile(next(path for path in paths if path not in taken), identity, self._tasks)
        loading = self._tasks.spawn(file.read(), "read the index")
        return _Library(identity, ModelSnapshots(file=file), file, is_usable, loading)

    def _sweep(self, fingerprints: Collection[str], kept: str) -> None:
        """Remove the index files of all models but those with these ``fingerprints`` and the one with the key ``kept``.
        Blocking.
        """
        if not self._directory.is_dir():
            return
        known = (Identity.from_text(text) for text in fingerprints)
        keys = {identity.key for identity in known if identity is not None} | {kept}
        for path in self._directory.iterdir():
            if path.is_dir():  # of an earlier version
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.split("-")[0] not in keys:
                with contextlib.suppress(OSError):
                    path.unlink()

    def drop(self, snapshot_id: str) -> None:
        """Remove a dropped snapshot from the index of its model. Idempotent."""
        for library in self:
            if snapshot_id in library.snapshots or snapshot_id in library.index:
                library.drop(snapshot_id)
