"""Updates sidecars later: the time of the last use, the number of hits, and that the data is on disk; and now and
then the manifest of them, so that a start after a crash finds it little out of date. And compares the accounts with
the disk while llamaslot runs: finds vanished files and unknown ones.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from llamaslot.errors import SnapshotInvalid
from llamaslot.observe.recurring import Recurring
from llamaslot.store import scan, sidecar
from llamaslot.store.learned import HitLog, Hits
from llamaslot.store.manifest import Manifest
from llamaslot.store.quota import Quota
from llamaslot.store.sidecar import EXT, KV, Noted, Snapshot
from llamaslot.store.snapshot_table import SnapshotTable
from llamaslot.tasks import TaskOwner

log = logging.getLogger(__name__)

_RANKED_AT_ONCE, _RANK_PAUSE_S = 128, 0.01  # 2 ms of each 12
_CHANGES_MAX = 256  # sidecars that are not as in the manifest: reading them takes 0.1 s at the next start


class Upkeep:
    """Background tasks on the sidecars of the snapshots in ``table``; ``lost(id)`` is called if the disk lost the
    data. ``hits`` is the file of hits: only one thread at a time may write to it.
    """

    def __init__(
        self,
        directory: Path,
        table: SnapshotTable,
        manifest: Manifest,
        tasks: TaskOwner,
        lost: Callable[[str], None],
    ) -> None:
        self._directory, self._table, self._manifest = directory, table, manifest
        self._tasks, self._lost = tasks, lost
        self.hits = HitLog(directory)
        self._undated: dict[str, float] = {}  # used, and no thread is writing that yet
        self._is_dating = False
        self._n_changed = 0
        self._failures = Recurring(log, "snapshots: files are synced again")
        self._syncing = asyncio.Lock()

    def changed(self, n: int) -> None:
        """Record that ``n`` sidecars are not as in the manifest; if these are many, write it anew."""
        self._n_changed += n
        if self._n_changed > _CHANGES_MAX:
            self._n_changed = 0
            self._tasks.spawn(self.write_manifest(), "write the manifest")

    async def write_manifest(self) -> None:
        """Write the manifest. Canceling is safe: the file is written to its end all the same."""
        self._n_changed, stats = 0, self._table.stats
        await self._manifest.write(self._table.snapshots, {id_: its.last_used for id_, its in stats.items()})

    async def note(self, found: scan.Found) -> None:
        """Write the manifest of what was ``found`` so far, while many files are read for the first time: after a start
        that is killed the next one does not begin all over again.
        """
        self._manifest.file_ids, self._manifest.durable = found.file_ids.copy(), found.durable.copy()
        await self._manifest.write({one.id: one for one in found.snapshots}, found.last_used)

    def rank_all(self) -> None:
        """Rank the snapshots of a large directory in the background, before the first choice needs that: 0.2 s for
        10,000.
        """
        if self._table.rank_some(_RANKED_AT_ONCE):
            self._tasks.spawn(self._rank(), "rank snapshots")

    async def _rank(self) -> None:
        while self._table.rank_some(_RANKED_AT_ONCE):  # noqa: ASYNC110  # it gives way
            await asyncio.sleep(_RANK_PAUSE_S)

    def date(self, id_: str) -> None:
        """Soon write the time of a snapshot's last use to disk. Several at once are one call of a thread."""
        self._undated[id_] = self._table.stats[id_].last_used
        if not self._is_dating:
            self._is_dating = True
            self._tasks.spawn(self._date(), "date sidecars")

    async def _date(self) -> None:
        try:
            while self._undated:
                batch, self._undated = self._undated, {}
                await asyncio.to_thread(sidecar.date, self._directory, batch)
                self.changed(len(batch))
                listed = self._table.stats
                if self.hits.is_long(len(listed)):
                    await asyncio.to_thread(self.hits.rewrite, self._hits(list(listed)))
                else:
                    await asyncio.to_thread(self.hits.append, self._hits(batch))
        finally:
            self._is_dating = False

    def _hits(self, ids: Iterable[str]) -> dict[str, Hits]:
        known = {id_: self._table.stats.get(id_) for id_ in ids}
        return {id_: Hits(of.n_hits, of.is_branched) for id_, of in known.items() if of is not None}

    def sync(self, noted: Noted) -> None:
        """Sync a committed snapshot's data in the background, then record that in its sidecar."""
        self._tasks.spawn(self._sync(noted), f"sync {noted.id}")

    async def change_kind(self, snapshot: Snapshot) -> Snapshot:
        """Write a snapshot's kind and pin into its sidecar. Canceling is safe: they are written all the same."""
        await asyncio.shield(self._tasks.spawn(self._change_kind(snapshot), f"mark {snapshot.id}"))
        return snapshot

    async def _change_kind(self, snapshot: Snapshot) -> None:
        async with self._syncing:  # syncing writes the same sidecar
            try:
                await asyncio.to_thread(sidecar.change_kind, self._directory, snapshot)
            except (OSError, SnapshotInvalid) as error:
                log.warning(
                    "snapshots: cannot mark %s in its sidecar: %s; its kind and pin change until the next start only",
                    snapshot.id, error,
                )  # fmt: skip

    async def _sync(self, noted: Noted) -> None:
        dated = noted.created_at
        async with self._syncing:  # one at a time: llama-server's next save needs the disk too
            if noted.id not in self._table.snapshots:
                return
            snapshot = self._table.snapshots[noted.id]
            noted = sidecar.marked(noted, snapshot)  # meanwhile
            dated = self._table.stats[noted.id].last_used
            try:
                await asyncio.to_thread(sidecar.make_durable, self._directory, noted, dated)
                self._manifest.durable.add(noted.id)
                self._failures.succeeded()
                self.changed(1)
            except OSError as error:
                if noted.id in self._table.snapshots:
                    reason = error.strerror or error
                    if error.errno == errno.EIO:
                        log.warning("snapshots: %s cannot be synced: %s; it is dropped", noted.id, reason)
                        self._lost(noted.id)  # the kernel reports the error once; a second sync would succeed
                    else:
                        self._failures.failed(reason, "snapshots: %s cannot be synced: %s", noted.id, reason)
        if noted.id not in self._table.snapshots and noted.id not in self._table.pending_delete:
            # Dropped meanwhile: the sidecar may have been written after its removal.
            is_needed = self._table.is_known(noted.id)
            await asyncio.to_thread(scan.remove, self._directory, noted.id, keeps_data=is_needed)
        elif (stats := self._table.stats.get(noted.id)) is not None and stats.last_used != dated:
            self.date(noted.id)


class Sweep:
    """Compares one directory with the accounts. ``reservations``: ids being written; ``drop(id)`` is called for a
    snapshot whose file vanished.
    """

    def __init__(
        self,
        directory: Path,
        table: SnapshotTable,
        quota: Quota,
        reservations: Collection[str],
        drop: Callable[[str], None],
    ) -> None:
        self._directory, self._table, self._quota = directory, table, quota
        self._reservations, self._drop = reservations, drop
        self._failures = Recurring(log, f"snapshots: {directory} can be read again")
        self._is_missed = False  # the lock file, and the log says so

    async def run(self) -> None:
        """Drop snapshots whose file vanished, and remove unknown files. Canceling is safe.

        llama-server completes a save even if its client has left: its part file can appear after an ``abandon``, or
        after a restart of llamaslot. An unknown pair of .kv and .json is left for the next opening.
        """
        before = set(self._table.files.sizes)
        try:
            found = await asyncio.to_thread(_compare, self._directory, before)
        except OSError as error:
            reason = error.strerror or error
            self._failures.failed(reason, "snapshots: %s cannot be read: %s", self._directory, reason)
            return
        self._failures.succeeded()
        if found is None:
            # Not the directory that we locked (unmounted, moved): forget and remove nothing.
            if not self._is_missed:
                log.warning(
                    "snapshots: %s is not the directory it was: its lock file is missing; unmounted or moved? Until "
                    "llamaslot is restarted with it in its place, files that vanish are not noticed",
                    self._directory,
                )
            self._is_missed = True
            return
        self._is_missed = False
        names, unnamed = found
        missing = set[str]().union(*(self._table.files.users.get(name, ()) for name in names))
        for id_ in missing & self._table.snapshots.keys():
            if self._quota.is_shared:
                log.info("snapshot dropped: %s: another llamaslot of this store has evicted it", id_)
            else:
                log.warning("snapshot dropped: %s: its file has vanished", id_)
            self._drop(id_)
        # An id is known before its file exists. So a listed file with an unknown id is an orphan, or gone by now.
        for id_ in unnamed:
            if not self._is_known(id_):
                size_bytes = await asyncio.to_thread(scan.size_bytes, self._directory, id_)
                if not self._is_known(id_):  # not yet found by another sweep
                    self._quota.remove(id_, size_bytes)

    def _is_known(self, id_: str) -> bool:
        return self._table.is_known(id_) or id_ in self._reservations or self._quota.is_known(id_)


def _compare(directory: Path, known: set[str]) -> tuple[set[str], list[str]] | None:
    """The ``known`` files that are missing, and the ids that have files which are not ``known``, but no whole pair.
    None without llamaslot's lock file. Blocking; raises OSError.
    """
    listing = scan.list_own(directory)
    if not listing.has_lock:
        return None
    listed = {id_ + suffix for id_, suffixes in listing.suffixes.items() for suffix in suffixes}
    # Checked again one by one: a listing that misses a name must not cost the file.
    missing = scan.missing(directory, known - listed)
    unnamed = [id_ for id_ in listing.unfinished() if id_ + KV not in known and id_ + EXT not in known]
    return missing, unnamed
