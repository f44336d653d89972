"""Decides when snapshots must be evicted and how many bytes and files that must free; and removes files from the disk.

``Quota`` keeps accounts of a directory's bytes and files. ``make_available`` is called before each write that needs
space. If the space is missing, it calls ``evict``, which chooses and drops snapshots (``eviction.py``). In a shared
store it first has other llamaslots' snapshots removed, if those were used longer ago (``shared_store.Neighbours``).

Space is booked before it is used on disk, and released only after it is free on disk. There is no await between
reading the accounts and changing them, so on one event loop they need no lock.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple, TypeVar

from msgspec import Struct

from llamaslot.errors import LlamaslotError
from llamaslot.observe.recurring_faults import Recurring
from llamaslot.sizes import readable_size
from llamaslot.store import scan
from llamaslot.store.file_references import FileReferences
from llamaslot.store.shared_store import Neighbours
from llamaslot.store.snapshot import JSON
from llamaslot.tasks import ChangeEvent, TaskOwner, in_thread

log = logging.getLogger(__name__)
T = TypeVar("T")
# How long a reservation waits for room in all: the request's slot waits with it, and another server may hang.
_PATIENCE_S = 20.0
_LOOK_S = 0.2  # whether it still may wait


class QuotaExceeded(LlamaslotError):
    """There is no space for a snapshot, and too few snapshots may be evicted for it."""


class NoRoomYet(QuotaExceeded):
    """As QuotaExceeded, but there may be space after other reservations have ended."""


class Turnover:
    """Lets a reservation that finds no room wait for the ends of others. At its end, a reservation releases the bytes
    that its file did not need, and its snapshot may be evicted, or the older snapshot that it replaces.
    """

    def __init__(self, n_held: Callable[[], int]) -> None:
        """``n_held()``: the number of reservations that have not ended."""
        self._n_held = n_held
        self._n_trying = self._n_ended = 0
        self._has_ended = ChangeEvent()

    def ended(self) -> None:
        """Record that a reservation has ended, or will not be made."""
        self._n_ended += 1
        self._has_ended.notify()

    async def reserve(self, attempt: Callable[[], Awaitable[T]], *, may_wait: Callable[[], bool]) -> T:
        """Call ``attempt``, which reserves space, and return its result. If it raises NoRoomYet, other reservations are
        left and ``may_wait()``, call it again after the end of the next one. Waits for at most ``_PATIENCE_S`` in all,
        then calls it once more. Never wait while holding a reservation: two such callers would wait for each other.
        Raises what ``attempt`` raises. Canceling is safe.
        """
        now = asyncio.get_running_loop().time
        until, is_last = now() + _PATIENCE_S, False
        while True:
            n_ended = self._n_ended
            self._n_trying += 1
            try:
                return await attempt()
            except BaseException as error:
                # Reservations that wait here do not count as left: they would wait for each other.
                has_others = self._n_ended > n_ended or self._n_trying + self._n_held() > 1
                if is_last or not (has_others and isinstance(error, NoRoomYet) and may_wait()):
                    self.ended()
                    raise
            finally:
                self._n_trying -= 1
            while self._n_ended == n_ended and now() < until and may_wait():
                await self._has_ended.wait(min(until - now(), _LOOK_S))
            is_last = self._n_ended == n_ended or now() >= until


class Limits(Struct, frozen=True):
    """The limits of one directory. ``quota_bytes`` and ``max_files`` limit llamaslot's files. ``min_free_bytes`` of the
    disk must stay free for other programs; even with 0, snapshots are evicted when the disk is full.
    """

    quota_bytes: int
    max_files: int = sys.maxsize  # no limit
    min_free_bytes: int = 0


def free_bytes_of(directory: Path) -> int | None:
    """The free bytes of a directory's file system; None if it reports no sizes, as some network file systems do.
    Blocking. Raises OSError.
    """
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def beyond_disk(quota_bytes: int, min_free_bytes: int, directory: Path, held_bytes: int) -> str | None:
    """A warning if the disk will be full before the snapshots reach the quota, else None. ``held_bytes``: bytes of the
    present snapshots. Blocking. Raises OSError.
    """
    free_bytes = free_bytes_of(directory)
    if free_bytes is None:
        return None
    can_have = held_bytes + max(free_bytes - min_free_bytes, 0)
    if quota_bytes <= can_have:
        return None
    room = (
        f"store.quota is {readable_size(quota_bytes)}, but {directory} has room for {readable_size(can_have)} of"
        f" snapshots: {readable_size(held_bytes)} are there, {readable_size(free_bytes)} are free"
    )
    others = (
        f", and store.min_free leaves {readable_size(min_free_bytes)} to others" if min_free_bytes else ""
    )
    return (
        f"{room}{others}. The least valuable are evicted when the disk is full, before the quota is reached"
    )


class Deficit(NamedTuple):
    """How many bytes and files are missing, so that snapshots of that size and number must be evicted. A negative
    number is what is still free.
    """

    size_bytes: int
    n_files: int

    def is_met_by(self, freed_bytes: int, n_freed: int) -> bool:
        return freed_bytes >= self.size_bytes and n_freed >= self.n_files


class Quota:
    """The bytes and files of a directory, in accounts. All are in bytes.

    ``committed``: of snapshots. ``granted``: of reservations; ``landed``: the part of ``granted`` that is on disk.
    ``leaving``: of files being unlinked. ``left``: of *leftovers*, files of ours that belong to no snapshot but cannot
    be removed. The disk never holds more of llamaslot's than ``committed + granted + leaving + left``. ``waiting``: of
    reservations that wait for space, so nothing of them is on disk. In a shared store the limits hold for all its parts
    together.
    """

    def __init__(
        self,
        directory: Path,
        limits: Limits,
        files: FileReferences,
        n_held: Callable[[], int],
        tasks: TaskOwner,
    ) -> None:
        """``files``: the files of the snapshots. ``n_held()``: the number of snapshots and reservations."""
        self.directory, self.limits = directory, limits
        self._files, self._n_held, self._tasks = files, n_held, tasks
        self._neighbours = Neighbours.of(directory)
        self.granted = self.landed = self.leaving = self.left = self.waiting = 0
        self._telling = asyncio.Lock()
        self._tell_task: asyncio.Task[None] | None = None
        if self._neighbours is not None:
            self._neighbours.reserve(0)  # what an earlier run had reserved does not count
        self.removing: dict[str, tuple[int, asyncio.Task[None]]] = {}
        self.leftovers: dict[str, int] = {}
        self.writing: set[str] = set()  # ids of extents being written, which no sidecar names yet
        self.n_commits = 0  # commits, and files of reservations that were written, since the start
        self._n_waiting = 0
        self._failures = Recurring(log, "snapshots: files can be removed again")
        self._free: int | None = None  # free bytes of the file system at the last query

    @property
    def is_shared(self) -> bool:
        """True if this is a part of a shared store: other llamaslots may evict snapshots of this directory."""
        return self._neighbours is not None

    @property
    def committed(self) -> int:
        return self._files.size_bytes

    @property
    def others(self) -> int:
        """The bytes that other llamaslot processes use in a shared store, as last counted; 0 if none is shared."""
        return self._neighbours.others if self._neighbours is not None else 0

    @property
    def size_bytes(self) -> int:
        """The number of bytes on disk or reserved."""
        return self.committed + self.granted + self.leaving + self.left

    @property
    def n_files(self) -> int:
        """The number that ``max_files`` limits: snapshots, reservations, removals and leftovers."""
        return self._n_held() + len(self.removing) + len(self.leftovers)

    def short(self, size_bytes: int = 0, n_files: int = 0) -> Deficit:
        """The bytes and files that are missing for all waiting reservations, and for ``size_bytes`` and ``n_files``
        more.

        Files being removed count as gone, and waiting reservations as taken. So each reservation evicts only what will
        still be missing after the running removals, and no two evict for the same bytes.
        """
        short = self.short_of_quota(size_bytes, n_files)
        free = self._short_of_free(self.waiting + size_bytes, self.leaving)
        return Deficit(max(short.size_bytes, free), short.n_files)

    def short_of_quota(self, size_bytes: int = 0, n_files: int = 0) -> Deficit:
        """As ``short``, but by quota and number of files only; the free space of the disk does not count."""
        wanted = self.waiting + size_bytes
        short = self.committed + self.granted + self.left + self.others + wanted - self.limits.quota_bytes
        n_short = self._n_held() + len(self.leftovers) + self._n_waiting + n_files - self.limits.max_files
        return Deficit(short, n_short)

    def _short_of_free(self, wanted: int, coming: int) -> int:
        """The bytes missing on the file system for ``wanted`` bytes, for those of reservations that are not written
        yet, and for ``min_free_bytes``. ``coming``: bytes that running removals will free.
        """
        if self._free is None:
            return -sys.maxsize
        return self.limits.min_free_bytes + self.granted - self.landed + wanted - self._free - coming

    def grant(self, size_bytes: int) -> None:
        """Add ``size_bytes`` to the bytes of a reservation; a negative number takes some away."""
        self.granted += size_bytes
        self._tell_soon()

    def _tell_soon(self) -> None:
        """Tell the other llamaslots of a shared store, in the background, how much is reserved."""
        if self._neighbours is not None:
            self._tell_task = self._tasks.spawn(self._tell(self._neighbours), "tell what is reserved")

    async def _tell(self, neighbours: Neighbours) -> None:
        """Write into the store how much is reserved here. In a thread, because the file system took up to 60 ms for
        these few bytes while a save was being synced.
        """
        async with self._telling:
            await in_thread(neighbours.reserve, self.granted + self.waiting)

    async def told(self) -> None:
        """Wait until the other llamaslots of a shared store can read how much is reserved. Canceling is safe."""
        if self._tell_task is not None:
            await asyncio.shield(self._tell_task)

    def end_grant(self, size_bytes: int, landed_bytes: int) -> None:
        """Record that a reservation of ``size_bytes`` has ended, of which ``landed_bytes`` are on disk."""
        self.landed -= landed_bytes
        self.grant(-size_bytes)

    def commit(self, size_bytes: int, landed_bytes: int) -> None:
        """As ``end_grant``, for a reservation whose files belong to a snapshot now."""
        self.n_commits += 1
        self.end_grant(size_bytes, landed_bytes)

    def land(self, size_bytes: int) -> None:
        """Record that ``size_bytes`` more of ``granted`` are on disk, so the file system counts them as used."""
        self.landed += size_bytes
        self.n_commits += 1
        if self._free is not None:  # it was queried before these bytes were written
            self._free -= size_bytes

    def turn(self) -> AbstractAsyncContextManager[None]:
        """Within the block no other llamaslot of a shared store removes files of this directory. Without a shared store
        it does nothing. Do not use it within ``make_available``, which has a turn of its own. Canceling is safe.
        """
        return self._neighbours.turn() if self._neighbours is not None else nullcontext()

    async def query_free_space(self) -> None:
        """Query the free space of the file system; unknown (None) if that fails."""
        n_before = -1
        while n_before != self.n_commits:
            # Query again after a commit meanwhile: the result may be from before the commit's file, whose bytes are no
            # longer part of a reservation either.
            n_before = self.n_commits
            try:
                self._free = await asyncio.to_thread(free_bytes_of, self.directory)
            except OSError:
                self._free = None  # if the disk is really unusable, the write itself fails and says so

    async def make_available(
        self, size_bytes: int, evict: Callable[[Deficit], bool], *, n_files: int = 1
    ) -> None:
        """Evict what is necessary, and wait until ``n_files`` more files of ``size_bytes`` together fit. The caller
        must book them without an await in between. With 0 bytes: until the limits hold again, after a file has grown
        that is on disk already.

        ``evict(short)`` must evict at least ``short`` at once, or nothing and return False. Raises QuotaExceeded.
        Canceling is safe: removals that have begun are completed.
        """
        n_files = min(size_bytes, n_files)
        self.waiting += size_bytes
        self._n_waiting += n_files
        try:
            if self._neighbours is None:
                await self._make_available(size_bytes, n_files, evict, None)
                return
            async with self._neighbours.turn():
                await self._make_available(size_bytes, n_files, evict, self._neighbours)
                await self._tell(self._neighbours)  # no other reservation can come in between
        except BaseException:
            self._tell_soon()
            raise
        finally:
            self.waiting -= size_bytes
            self._n_waiting -= n_files

    async def _make_available(
        self, size_bytes: int, n_files: int, evict: Callable[[Deficit], bool], neighbours: Neighbours | None
    ) -> None:
        has_retried = has_removed = False
        while True:
            if size_bytes or has_removed:  # after a removal the last figure is too small
                await self.query_free_space()
            if neighbours is not None:
                await neighbours.look()
                if theirs := neighbours.share_of_others(self.short().size_bytes):
                    await neighbours.remove(theirs)
                    continue
            # No await from here to the return.
            short = self.short()
            is_short = short.size_bytes > 0 or short.n_files > 0
            if is_short and self.leftovers and not has_retried:
                has_retried = True
                for id_ in list(self.leftovers):
                    self.remove(id_, self._unleave(id_))
                continue
            if is_short and not evict(short):
                # All snapshots of the own part may be in use: then only those of other parts are left to evict.
                if neighbours is not None:
                    theirs = neighbours.share_of_others(short.size_bytes, is_all_theirs=True)
                    if theirs:
                        await neighbours.remove(theirs)
                        continue
                is_too_large = size_bytes + self.left > self.limits.quota_bytes
                raise (QuotaExceeded if is_too_large else NoRoomYet)(self._why_full(size_bytes))
            if self._fits(size_bytes, n_files):
                return
            if self.removing:
                await self.next_removal()
                has_removed = True

    def _fits(self, size_bytes: int, n_files: int) -> bool:
        is_free = not size_bytes or self._short_of_free(size_bytes, 0) <= 0
        in_quota = self.size_bytes + self.others + size_bytes <= self.limits.quota_bytes
        return is_free and in_quota and self.n_files + n_files <= self.limits.max_files

    def _why_full(self, size_bytes: int) -> str:
        limits = self.limits
        if self._free is not None and self._short_of_free(self.waiting, self.leaving) > 0:
            text = (
                f"no room for {readable_size(size_bytes)}: {readable_size(self._free)} are free on the file system of "
                f"{self.directory}"
            )
            if limits.min_free_bytes:
                text += f", of which store.min_free leaves {readable_size(limits.min_free_bytes)} to others"
            return f"{text}. Make room there: until then contexts stay in their slots only"
        parts = f"{readable_size(self.committed)} in snapshots, {readable_size(self.granted)} being written"
        if self.others:
            parts += f", {readable_size(self.others)} of other models in the same store"
        if self.left:
            parts += f", {readable_size(self.left)} in files that cannot be removed"
        if self._n_held() + len(self.leftovers) + self._n_waiting > limits.max_files:
            return f"no room for another file: store.max_files is {limits.max_files} ({parts})"
        quota = f"the quota is {readable_size(limits.quota_bytes)} ({parts})"
        return f"no room for {readable_size(size_bytes)}: {quota}. Raise store.quota, or unpin something"

    def remove(self, id_: str, size_bytes: int, *, keeps_data: bool = False) -> asyncio.Task[None]:
        """Start to unlink the files of an id, ``size_bytes`` in all, which count until they are gone. ``keeps_data``:
        unlink only the sidecar.
        """
        self.leaving += size_bytes
        name = id_ + JSON if keeps_data else id_
        task = self._tasks.spawn(self._unlink(name, id_, size_bytes, keeps_data), f"remove {name}")
        self.removing[name] = size_bytes, task
        return task

    async def _unlink(self, name: str, id_: str, size_bytes: int, keeps_data: bool) -> None:
        n_left = size_bytes  # if the thread fails, all bytes are left
        try:
            n_left, error = await asyncio.to_thread(scan.remove, self.directory, id_, keeps_data=keeps_data)
            if error is not None:
                reason = error.strerror or error
                self._failures.failed(
                    reason,
                    "snapshots: files of snapshot %s cannot be removed, they still count for the quota: %s",
                    id_, reason,
                )  # fmt: skip
            elif not self.leftovers:
                self._failures.succeeded()
        finally:
            # On every path, in one step: those who wait for this removal look at the accounts next.
            del self.removing[name]
            self.leaving -= size_bytes
            if n_left:
                self.leave(id_, n_left)

    def is_known(self, id_: str) -> bool:
        """True if files of this id are being removed, could not be removed, or are being written."""
        return id_ in self.removing or id_ in self.leftovers or id_ in self.writing

    async def removed(self, id_: str) -> None:
        """Wait for a running removal of the id's files, whether it succeeds or not. Canceling is safe."""
        for name in (id_, id_ + JSON):
            if (removal := self.removing.get(name)) is not None:
                await asyncio.shield(removal[1])

    async def next_removal(self) -> None:
        """Wait until one of the running removals has ended; there must be one. Canceling is safe."""
        await asyncio.wait([task for _, task in self.removing.values()], return_when=asyncio.FIRST_COMPLETED)

    def leave(self, id_: str, size_bytes: int) -> None:
        """Count ``size_bytes`` of an id's files that could not be removed as leftovers."""
        self.leftovers[id_] = size_bytes
        self.left += size_bytes

    def _unleave(self, id_: str) -> int:
        size_bytes = self.leftovers.pop(id_)
        self.left -= size_bytes
        return size_bytes

    def check(self, granted: int) -> None:
        """Raise AssertionError with the name of the account that is not the sum of its parts."""
        assert self.granted == granted, "granted is not the reservations"
        assert 0 <= self.landed <= granted, "landed is part of granted"
        assert self.leaving == sum(size for size, _ in self.removing.values()), (
            "leaving is not what is removed"
        )
        assert self.left == sum(self.leftovers.values()), "left is not the leftovers"
        assert self.waiting >= 0, "waiting is negative"
