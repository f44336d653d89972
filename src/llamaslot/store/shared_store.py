"""A directory that several llamaslot processes share, one for each model: each has a *part*, and one quota holds for
all. **A process evicts snapshots from the parts of other processes too** (``Neighbours.remove``), and others evict its
own: ``upkeep.Sweep`` finds those missing and drops them from the table.

``<root>/<part>/`` has slot files, ``<root>/.meta/<part>/`` llamaslot's own files. A process claims a part by an flock
on a file in the latter directory. The kernel releases that lock when the process ends.

How a process makes room, called by ``Quota.make_available``:

1. One process at a time reserves and evicts, under an flock of the root (``turn``). The kernel releases it too.
2. It lists the files of all parts (``look``), and reads how much the other processes have reserved: a number in
   ``<root>/.meta/<part>/``. What a dead process had reserved does not count.
3. It takes the least recently used snapshots of all parts, as many as would free enough (``share_of_others``). Those of
   other parts it removes itself. For those of its own part it evicts as many bytes, chosen by value
   (``SnapshotTable.victims``): it does not know the values in other parts.
4. It removes no pinned snapshot of another part. If a process has claimed that part, it removes none that was used in
   the last minute either: a plan of that process may need it.

A new snapshot may need files of an older one. After writing its sidecar, which names those files, its process checks
within a turn that they still exist (``deduplicate.let_go``). A process that evicts later reads in the sidecar that they
are needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from llamaslot.errors import LlamaslotError, SnapshotInvalid
from llamaslot.store import inventory, sidecar
from llamaslot.store.directory_lock import DirectoryUnusable
from llamaslot.store.file_references import Departure, FileReferences
from llamaslot.store.snapshot import EXT, JSON, KV, PART, Part, Snapshot, own_name
from llamaslot.tasks import in_thread

META = ".meta"
CLAIM = "in-use"
QUOTA_LOCK = "quota.lock"  # in META: locked while a process claims a part, or reserves space
RESERVED = "reserved"
IN_PLANS_S = 60.0
_POLL_S = 0.01  # between two attempts to take the lock, which a process holds for a scan and some removals


class StoreUnusable(LlamaslotError):
    """The shared directory cannot be made or written to."""


class StorePart(Struct):
    """A model's part of a shared store, claimed by this process until ``release``. ``taken``: the process ids of other
    llamaslots with the same model, which have claimed the parts before this one.
    """

    name: str
    directory: Path
    meta_dir: Path
    taken: tuple[str, ...]
    _claim: int

    def release(self) -> None:
        os.close(self._claim)


def name_of(model: str) -> str:
    """The name of a model's part of the store: readable, and different for each ``model``, which is the path of the
    model file or the place it is loaded from.
    """
    legible = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name.removesuffix(".gguf")).strip("-.") or "model"
    return f"{legible[:48]}-{hashlib.sha256(model.encode(errors='surrogateescape')).hexdigest()[:8]}"


def claim(root: Path, model: str) -> StorePart:
    """Claim the first part of a model that no process has claimed; make its directories. A second llamaslot with the
    same model gets another part: two in one directory would remove each other's files. Blocking: waits while another
    process reserves space. Raises StoreUnusable.
    """
    try:
        (root / META).mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(root / META / QUOTA_LOCK):
            return _first_free(root, name_of(model))
    except OSError as error:
        raise StoreUnusable(
            f"the store {root} cannot be used: {error.strerror} ({error.filename})"
        ) from error


def _first_free(root: Path, first: str) -> StorePart:
    taken: list[str] = []
    for name in _names(first):
        directory, meta_dir = root / name, root / META / name
        for path in (directory, meta_dir):
            path.mkdir(mode=0o700, exist_ok=True)
            if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
                raise StoreUnusable(f"the store {path} cannot be written to by this user")
        if (lock := _try_claim(meta_dir)) is not None:
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
            return StorePart(name, directory, meta_dir, tuple(taken), lock)
        taken.append((meta_dir / CLAIM).read_text(encoding="ascii", errors="replace").strip() or "unknown")
    raise AssertionError("there is no end of names")


def _try_claim(meta_dir: Path) -> int | None:
    """The locked file of a part's claim, open; None if another process has claimed the part. Call it only while
    QUOTA_LOCK is held: else a starting llamaslot could take this short try for a claim. Blocking; raises OSError.
    """
    return try_lock(meta_dir / CLAIM)


def try_lock(path: Path) -> int | None:
    """Lock the file ``path`` (flock) and return its descriptor; closing it unlocks the file. None if another process
    has locked it. Blocking; raises OSError.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except BaseException:
        os.close(lock)
        raise
    return lock


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _names(first: str) -> Iterator[str]:
    yield first
    for n in count(2):
        yield f"{first}.{n}"


# -- one quota for all parts -------------------------------------------------------------------------------------


class _Seen(Struct, frozen=True, order=True):
    """A snapshot of any part; they sort by time of last use. ``size_bytes``: the bytes that removing it frees, once all
    snapshots of the part that were used longer ago are gone.
    """

    last_used: float
    size_bytes: int
    directory: Path
    id: str


class Neighbours:
    """The other parts of a shared store, as seen from the own part ``directory``; evicts from them. ``others``: bytes
    of all other parts, reserved ones included, at the last ``look``.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._meta = directory, directory.parent / META
        self.others = 0
        self._seen: list[_Seen] = []
        # The files that a snapshot's sidecar names, by id, from the last look and the one before: no sidecar is read
        # twice, as these never change.
        self._parts, self._parts_before = dict[str, tuple[Part, ...]](), dict[str, tuple[Part, ...]]()
        self._kept: set[str] = set()  # not removed in this turn: pinned, used meanwhile, or unreadable

    @classmethod
    def of(cls, directory: Path) -> Neighbours | None:
        """The other parts of the store that ``directory`` belongs to; None if it is no part of a shared store."""
        is_part = (directory.parent / META / QUOTA_LOCK).exists()
        return cls(directory) if is_part and (directory.parent / META / directory.name).is_dir() else None

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for the lock of the store. Within the block no other process reserves space, evicts snapshots or claims
        a part. Canceling is safe.
        """
        while (lock := try_lock(self._meta / QUOTA_LOCK)) is None:  # noqa: ASYNC110 - of another process
            await asyncio.sleep(_POLL_S)
        try:
            self._kept.clear()
            yield
        finally:
            os.close(lock)

    def reserve(self, size_bytes: int) -> None:
        """Tell the other processes that this part has ``size_bytes`` reserved in all. Blocking."""
        with contextlib.suppress(OSError):  # then the others may exceed the quota until the files are on disk
            path = self._meta / self._directory.name / RESERVED
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(fd, f"{size_bytes:20}\n".encode(), 0)  # never empty for one that reads it meanwhile
            finally:
                os.close(fd)

    async def look(self) -> None:
        """List the files of all parts: the directories of all llamaslots that share this store, including its own. Then
        ``others`` tells the bytes that the other parts take, and ``share_of_others`` which of their snapshots to remove
        to make room. A part that cannot be read does not count. Call this only within ``turn``. Canceling is safe.
        """
        self.others, self._seen = await in_thread(self._look)

    def _look(self) -> tuple[int, list[_Seen]]:
        others, seen = 0, list[_Seen]()
        self._parts, self._parts_before = {}, self._parts
        for entry in os.scandir(self._meta):
            directory = self._directory.parent / entry.name
            if not entry.is_dir() or not directory.is_dir():
                continue
            is_own = directory == self._directory
            is_used = is_own or self._is_used(Path(entry.path))
            size_bytes, snapshots = self._files(directory, with_parts=not is_used)
            newest = time.time() - IN_PLANS_S if is_used and not is_own else float("inf")
            seen += (one for one in snapshots if one.last_used <= newest and one.id not in self._kept)
            if not is_own:
                others += size_bytes + (_reserved(Path(entry.path)) if is_used else 0)
        return others, sorted(seen)

    def _is_used(self, meta_dir: Path) -> bool:
        try:
            lock = _try_claim(meta_dir)
        except OSError:
            return True  # perhaps of another user: leave it alone
        if lock is not None:
            os.close(lock)
        return lock is None

    def share_of_others(self, short_bytes: int, *, is_all_theirs: bool = False) -> list[_Seen]:
        """The snapshots to remove from other parts so that ``short_bytes`` become free: of the least recently used of
        all parts, those that are not in the own part, which evicts the other bytes itself. ``is_all_theirs``: the own
        part can evict nothing, so all must come from other parts. Empty if all of these together are not enough.
        """
        theirs, left = list[_Seen](), short_bytes
        for one in self._seen:
            if left <= 0:
                break
            if one.directory != self._directory:
                theirs.append(one)
            elif is_all_theirs:
                continue
            left -= one.size_bytes
        return theirs if left <= 0 else []

    async def remove(self, snapshots: list[_Seen]) -> None:
        """Remove snapshots from other parts. Those that must stay (``_must_stay``) are left out by ``look`` for the
        rest of this turn. Canceling is safe.
        """
        self._kept |= await in_thread(_remove, snapshots)

    def _files(self, directory: Path, *, with_parts: bool) -> tuple[int, list[_Seen]]:
        """The bytes of slot files in a part, and its snapshots. ``with_parts``: also count part files, which saves have
        not finished. If a process uses the part, they are not counted here, because its reservations count.
        """
        sizes, used, n_parts = dict[str, int](), dict[str, float](), 0
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                if (own := own_name(entry.name)) is None:
                    continue
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if own[1] in (KV, EXT):
                        sizes[entry.name] = status.st_size
                    elif own[1] == JSON:
                        used[own[0]] = status.st_mtime
                    elif own[1] == PART and with_parts:
                        n_parts += status.st_size
        files = FileReferences()
        whole = sorted((last_used, id_) for id_, last_used in used.items() if id_ + KV in sizes)
        has_parts = any(name.endswith(EXT) for name in sizes)
        snapshots = [self._snapshot(directory, id_, sizes[id_ + KV], has_parts) for _, id_ in whole]
        for snapshot in snapshots:
            files.add(snapshot)
        departure = Departure(files)
        seen = [
            _Seen(last_used, departure.add(snapshot), directory, id_)
            for (last_used, id_), snapshot in zip(whole, snapshots, strict=True)
        ]
        return sum(sizes.values()) + n_parts, seen

    def _snapshot(self, directory: Path, id_: str, size_bytes: int, has_parts: bool) -> Snapshot:
        """A snapshot of any part, with only the fields that tell which files it needs."""
        parts: tuple[Part, ...] = ()
        if has_parts:
            if (known := self._parts_before.get(id_)) is not None:
                self._parts[id_] = known
            else:
                path = directory / (id_ + JSON)
                with contextlib.suppress(OSError, SnapshotInvalid):
                    self._parts[id_] = sidecar.parse(path.name, path.read_bytes()).parts
            parts = self._parts.get(id_, ())
        return Snapshot(id_, 0, "", size_bytes, "", 0.0, (), "", parts=parts)


def _remove(snapshots: list[_Seen]) -> set[str]:
    """Remove snapshots from other parts, and those of their files that no other snapshot of the part needs. Returns the
    ids of the snapshots that were not removed. Blocking: reads each part once, 0.7 s of CPU with 2,000 snapshots.
    """
    stocks, kept = dict[Path, inventory.Stock](), set[str]()
    for one in snapshots:
        try:
            if one.directory not in stocks:
                stocks[one.directory] = inventory.take_stock(one.directory)
        except DirectoryUnusable:
            kept.add(one.id)
            continue
        stock = stocks[one.directory]
        if (item := stock.items.get(one.id)) is None:
            continue
        if stock.unreadable or _must_stay(one):  # an unreadable sidecar may need any file
            kept.add(one.id)
            continue
        _, error = inventory.remove(one.directory, stock, replace(item, bad_files=()))
        if error is not None:
            kept.add(one.id)
    return kept


def _must_stay(one: _Seen) -> bool:
    """True if the sidecar of a snapshot of another part marks it as pinned, or if it was used since ``look``."""
    path = one.directory / (one.id + JSON)
    try:
        return path.stat().st_mtime != one.last_used or sidecar.parse(path.name, path.read_bytes()).is_pinned
    except (OSError, SnapshotInvalid):
        return False


def _reserved(meta_dir: Path) -> int:
    try:
        return int((meta_dir / RESERVED).read_text())
    except (OSError, ValueError):
        return 0
