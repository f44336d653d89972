"""The snapshots of one directory, in memory: their usage, their pins, and the files that each needs. Touches no files
and never awaits. Times come in as arguments, in seconds of any one clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager

from msgspec.structs import replace

from llamaslot.cache.content import SnapshotKind
from llamaslot.scheduling.snapshot_value import Order, SnapshotStats
from llamaslot.store.eviction import Eviction
from llamaslot.store.file_references import FileReferences
from llamaslot.store.snapshot import EXT, KV, Snapshot


class Pin(AbstractContextManager[Snapshot]):
    """Protects a snapshot's files from removal, from the moment the pin is made until the context exits. Between the
    lookup of a snapshot and its pin there must be no await.

    A pin that is never released lasts as long as the process: garbage collection does not unpin.
    """

    def __init__(self, snapshot: Snapshot, unpin: Callable[[str], None]) -> None:
        self.snapshot = snapshot
        self._unpin: Callable[[str], None] | None = unpin

    def __enter__(self) -> Snapshot:
        return self.snapshot

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """End the protection. If the snapshot was dropped meanwhile, its files are removed now. Idempotent."""
        if (unpin := self._unpin) is not None:
            self._unpin = None
            unpin(self.snapshot.id)


class SnapshotTable:
    """The snapshots of one directory, in memory. Those in ``snapshots`` are listed: they can be found, pinned and
    restored. Those in ``pending_delete`` are dropped, but still pinned. All are by id.

    ``stats``: usage of the listed snapshots, by id. ``files``: the files of all snapshots, until ``release``.
    ``eviction``: which of the listed snapshots are evicted next.
    """

    def __init__(self, order: Order | None = None) -> None:
        self.snapshots: dict[str, Snapshot] = {}
        self.stats: dict[str, SnapshotStats] = {}
        self.pending_delete: dict[str, Snapshot] = {}
        self.files = FileReferences()
        self._pins: Counter[str] = Counter()
        self.eviction = Eviction(self.snapshots, self.stats, self.files, self._pins, order)

    def __len__(self) -> int:
        """The number of snapshots, those pending deletion included."""
        return len(self.snapshots) + len(self.pending_delete)

    def add(self, snapshot: Snapshot, now: float, *, last_used: float | None = None, n_hits: int = 0) -> None:
        """List a snapshot. ``last_used`` defaults to ``now``; no hit rate is learned from the time before ``now``."""
        self.snapshots[snapshot.id] = snapshot
        last_used = now if last_used is None else last_used
        touched = self.files.add(snapshot)
        self.stats[snapshot.id] = SnapshotStats(
            snapshot.id, snapshot.n_tokens, self.files.own_bytes(snapshot), snapshot.kind, last_used, now,
            n_hits, read_bytes=snapshot.restored_bytes(),
        )  # fmt: skip
        self.eviction.changed(snapshot.id, now)
        self._weigh(touched)

    def add_many(
        self,
        snapshots: Iterable[Snapshot],
        last_used: Mapping[str, float],
        n_hits: Mapping[str, int],
        now: float,
    ) -> None:
        """List the snapshots of a whole directory. They are ranked later."""
        stats = self.stats
        listed = {snapshot.id: snapshot for snapshot in snapshots}
        self.snapshots.update(listed)
        for snapshot in listed.values():
            self.files.add(snapshot)
        for id_, snapshot in listed.items():
            stats[id_] = SnapshotStats(
                id_, snapshot.n_tokens, self.files.own_bytes(snapshot), snapshot.kind, last_used[id_], now,
                n_hits.get(id_, 0), read_bytes=snapshot.restored_bytes(),
            )  # fmt: skip
        self.eviction.add_many(listed, now)

    def hit(self, id_: str, now: float) -> None:
        """Record that a request used a snapshot at the time ``now``. Raises KeyError for an unlisted id."""
        stats = self.stats[id_]
        self.eviction.learn(self.eviction.order.hit, id_, now)
        stats.n_hits += 1
        stats.last_used = stats.counted_until = now
        self.eviction.changed(id_, now)

    def inherit(self, id_: str, from_id: str, now: float) -> None:
        """Add the hits of the snapshot ``from_id`` to those of ``id_``, which continues the same conversation."""
        self.stats[id_].n_hits += self.stats[from_id].n_hits
        self.eviction.changed(id_, now)

    def take(self, id_: str, now: float) -> bool:
        """Unlist a snapshot. True if the caller may call ``release`` and remove the files now. False if the snapshot is
        pinned: then ``unpin`` returns it at the last pin, and the files may be removed only after that.
        """
        self.eviction.learn(self.eviction.order.gone, id_, now)
        snapshot = self.snapshots.pop(id_)
        del self.stats[id_]
        self.eviction.forget(id_)
        if self._pins[id_]:
            self.pending_delete[id_] = snapshot
            return False
        return True

    def release(self, snapshot: Snapshot) -> dict[str, int]:
        """Remove an unlisted snapshot from ``files``. Returns those of its files that no other snapshot needs, with
        their bytes: the caller removes them.
        """
        freed, touched = self.files.drop(snapshot)
        self._weigh(touched)
        return freed

    def checksum_of(self, name: str) -> int | None:
        """The checksum of the whole slot file ``name``; None if no snapshot that needs the file has recorded one."""
        for id_ in self.files.users.get(name, ()):
            snapshot = self.snapshots.get(id_) or self.pending_delete.get(id_)
            for part in snapshot.parts if snapshot is not None else ():
                if part.file == name and part.checksum is not None:
                    return part.checksum
        return None

    def _weigh(self, ids: Iterable[str]) -> None:
        """Update the size and rank of those snapshots in ``ids`` that are listed."""
        for id_ in ids:
            if (stats := self.stats.get(id_)) is not None:
                stats.size_bytes = self.files.own_bytes(self.snapshots[id_])
                self.eviction.changed(id_)

    def change_kind(
        self, id_: str, kind: SnapshotKind, is_pinned: bool, is_prewarmed: bool = False
    ) -> Snapshot:
        """Change a snapshot's kind and pin. Raises KeyError for an unlisted id."""
        self.snapshots[id_] = replace(
            self.snapshots[id_], kind=kind, is_pinned=is_pinned, is_prewarmed=is_prewarmed
        )
        self.stats[id_].kind = kind
        self.eviction.changed(id_)
        return self.snapshots[id_]

    def pin(self, id_: str) -> Snapshot:
        """Count one more pin of a snapshot, and return the snapshot. Raises KeyError for an unlisted id."""
        snapshot = self.snapshots[id_]
        self._pins[id_] += 1
        return snapshot

    def unpin(self, id_: str) -> Snapshot | None:
        """Count one pin less. Returns the snapshot if it is in ``pending_delete`` and this was its last pin: the caller
        removes its files now. Else None.
        """
        self._pins[id_] -= 1
        if self._pins[id_]:
            return None
        del self._pins[id_]
        return self.pending_delete.pop(id_, None)

    def is_known(self, id_: str) -> bool:
        """True if a snapshot has this id, listed or pending, or any snapshot needs a .kv or .ext file of this id."""
        is_listed = id_ in self.snapshots or id_ in self.pending_delete
        return is_listed or id_ + KV in self.files.sizes or id_ + EXT in self.files.sizes

    def check(self) -> None:
        """Raise AssertionError with the name of the invariant that does not hold."""
        assert self.stats.keys() == self.snapshots.keys(), "stats and snapshots differ"
        assert len(self.eviction) == len(self.snapshots), "not everything is ranked"
        assert self.pending_delete.keys() <= self._pins.keys(), "pending deletion without a pin"
        assert not self.snapshots.keys() & self.pending_delete.keys(), "listed and pending deletion"
        needed = FileReferences()
        for snapshot in (*self.snapshots.values(), *self.pending_delete.values()):
            needed.add(snapshot)
        assert needed.users == self.files.users, "files are those of the snapshots"
        assert sum(self.files.sizes.values()) == self.files.size_bytes, "bytes are those of the files"
        for id_, stats in self.stats.items():
            assert stats.size_bytes == self.files.own_bytes(self.snapshots[id_]), "own bytes are up to date"
        assert all(n > 0 for n in self._pins.values()), "pins that hold nothing"
