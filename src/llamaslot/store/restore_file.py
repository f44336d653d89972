"""Gives a snapshot, or its first tokens, to llama-server, as a slot file in the directory that it restores from.

A snapshot that is a whole slot file is given as it is, unless a tenth or more of it is not needed. In all other cases a
copy is put together for the time of the restore. Space for the copy is reserved, as for a save, so the quota holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from msgspec import Struct
from msgspec.structs import replace

from llamaslot.cache.ids import WIDTH
from llamaslot.errors import SlotActionFailed, SnapshotInvalid
from llamaslot.store.assemble import DoesNotFit, StateAt, assemble
from llamaslot.store.commit import Reservation
from llamaslot.store.extent import Piece, Source, check_file
from llamaslot.store.landing import Landing, NoLanding, copy_file
from llamaslot.store.quota import QuotaExceeded
from llamaslot.store.slot_file import ROW_HEAD
from llamaslot.store.snapshot import KV, N_STATES, PART, Part, Snapshot, new_id
from llamaslot.tasks import in_thread

_CUT_SHARE = 0.9  # if a larger share of a whole slot file is needed, it is given as it is
_MORE_BYTES = 2048  # upper bound of a slot file's bytes besides tokens, rows, cells and states


class Reserve(Protocol):
    """As ``Catalog.reserve``."""

    async def __call__(
        self,
        size_bytes: int,
        keep: Collection[str],
        spare: Collection[str],
        new_bytes: int | None,
        *,
        may_wait: Callable[[], bool],
    ) -> Reservation: ...


def is_passing(error: BaseException) -> bool:
    """True if ``error``, because of which a snapshot could not be given out, may pass while the snapshot's files are
    undamaged: no room, no permission, too many open files, a disk that does not answer.
    """
    cause = error.__cause__
    is_refused = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
    return is_refused or isinstance(error, QuotaExceeded)


class Given(Struct, frozen=True):
    """A slot file that llama-server can restore now. ``name``: in the directory where llama-server reads."""

    name: str
    size_bytes: int
    n_tokens: int


class Outgoing(Struct, frozen=True):
    """A slot file to be put together: from ``rows``, and from ``states``, ascending. The last state is that after the
    last token. No states for a dense model.
    """

    rows: tuple[Part, ...]
    states: tuple[Part, ...]

    def size_bytes(self, directory: Path) -> int:
        """An upper bound of the file's bytes. Blocking; raises SnapshotInvalid, DoesNotFit."""
        with Source(directory / self.rows[-1].file) as source:
            extent = source.extent()
        if extent.shape.has_states is not bool(self.states):  # checked before space is reserved
            raise DoesNotFit(
                f"{self.rows[-1].file}: has no state for a model with states, or one for a model without"
            )
        attention, n_tokens = extent.shape.attention, self.rows[-1].end
        size_bytes = n_tokens * WIDTH + _MORE_BYTES + 16 * extent.n_streams
        if attention is not None:
            size_bytes += n_tokens * (extent.shape.bytes_per_token + attention.cell_words * WIDTH)
            size_bytes += ROW_HEAD.size * len(attention.tensors)
        states = [part.size_bytes for part in self.states]
        return size_bytes + sum(states) + sum(states[-1:])  # the last state is written twice

    def write(self, directory: Path, target: Path) -> int:
        """Write the file to ``target``. Returns its size in bytes. Blocking; raises SnapshotInvalid and OSError."""
        pieces = [Piece(directory / part.file, part.start, part.end, part.checksum) for part in self.rows]
        states = [StateAt(directory / part.file, part.end) for part in self.states]
        return assemble(pieces, states[-1] if states else None, states[:-1], target)


def outgoing(snapshot: Snapshot, n_tokens: int) -> Outgoing | None:
    """The parts of a slot file with the first ``n_tokens`` of a snapshot; None if the snapshot's own slot file is to be
    given instead. For a model with states, the snapshot must have a state after ``n_tokens``.
    """
    parts = snapshot.parts
    if not parts:
        if n_tokens > _CUT_SHARE * snapshot.n_tokens:
            return None
        return Outgoing((Part(snapshot.id + KV, 0, n_tokens, snapshot.size_bytes),), ())
    rows = [
        part._replace(end=min(part.end, n_tokens))
        for part in parts
        if not part.is_state and part.start < n_tokens
    ]
    states = [part for part in parts if part.is_state and part.end <= n_tokens][-N_STATES:]
    return Outgoing(tuple(rows), tuple(states))


class Copies:
    """Gives out the snapshots in ``directory`` as slot files, and makes copies where that is necessary.

    ``reserve`` and ``abandon``: the catalog's. ``on_damage(id, error)`` is called if files of that snapshot are
    damaged or gone; the error names them. ``checksum_of(name)``: the checksum of a whole slot file, None if unknown.
    """

    def __init__(
        self,
        directory: Path,
        landing: Landing,
        reserve: Reserve,
        abandon: Callable[[Reservation], Awaitable[None]],
        on_damage: Callable[[str, SnapshotInvalid], None],
        checksum_of: Callable[[str], int | None],
    ) -> None:
        self._directory, self._landing = directory, landing
        self._reserve, self._abandon = reserve, abandon
        self._on_damage, self._checksum_of = on_damage, checksum_of

    @asynccontextmanager
    async def given_out(
        self, snapshot: Snapshot, n_tokens: int, spare: Collection[str] = ()
    ) -> AsyncIterator[Given]:
        """Provide a slot file that llama-server can restore until the context exits. It has at least the first
        ``n_tokens`` of a pinned snapshot, perhaps more, as ``Given`` says. For a model with states the snapshot must
        have a state after ``n_tokens``. ``spare``: as in ``Catalog.reserve``.

        Raises SnapshotInvalid if a file is damaged or gone, QuotaExceeded if there is no room for a copy, NoLanding if
        llama-server cannot use a file through a link. Canceling is safe: it waits for the copy and removes it.
        """
        has_states = any(part.is_state for part in snapshot.parts)
        or_more = n_tokens if has_states else int(n_tokens / _CUT_SHARE)
        if (kept := self._landing.take(snapshot.id, n_tokens, or_more=or_more)) is not None:
            try:
                yield Given(kept.name, kept.size_bytes, kept.n_tokens)
            finally:
                self._landing.give_back(kept)
            return
        await self._check_whole(snapshot)
        order = outgoing(snapshot, n_tokens)
        copy = await self._copy(snapshot, order, spare) if order is not None else None
        if copy is None:
            async with self._whole(snapshot) as name:
                yield Given(name, snapshot.size_bytes, snapshot.n_tokens)
            return
        try:
            yield Given(copy.part_name, copy.size_bytes, n_tokens)
            await self._landing.settle(copy.id, snapshot.id, n_tokens, copy.size_bytes)
        except SlotActionFailed as error:
            if self._landing.was_refused(copy.id):
                raise NoLanding(str(error)) from error  # the snapshot itself is undamaged
            raise
        finally:
            await self._abandon(copy)

    @asynccontextmanager
    async def _whole(self, snapshot: Snapshot) -> AsyncIterator[str]:
        """Provide a snapshot's own slot file until the context exits; yields the name under which llama-server finds
        it. With a landing place, that is a copy there, or a link. Raises SnapshotInvalid and QuotaExceeded.
        """
        if not self._landing.is_separate:
            yield snapshot.file_name
            return
        id_ = new_id()
        try:
            if await self._landing.book(id_, snapshot.size_bytes, snapshot.file_name):
                source = self._directory / snapshot.file_name
                try:
                    await in_thread(copy_file, source, self._landing.path(id_))
                except OSError as error:
                    raise SnapshotInvalid(f"{snapshot.id}: cannot be copied: {error}") from error
                self._landing.written(id_)
            yield id_ + PART
            await self._landing.settle(id_, snapshot.id, snapshot.n_tokens, snapshot.size_bytes)
        except SlotActionFailed as error:
            if self._landing.was_refused(id_):
                raise NoLanding(str(error)) from error  # the snapshot itself is undamaged
            raise
        finally:
            await self._landing.drop(id_)

    async def _check_whole(self, snapshot: Snapshot) -> None:
        """Check a snapshot's own slot file against its checksum, if other snapshots have recorded one. Reads the file
        once in this process, which takes a second or more for several GB. Raises SnapshotInvalid.
        """
        name = snapshot.file_name
        if snapshot.parts or (checksum := self._checksum_of(name)) is None:
            return
        try:
            await asyncio.to_thread(check_file, self._directory / name, checksum)
        except OSError as error:
            raise SnapshotInvalid(f"{name}: cannot be read: {error.strerror or error}") from error
        except SnapshotInvalid as error:
            self._on_damage(snapshot.id, error)
            raise

    async def _copy(self, snapshot: Snapshot, order: Outgoing, spare: Collection[str]) -> Reservation | None:
        """Reserve space, and write there the slot file that ``order`` describes. None if that fails and the
        snapshot's own slot file can be given instead. Raises SnapshotInvalid and QuotaExceeded.
        """
        try:
            size_bytes = await asyncio.to_thread(order.size_bytes, self._directory)
            # Without parts the copy only saves bytes to read: that is not worth a wait for room.
            copy = await self._reserve(
                size_bytes, (snapshot.id,), spare, 0, may_wait=lambda: bool(snapshot.parts)
            )
            target = self._landing.path(copy.id)  # or through the link there
            try:
                size_bytes = await in_thread(order.write, self._directory, target)
                self._landing.written(copy.id)
            except BaseException:
                await self._abandon(copy)
                raise
        except (OSError, SnapshotInvalid, QuotaExceeded) as error:
            if not snapshot.parts:
                return None
            if isinstance(error, OSError):
                raise SnapshotInvalid(f"{snapshot.id}: cannot be put together: {error}") from error
            if isinstance(error, SnapshotInvalid) and not isinstance(error, DoesNotFit):
                self._on_damage(snapshot.id, error)
            raise
        return replace(copy, size_bytes=size_bytes)
