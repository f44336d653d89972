"""The snapshots in one directory: a quota before each write, a commit by rename, a repair at each opening.

One event loop owns a catalog. No await is between reading the accounts and changing them. Space is booked before it is
used on disk, and released after it is free there. Files change in tasks: a cancelled caller leaves no wrong account.
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
from llamaslot.store import scan, sidecar
from llamaslot.store.acceptance import Acceptance, Reservation, ReservationState, SavedSlot
from llamaslot.store.directory import DirectoryLock, DirectoryUnusable
from llamaslot.store.giving_out import Copies, is_passing
from llamaslot.store.landing import Landing
from llamaslot.store.manifest import Manifest
from llamaslot.store.quota import Deficit, Limits, Quota, Turnover
from llamaslot.store.sidecar import KV, PART, Noted, Snapshot, WithTokens
from llamaslot.store.sidecar_upkeep import Sweep, Upkeep
from llamaslot.store.snapshot_table import Pin, SnapshotTable
from llamaslot.tasks import TaskOwner, in_thread, outcome

log = logging.getLogger(__name__)


class Catalog:
    """The snapshots in one directory. Those of models that no backend serves (``serve``) are evicted first, then by
    ``order`` (default: by value).

    ``on_drop`` is called in the event loop at the moment when a snapshot leaves ``snapshots``, for any reason; its
    file may still exist for a moment. It is not called for what ``open`` removes.
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
        """``landing``: where llama-server writes and reads, if elsewhere; at most ``landing_bytes`` stay there."""
        self.directory, self.slot_files = directory, landing or directory
        self._now, self._on_drop = now, on_drop
        self._lock = DirectoryLock(directory)
        self._tasks = TaskOwner()
        self.landing = Landing(self.slot_files, directory, self._tasks, landing_bytes)
        self._table = SnapshotTable(order)
        self._quota = Quota(
            directory,
            limits,
            self._table.files,
            lambda: len(self._table) + len(self._reservations),
            self._tasks,
        )
        self._manifest = Manifest(manifest, directory)
        self._reservations: dict[str, ReservationState] = {}
        self._turnover = Turnover(self._reservations.__len__)
        self._served: dict[str, str] = {}  # fingerprints by backend
        self._upkeep = Upkeep(directory, self._table, self._manifest, self._tasks, self._drop)
        self._sweep = Sweep(directory, self._table, self._quota, self._reservations.keys(), self._drop)
        self.acceptance = Acceptance(
            directory, self._table, self._quota, self._manifest, self._evict, self.pin, self._drop,
            self.landing,
        )  # fmt: skip
        self._copies = Copies(
            directory, self.landing, partial(self.reserve, waits=True), self.abandon, self._is_invalid,
            self._table.checksum_of,
        )  # fmt: skip
        self.given_out = self._copies.given_out  # if a file is damaged, what needs it is dropped
        self.snapshots: Mapping[str, Snapshot] = MappingProxyType(self._table.snapshots)

    def __repr__(self) -> str:
        used = f"{readable_size(self.size_bytes)} of {readable_size(self.limits.quota_bytes)}"
        return f"<Catalog {self.directory} {len(self.snapshots)} snapshots {used}>"

    @property
    def fingerprints(self) -> frozenset[str]:
        """Fingerprints of the models that are served, or were when their backends were last connected."""
        return self._table.fingerprints

    def serve(self, backend: str, fingerprint: str) -> None:
        """Record that ``backend`` serves the model with that fingerprint from now on."""
        self._served[backend] = fingerprint
        self._table.fingerprints = frozenset(self._served.values())
        self._upkeep.rank_all()

    @property
    def size_bytes(self) -> int:
        """Bytes on disk or reserved: snapshots, reservations, and files that are being removed or cannot be removed."""
        return self._quota.size_bytes

    def last_used(self, id_: str) -> float:
        """The time of a snapshot's last use, in seconds of ``now``. Raises KeyError."""
        return self._table.stats[id_].last_used

    def n_hits(self, id_: str) -> int:
        """The number of a snapshot's hits, also from before a restart. Raises KeyError."""
        return self._table.stats[id_].n_hits

    def value(self, id_: str) -> float:
        """What a snapshot is worth per byte now: one of less is evicted sooner. Raises KeyError."""
        return self._table.order.rank(self._table.stats[id_], self._now())

    def own_bytes(self, id_: str) -> int:
        """The bytes of a snapshot that no other snapshot needs. Raises KeyError."""
        return self._table.stats[id_].size_bytes

    def share_bytes(self, id_: str) -> int:
        """A snapshot's share of the files that other snapshots need too. Raises KeyError."""
        return self._table.files.share_bytes(self.snapshots[id_])

    async def open(self) -> list[Snapshot]:
        """Lock the directory, scan and repair it, enforce the quota. Returns the valid snapshots.

        Raises DirectoryUnusable if another llamaslot uses the directory or it cannot be used. Canceling is safe: the
        lock is released, and the next opening repairs.
        """
        try:
            await in_thread(self._lock.acquire)  # cancelled while the thread still locks, the lock would stay
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
        now = self._now()  # one time for all: ranks of different times are not comparable
        self._table.add_many(found.snapshots, found.last_used, hits, now)
        self._manifest.file_ids, self._manifest.durable = found.file_ids, found.durable
        for id_, size in found.leftovers.items():
            self._quota.leave(id_, size)
        for fault in found.faults:
            log.warning("snapshots: fault found at the start: %s", fault)
        await self._quota.query_free_space()
        over = self._beyond_limits(now)
        for victim in over:
            self._take(victim.id)
        while self._quota.removing:
            await self._quota.next_removal()
        self._upkeep.changed(found.n_read)
        for id_ in self.snapshots.keys() - found.durable:
            self._upkeep.sync(Noted.of(self.snapshots[id_]))  # llamaslot was killed before this was done
        log.info(
            "snapshots: %d in %s, %s of %s used; removed %d unfinished and %d broken, evicted %d, ignored %d files"
            " of others",
            len(self.snapshots), self.directory, readable_size(self.size_bytes), readable_size(self.limits.quota_bytes),
            found.n_unfinished, len(found.faults), len(over), found.n_foreign,
        )  # fmt: skip
        return list(self.snapshots.values())

    async def settle(self) -> None:
        """Wait until everything begun is on disk: removals, commits, times of use. Canceling is safe."""
        while len(self._tasks):
            await self._tasks.drain()

    async def write_manifest(self) -> None:
        """Write the manifest, so the next ``open`` need not open each file. Canceling is safe."""
        await self._upkeep.write_manifest()

    def close(self) -> None:
        """Release the lock of the directory. Idempotent. Without ``settle`` before, unfinished removals, commits and
        times of use may be lost.
        """
        self.landing.close()
        self._lock.release()

    # -- space ---------------------------------------------------------------------------------------------------

    @property
    def limits(self) -> Limits:
        """The limits in force."""
        return self._quota.limits

    def take_limits(self, limits: Limits) -> None:
        """Use other limits from now on. What is too much is evicted in the background; in a shared store, which needs
        a turn for that, at the next reservation.
        """
        if limits == self._quota.limits:
            return
        self._quota.limits = limits
        if not self._quota.is_shared:
            self._tasks.spawn(self._keep_to_limits(), "keep to the limits")

    async def _keep_to_limits(self) -> None:
        await self._quota.query_free_space()
        over = self._beyond_limits(self._now())
        for victim in over:
            self._drop(victim.id)
        if over:
            log.info("snapshots: %d evicted for the new limits", len(over))

    def _beyond_limits(self, now: float) -> list[Snapshot]:
        """The snapshots that must be evicted although nothing is to be saved. None is evicted for a disk that other
        programs have filled so far that it would be too full without any snapshot.
        """
        short = self._quota.short()
        victims = self._table.victims(*short, (), now)
        if short.is_met_by(self._table.files.freed_bytes(victims), len(victims)):
            return victims
        return self._table.victims(*self._quota.short_of_quota(), (), now)

    async def reserve(
        self,
        size_bytes: int,
        keep: Collection[str] = (),
        spare: Collection[str] = (),
        new_bytes: int | None = None,
        *,
        waits: bool = False,
    ) -> Reservation:
        """Reserve ``size_bytes``, evicting snapshots that are neither pinned nor in ``keep``. If llama-server writes
        elsewhere, and ``new_bytes`` is given, only those are reserved. Snapshots in ``spare`` are evicted only if
        there are no others. When this returns, the evicted files are gone from the disk. ``waits``: for the ends of
        other reservations, as long as there is no room.

        Raises QuotaExceeded, and evicts nothing, if not enough may be evicted. Canceling is safe: the space is
        released, evictions that have begun are completed.
        """
        attempt = partial(self._reserve, size_bytes, frozenset(keep), frozenset(spare), new_bytes)
        return await self._turnover.reserve(attempt, waits=waits)

    async def _reserve(
        self, size_bytes: int, kept: frozenset[str], spare: frozenset[str], new_bytes: int | None
    ) -> Reservation:
        id_ = sidecar.new_id()
        has_landed = await self.landing.book(id_, size_bytes)
        booked = size_bytes if new_bytes is None or not has_landed else min(new_bytes, size_bytes)
        self._table.tend(self._now())
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
        """Evict at least what is ``short``, or nothing. Returns whether that was possible."""
        victims = self._table.victims(*short, keep, self._now())
        if not short.is_met_by(self._table.files.freed_bytes(victims), len(victims)):
            return False
        for victim in victims:
            self._drop(victim.id)
        return True

    # -- one reservation ------------------------------------------------------------------------------------------

    async def commit(self, reservation: Reservation, saved: SavedSlot) -> WithTokens:
        """Make the saved part file a snapshot, if its content is as expected.

        Raises SnapshotInvalid; raises QuotaExceeded if the file is larger than reserved and nothing can be evicted for
        the rest. In both cases the file is removed and the reservation ended. If cancelled, the commit is completed
        all the same; ``abandon`` then waits for it and changes nothing.
        """
        state = self._reservations.get(reservation.id)
        if state is None or state.commit is not None:
            raise SnapshotInvalid(f"{reservation.id}: its reservation has ended")
        commit = partial(self._commit, state, saved.noted(reservation.id, self._now()), saved)
        state.commit = self._tasks.spawn(outcome(commit, LlamaslotError), f"commit {reservation.id}")
        result = await asyncio.shield(state.commit)
        if isinstance(result, LlamaslotError):
            raise result
        return result

    async def _commit(self, state: ReservationState, noted: Noted, saved: SavedSlot) -> WithTokens:
        """Run the commit of a reservation in its own task."""
        try:
            snapshot = await self.acceptance.accept(state, noted, saved)
        except Exception:
            state.unpin()
            await self._end_reservation(noted.id)
            raise
        # No await from here until it is listed: a granted commit is carried out, and a sweep knows its files.
        del self._reservations[noted.id]
        self._quota.commit(state.size_bytes, state.landed_bytes)
        self._table.add(snapshot.listed, self._now(), last_used=noted.created_at - saved.idle_s)
        state.unpin()
        self._turnover.ended()
        if snapshot.id not in self._manifest.durable:
            self._upkeep.sync(Noted.of(snapshot))
        elif saved.idle_s:  # on disk already, but dated as if used now: the manifest would leave it out
            self._upkeep.date(noted.id)
        else:
            self._upkeep.changed(1)
        await self.landing.settle(noted.id, noted.id, saved.n_saved, saved.n_written)
        return snapshot

    async def abandon(self, reservation: Reservation, *, is_refused: bool = False) -> None:
        """Remove the part file and release the space. ``is_refused``: llama-server could not write the file.
        Idempotent; no effect on a committed reservation. Canceling is safe: the file is removed all the same.
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
        await asyncio.shield(removal)

    # -- one snapshot ---------------------------------------------------------------------------------------------

    def pin(self, id_: str) -> Pin:
        """Keep the snapshot's file until the returned context exits. Raises KeyError immediately if the snapshot is
        gone.
        """
        return Pin(self._table.pin(id_), self._unpin)

    def _unpin(self, id_: str) -> None:
        if (pending_delete := self._table.unpin(id_)) is not None:
            self._remove(pending_delete)

    def touch(self, id_: str) -> None:
        """Record a hit of a snapshot now; written to disk a moment later. An unknown id is ignored."""
        if id_ in self.snapshots:
            self._table.hit(id_, self._now())
            self._upkeep.date(id_)

    def branched(self, id_: str) -> None:
        """Record that a snapshot's conversation has left it, so a hit is unlikely. An unknown id is ignored."""
        if id_ in self.snapshots and not self._table.stats[id_].is_branched:
            self._table.branch(id_, self._now())
            self._upkeep.date(id_)

    def inherit(self, id_: str, from_id: str) -> None:
        """Give ``id_`` the hits of ``from_id``, whose conversation it continues. An unknown id is ignored."""
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
        """Check that the snapshot's file exists, has the recorded size, and has its tokens in the header. Returns the
        snapshot with its tokens.

        Raises SnapshotInvalid otherwise. The snapshots that need the file are then dropped, unless they only could not
        be read now (open files, memory, permission). Canceling is safe.
        """
        if (pinned := self._table.pending_delete.get(id_)) is not None:
            # Superseded since it was chosen, and still pinned by the one that asks.
            return await asyncio.to_thread(scan.agree_still, self.directory, pinned)
        try:
            pin = self.pin(id_)
        except KeyError:
            raise SnapshotInvalid(f"{id_}: is gone") from None
        with pin as snapshot:
            try:
                return await asyncio.to_thread(scan.agree_still, self.directory, snapshot)
            except SnapshotInvalid as error:
                self._is_invalid(id_, error)
                raise

    async def verify_some(self, ids: Collection[str]) -> list[WithTokens]:
        """As ``verify``, for several in one call of a thread. Those that are gone or invalid are left out."""
        with contextlib.ExitStack() as stack:
            listed = [stack.enter_context(self.pin(id_)) for id_ in ids if id_ in self.snapshots]
            read = await asyncio.to_thread(scan.agree_each, self.directory, listed)
            for snapshot, result in zip(listed, read, strict=True):
                if isinstance(result, SnapshotInvalid):
                    self._is_invalid(snapshot.id, result)
            return [result for result in read if not isinstance(result, SnapshotInvalid)]

    def _is_invalid(self, id_: str, error: SnapshotInvalid) -> None:
        """Drop an invalid snapshot, and all that need the same damaged file: each would cost a restore."""
        if is_passing(error):
            return
        ids = {id_}
        if (snapshot := self.snapshots.get(id_)) is not None:
            bad = [name for name in snapshot.files if name == id_ + KV or name in str(error)]
            ids.update(*(self._table.files.users[name] for name in bad))
        listed = ids & self.snapshots.keys()
        also = f" ({len(listed - {id_})} more that need it too)" if listed - {id_} else ""
        log.warning("snapshot dropped: %s%s", error, also)
        for each in sorted(listed):
            self._drop(each)

    async def drop(self, id_: str) -> None:
        """Unlist the snapshot at once, and remove its file; if it is pinned, at the last unpin. Idempotent. Canceling
        is safe: the file is removed all the same.
        """
        if id_ in self.snapshots:
            self._drop(id_)
        await self._quota.removed(id_)

    # -- without an await ------------------------------------------------------------------------------------------

    def _take(self, id_: str) -> Snapshot:
        """Unlist a snapshot, so that no request can use it; its files go now, or when it is not pinned any more."""
        snapshot = self.snapshots[id_]
        if self._table.take(id_, self._now()):
            self._remove(snapshot)
        return snapshot

    def _drop(self, id_: str) -> None:
        self._on_drop(self._take(id_))

    def _remove(self, snapshot: Snapshot) -> None:
        """Remove the sidecar of an unlisted snapshot, and those of its files that no other snapshot needs."""
        self.landing.forget(snapshot.id)
        freed = self._table.release(snapshot)
        if (own := snapshot.id + KV) not in freed:
            self._quota.remove(snapshot.id, 0, keeps_data=True)
        for name, size_bytes in sorted(freed.items(), key=lambda file: file[0] != own):
            self._quota.remove(name[: name.index(".")], size_bytes)

    def check(self) -> None:
        """Raise AssertionError with the name of the account that is not the sum of its parts."""
        self._table.check()
        self._quota.check(sum(state.size_bytes for state in self._reservations.values()))
