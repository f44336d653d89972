"""Turns slot files that llama-server has written into snapshots: checks their content, and writes the files."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from llamaslot.cache.content import SnapshotKind
from llamaslot.errors import LlamaslotError, OtherConversation, SnapshotInvalid
from llamaslot.file_id import FileId
from llamaslot.observe.recurring_faults import Recurring
from llamaslot.store import scan, sidecar
from llamaslot.store.deduplicate import Base, DataLost, Intake, RowsDiffer, let_go, look, take_in
from llamaslot.store.landing import Landing, copy_file
from llamaslot.store.manifest import Manifest
from llamaslot.store.quota import Deficit, Quota, QuotaExceeded
from llamaslot.store.sidecar import Sidecar
from llamaslot.store.slot_file import read_slot_file
from llamaslot.store.slot_layout import LayoutUnknown
from llamaslot.store.snapshot import EXT, KV, PART, WithTokens, digest_of, new_id
from llamaslot.store.snapshot_table import Pin, SnapshotTable

log = logging.getLogger(__name__)

_KEPT_WHOLE = "snapshots: the slot file of snapshot %s is kept whole, it shares no rows with others: %s"


class Reservation(Struct, frozen=True):
    """Reserved space for one snapshot. llama-server saves the slot under the name ``part_name``; then the caller calls
    ``Catalog.commit`` or ``abandon``. ``has_landed``: llama-server's file is in the landing place, not in the store.
    """

    id: str
    part_name: str
    size_bytes: int
    has_landed: bool = False


class SavedSlot(Struct, frozen=True, kw_only=True):
    """A slot file that llama-server has saved, to be made a snapshot.

    ``tokens_expected``: the file must begin with these tokens. ``n_saved`` (tokens) and ``n_written`` (bytes):
    llama-server's answer to the save. ``idle_s``: seconds since the last use of the slot. ``find_base(tokens)`` returns
    the snapshot that has the most rows in common with the file; without ``find_base``, the file is kept whole.
    ``marks``: token counts to which a later request may rewind. ``on_checked(tokens)`` is called with the file's tokens
    after they have been checked, before any is copied: from then on the slot may be used again. Copying and syncing run
    within ``turn``, which limits how many saves do that at once. ``is_prewarmed``: ``prewarm`` names it, so it is
    pinned. The other fields are those of the ``Snapshot``.
    """

    tokens_expected: bytes
    n_saved: int
    n_written: int
    fingerprint: str
    checkpoints: tuple[int, ...]
    source: str
    kind: SnapshotKind = SnapshotKind.LEAF
    is_prewarmed: bool = False
    namespace: str = ""
    idle_s: float = 0.0
    find_base: Callable[[bytes], Base | None] | None = None
    marks: tuple[int, ...] = ()
    on_checked: Callable[[bytes], None] = lambda tokens: None
    turn: contextlib.AbstractAsyncContextManager[object] = contextlib.nullcontext()

    def to_sidecar(self, id_: str, created_at: float) -> Sidecar:
        """The content of the new snapshot's sidecar, without ``digest``, which is known once the file is read."""
        return Sidecar(
            id=id_,
            n_tokens=self.n_saved,
            size_bytes=self.n_written,
            fingerprint=self.fingerprint,
            created_at=created_at,
            checkpoints=self.checkpoints,
            source=self.source,
            boot=sidecar.boot_id(),
            kind=self.kind,
            is_pinned=self.is_prewarmed,
            is_prewarmed=self.is_prewarmed,
            namespace=self.namespace,
        )


class ReservationState(Struct):
    """The state of a reservation. ``size_bytes``: reserved; ``landed_bytes``: of these, on disk. ``keep``: ids of
    snapshots that are never evicted for it. ``commit``: the task of its commit, once that has begun.

    ``has_landed``: llama-server's file is in the landing place, not in the store. ``spare``: ids of snapshots that may
    be evicted for llama-server's file, but not for a copy of the file's new rows beside it: without room for a copy,
    the file is kept whole. ``base``: the pin of a snapshot whose files the new one needs, held until the new one is
    listed.
    """

    size_bytes: int
    keep: frozenset[str]
    spare: frozenset[str] = frozenset()
    landed_bytes: int = 0
    has_landed: bool = False
    base: Pin | None = None
    commit: asyncio.Task[WithTokens | LlamaslotError] | None = None

    def unpin(self) -> None:
        if self.base is not None:
            self.base.release()


class Commits:
    """Turns slot files in one directory into snapshots. ``evict(short, keep)`` evicts snapshots outside ``keep`` that
    free at least ``short``, or none and returns False. ``lost(id)`` is called if the disk has lost data of that
    snapshot.
    """

    def __init__(
        self,
        directory: Path,
        table: SnapshotTable,
        quota: Quota,
        manifest: Manifest,
        evict: Callable[[Deficit, frozenset[str]], bool],
        pin: Callable[[str], Pin],
        lost: Callable[[str], None],
        landing: Landing,
    ) -> None:
        self._directory, self._table, self._quota, self._manifest = directory, table, quota, manifest
        self._evict, self._pin, self._lost, self._landing = evict, pin, lost, landing
        self._said = set[str]()
        self._failures = Recurring(log, "snapshots: slot files share rows again")
        self.n_differing = 0  # saves whose rows were not those that the slot was restored from or saved with
        self.added_bytes = 0  # bytes that all saves have added to the store

    async def accept(self, state: ReservationState, noted: Sidecar, saved: SavedSlot) -> WithTokens:
        """Check the part file of a reservation, and write the files and the sidecar of its snapshot, which is returned;
        the caller lists it. Raises SnapshotInvalid (OtherConversation if it holds other tokens) and QuotaExceeded.
        """
        part = self._landing.path(noted.id) if state.has_landed else self._directory / (noted.id + PART)
        file = await read_slot_file(part)
        self._landing.written(noted.id)
        if not state.has_landed:
            await self._has_written(state, file.size_bytes)
        scan.agree(noted, file)
        if not file.tokens:
            raise OtherConversation(f"{part.name}: holds no tokens")
        if not file.tokens.startswith(saved.tokens_expected):
            raise OtherConversation(f"{part.name}: holds another conversation than was to be saved")
        saved.on_checked(file.tokens)
        noted = replace(noted, digest=digest_of(file.tokens))
        async with saved.turn:
            taken = await self._take_in(state, part, noted, saved, file.tokens)
            if taken is None:
                taken = await self._keep_whole(state, part, noted)
        return taken.snapshot(taken.digest).with_tokens(file.tokens)

    async def _has_written(self, state: ReservationState, size_bytes: int) -> None:
        """Book llama-server's file, which is in the store and has ``size_bytes``. If that is more than reserved, evict
        snapshots for the difference. Raises QuotaExceeded if that is impossible.
        """
        if (extra := size_bytes - state.size_bytes) > 0:
            # The file is on disk already, so it is booked first; the quota is exceeded until the eviction is done.
            self._book(state, extra)
        state.landed_bytes = size_bytes
        self._quota.land(size_bytes)
        if extra > 0:
            await self._quota.make_available(0, lambda short: self._evict(short, state.keep))

    def _book(self, state: ReservationState, size_bytes: int) -> None:
        self._quota.grant(size_bytes)
        state.size_bytes += size_bytes

    async def _make_room(self, state: ReservationState, size_bytes: int, keep: frozenset[str]) -> None:
        """Raise the reservation to ``size_bytes`` in all. Evicts snapshots if necessary, but none in ``keep``. Raises
        QuotaExceeded.
        """
        if (more := size_bytes - state.size_bytes) > 0:
            await self._quota.make_available(more, lambda short: self._evict(short, keep), n_files=0)
            self._book(state, more)

    async def _keep_whole(self, state: ReservationState, part: Path, noted: Sidecar) -> Sidecar:
        if state.has_landed:
            await self._make_room(state, noted.size_bytes, state.keep)
        try:
            if state.has_landed:
                landed, part = part, self._directory / part.name
                await asyncio.to_thread(copy_file, landed, part)
            self._manifest.file_ids[noted.id] = await asyncio.to_thread(self._publish, part, noted)
        except OSError as error:
            raise SnapshotInvalid(f"{noted.id}: cannot be written: {error.strerror or error}") from error
        self.added_bytes += noted.size_bytes
        return noted

    def _publish(self, part: Path, noted: Sidecar) -> FileId:
        """Rename the slot file, then write its sidecar: until then a scan takes the .kv file for unfinished."""
        os.rename(part, kv := self._directory / (noted.id + KV))
        sidecar.write(self._directory, noted, noted.created_at)
        return FileId.of(os.lstat(kv))

    async def _take_in(
        self, state: ReservationState, part: Path, noted: Sidecar, saved: SavedSlot, tokens: bytes
    ) -> Sidecar | None:
        """Write only those rows and states of the slot file that the store does not have yet. None if the whole file
        must be kept: nothing can be shared, or an error came up, which is logged.
        """
        if saved.find_base is None:
            return None
        new: list[str] = []
        try:
            base = saved.find_base(tokens)
            if base is not None and base.snapshot.id not in self._table.snapshots:
                base = None
            if base is not None:
                state.base = self._pin(base.snapshot.id)
                base = replace(base, checksum=self._table.checksum_of(base.snapshot.file_name))
            if base is not None and self._quota.is_shared:  # no other llamaslot evicts it for a minute then
                used = {base.snapshot.id: noted.created_at}
                await asyncio.to_thread(sidecar.date, self._directory, used)
            intake = await asyncio.to_thread(look, self._directory, part, base, saved.marks)
            return await self._write(state, part, noted, intake, new) if intake is not None else None
        except Exception as error:  # any error: llama-server's file is good and can be kept whole
            self._say(noted, error)
            if isinstance(error, DataLost):  # a second sync would succeed
                for id_ in self._table.files.users.get(error.file, {}).keys() & self._table.snapshots.keys():
                    self._lost(id_)
            for id_ in new:
                await asyncio.to_thread(scan.remove, self._directory, id_)
            return None
        finally:
            self._quota.writing.difference_update(new)

    async def _write(
        self, state: ReservationState, part: Path, noted: Sidecar, intake: Intake, new: list[str]
    ) -> Sidecar:
        """Write the new extents, then header and sidecar of the snapshot, and remove llama-server's file. Puts the ids
        of the extents into ``new``. Raises SnapshotInvalid, OSError and QuotaExceeded; then files of these ids may be
        left.
        """
        there = 0 if state.has_landed else state.size_bytes
        await self._make_room(state, there + intake.size_bytes, state.keep | state.spare)

        def new_file() -> str:
            new.append(id_ := new_id())
            self._quota.writing.add(id_)  # else a sweep would remove it
            return id_

        noted = await asyncio.to_thread(take_in, self._directory, part, intake, noted, new_file)
        async with self._quota.turn():
            self._manifest.file_ids[noted.id] = await asyncio.to_thread(
                let_go, self._directory, None if state.has_landed else part, noted
            )
        written = noted.size_bytes + sum(
            part.size_bytes for part in noted.parts if part.file[: -len(EXT)] in new
        )
        self.added_bytes += written
        self._manifest.durable.add(noted.id)
        self._failures.succeeded()
        return noted

    def _say(self, noted: Sidecar, error: Exception) -> None:
        """Log why a slot file is kept whole. A layout that llamaslot does not know is logged once for each reason: all
        files of that server have it.
        """
        if isinstance(error, LayoutUnknown):
            reason = str(error).partition(": ")[2]
            if (kind := re.sub(r"\d+", "", reason)) not in self._said:
                self._said.add(kind)
                log.warning(
                    "snapshots: all slot files of this model are kept whole, they share no rows: %s", reason
                )
            return
        self.n_differing += isinstance(error, RowsDiffer)
        reason = str(error) or repr(error)
        if isinstance(error, OSError | QuotaExceeded):
            self._failures.failed(reason, _KEPT_WHOLE, noted.id, reason)
        else:
            log.warning(_KEPT_WHOLE, noted.id, reason)
