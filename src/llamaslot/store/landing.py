"""The directory where llama-server writes and reads slot files, if that is not the directory of the snapshots: best in
memory.

llama-server, and all its streams, stand still while it writes or reads a slot file, so it should have a fast place for
that; copying between there and the store is work of threads. A file is there from the booking of its space until it is
taken into the store or restored. Within ``quota_bytes`` it stays for the next restore, and the one used longest ago
goes first. What does not fit goes through a symbolic link to the store, as if there were no landing place; so does all
if both are on one file system.
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
from llamaslot.store.directory import LOCK_NAME, DirectoryLock, DirectoryUnusable
from llamaslot.store.extent import Source
from llamaslot.store.quota import QuotaExceeded
from llamaslot.store.sidecar import PART, PROBE
from llamaslot.tasks import TaskOwner, in_thread

log = logging.getLogger(__name__)

_LEFT_TO_OTHERS = 1 << 30  # bytes of memory
_TRY_LINKS_S = 60.0  # after llama-server could not use one
_CGROUPS, _OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class NoLanding(QuotaExceeded):
    """llama-server can neither write nor read a file now. The reason and the remedy were logged when that began."""


class _File(Struct):
    """A booked file. ``size_bytes``: what is still to be written."""

    size_bytes: int
    is_link: bool = False


class Kept(Struct):
    """A slot file with the first ``n_tokens`` of a snapshot, which stays for the next restore. ``n_users``: restores
    that use it now.
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
    do nothing. Removals run in ``tasks``. An event loop owns it.
    """

    def __init__(self, directory: Path, store: Path, tasks: TaskOwner, quota_bytes: int = 0) -> None:
        self.directory, self._store, self.quota_bytes = directory, store, quota_bytes
        self.is_separate = os.path.realpath(directory) != os.path.realpath(store)
        self._is_apart = self._is_in_memory = False  # on another file system
        self._tasks, self._lock = tasks, DirectoryLock(directory)
        self._files: dict[str, _File] = {}  # by id
        self._kept: dict[tuple[str, int], Kept] = {}  # by snapshot and number of tokens; last used last
        self._said = ""
        self._links_from = 0.0  # time of the event loop
        self._links_work = False  # llama-server has used one: what it refuses has another reason

    @property
    def kept_bytes(self) -> int:
        return sum(kept.size_bytes for kept in self._kept.values())

    def path(self, id_: str) -> Path:
        """The path of a booked file."""
        return self.directory / (id_ + PART)

    async def open(self) -> None:
        """Lock the directory and remove what was left there. Raises DirectoryUnusable. Canceling is safe: ``close``
        unlocks.
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
            ).suffixes:  # .kv and the like may be of a store that was here
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
        """Remove the files that have stayed, and unlock the directory. Idempotent. Blocking."""
        for kept in self._kept.values():
            _unlink_quietly(self.path(kept.id))
        self._kept.clear()
        self._lock.release()

    # -- files of a moment -----------------------------------------------------------------------------------------

    async def book(self, id_: str, size_bytes: int, target: str | None = None) -> bool:
        """Make room for a file with that id. True if the file will be in the landing place; False if there is a link
        to ``target`` in the store instead, by default to the id's part file.

        Raises NoLanding, and books nothing. Canceling is safe: nothing is booked.
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
        """The bytes that can be written to the landing place. Raises OSError."""
        self._check()
        found = os.statvfs(self.directory)
        if found.f_flag & os.ST_RDONLY or not os.access(self.directory, os.W_OK | os.X_OK):
            raise PermissionError(13, "it cannot be written to")
        free = found.f_bavail * found.f_frsize
        return min(free, available_memory() - _LEFT_TO_OTHERS) if self._is_in_memory else free

    def _unusable(self, error: OSError) -> NoLanding:
        what = f"{self.directory} cannot be used: {error.strerror or error}"
        self._say(
            what,
            "%s. Nothing is saved or restored until it can be used again; snapshots in %s stay. Make or mount it again,"
            " writable for llama-server and llamaslot, and restart llamaslot",
            what, self._store,
        )  # fmt: skip
        return NoLanding(what)

    def _say(self, what: str, text: str, *values: object) -> None:
        if what != self._said:
            self._said = what
            log.warning("landing place: " + text, *values)

    def written(self, id_: str) -> None:
        """A booked file is written whole, so its bytes need not be kept free any more."""
        if (file := self._files.get(id_)) is not None:
            file.size_bytes = 0

    def was_refused(self, id_: str) -> bool:
        """Record that llama-server could not write or read a file. True if that is because of a link."""
        is_link = (file := self._files.get(id_)) is not None and file.is_link
        if is_link and not self._links_work:
            self._links_from = asyncio.get_running_loop().time() + _TRY_LINKS_S
            self._say(
                "links",
                "llama-server cannot use files of %s through a link in %s: what does not fit there is not saved or"
                " restored. Give that more room, or let llama-server reach the store under the same path (in a"
                " container: mount it there too)",
                self._store, self.directory,
            )  # fmt: skip
            return True
        return False

    async def drop(self, id_: str) -> None:
        """Remove a booked file. Idempotent. Canceling is safe: the file is removed all the same."""
        if self._files.pop(id_, None) is not None:
            await asyncio.shield(self._unlinked(id_))

    async def settle(self, id_: str, snapshot: str, n_tokens: int, size_bytes: int) -> None:
        """A booked file has the first ``n_tokens`` of ``snapshot``: keep it for the next restore if there is room,
        else remove it. Canceling is safe.
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
        """Remove files that llama-server has written after they were dropped."""
        try:
            found = await asyncio.to_thread(scan.list_own, self.directory)
        except OSError:
            return  # ``book`` says so
        known = self._files.keys() | {kept.id for kept in self._kept.values()}
        for id_ in found.ids_with(PART) - known:
            await self._unlinked(id_)

    # -- files that stay -------------------------------------------------------------------------------------------

    def take(self, snapshot: str, n_tokens: int, *, or_more: int) -> Kept | None:
        """A kept file with the first ``n_tokens`` of a snapshot, or with more but at most ``or_more``; None if there
        is none. It stays until ``give_back``.
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
        """Remove the kept files of a snapshot that is gone."""
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
    """Copy a file. Blocking; raises SnapshotInvalid and OSError, and leaves nothing in ``target`` then. The copy is
    not synced.
    """
    with Source(source) as opened, Copier(target) as copier:
        copier.copy(opened.fd, 0, opened.size_bytes)


def _unlink_quietly(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _are_apart(one: Path, other: Path) -> bool:
    return os.stat(one).st_dev != os.stat(other).st_dev


def is_in_memory(directory: Path) -> bool:
    """Whether a directory is on a tmpfs. Blocking; raises OSError."""
    device = os.stat(directory).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            before, _, after = line.partition(" - ")
            if before.split()[2] == number:
                return after.split()[0] == "tmpfs"
    return False


def available_memory() -> int:
    """Bytes that programs can have without swapping, in the control groups of this process too: what is in a tmpfs
    counts there, and at the limit llama-server is killed. Very many if that is not known. Blocking.
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
    """How many bytes a control group (v2) can take until its limit; the page cache counts as free. Raises ValueError,
    KeyError.
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
