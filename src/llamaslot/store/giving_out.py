"""Gives a snapshot, or its first tokens, to llama-server: as a slot file in the directory that it restores from.

A whole slot file is given as it is, unless much less of it is needed. All else is put together for the moment of the
restore; that copy is reserved as a save is, so the quota holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from llamaslot.cache.ids import WIDTH
from llamaslot.errors import SlotActionFailed, SnapshotInvalid
from llamaslot.store.acceptance import Reservation
from llamaslot.store.assemble import DoesNotFit, StateAt, assemble
from llamaslot.store.extent import Piece, Source, check_file
from llamaslot.store.landing import Landing, NoLanding, copy_file
from llamaslot.store.quota import QuotaExceeded
from llamaslot.store.sidecar import KV, N_STATES, PART, Part, Snapshot, new_id
from llamaslot.store.slot_file import ROW_HEAD
from llamaslot.tasks import in_thread

_CUT_SHARE = 0.9  # a larger share of a whole file is not worth a copy
_MORE_BYTES = 2048  # of a file, besides rows, cells and states


def is_passing(error: BaseException) -> bool:
    """Whether the reason why a snapshot could not be given out may be over soon, while its files are whole: no room,
    no permission, too many open files, a disk that does not answer.
    """
    cause = error.__cause__
    is_refused = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
    return is_refused or isinstance(error, QuotaExceeded)


class Given(Struct, frozen=True):
    """A slot file that llama-server can restore now."""

    name: str
    size_bytes: int
    n_tokens: int


class Outgoing(Struct, frozen=True):
    """A slot file to be put together from ``rows``, and from ``states`` by position: the last state is after the last
    token.
    """

    rows: tuple[Part, ...]
    states: tuple[Part, ...]

    def size_bytes(self, directory: Path) -> int:
        """An upper bound of the file's bytes. Blocking; raises SnapshotInvalid, DoesNotFit."""
        with Source(directory / self.rows[-1].file) as source:
            extent = source.extent()
        if extent.shape.has_states is not bool(self.states):  # before room is made for it
            raise DoesNotFit(f"{self.rows[-1].file}: a model with states needs one, another none")
        attention, n_tokens = extent.shape.attention, self.rows[-1].end
        size_bytes = n_tokens * WIDTH + _MORE_BYTES + 16 * extent.n_streams
        if attention is not None:
            size_bytes += n_tokens * (extent.shape.bytes_per_token + attention.cell_words * WIDTH)
            size_bytes += ROW_HEAD.size * len(attention.tensors)
        states = [part.size_bytes for part in self.states]
        return size_bytes + sum(states) + sum(states[-1:])  # the last is there twice

    def write(self, directory: Path, target: Path) -> int:
        """Write the file to ``target``. Returns its size in bytes. Blocking; raises SnapshotInvalid and OSError."""
        pieces = [Piece(directory / part.file, part.start, part.end, part.checksum) for part in self.rows]
        states = [StateAt(directory / part.file, part.end) for part in self.states]
        return assemble(pieces, states[-1] if states else None, states[:-1], target)


def outgoing(snapshot: Snapshot, n_tokens: int) -> Outgoing | None:
    """What to put together for the first ``n_tokens`` of a snapshot; None if its own file is given. For a model that
    cannot rewind, the snapshot has parts, and a state after as many tokens.
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
    """Gives out slot files, and makes the copies in ``directory`` that are needed for that.

    ``reserve`` and ``abandon``: the catalog's. ``on_damage(id, error)`` is called if files of that snapshot are
    damaged or gone; the error names them. ``checksum_of(name)``: of a whole slot file, if known.
    """

    def __init__(
        self,
        directory: Path,
        landing: Landing,
        reserve: Callable[[int, Collection[str], Collection[str], int | None], Awaitable[Reservation]],
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
        """A slot file of the first ``n_tokens`` of a pinned snapshot, or of all, until the context exits. For a model
        that cannot rewind there must be a state after ``n_tokens``. ``spare``: as in ``Catalog.reserve``.

        Raises SnapshotInvalid, and QuotaExceeded if there is no room for a copy. Canceling is safe: it waits for the
        copy and removes it.
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
                raise NoLanding(str(error)) from error  # the snapshot is whole
            raise
        finally:
            await self._abandon(copy)

    @asynccontextmanager
    async def _whole(self, snapshot: Snapshot) -> AsyncIterator[str]:
        """The name of a snapshot's own file, where llama-server finds it. Raises SnapshotInvalid and QuotaExceeded."""
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
                raise NoLanding(str(error)) from error  # the snapshot is whole
            raise
        finally:
            await self._landing.drop(id_)

    async def _check_whole(self, snapshot: Snapshot) -> None:
        """Compare the checksum of a snapshot's own slot file, if other snapshots have recorded one: read once in this
        process, a second or more for several GB. Raises SnapshotInvalid.
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
        """Put a copy together in reserved space; None if that failed and the snapshot's own file will do as well."""
        try:
            size_bytes = await asyncio.to_thread(order.size_bytes, self._directory)
            copy = await self._reserve(size_bytes, (snapshot.id,), spare, 0)
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
