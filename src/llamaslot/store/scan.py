"""Scans the snapshot directory when the store is opened, and removes what is no snapshot.

A file is llamaslot's if it is a regular file named ``ls-<16 hex>`` with one of our suffixes. No other file is touched.
Of ours, a .kv file with a matching sidecar is a snapshot, and needs the files that the sidecar names. All other files
of ours were left by a crash. They are removed; those that cannot be removed count as leftovers, so that the quota is
right. If parts of a snapshot are missing or have another size, the longest beginning that does not need them is kept.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from itertools import islice, takewhile
from pathlib import Path
from typing import NamedTuple

from msgspec import Struct, field
from msgspec.structs import replace

from llamaslot.cache.content import SnapshotKind
from llamaslot.cache.ids import NEGLIGIBLE_TOKENS, head
from llamaslot.errors import SnapshotInvalid
from llamaslot.file_id import FileId
from llamaslot.store import sidecar
from llamaslot.store.directory_lock import LOCK_NAME
from llamaslot.store.learned import HITS_NAME
from llamaslot.store.manifest import Known, Mark
from llamaslot.store.sidecar import Sidecar
from llamaslot.store.slot_file import SlotFile, read_slot_file_now, slot_file_head
from llamaslot.store.snapshot import (
    EXT,
    JSON,
    KV,
    NEW,
    PART,
    PROBE,
    Part,
    Snapshot,
    WithTokens,
    digest_of,
    new_id,
    own_name,
)

_AT_ONCE = 64  # snapshots read by one call of a thread, which costs as much as reading one of them
_SOME = 32 * _AT_ONCE

_DATA = (PART, KV, EXT)  # these count for the quota
SUFFIXES = (*_DATA, PROBE, NEW, JSON)  # the order of removal: the largest first, the sidecar last


class Listing(Struct, frozen=True):
    """llamaslot's files in a directory, as suffixes by id; the number of other entries; and whether llamaslot's lock
    file is there.
    """

    suffixes: dict[str, set[str]]
    n_foreign: int
    has_lock: bool

    def ids_with(self, suffix: str) -> set[str]:
        """The ids that have a file with this suffix."""
        return {id_ for id_, suffixes in self.suffixes.items() if suffix in suffixes}


class Found(Struct):
    """The result of a scan. By snapshot id: ``last_used`` in seconds since the epoch, ``leftovers`` in bytes, and
    ``file_ids``, the FileId of each .kv file when it was read. ``faults``: a line about each broken snapshot.
    ``durable``: ids of the snapshots whose data is known to be synced.
    """

    snapshots: list[Snapshot] = field(default_factory=list)
    last_used: dict[str, float] = field(default_factory=dict)
    leftovers: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    file_ids: dict[str, Mark] = field(default_factory=dict)
    durable: set[str] = field(default_factory=set)
    n_read: int = 0  # snapshots whose files were read, because the manifest did not have them
    n_unfinished: int = 0
    n_foreign: int = 0

    def take(self, known: Known, ids: set[str]) -> None:
        """Add the snapshots with these ``ids`` from ``known``, and remove the others from ``known``."""
        for id_ in known.snapshots.keys() - ids:
            del known.snapshots[id_], known.last_used[id_], known.kv[id_]
        self.snapshots += known.snapshots.values()
        self.last_used |= known.last_used
        self.file_ids |= known.kv
        self.durable |= ids

    def add(self, read: Loaded) -> None:
        id_ = read.snapshot.id
        self.snapshots.append(read.snapshot)
        self.last_used[id_], self.file_ids[id_] = read.last_used, read.file_id
        if read.is_durable:
            self.durable.add(id_)


def unfinished(suffixes: Mapping[str, set[str]]) -> set[str]:
    """The ids that have neither both .kv and .json nor a probe. ``suffixes``: of the files of each id."""
    return {id_ for id_, its in suffixes.items() if not {KV, JSON} <= its and PROBE not in its}


def list_own(directory: Path) -> Listing:
    """List llamaslot's files in a directory, by name and type, without a stat of each. Blocking; raises OSError if the
    directory cannot be read.
    """
    with os.scandir(directory) as entries:
        return _listing(entries)


def _listing(entries: Iterable[os.DirEntry[str]]) -> Listing:
    suffixes: dict[str, set[str]] = {}
    n_foreign, has_lock = 0, False
    for entry in entries:
        if entry.name == LOCK_NAME:
            has_lock = True
        elif entry.name in (HITS_NAME, HITS_NAME + ".new"):
            continue
        elif (own := own_name(entry.name)) is not None and entry.is_file(follow_symlinks=False):
            suffixes.setdefault(own[0], set()).add(own[1])
        else:
            # A directory or symbolic link with such a name is not ours.
            n_foreign += 1
    return Listing(suffixes, n_foreign, has_lock)


def size_bytes(directory: Path, id_: str) -> int:
    """The bytes of those files of an id that count for the quota (.part, .kv, .ext). Blocking."""
    return sum(_size(directory / (id_ + suffix)) for suffix in _DATA)


def missing(directory: Path, names: set[str]) -> set[str]:
    """Those of the given files that do not exist. Blocking."""
    return {name for name in names if not os.path.lexists(directory / name)}


def remove(directory: Path, id_: str, *, keeps_data: bool = False) -> tuple[int, OSError | None]:
    """Unlink all files of the id; with ``keeps_data`` only the sidecar, because other snapshots need the data.
    Blocking. Never raises: returns the bytes that are still there, and the first error or None.

    Data is unlinked first: it is the largest, and the next scan removes a sidecar without a .kv file.
    """
    n_left, first = 0, None
    for suffix in (NEW, JSON) if keeps_data else SUFFIXES:
        path = directory / (id_ + suffix)
        try:
            os.unlink(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            first = first or error
            if suffix in _DATA:
                n_left += _size(path)
    return n_left, first


def _size(path: Path) -> int:
    try:
        return os.lstat(path).st_size
    except OSError:
        return 0


def agree(noted: Sidecar, file: SlotFile) -> None:
    """Raise SnapshotInvalid unless the slot file has the size and tokens of the sidecar ``noted``, and no media."""
    name = noted.id + KV
    if file.size_bytes != noted.size_bytes:
        raise SnapshotInvalid(f"{name}: has {file.size_bytes} bytes, {noted.size_bytes} were written")
    if file.has_media:
        raise SnapshotInvalid(f"{name}: holds media, which tokens alone do not identify")
    if file.n_tokens != noted.n_tokens:
        raise SnapshotInvalid(f"{name}: holds {file.n_tokens} tokens, {noted.n_tokens} were saved")
    if noted.digest and noted.digest != digest_of(file.tokens):
        raise SnapshotInvalid(f"{name}: holds other tokens than when it was saved")


def agree_each(directory: Path, snapshots: Iterable[Snapshot]) -> list[WithTokens | SnapshotInvalid]:
    """The result of ``agree_still`` for each snapshot, or its error. Blocking."""
    results = list[WithTokens | SnapshotInvalid]()
    for snapshot in snapshots:
        try:
            results.append(agree_still(directory, snapshot))
        except SnapshotInvalid as error:
            results.append(error)
    return results


def agree_still(directory: Path, snapshot: Snapshot) -> WithTokens:
    """The snapshot with the tokens from its file's header. Blocking. Raises SnapshotInvalid unless these are the
    recorded tokens, and all its files exist with the recorded sizes.
    """
    file = read_slot_file_now(directory / snapshot.file_name)
    if file.size_bytes != snapshot.size_bytes:
        raise SnapshotInvalid(
            f"{snapshot.id}: has {file.size_bytes} bytes, {snapshot.size_bytes} were written"
        )
    if digest_of(file.tokens) != snapshot.digest:
        raise SnapshotInvalid(f"{snapshot.id}: holds other tokens than when it was saved")
    if bad := bad_files(directory, snapshot):
        raise SnapshotInvalid(f"{snapshot.id}: {', '.join(sorted(bad))} is missing or has another size")
    return snapshot.with_tokens(file.tokens)


async def scan(directory: Path, known: Known, on_some: Callable[[Found], Awaitable[None]]) -> Found:
    """Find the snapshots in a directory, and remove those of llamaslot's files that no snapshot needs. Raises OSError
    if the directory cannot be read.

    ``known``: the manifest. The files of a snapshot that have not changed since then are not read. ``on_some`` is
    awaited with what was found so far after each 2,048 snapshots that were read. Canceling is safe: the next scan
    removes the remaining files.
    """
    listing, unchanged = await asyncio.to_thread(_look, directory, known)
    found = Found(n_foreign=listing.n_foreign)
    found.take(known, unchanged)
    unread = iter(sorted((listing.ids_with(KV) & listing.ids_with(JSON)) - unchanged))
    loaded = dict[str, Loaded | SnapshotInvalid]()
    useless, unreadable = list[str](), list[str]()
    for id_, suffixes in sorted(listing.suffixes.items()):
        if not {KV, JSON} <= suffixes:
            useless.append(id_)  # ``_clear`` keeps those of its files that a snapshot needs
            continue
        if suffixes != {KV, JSON}:
            # A snapshot with other files besides: only these are removed.
            found.n_unfinished += 1
            await asyncio.to_thread(
                _unlink_quietly, *(directory / (id_ + rest) for rest in suffixes - {KV, JSON})
            )
        if id_ in unchanged:
            continue
        if id_ not in loaded:
            if found.n_read and found.n_read % _SOME == 0:
                await on_some(found)
            loaded = await asyncio.to_thread(_load_some, directory, list(islice(unread, _AT_ONCE)))
            found.n_read += len(loaded)
        if isinstance(read := loaded.pop(id_), SnapshotInvalid):
            found.faults.append(str(read))
            cause = read.__cause__
            # A snapshot that only cannot be read now counts as a leftover: it is removed when its space is needed.
            is_unreadable = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
            (unreadable if is_unreadable else useless).append(id_)
            continue
        if read.fault:  # a shortened snapshot has taken its place, with another id
            found.faults.append(read.fault)
            useless.append(id_)
        found.add(read)
    await _clear(directory, listing, found, useless, unreadable)
    return found


async def _clear(
    directory: Path, listing: Listing, found: Found, useless: list[str], unreadable: list[str]
) -> None:
    """Remove the files of ``useless`` ids that no snapshot needs. Count as leftovers those that cannot be removed, and
    the files of ``unreadable`` ids.

    It is unknown which files the ``unreadable`` snapshots need. So while there are any, no .kv or .ext file without a
    sidecar is removed; these count as leftovers too.
    """
    if not useless and not unreadable:
        return
    needed = {name for snapshot in found.snapshots for name in snapshot.files}
    for id_ in useless:
        names = {id_ + suffix for suffix in listing.suffixes[id_]}
        if names & needed:
            if names - needed:
                await asyncio.to_thread(_unlink_quietly, *(directory / name for name in names - needed))
        elif unreadable and names & {id_ + KV, id_ + EXT} and id_ + JSON not in names:
            found.leftovers[id_] = await asyncio.to_thread(size_bytes, directory, id_)
        else:
            found.n_unfinished += not {id_ + KV, id_ + JSON} <= names
            await _discard(directory, id_, found)
    for id_ in unreadable:
        if id_ + KV not in needed:
            found.leftovers[id_] = await asyncio.to_thread(size_bytes, directory, id_)


def _look(directory: Path, known: Known) -> tuple[Listing, set[str]]:
    """List the directory. Returns a listing, and the ids of ``known`` snapshots whose files have not changed. The
    listing lacks the .kv file and the sidecar of these, unless they have more files. Blocking; raises OSError.
    """
    # With 10,000 snapshots each step in this loop runs 20,000 times: 75 ms, of which ``stat`` takes 50. With paths
    # instead of a descriptor it takes 6 ms more; with ids and suffixes instead of names the loop takes 25 ms more.
    marks = {id_ + KV: mark for id_, mark in known.kv.items()}
    marks |= {id_ + JSON: mark for id_, mark in known.json.items()}
    others, sizes = list[os.DirEntry[str]](), dict[str, int]()
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with os.scandir(opened) as entries:
            for entry in entries:
                name = entry.name
                if (was := marks.get(name)) is not None:
                    try:
                        now = entry.stat(follow_symlinks=False)
                    except OSError:
                        pass
                    else:  # not ``FileId.of``, which takes as long as the rest
                        if (now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns) == was:
                            sizes[name] = now.st_size
                            del marks[name]
                            continue
                elif name.endswith((KV, EXT)):
                    with suppress(OSError):
                        sizes[name] = entry.stat(follow_symlinks=False).st_size
                others.append(entry)
        listing = _listing(others)
    finally:
        os.close(opened)
    # From here on ``marks`` has the files that are gone or have changed.
    unchanged = {
        id_
        for id_ in known.snapshots.keys() - {name[: name.index(".")] for name in marks}
        if not (parts := known.snapshots[id_].parts) or not _bad_files(parts, sizes.get)
    }
    for id_ in known.snapshots.keys() - unchanged | unchanged & listing.suffixes.keys():
        for suffix in (KV, JSON):
            if id_ + suffix not in marks:
                listing.suffixes.setdefault(id_, set()).add(suffix)
    return listing, unchanged


def _bad_files(parts: Iterable[Part], size_of: Callable[[str], int | None]) -> set[str]:
    """The files of ``parts`` that are missing or have another size."""
    return {part.file for part in parts if size_of(part.file) != part.size_bytes}


def bad_files(directory: Path, of: Snapshot | Sidecar) -> set[str]:
    """The files of a snapshot's parts that are missing or have another size. Blocking."""
    return _bad_files(of.parts, lambda name: _size(directory / name))


class Loaded(NamedTuple):
    """A snapshot that was read from its files. ``file_id``: of its .kv file; ``is_durable``: its data is known to be
    synced. ``fault``: why it was shortened, so that it has a new id; else "".
    """

    snapshot: Snapshot
    last_used: float
    file_id: FileId
    is_durable: bool
    fault: str = ""


def _load_some(directory: Path, ids: Iterable[str]) -> dict[str, Loaded | SnapshotInvalid]:
    """The result of ``_load`` for each id, or its error. Blocking."""
    loaded = dict[str, Loaded | SnapshotInvalid]()
    for id_ in ids:
        try:
            loaded[id_] = _load(directory, id_)
        except SnapshotInvalid as error:
            loaded[id_] = error
    return loaded


def _load(directory: Path, id_: str) -> Loaded:
    """Read one snapshot, or shorten it if parts are bad (``_shortened``). Blocking; raises SnapshotInvalid."""
    path = directory / (id_ + JSON)
    try:
        data, dated = path.read_bytes(), path.stat().st_mtime
        file_id = FileId.of(os.lstat(directory / (id_ + KV)))
    except OSError as error:
        raise SnapshotInvalid(f"{path.name}: cannot be read: {error.strerror or error}") from error
    noted = sidecar.parse(path.name, data)
    if noted.boot not in (None, sidecar.boot_id()):
        raise SnapshotInvalid(f"{id_}{KV}: was not yet on the disk when the machine went down")
    file = read_slot_file_now(directory / (id_ + KV))
    agree(noted, file)
    if bad := bad_files(directory, noted):
        fault = f"{id_}: {', '.join(sorted(bad))} is missing or has another size"
        return _shortened(directory, noted, file.tokens, bad, dated, fault)
    return Loaded(noted.snapshot(digest_of(file.tokens)), dated, file_id, noted.boot is None)


def _shortened(
    directory: Path, noted: Sidecar, tokens: bytes, bad: set[str], last_used: float, fault: str
) -> Loaded:
    """Write a new snapshot of the longest beginning that does not need the ``bad`` files. Raises SnapshotInvalid with
    the text ``fault`` if there is no such beginning, or if it cannot be written.
    """
    rows = [part for part in noted.parts if not part.is_state]
    good = list(takewhile(lambda part: part.file not in bad, rows))
    n_rows = good[-1].end if good else 0 if rows else noted.n_tokens
    states = [part for part in noted.parts if part.is_state and part.file not in bad and part.end <= n_rows]
    has_states = any(part.is_state for part in noted.parts)
    n_tokens = max((part.end for part in states), default=0) if has_states else n_rows
    if n_tokens < NEGLIGIBLE_TOKENS:
        raise SnapshotInvalid(fault)
    kept = [part._replace(end=min(part.end, n_tokens)) for part in good if part.start < n_tokens]
    data = slot_file_head(head(tokens, n_tokens))
    noted = replace(
        noted,
        id=new_id(),
        n_tokens=n_tokens,
        size_bytes=len(data),
        parts=(*kept, *states),
        checkpoints=tuple(at for at in noted.checkpoints if at <= n_tokens),
        boot=sidecar.boot_id(),
        is_pinned=False,
        is_prewarmed=False,
        kind=SnapshotKind.LEAF,
        digest=digest_of(head(tokens, n_tokens)),
    )
    kv = directory / (noted.id + KV)
    try:
        sidecar.write_data(kv, data)
        sidecar.make_durable(directory, noted, last_used)
        file_id = FileId.of(os.lstat(kv))
    except OSError as error:
        raise SnapshotInvalid(
            f"{fault}, and no shorter one can be written: {error.strerror or error}"
        ) from error
    snapshot = noted.snapshot(noted.digest)
    return Loaded(
        snapshot,
        last_used,
        file_id,
        True,
        f"{fault}: its first {n_tokens} tokens are kept as snapshot {noted.id}",
    )


async def _discard(directory: Path, id_: str, found: Found) -> None:
    n_left, error = await asyncio.to_thread(remove, directory, id_)
    if error is not None:
        found.faults.append(f"{id_}: cannot be removed: {error.strerror or error}")
    if n_left:
        found.leftovers[id_] = n_left


def _unlink_quietly(*paths: Path) -> None:
    for path in paths:
        try:
            os.unlink(path)
        except OSError:
            continue
