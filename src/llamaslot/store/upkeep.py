"""Background work on the files of one directory.

``Upkeep`` writes what changes in memory to disk a moment later: times of last use, numbers of hits, and in the sidecar
that a snapshot's data has been synced. Now and then it writes the manifest, a copy of all sidecars, so that a start
after a crash has few sidecars to read.

``Sweep`` compares the directory with the table before each reservation. It evicts nothing. It drops snapshots whose
files have vanished, in a shared store usually because another llamaslot has evicted them (``shared_store``), and
removes files of llamaslot's that belong to no snapshot.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from llamaslot.errors import SnapshotInvalid
from llamaslot.observe.recurring_faults import Recurring
from llamaslot.store import scan, sidecar
from llamaslot.store.directory_lock import LOCK_NAME
from llamaslot.store.learned import HitLog
from llamaslot.store.manifest import Manifest
from llamaslot.store.quota import Quota
from llamaslot.store.sidecar import Sidecar
from llamaslot.store.snapshot import EXT, JSON, KV, Snapshot, own_name
from llamaslot.store.snapshot_table import SnapshotTable
from llamaslot.tasks import TaskOwner

log = logging.getLogger(__name__)

_RANKED_AT_ONCE, _RANK_PAUSE_S = 128, 0.01  # ranking takes 2 ms, then the event loop has 10 ms for other work
# Comparing so many files takes 5 ms of the GIL, so it is not done more often.
_MANY_FILES, _SWEPT_S = 2000, 10.0
_CHANGES_MAX = 256  # sidecars that differ from the manifest: reading so many takes 0.1 s at the next start


class Upkeep:
    """Writes what changes about the snapshots in ``table`` to disk, in background tasks. ``lost(id)`` is called if the
    disk has lost a snapshot's data. ``hits`` is the file of hits: only one thread at a time may write to it.
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
        self._undated: dict[str, float] = {}  # times of last use, by id, that no thread writes yet
        self._is_dating = False
        self._n_changed = 0
        self._failures = Recurring(log, "snapshots: slot files are written through to the disk again")
        self._syncing = asyncio.Lock()

    def changed(self, n: int) -> None:
        """Record that ``n`` more sidecars differ from the manifest. After more than ``_CHANGES_MAX``, start to write
        the manifest.
        """
        self._n_changed += n
        if self._n_changed > _CHANGES_MAX:
            self._n_changed = 0
            self._tasks.spawn(self.write_manifest(), "write the manifest")

    async def write_manifest(self) -> None:
        """Write the manifest. Canceling is safe: the file is written to its end all the same."""
        self._n_changed, stats = 0, self._table.stats
        await self._manifest.write(self._table.snapshots, lambda id_: stats[id_].last_used)

    async def note(self, found: scan.Found) -> None:
        """Write the manifest of the snapshots ``found`` so far, while a first start reads many files: if it is killed,
        the next start goes on there.
        """
        self._manifest.file_ids, self._manifest.durable = found.file_ids.copy(), found.durable.copy()
        await self._manifest.write({one.id: one for one in found.snapshots}, found.last_used.__getitem__)

    def rank_all(self) -> None:
        """Rank all unranked snapshots in the background, in portions, so that no reservation waits for that: 10,000
        take 0.2 s.
        """
        if self._table.eviction.rank_some(_RANKED_AT_ONCE):
            self._tasks.spawn(self._rank(), "rank snapshots")

    async def _rank(self) -> None:
        while self._table.eviction.rank_some(_RANKED_AT_ONCE):  # noqa: ASYNC110  # it gives way
            await asyncio.sleep(_RANK_PAUSE_S)

    def date(self, id_: str) -> None:
        """Start to write a snapshot's time of last use and its hits to disk. One call of a thread writes all that have
        changed since the last call.
        """
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

    def _hits(self, ids: Iterable[str]) -> dict[str, int]:
        known = {id_: self._table.stats.get(id_) for id_ in ids}
        return {id_: of.n_hits for id_, of in known.items() if of is not None}

    def sync(self, noted: Sidecar) -> None:
        """Sync a committed snapshot's files (fsync) in the background, then record that in its sidecar."""
        self._tasks.spawn(self._sync(noted), f"sync {noted.id}")

    async def change_kind(self, snapshot: Snapshot) -> Snapshot:
        """Write a snapshot's kind and pin into its sidecar. Canceling is safe: they are written all the same."""
        await asyncio.shield(self._tasks.spawn(self._change_kind(snapshot), f"mark {snapshot.id}"))
        return snapshot

    async def _change_kind(self, snapshot: Snapshot) -> None:
        async with self._syncing:  # ``_sync`` may write the same sidecar
            try:
                await asyncio.to_thread(sidecar.change_kind, self._directory, snapshot)
            except (OSError, SnapshotInvalid) as error:
                log.warning(
                    "snapshots: cannot write the sidecar of snapshot %s: %s; the next start forgets its new kind or"
                    " pin",
                    snapshot.id, error,
                )  # fmt: skip

    async def _sync(self, noted: Sidecar) -> None:
        dated = noted.created_at
        async with self._syncing:  # one at a time: llama-server's next save needs the disk too
            if noted.id not in self._table.snapshots:
                return
            snapshot = self._table.snapshots[noted.id]
            noted = sidecar.marked(noted, snapshot)  # it may have changed meanwhile
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
                        log.warning("snapshot dropped: %s: fsync of its files failed: %s", noted.id, reason)
                        self._lost(noted.id)  # the kernel reports the error once; a second sync would succeed
                    else:
                        self._failures.failed(
                            reason,
                            "snapshots: fsync of snapshot %s failed, a power failure would lose it: %s",
                            noted.id, reason,
                        )  # fmt: skip
        if noted.id not in self._table.snapshots and noted.id not in self._table.pending_delete:
            # Dropped meanwhile: the thread may have written the sidecar after its removal, so remove it again.
            is_needed = self._table.is_known(noted.id)
            await asyncio.to_thread(scan.remove, self._directory, noted.id, keeps_data=is_needed)
        elif (stats := self._table.stats.get(noted.id)) is not None and stats.last_used != dated:
            self.date(noted.id)


class Sweep:
    """Compares one directory with the table and the accounts. ``reservations``: ids of files that llama-server may be
    writing. ``drop(id)`` is called for a snapshot of which a file has vanished.
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
        self._is_missed = False  # the lock file was missing at the last run, and that was logged
        self._done_at = float("-inf")  # time of the event loop

    def was_done(self) -> None:
        """Record that the directory has just been compared with the table: it was opened."""
        self._done_at = asyncio.get_running_loop().time()

    async def run(self) -> None:
        """Drop snapshots of which a file has vanished, and start to remove files of unknown ids. If our lock file is
        missing, do neither: the directory is another one now. If there are many files, do nothing for a while after
        each run; in a shared store others remove files, so there each call compares. Canceling is safe.

        Unknown files arise because llama-server completes a save even if its client has left: a part file can appear
        after an ``abandon``, or after a restart of llamaslot. An unknown pair of .kv and .json stays for the next
        ``open``, which reads it.
        """
        now = asyncio.get_running_loop().time()
        has_many = len(self._table.files.sizes) > _MANY_FILES and not self._quota.is_shared
        if has_many and now < self._done_at + _SWEPT_S:
            return
        self._done_at, before = now, set(self._table.files.sizes)
        try:
            found = await asyncio.to_thread(_compare, self._directory, before)
        except OSError as error:
            reason = error.strerror or error
            self._failures.failed(
                reason, "snapshots: directory %s cannot be read: %s", self._directory, reason
            )
            return
        self._failures.succeeded()
        if found is None:
            # Not the directory that we locked (unmounted, moved): its snapshots are not lost.
            if not self._is_missed:
                log.warning(
                    "snapshots: %s is not the directory that llamaslot opened: its lock file is missing (unmounted?"
                    " moved?). Until the directory is back, llamaslot does not notice lost or left-over"
                    " files",
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
                log.warning("snapshot dropped: %s: a file that it needs has vanished from the disk", id_)
            self._drop(id_)
        # An id is known before its file exists. So a file with an unknown id belongs to nothing, or is gone by now.
        for id_ in unnamed:
            if not self._is_known(id_):
                size_bytes = await asyncio.to_thread(scan.size_bytes, self._directory, id_)
                if not self._is_known(id_):  # another sweep may have found it meanwhile
                    self._quota.remove(id_, size_bytes)

    def _is_known(self, id_: str) -> bool:
        return self._table.is_known(id_) or id_ in self._reservations or self._quota.is_known(id_)


def _compare(directory: Path, known: set[str]) -> tuple[set[str], list[str]] | None:
    """The ``known`` file names that do not exist, and the ids that have files but neither a ``known`` .kv or .ext file
    nor a whole pair of .kv and .json. None if llamaslot's lock file is missing. Blocking; raises OSError.

    Entry by entry, without a table of all: with 10,000 snapshots, making and freeing one kept the event loop waiting
    for the GIL for 12 ms.
    """
    missing, unknown, has_lock = set(known), dict[str, set[str]](), False
    with os.scandir(directory) as entries:
        for entry in entries:
            name = entry.name
            if name in known:
                if entry.is_file(follow_symlinks=False):
                    missing.discard(name)
            elif name == LOCK_NAME:
                has_lock = True
            elif name.endswith(JSON) and name[: -len(JSON)] + KV in known:
                continue
            elif (own := own_name(name)) is not None and entry.is_file(follow_symlinks=False):
                unknown.setdefault(own[0], set()).add(own[1])
    if not has_lock:
        return None
    unnamed = [id_ for id_ in scan.unfinished(unknown) if id_ + KV not in known and id_ + EXT not in known]
    # Each missing name is checked again: a listing that happens to lack a name must not cost the snapshot.
    return scan.missing(directory, missing), unnamed
