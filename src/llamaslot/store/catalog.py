"""The snapshots in one directory: reserves space before each save, commits saved files, and repairs at each opening.

It carries out each eviction: ``_drop`` unlists a snapshot and has its files removed. ``eviction.py`` says who decides
what.

One event loop owns a catalog. Files change in tasks, so cancelling a caller leaves no account wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

from llamaslot.cache.content import SnapshotKind
from llamaslot.errors import LlamaslotError, SnapshotInvalid
from llamaslot.scheduling.snapshot_value import Order
from llamaslot.sizes import readable_size
from llamaslot.store import scan
from llamaslot.store.commit import Commits, Reservation, ReservationState, SavedSlot
from llamaslot.store.directory_lock import DirectoryLock, DirectoryUnusable
from llamaslot.store.landing import Landing
from llamaslot.store.manifest import Manifest
from llamaslot.store.quota import Deficit, Limits, Quota, Turnover
from llamaslot.store.restore_file import Copies, is_passing
from llamaslot.store.sidecar import Sidecar
from llamaslot.store.snapshot import KV, PART, Snapshot, WithTokens, new_id
from llamaslot.store.snapshot_table import Pin, SnapshotTable
from llamaslot.store.upkeep import Sweep, Upkeep
from llamaslot.tasks import TaskOwner, in_thread, outcome

log = logging.getLogger(__name__)


class Catalog:
    """The snapshots in one directory. ``order`` ranks them for eviction, by default by value.

    ``on_drop`` is called in the event loop when a snapshot leaves ``snapshots``, for any reason but a removal in
    ``open``; its files may still exist for a moment.
    """

    def __init__(
        self,
        directory: Path,
        limits: Limits,
        *,
        now: Callable[[], float],
        on_drop: Callable[[Snapshot], None],
        manifest: Path | None = None,
        order: Order | None = None,
        landing: Path | None = None,
        landing_bytes: int = 0,
    ) -> None:
        """``landing``: where llama-server writes and reads, if not in ``directory``; it keeps ``landing_bytes``."""
        self.directory, self.slot_files = directory, landing or directory
        self._now, self._on_drop = now, on_drop
        self._lock = DirectoryLock(directory)
        self._tasks = TaskOwner()
        self.landing = Landing(self.slot_files, directory, self._tasks, landing_bytes)
        self._table = SnapshotTable(order)
        self._reservations: dict[str, ReservationState] = {}
        self._quota = Quota(directory, limits, self._table.files, self._n_held, self._tasks)
        self._manifest = Manifest(manifest, directory)
        self._turnover = Turnover(self._reservations.__len__)
        self._served: dict[str, str] = {}  # fingerprints by backend
        self._upkeep = Upkeep(directory, self._table, self._manifest, self._tasks, self._drop)
        self._sweep = Sweep(directory, self._table, self._quota, self._reservations.keys(), self._drop)
        self.commits = Commits(
            directory, self._table, self._quota, self._manifest, self._evict, self.pin, self._drop,
            self.landing,
        )  # fmt: skip
        self._copies = Copies(
            directory, self.landing, self.reserve, self.abandon, self._drop_damaged,
            self._table.checksum_of,
        )  # fmt: skip
        self.given_out = self._copies.given_out  # if a file is damaged, drops the snapshots that need it
        self.snapshots: Mapping[str, Snapshot] = MappingProxyType(self._table.snapshots)

    def _n_held(self) -> int:
        return len(self._table) + len(self._reservations)

    def __repr__(self) -> str:
        used = f"{readable_size(self.size_bytes)} of {readable_size(self.limits.quota_bytes)}"
        return f"<Catalog {self.directory} {len(self.snapshots)} snapshots {used}>"

    @property
    def fingerprints(self) -> frozenset[str]:
        """The fingerprints of the models that backends serve now, or served when they were last connected."""
        return self._table.eviction.fingerprints

    def serve(self, backend: str, fingerprint: str) -> None:
        """Record that ``backend`` serves the model with that fingerprint from now on."""
        self._served[backend] = fingerprint
        self._table.eviction.fingerprints = frozenset(self._served.values())
        self._upkeep.rank_all()

    @property
    def size_bytes(self) -> int:
        """Bytes on disk or reserved: of snapshots, reservations, files being removed, and files that cannot be."""
        return self._quota.size_bytes

    def last_used(self, id_: str) -> float:
        """The time of a snapshot's last use, in seconds of ``now``. Raises KeyError."""
        return self._table.stats[id_].last_used

    def n_hits(self, id_: str) -> int:
        """The number of a snapshot's hits, also from before a restart. Raises KeyError."""
        return self._table.stats[id_].n_hits

    def value(self, id_: str) -> float:
        """A snapshot's rank by ``order`` now: the lowest is evicted first. Raises KeyError."""
        return self._table.eviction.order.rank(self._table.stats[id_], self._now())

    def own_bytes(self, id_: str) -> int:
        """The bytes of a snapshot that no other snapshot needs. Raises KeyError."""
        return self._table.stats[id_].size_bytes

    def share_bytes(self, id_: str) -> int:
        """A snapshot's share of the bytes that it needs together with others, each divided equally. Raises KeyError."""
        return self._table.files.share_bytes(self.snapshots[id_])

    async def open(self) -> list[Snapshot]:
        """Lock the directory, find its snapshots, remove llamaslot's other files, and evict what is beyond the limits.
        Returns the remaining snapshots. Raises DirectoryUnusable, also if another llamaslot uses the directory.
        Canceling is safe: the lock is released, and the next opening does the rest.
        """
        try:
            # ``in_thread`` waits for the thread also if cancelled: else the thread might lock after ``close``.
            await in_thread(self._lock.acquire)
            await self.landing.open()
            return await self._open()
        except BaseException:
            self.close()
            raise

    async def _open(self) -> list[Snapshot]:
        try:
            hits = await asyncio.to_thread(self._upkeep.hits.load)
            found = await scan.scan(self.directory, await self._manifest.read(), self._upkeep.note)
        except OSError as error:
            raise DirectoryUnusable(f"{self.directory} cannot be read: {error.strerror or error}") from error
        self._sweep.was_done()
        now = self._now()  # the same for all snapshots: ranks of different times are not comparable
        self._table.add_many(found.snapshots, found.last_used, hits, now)
        self._manifest.file_ids, self._manifest.durable = found.file_ids, found.durable
        for id_, size in found.leftovers.items():
            self._quota.leave(id_, size)
        for fault in found.faults:
            log.warning("snapshots: fault found at the start: %s", fault)
        await self._quota.query_free_space()
        over = self._table.eviction.beyond_limits(self._quota, now)
        for victim in over:
            self._take(victim.id, "evicted")
        while self._quota.removing:
            await self._quota.next_removal()
        self._upkeep.changed(found.n_read)
        for id_ in self.snapshots.keys() - found.durable:
            self._upkeep.sync(
                Sidecar.of(self.snapshots[id_])
            )  # an earlier llamaslot was killed before it did
        log.info(
            "snapshots: %d in %s, %s used of the quota of %s; removed %d unfinished and %d broken ones, evicted %d,"
            " left %d unknown files alone",
            len(self.snapshots), self.directory, readable_size(self.size_bytes), readable_size(self.limits.quota_bytes),
            found.n_unfinished, len(found.faults), len(over), found.n_foreign,
        )  # fmt: skip
        return list(self.snapshots.values())

    async def settle(self) -> None:
        """Wait for all removals, commits and writes of times of use that have begun. Canceling is safe."""
        while len(self._tasks):
            await self._tasks.all_ended()

    async def write_manifest(self) -> None:
        """Write the manifest, so that the next ``open`` need not read each file. Canceling is safe."""
        await self._upkeep.write_manifest()

    def close(self) -> None:
        """Release the lock of the directory. Idempotent. Call ``settle`` before, or work on the files may be lost."""
        self.landing.close()
        self._lock.release()

    # -- space ---------------------------------------------------------------------------------------------------

    @property
    def limits(self) -> Limits:
        """The limits of bytes, files and free space that hold now."""
        return self._quota.limits

    def take_limits(self, limits: Limits) -> None:
        """Use other limits from now on. Snapshots beyond them are evicted in the background. In a shared store that
        happens at the next reservation, because it needs ``Neighbours.turn``.
        """
        if limits == self._quota.limits:
            return
        self._quota.limits = limits
        if not self._quota.is_shared:
            self._tasks.spawn(self._keep_to_limits(), "keep to the limits")

    async def _keep_to_limits(self) -> None:
        await self._quota.query_free_space()
        over = self._table.eviction.beyond_limits(self._quota, self._now())
        for victim in over:
            self._drop(victim.id, "evicted")
        if over:
            log.info("snapshots: %d evicted to keep to the new limits of store", len(over))

    async def reserve(
        self,
        size_bytes: int,
        keep: Collection[str] = (),
        spare: Collection[str] = (),
        new_bytes: int | None = None,
        *,
        may_wait: Callable[[], bool] = lambda: False,
    ) -> Reservation:
        """Reserve ``size_bytes`` for a snapshot. If llama-server's file will lie in the landing place, reserve only
        ``new_bytes``, if given. Evicts as necessary, but never pinned snapshots and those in ``keep``; those in
        ``spare`` only if the others are not enough. Returns when the evicted files are gone. While there is no room and
        ``may_wait()``, it waits for the ends of other reservations.

        Raises QuotaExceeded, and evicts nothing, if too little may be evicted. Canceling is safe: nothing stays
        reserved, and evictions that have begun are completed.
        """
        attempt = partial(self._reserve, size_bytes, frozenset(keep), frozenset(spare), new_bytes)
        return await self._turnover.reserve(attempt, may_wait=may_wait)

    async def _reserve(
        self, size_bytes: int, kept: frozenset[str], spare: frozenset[str], new_bytes: int | None
    ) -> Reservation:
        id_ = new_id()
        has_landed = await self.landing.book(id_, size_bytes)
        booked = size_bytes if new_bytes is None or not has_landed else min(new_bytes, size_bytes)
        self._table.eviction.tend(self._now())
        try:
            await self._sweep.run()
            await self._quota.make_available(
                booked, lambda short: self._evict(short, kept | spare) or self._evict(short, kept)
            )
        except BaseException:
            await self.landing.drop(id_)
            raise
        # No await since the space was found.
        self._reservations[id_] = ReservationState(booked, kept, spare, has_landed=has_landed)
        self._quota.grant(booked)
        return Reservation(id_, id_ + PART, size_bytes, has_landed)

    def _evict(self, short: Deficit, keep: Collection[str]) -> bool:
        """Evict snapshots outside ``keep`` that free at least ``short``. If impossible, evict none and return False."""
        victims = self._table.eviction.enough(short, keep, self._now())
        for victim in victims or ():
            self._drop(victim.id, "evicted")
        return victims is not None

    # -- one reservation ------------------------------------------------------------------------------------------

    async def commit(self, reservation: Reservation, saved: SavedSlot) -> WithTokens:
        """Make the part file that llama-server has saved a snapshot.

        Raises SnapshotInvalid if its content is not as expected, QuotaExceeded if it is larger than reserved and the
        difference cannot be evicted. Then the file is removed and the reservation ends. Canceling does not stop the
        commit: ``abandon`` then waits for it and changes nothing.
        """
        state = self._reservations.get(reservation.id)
        if state is None or state.commit is not None:
            raise SnapshotInvalid(f"{reservation.id}: its reservation has ended")
        commit = partial(self._commit, state, saved.to_sidecar(reservation.id, self._now()), saved)
        state.commit = self._tasks.spawn(outcome(commit, LlamaslotError), f"commit {reservation.id}")
        result = await asyncio.shield(state.commit)
        if isinstance(result, LlamaslotError):
            raise result
        return result

    async def _commit(self, state: ReservationState, noted: Sidecar, saved: SavedSlot) -> WithTokens:
        """The work of ``commit``, in a task of its own."""
        try:
            snapshot = await self.commits.accept(state, noted, saved)
        except Exception:
            state.unpin()
            await self._end_reservation(noted.id)
            raise
        # No await from here until it is listed: a granted commit is carried out, and a sweep knows its files.
        del self._reservations[noted.id]
        self._quota.commit(state.size_bytes, state.landed_bytes)
        self._table.add(snapshot.listed, self._now(), last_used=noted.created_at - saved.idle_s)
        state.unpin()
        log.debug("snapshots: %s is listed: %d tokens", snapshot.id, snapshot.n_tokens)
        self._turnover.ended()
        if snapshot.id not in self._manifest.durable:
            self._upkeep.sync(Sidecar.of(snapshot))
        elif saved.idle_s:  # its sidecar is dated as if used now: the manifest would leave the snapshot out
            self._upkeep.date(noted.id)
        else:
            self._upkeep.changed(1)
        await self._quota.told()
        await self.landing.settle(noted.id, noted.id, saved.n_saved, saved.n_written)
        return snapshot

    async def abandon(self, reservation: Reservation, *, is_refused: bool = False) -> None:
        """End a reservation without a snapshot: remove its part file and release its space. No effect on a committed
        one; idempotent. ``is_refused``: llama-server could not write the file. Canceling is safe: the file is removed
        all the same.
        """
        if is_refused:
            self.landing.was_refused(reservation.id)
        state = self._reservations.get(reservation.id)
        if state is not None and state.commit is not None:
            await asyncio.shield(state.commit)
        elif state is not None:
            await self._end_reservation(reservation.id)
        await self._quota.removed(reservation.id)

    async def _end_reservation(self, id_: str) -> None:
        state = self._reservations.pop(id_)
        self._quota.end_grant(state.size_bytes, state.landed_bytes)
        removal = self._quota.remove(id_, state.size_bytes)
        self._turnover.ended()
        await self.landing.drop(id_)
        await self._quota.told()
        await asyncio.shield(removal)

    # -- one snapshot ---------------------------------------------------------------------------------------------

    def pin(self, id_: str) -> Pin:
        """Protect the snapshot's files, from this call until the returned context exits. Raises KeyError if the
        snapshot is gone.
        """
        return Pin(self._table.pin(id_), self._unpin)

    def _unpin(self, id_: str) -> None:
        if (pending_delete := self._table.unpin(id_)) is not None:
            self._remove(pending_delete)

    def touch(self, id_: str) -> None:
        """Record that a request uses a snapshot now, and write that to disk a moment later. Ignores an unknown id."""
        if id_ in self.snapshots:
            self._table.hit(id_, self._now())
            self._upkeep.date(id_)

    def inherit(self, id_: str, from_id: str) -> None:
        """Add the hits of ``from_id`` to those of ``id_``, which continues its conversation. Ignores unknown ids."""
        if id_ in self.snapshots and from_id in self.snapshots:
            self._table.inherit(id_, from_id, self._now())
            self._upkeep.date(id_)

    async def change_kind(
        self, id_: str, kind: SnapshotKind, *, is_pinned: bool, is_prewarmed: bool = False
    ) -> Snapshot:
        """Change a snapshot's kind and pin, in memory and on disk. Raises KeyError. Canceling is safe."""
        with self.pin(id_):
            changed = self._table.change_kind(id_, kind, is_pinned, is_prewarmed)
            return await self._upkeep.change_kind(changed)

    async def verify(self, id_: str) -> WithTokens:
        """The snapshot with its tokens, after a check that its files have the recorded sizes and these tokens.

        Raises SnapshotInvalid otherwise, and drops the snapshots that need a damaged file. None is dropped for a file
        that only cannot be read now (open files, memory, permission). Canceling is safe.
        """
        if (pinned := self._table.pending_delete.get(id_)) is not None:
            # Dropped since the caller chose it, and still pinned by the caller.
            return await asyncio.to_thread(scan.agree_still, self.directory, pinned)
        try:
            pin = self.pin(id_)
        except KeyError:
            raise SnapshotInvalid(f"{id_}: is gone") from None
        with pin as snapshot:
            try:
                return await asyncio.to_thread(scan.agree_still, self.directory, snapshot)
            except SnapshotInvalid as error:
                self._drop_damaged(id_, error)
                raise

    async def verify_some(self, ids: Collection[str]) -> list[WithTokens]:
        """As ``verify``, for several snapshots in one call of a thread. The result lacks gone and invalid ones."""
        with contextlib.ExitStack() as stack:
            listed = [stack.enter_context(self.pin(id_)) for id_ in ids if id_ in self.snapshots]
            read = await asyncio.to_thread(scan.agree_each, self.directory, listed)
            for snapshot, result in zip(listed, read, strict=True):
                if isinstance(result, SnapshotInvalid):
                    self._drop_damaged(snapshot.id, result)
            return [result for result in read if not isinstance(result, SnapshotInvalid)]

    def _drop_damaged(self, id_: str, error: SnapshotInvalid) -> None:
        """Drop an invalid snapshot, and all that need the same damaged file, unless the cause ``is_passing``."""
        if is_passing(error):
            return
        ids = {id_}
        if (snapshot := self.snapshots.get(id_)) is not None:
            bad = [name for name in snapshot.files if name == id_ + KV or name in str(error)]
            ids.update(*(self._table.files.users[name] for name in bad))
        listed = ids & self.snapshots.keys()
        log.warning(
            "snapshot dropped: a file of it cannot be used: %s; %d others that need the same file are dropped too",
            error, len(listed - {id_}),
        )  # fmt: skip
        for each in sorted(listed):
            self._drop(each)

    async def drop(self, id_: str) -> None:
        """Unlist the snapshot at once, remove its files, and wait for that. If it is pinned, the files go at the last
        unpin, for which nothing waits. Idempotent. Canceling is safe: the files are removed all the same.
        """
        if id_ in self.snapshots:
            self._drop(id_)
        await self._quota.removed(id_)

    # -- without an await ------------------------------------------------------------------------------------------

    def _take(self, id_: str, why: str) -> Snapshot:
        """Unlist a snapshot, so that no request can find it. Its files are removed now, or at its last unpin."""
        snapshot = self.snapshots[id_]
        log.debug("snapshots: %s is no longer listed: %s", id_, why)  # before any file of it goes
        if self._table.take(id_, self._now()):
            self._remove(snapshot)
        return snapshot

    def _drop(self, id_: str, why: str = "dropped") -> None:
        self._on_drop(self._take(id_, why))

    def _remove(self, snapshot: Snapshot) -> None:
        """Start to remove the sidecar of an unlisted snapshot, and those of its files that no other snapshot needs."""
        self.landing.forget(snapshot.id)
        freed = self._table.release(snapshot)
        if (own := snapshot.id + KV) not in freed:
            self._quota.remove(snapshot.id, 0, keeps_data=True)
        for name, size_bytes in sorted(freed.items(), key=lambda file: file[0] != own):
            self._quota.remove(name[: name.index(".")], size_bytes)

    def check(self) -> None:
        """Raise AssertionError with the name of the first broken invariant, of the table or of the accounts."""
        self._table.check()
        self._quota.check(sum(state.size_bytes for state in self._reservations.values()))
