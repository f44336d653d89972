"""Snapshots in memory: the catalog's surface as far as the engine uses it, around the real table.

Which snapshots go first is decided by the table. As on a real disk rows are there once: a snapshot has those that the
one with the longest common prefix lacks, and a restore is given only those that it needs. There are no states: the
model is dense.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from functools import partial
from types import MappingProxyType

from msgspec.structs import replace

from bench.simulator.server import File, Origin, SimulatedServer
from llamaslot.cache.content import SnapshotKind
from llamaslot.cache.ids import MIN_SHARED_TOKENS, head
from llamaslot.errors import OtherConversation, SnapshotInvalid
from llamaslot.scheduling.snapshot_value import ByValue
from llamaslot.store import QuotaExceeded, Reservation, SavedSlot, Snapshot, WithTokens
from llamaslot.store.deduplicate import Base
from llamaslot.store.quota import NoRoomYet, Turnover
from llamaslot.store.restore_file import Given, outgoing
from llamaslot.store.snapshot import EXT, KV, PART, Part, digest_of
from llamaslot.store.snapshot_table import Pin, SnapshotTable

FINGERPRINT = "simulated"
UNLIMITED = 1 << 60


class Disk:
    """As ``store.Catalog``, without files. Removing is done at once; ``quota_bytes`` holds at every moment.

    ``largest_bytes`` is the most that was ever there, ``added_bytes`` what all saves have added. ``origins`` says whose
    context each snapshot is.
    """

    def __init__(
        self,
        server: SimulatedServer,
        table: SnapshotTable,
        quota_bytes: int,
        *,
        now: Callable[[], float],
        on_drop: Callable[[Snapshot], None],
    ) -> None:
        self.quota_bytes = quota_bytes
        self.largest_bytes = self.added_bytes = 0
        self.n_evicted = 0
        self.origins: dict[str, Origin] = {}
        self._server, self._table, self._now, self._on_drop = server, table, now, on_drop
        self._reservations: dict[str, tuple[int, frozenset[str]]] = {}
        self._turnover = Turnover(self._reservations.__len__)
        self._serial = 0
        table.eviction.fingerprints = frozenset({FINGERPRINT})
        self.snapshots: Mapping[str, Snapshot] = MappingProxyType(table.snapshots)

    @property
    def size_bytes(self) -> int:
        """Of all files, and reserved."""
        return self._table.files.size_bytes + sum(size for size, _ in self._reservations.values())

    def last_used(self, id_: str) -> float:
        return self._table.stats[id_].last_used

    def n_hits(self, id_: str) -> int:
        return self._table.stats[id_].n_hits

    async def reserve(
        self,
        size_bytes: int,
        keep: Collection[str] = (),
        spare: Collection[str] = (),
        new_bytes: int | None = None,
        *,
        may_wait: Callable[[], bool] = lambda: False,
    ) -> Reservation:
        """Raises QuotaExceeded, and evicts nothing, if there is not enough that may go.

        ``spare`` is a part of llamaslot's order, and does not count in others.
        """
        return await self._turnover.reserve(
            partial(self._reserve, size_bytes, keep, spare), may_wait=may_wait
        )

    async def _reserve(self, size_bytes: int, keep: Collection[str], spare: Collection[str]) -> Reservation:
        self._table.eviction.tend(self._now())
        spared = frozenset(keep) | frozenset(spare if isinstance(self._table.eviction.order, ByValue) else ())
        try:
            self._make_room(size_bytes, spared)
        except QuotaExceeded:
            self._make_room(size_bytes, frozenset(keep))
        self._serial += 1
        id_ = f"ls-{self._serial:016x}"  # not random: ids break ties
        self._reservations[id_] = size_bytes, frozenset(keep)
        self._note()
        return Reservation(id_, id_ + PART, size_bytes)

    def _make_room(self, size_bytes: int, keep: frozenset[str]) -> None:
        short = self.size_bytes + size_bytes - self.quota_bytes
        victims = self._table.eviction.victims(short, 0, keep, self._now())
        if self._table.files.freed_bytes(victims) < short:
            raise NoRoomYet(f"no room for {size_bytes} bytes")
        for victim in victims:
            self.n_evicted += 1
            self._drop(victim.id)

    async def commit(self, reservation: Reservation, saved: SavedSlot) -> WithTokens:
        """Raises OtherConversation and QuotaExceeded as the real one does."""
        size_bytes, keep = self._reservations[reservation.id]
        file = self._server.files[reservation.part_name]
        if not file.tokens or not file.tokens.startswith(saved.tokens_expected):
            raise OtherConversation(f"{reservation.id}: holds another conversation than was to be saved")
        if saved.n_written > size_bytes:
            self._make_room(saved.n_written - size_bytes, keep)
        base = saved.find_base(file.tokens) if saved.find_base is not None else None
        parts = self._parts(base, reservation.id, saved.n_saved)
        del self._reservations[reservation.id]
        self._server.files[reservation.id + KV] = self._server.files.pop(reservation.part_name)
        now, before = self._now(), self.size_bytes
        noted = replace(
            saved.to_sidecar(reservation.id, now),
            size_bytes=0 if parts else saved.n_written,
            parts=parts,
            row_bytes=self._server.hardware.bytes_per_token,
        )
        snapshot = noted.snapshot(digest_of(file.tokens)).with_tokens(file.tokens)
        if file.origin is not None and saved.kind is SnapshotKind.LEAF:  # a shared prefix has no owner
            self.origins[reservation.id] = file.origin
        self._table.add(snapshot.listed, now, last_used=now - saved.idle_s)
        self.added_bytes += self.size_bytes - before
        self._note()
        self._turnover.ended()
        return snapshot

    def _parts(self, base: Base | None, id_: str, n_tokens: int) -> tuple[Part, ...]:
        """Where the rows are; empty if all are in a file of its own."""
        if base is None or base.snapshot.id not in self.snapshots or base.n_shared < MIN_SHARED_TOKENS:
            return ()
        order = outgoing(
            replace(base.snapshot, parts=base.snapshot.parts or _whole(base.snapshot)), base.n_shared
        )
        assert order is not None, "it has parts"
        start, row_bytes = order.rows[-1].end, self._server.hardware.bytes_per_token
        own = (Part(id_ + EXT, start, n_tokens, (n_tokens - start) * row_bytes),) if start < n_tokens else ()
        return (*order.rows, *own)

    async def abandon(self, reservation: Reservation, *, is_refused: bool = False) -> None:
        if self._reservations.pop(reservation.id, None) is not None:
            self._server.files.pop(reservation.part_name, None)
            self._turnover.ended()

    def pin(self, id_: str) -> Pin:
        """Raises KeyError if it is gone."""
        return Pin(self._table.pin(id_), self._unpin)

    def _unpin(self, id_: str) -> None:
        if (pending_delete := self._table.unpin(id_)) is not None:
            self._remove(pending_delete)

    def touch(self, id_: str) -> None:
        if id_ in self.snapshots:
            self._table.hit(id_, self._now())

    def inherit(self, id_: str, from_id: str) -> None:
        if id_ in self.snapshots and from_id in self.snapshots:
            self._table.inherit(id_, from_id, self._now())

    async def verify(self, id_: str) -> WithTokens:
        """Raises SnapshotInvalid if it is gone."""
        if id_ not in self.snapshots:
            raise SnapshotInvalid(f"{id_}: is gone")
        return self.snapshots[id_].with_tokens(self._server.files[id_ + KV].tokens)

    @asynccontextmanager
    async def given_out(
        self, snapshot: Snapshot, n_tokens: int, spare: Collection[str] = ()
    ) -> AsyncIterator[Given]:
        """As ``Copies.given_out``."""
        order = outgoing(snapshot, n_tokens)
        if order is None:
            yield Given(snapshot.file_name, snapshot.size_bytes, snapshot.n_tokens)
            return
        n = order.rows[-1].end
        size_bytes = n * self._server.hardware.bytes_per_token
        copy = await self.reserve(size_bytes, (snapshot.id,), spare, may_wait=lambda: True)
        whole = self._server.files[snapshot.file_name]
        self._server.files[copy.part_name] = File(head(whole.tokens, n), whole.origin)
        try:
            yield Given(copy.part_name, copy.size_bytes, n)
        finally:
            await self.abandon(copy)

    async def drop(self, id_: str) -> None:
        if id_ in self.snapshots:
            self._drop(id_)

    def _drop(self, id_: str) -> None:
        snapshot = self.snapshots[id_]
        if self._table.take(id_, self._now()):
            self._remove(snapshot)
        self._on_drop(snapshot)

    def _remove(self, snapshot: Snapshot) -> None:
        self._table.release(snapshot)
        self._server.files.pop(snapshot.file_name, None)
        self.origins.pop(snapshot.id, None)

    def _note(self) -> None:
        self.largest_bytes = max(self.largest_bytes, self.size_bytes)

    def check(self) -> None:
        """Raise AssertionError naming the account that is not the sum of its parts."""
        self._table.check()
        listed = (*self._table.snapshots.values(), *self._table.pending_delete.values())
        assert not self._reservations, "each save and each restore has ended"
        files = {name.removesuffix(KV) for name in self._server.files if name.endswith(KV)}
        assert files == {snapshot.id for snapshot in listed}, "a file for each snapshot"
        assert self.size_bytes <= self.quota_bytes, "the quota holds"


def _whole(snapshot: Snapshot) -> tuple[Part, ...]:
    return (Part(snapshot.file_name, 0, snapshot.n_tokens, snapshot.size_bytes),)
