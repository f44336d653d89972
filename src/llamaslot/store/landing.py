"""The landing place: the directory where llama-server writes and reads slot files, if it is not the directory of the
snapshots (the *store*). Best a tmpfs.

While llama-server writes or reads a slot file, all its streams stand still, so it should have a fast place for that.
Threads of llamaslot copy between that place and the store. A file lies there from the booking of its space until it is
taken into the store, or until its restore has ended. After that it is kept for the next restore, as long as all kept
files have at most ``quota_bytes``; the least recently used is removed first. For a file that does not fit, a symbolic
link to the store is made instead, so llama-server writes to the store itself. So it is with all files if both
directories are on one file system.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path

from msgspec import Struct

from llamaslot.sizes import readable_size
from llamaslot.store import scan
from llamaslot.store.copying import Copier
from llamaslot.store.directory_lock import LOCK_NAME, DirectoryLock, DirectoryUnusable
from llamaslot.store.extent import Source
from llamaslot.store.quota import QuotaExceeded
from llamaslot.store.snapshot import PART, PROBE
from llamaslot.tasks import TaskOwner, in_thread

log = logging.getLogger(__name__)

_LEFT_TO_OTHERS = 1 << 30  # bytes of memory that stay free for other programs
_TRY_LINKS_S = 60.0  # pause after llama-server could not use a link, before the next one is tried
_CGROUPS, _OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class NoLanding(QuotaExceeded):
    """The landing place has no room, and llama-server cannot use a link, so it can neither write nor read a file now.
    The reason and the remedy were logged when that began.
    """


class _File(Struct):
    """A booked file. ``size_bytes``: booked, and 0 once the file is written."""

    size_bytes: int
    is_link: bool = False


class Kept(Struct):
    """A slot file with the first ``n_tokens`` of a snapshot, kept for the next restore. ``n_users``: the number of
    restores that use it now.
    """

    id: str
    size_bytes: int
    n_tokens: int
    n_users: int = 0

    @property
    def name(self) -> str:
        return self.id + PART


class Landing:
    """The landing place. ``directory``: llama-server's; ``store``: the snapshots'. If both are the same, all methods
    do nothing. Removals run in ``tasks``. One event loop owns it.
    """

    def __init__(self, directory: Path, store: Path, tasks: TaskOwner, quota_bytes: int = 0) -> None:
        self.directory, self._store, self.quota_bytes = directory, store, quota_bytes
        self.is_separate = os.path.realpath(directory) != os.path.realpath(store)
        # ``_is_apart``: ``directory`` is on another file system than ``store``.
        self._is_apart = self._is_in_memory = False
        self._tasks, self._lock = tasks, DirectoryLock(directory)
        self._files: dict[str, _File] = {}  # by id
        self._kept: dict[tuple[str, int], Kept] = {}  # by snapshot and number of tokens; last used last
        self._said = ""
        self._links_from = 0.0  # no links are made before this time of the event loop
        self._links_work = False  # llama-server has used a link: a later failure has another reason

    @property
    def kept_bytes(self) -> int:
        return sum(kept.size_bytes for kept in self._kept.values())

    def path(self, id_: str) -> Path:
        """The path of a booked file."""
        return self.directory / (id_ + PART)

    async def open(self) -> None:
        """Lock the directory, and remove the files that an earlier run has left there. Raises DirectoryUnusable.
        Canceling is safe if ``close`` follows, which unlocks.
        """
        if self.is_separate:
            await in_thread(self._open)

    def _open(self) -> None:
        self._lock.acquire()
        try:
            self._is_apart = _are_apart(self.directory, self._store)
            self._is_in_memory = is_in_memory(self.directory)
            for id_ in scan.list_own(
                self.directory
            ).suffixes:  # not .kv, .ext and .json: this may have been a store before
                for suffix in (PART, PROBE):
                    with contextlib.suppress(OSError):
                        os.unlink(self.directory / (id_ + suffix))
            self._unlink_links()
        except OSError as error:
            raise DirectoryUnusable(
                f"{self.directory} cannot be used by llamaslot: {error.strerror or error}"
            ) from error

    def _unlink_links(self) -> None:
        """Remove links to the store that an earlier run has left: ``scan`` takes links for foreign files."""
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if entry.name.endswith(PART) and entry.is_symlink():
                    target = os.readlink(entry.path)
                    if os.path.dirname(target) == os.path.abspath(self._store):
                        with contextlib.suppress(OSError):
                            os.unlink(entry.path)

    def close(self) -> None:
        """Remove the kept files, and unlock the directory. Idempotent. Blocking."""
        for kept in self._kept.values():
            _unlink_quietly(self.path(kept.id))
        self._kept.clear()
        self._lock.release()

    # -- files of a moment -----------------------------------------------------------------------------------------

    async def book(self, id_: str, size_bytes: int, target: str | None = None) -> bool:
        """Book ``size_bytes`` for a file with that id, and remove kept files if necessary. True if the file will lie in
        the landing place. False if llama-server will use the store: through a link to the file ``target`` there (by
        default the id's part file), or directly if there is no landing place.

        Raises NoLanding if neither is possible. Canceling is safe: then nothing is booked.
        """
        if not self.is_separate:
            return False
        self._tasks.spawn(self._sweep(), "sweep the landing place")
        try:
            while self._is_apart:
                free = await asyncio.to_thread(self._free_bytes)
                # No await from here to the booking.
                if size_bytes <= free - sum(file.size_bytes for file in self._files.values()):
                    self._files[id_] = _File(size_bytes)
                    self._said = ""
                    return True
                if (least := self._least()) is None:
                    break
                await asyncio.shield(self._removal(least))
            if asyncio.get_running_loop().time() < self._links_from:
                raise NoLanding(
                    f"no room for {readable_size(size_bytes)} in {self.directory}, and llama-server cannot use"
                    f" {self._store} through a link"
                )
            self._files[id_] = _File(0, is_link=True)
            try:
                await in_thread(self._link, id_, target or id_ + PART)
            except BaseException:
                await self.drop(id_)
                raise
        except OSError as error:
            raise self._unusable(error) from error
        return False

    def _link(self, id_: str, target: str) -> None:
        self._check()
        os.symlink(os.path.join(os.path.abspath(self._store), target), self.path(id_))

    def _check(self) -> None:
        if not os.path.lexists(self.directory / LOCK_NAME):
            raise FileNotFoundError(2, "it is not the directory that it was: unmounted or removed?")

    def _free_bytes(self) -> int:
        """The bytes that can be written to the landing place: of its file system, and of memory if it is in memory.
        Blocking; raises OSError.
        """
        self._check()
        found = os.statvfs(self.directory)
        if found.f_flag & os.ST_RDONLY or not os.access(self.directory, os.W_OK | os.X_OK):
            raise PermissionError(13, "it cannot be written to")
        free = found.f_bavail * found.f_frsize
        return min(free, available_memory() - _LEFT_TO_OTHERS) if self._is_in_memory else free

    def _unusable(self, error: OSError) -> NoLanding:
        what = f"{self.directory} cannot be used: {error.strerror or error}"
        if self._is_news(what):
            log.warning(
                "landing place: %s. Nothing is saved or restored until it can be used again; snapshots in %s stay. Make"
                " or mount it again, writable for llama-server and llamaslot, and restart llamaslot",
                what, self._store,
            )  # fmt: skip
        return NoLanding(what)

    def _is_news(self, what: str) -> bool:
        """Return True if ``what`` was not the last fault that was logged, and note that it is logged now."""
        is_news, self._said = what != self._said, what
        return is_news

    def written(self, id_: str) -> None:
        """Record that a booked file is written, so the file system counts its bytes."""
        if (file := self._files.get(id_)) is not None:
            file.size_bytes = 0

    def was_refused(self, id_: str) -> bool:
        """Record that llama-server could not write or read a booked file. True if the cause is probably its link: it is
        one, and llama-server has used none so far. Then no link is made for ``_TRY_LINKS_S``.
        """
        is_link = (file := self._files.get(id_)) is not None and file.is_link
        if is_link and not self._links_work:
            self._links_from = asyncio.get_running_loop().time() + _TRY_LINKS_S
            if self._is_news("links"):
                log.warning(
                    "landing place: llama-server cannot use files of the store %s (store.directory) through a link in"
                    " its slot directory %s. So slot files that are too large for the slot directory are not saved or"
                    " restored. Give the slot directory more room, or let llama-server reach the store under the same"
                    " path (in a container: mount the store there too)",
                    self._store, self.directory,
                )  # fmt: skip
            return True
        return False

    async def drop(self, id_: str) -> None:
        """Remove a booked file. Idempotent. Canceling is safe: the file is removed all the same."""
        if self._files.pop(id_, None) is not None:
            await asyncio.shield(self._unlinked(id_))

    async def settle(self, id_: str, snapshot: str, n_tokens: int, size_bytes: int) -> None:
        """Keep a booked file, which has the first ``n_tokens`` of ``snapshot``, for the next restore; remove the least
        recently used ones if there are too many bytes. Removes the file itself if it is a link, is larger than
        ``quota_bytes``, or if such a file is kept already. Canceling is safe.
        """
        if (file := self._files.get(id_)) is None:
            return
        key, self._links_work = (snapshot, n_tokens), self._links_work or file.is_link
        if file.is_link or size_bytes > self.quota_bytes or key in self._kept:
            await self.drop(id_)
            return
        del self._files[id_]
        self._kept[key] = Kept(id_, size_bytes, n_tokens)
        removals = []
        while self.kept_bytes > self.quota_bytes and (least := self._least()) is not None:
            removals.append(self._removal(least))
        if removals:
            await asyncio.wait(removals)

    async def _sweep(self) -> None:
        """Remove part files that are neither booked nor kept: llama-server has finished them after their drop."""
        try:
            found = await asyncio.to_thread(scan.list_own, self.directory)
        except OSError:
            return  # ``book`` logs that
        known = self._files.keys() | {kept.id for kept in self._kept.values()}
        for id_ in found.ids_with(PART) - known:
            await self._unlinked(id_)

    # -- files that stay -------------------------------------------------------------------------------------------

    def take(self, snapshot: str, n_tokens: int, *, or_more: int) -> Kept | None:
        """A kept file with the first ``n_tokens`` of a snapshot, or with more, up to ``or_more``; None if there is
        none. It is not removed before ``give_back``.
        """
        for key, kept in self._kept.items():
            if key[0] == snapshot and n_tokens <= key[1] <= max(or_more, n_tokens):
                self._kept[key] = self._kept.pop(key)
                kept.n_users += 1
                return kept
        return None

    def give_back(self, kept: Kept) -> None:
        kept.n_users -= 1

    def forget(self, snapshot: str) -> None:
        """Start to remove the kept files of a snapshot that was dropped."""
        for key in [key for key in self._kept if key[0] == snapshot]:
            self._removal(key)

    def _least(self) -> tuple[str, int] | None:
        return next((key for key, kept in self._kept.items() if not kept.n_users), None)

    def _removal(self, key: tuple[str, int]) -> asyncio.Task[None]:
        return self._unlinked(self._kept.pop(key).id)

    def _unlinked(self, id_: str) -> asyncio.Task[None]:
        return self._tasks.spawn(
            asyncio.to_thread(_unlink_quietly, self.path(id_)), f"remove {id_} from the landing place"
        )


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, without syncing the copy. Blocking. Raises SnapshotInvalid if ``source`` cannot be read, OSError;
    then it leaves no ``target``.
    """
    with Source(source) as opened, Copier(target) as copier:
        copier.copy(opened.fd, 0, opened.size_bytes)


def _unlink_quietly(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _are_apart(one: Path, other: Path) -> bool:
    return os.stat(one).st_dev != os.stat(other).st_dev


def is_in_memory(directory: Path) -> bool:
    """True if a directory is on a tmpfs, which is in memory. Blocking; raises OSError."""
    device = os.stat(directory).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            before, _, after = line.partition(" - ")
            if before.split()[2] == number:
                return after.split()[0] == "tmpfs"
    return False


def available_memory() -> int:
    """The bytes of memory that can be allocated without swapping, on this machine and in the control groups of this
    process: files in a tmpfs count there, and at the limit the kernel may kill llama-server. A very large number if it
    is unknown. Blocking.
    """
    free = 1 << 62
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) << 10
    with contextlib.suppress(OSError, ValueError, KeyError):
        group = _CGROUPS / _OWN_GROUP.read_text().rpartition("0::/")[2].strip()
        for each in (group, *group.parents):
            if each.is_relative_to(_CGROUPS):
                free = min(free, _free_in(each))
    return free


def _free_in(group: Path) -> int:
    """The bytes that a control group (v2) can still allocate before it reaches its limit; the page cache counts as
    free. A very large number without a limit. Raises ValueError, KeyError.
    """
    free = 1 << 62
    with contextlib.suppress(OSError):  # the root has no limits
        limits = [(group / name).read_text().strip() for name in ("memory.max", "memory.high")]
        if limits := [limit for limit in limits if limit != "max"]:
            used = int((group / "memory.current").read_text())
            figures = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cache = int(figures["active_file"]) + int(figures["inactive_file"])
            free = min(map(int, limits)) - used + cache
    return free
