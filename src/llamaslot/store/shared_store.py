"""A directory that several llamaslots share, one for each model: a part for each, and one quota for all.

``<root>/<part>/`` has slot files, ``<root>/.meta/<part>/`` llamaslot's own files. A part is claimed by an flock on a
file in the latter, which the kernel releases when the process ends.

Each process sees the files of the others, and how much they have reserved: a number in ``<root>/.meta/<part>/``.
Space is reserved and evicted by one process at a time, under an flock of the root, which the kernel releases if that
process dies; what a dead one had reserved does not count. What was used least recently goes first, wherever it lies:
of its own part a process then evicts what is worth least, of another part just that. A part that is in use keeps what
it has used in the last minute, which may be in one of its plans. A save that goes on from a snapshot makes sure in a
turn of its own, after its sidecar is written, that the files of that are there: who evicts later reads in the sidecar
that they are needed.
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
from llamaslot.store.directory import DirectoryUnusable
from llamaslot.store.sidecar import EXT, JSON, KV, PART, Part, Snapshot
from llamaslot.store.snapshot_table import Departure, SharedFiles
from llamaslot.tasks import in_thread

META = ".meta"
CLAIM = "in-use"
QUOTA_LOCK = "quota.lock"  # in META: held while parts are claimed or space is reserved
RESERVED = "reserved"
IN_PLANS_S = 60.0
_POLL_S = 0.01  # the lock is held for a scan and some removals


class StoreUnusable(LlamaslotError):
    """The shared directory cannot be made or written to."""


class StorePart(Struct):
    """A model's part of a shared store, claimed by this process until ``release``. ``taken``: ids of other processes
    that hold the model's earlier parts.
    """

    name: str
    directory: Path
    meta_dir: Path
    taken: tuple[str, ...]
    _claim: int

    def release(self) -> None:
        os.close(self._claim)


def name_of(model: str) -> str:
    """The name of a model's part of the store: legible, and different for each ``model`` (a path, or where the model
    is loaded from).
    """
    legible = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name.removesuffix(".gguf")).strip("-.") or "model"
    return f"{legible[:48]}-{hashlib.sha256(model.encode(errors='surrogateescape')).hexdigest()[:8]}"


def claim(root: Path, model: str) -> StorePart:
    """Claim the first free part of a model. A second llamaslot with the same model gets a part of its own: two in one
    directory would remove each other's files. Blocking. Raises StoreUnusable.
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
    """The open file of a claim; None if another process has that claim. Only while the quota is locked: a llamaslot
    that starts must not meet a claim that was only tried. Blocking; raises OSError.
    """
    return try_lock(meta_dir / CLAIM)


def try_lock(path: Path) -> int | None:
    """The open file, locked until it is closed; None if another process has it locked. Blocking; raises OSError."""
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
    """A snapshot of any part, in a list by time of last use. ``size_bytes``: what is freed by dropping it, after all
    that were used longer ago.
    """

    last_used: float
    size_bytes: int
    directory: Path
    id: str


class Neighbours:
    """The other parts of a shared store. ``directory``: the own part. ``others``: bytes of all other parts, as of the
    last ``look``.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._meta = directory, directory.parent / META
        self.others = 0
        self._seen: list[_Seen] = []
        # Of the snapshots that the last look found, and the look before; a sidecar never changes in this.
        self._parts, self._parts_before = dict[str, tuple[Part, ...]](), dict[str, tuple[Part, ...]]()
        self._kept: set[str] = set()  # not removed in this turn: pinned, or used meanwhile

    @classmethod
    def of(cls, directory: Path) -> Neighbours | None:
        """The other parts of the store that ``directory`` belongs to; None if it is no part of a shared store."""
        is_part = (directory.parent / META / QUOTA_LOCK).exists()
        return cls(directory) if is_part and (directory.parent / META / directory.name).is_dir() else None

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Within the block no other process reserves space or claims a part. Canceling is safe."""
        while (lock := try_lock(self._meta / QUOTA_LOCK)) is None:  # noqa: ASYNC110 - of another process
            await asyncio.sleep(_POLL_S)
        try:
            self._kept.clear()
            yield
        finally:
            os.close(lock)

    def reserve(self, size_bytes: int) -> None:
        """Tell the other processes how much this part has reserved in all. Blocking, for microseconds."""
        with contextlib.suppress(OSError):  # then the quota is exceeded by it, until it is on disk
            (self._meta / self._directory.name / RESERVED).write_text(f"{size_bytes}\n")

    async def look(self) -> None:
        """Look at the files of all parts; only within ``turn``. A part that cannot be read does not count. Canceling
        is safe.
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
            return True  # of another user, perhaps
        if lock is not None:
            os.close(lock)
        return lock is None

    def share_of_others(self, short_bytes: int, *, is_all_theirs: bool = False) -> list[_Seen]:
        """The snapshots to remove in other parts so that ``short_bytes`` become free, together with what the own part
        evicts then. ``is_all_theirs``: the own part can evict nothing.
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
        """Remove snapshots of other parts. Snapshots that must stay are not offered again in this turn. Canceling is
        safe.
        """
        self._kept |= await in_thread(_remove, snapshots)

    def _files(self, directory: Path, *, with_parts: bool) -> tuple[int, list[_Seen]]:
        """The bytes of slot files in a part, and its snapshots. Files being written are counted by their reservation,
        unless ``with_parts``.
        """
        sizes, used, n_parts = dict[str, int](), dict[str, float](), 0
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                if (own := sidecar.own_name(entry.name)) is None:
                    continue
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if own[1] in (KV, EXT):
                        sizes[entry.name] = status.st_size
                    elif own[1] == JSON:
                        used[own[0]] = status.st_mtime
                    elif own[1] == PART and with_parts:
                        n_parts += status.st_size
        files = SharedFiles()
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
        """A snapshot of another part, with only the fields that tell which files it needs."""
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
    """Remove snapshots of other parts, and those of their files that no other snapshot of the part needs. Returns the
    ids of those that stay. Each part is read once: 0.7 s of CPU with 2,000 snapshots.
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
        if stock.unreadable or _must_stay(one):  # what a sidecar needs that cannot be read is not known
            kept.add(one.id)
            continue
        _, error = inventory.remove(one.directory, stock, replace(item, bad_files=()))
        if error is not None:
            kept.add(one.id)
    return kept


def _must_stay(one: _Seen) -> bool:
    """Whether a snapshot of another part is pinned, or was used since it was seen."""
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
