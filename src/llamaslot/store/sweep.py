"""Compares the accounts with the disk while llamaslot runs: finds vanished files and unknown ones."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from pathlib import Path

from llamaslot.store import scan
from llamaslot.store.entries import SnapshotTable
from llamaslot.store.quota import Quota
from llamaslot.store.sidecar import EXT, KV

log = logging.getLogger(__name__)


class Sweep:
    """The sweep of one directory. ``reservations``: ids being written; ``drop(id)`` is called for a snapshot whose file
    vanished.
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
        self._is_missed = False  # the lock file, and the log says so

    async def run(self) -> None:
        """Drop snapshots whose file vanished, and remove unknown files. Canceling is safe.

        llama-server completes a save even if its client has gone: its part file can appear after an ``abandon``, or
        after our own restart. An unknown pair of .kv and .json is left for the next opening.
        """
        before = set(self._table.files.sizes)
        try:
            found = await asyncio.to_thread(_compare, self._directory, before)
        except OSError as error:
            log.warning("snapshots: %s cannot be read: %s", self._directory, error.strerror or error)
            return
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
    """The ``known`` files that are missing, and the ids without a whole pair whose files are not among them. None
    without our lock file. Blocking; raises OSError.
    """
    listing = scan.list_own(directory)
    if not listing.has_lock:
        return None
    listed = {id_ + suffix for id_, suffixes in listing.suffixes.items() for suffix in suffixes}
    # Checked again one by one: a listing that misses a name must not cost the file.
    missing = scan.missing(directory, known - listed)
    unnamed = [id_ for id_ in listing.unfinished() if id_ + KV not in known and id_ + EXT not in known]
    return missing, unnamed
