"""Lists and checks the content of a snapshot directory: for ``llamaslot snapshots``, and for ``shared_store``, which
removes snapshots of other llamaslots. Reads without a lock, also while a llamaslot uses the directory.

Only ``remove`` changes files. A snapshot that a running llamaslot is writing looks unfinished.
"""

from __future__ import annotations

import asyncio
import enum
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from llamaslot.errors import SnapshotInvalid
from llamaslot.store import scan, sidecar
from llamaslot.store.directory_lock import DirectoryUnusable
from llamaslot.store.extent import Source, check_file, verify
from llamaslot.store.file_references import FileReferences
from llamaslot.store.learned import HitLog
from llamaslot.store.sidecar import Sidecar
from llamaslot.store.slot_file import read_slot_file
from llamaslot.store.snapshot import EXT, JSON, KV

_AT_ONCE = 8  # headers read at the same time


class FileState(enum.StrEnum):
    WHOLE = "whole"
    UNFINISHED = "unfinished"  # left by a crash, or being written
    BROKEN = "broken"
    UNREADABLE = "unreadable"  # perhaps whole, but a file cannot be read now: removed only if its id is named


class Item(Struct, frozen=True):
    """A snapshot, or the files of an id that is no snapshot. ``size_bytes``: of its files that no other snapshot needs;
    ``shared_bytes``: of its other files. ``noted``: the content of its sidecar, None if that cannot be read or does not
    fit; ``last_used``: seconds since the epoch; ``why``: what is wrong with it; ``bad_files``: its damaged parts.
    """

    id: str
    size_bytes: int
    last_used: float
    shared_bytes: int = 0
    bad_files: tuple[str, ...] = ()
    state: FileState = FileState.WHOLE
    why: str = ""
    noted: Sidecar | None = None
    n_hits: int = 0


class Stock(Struct, frozen=True):
    """The content of a directory: items by id, the number of files that are not llamaslot's, and the files of all
    snapshots. ``unreadable``: ids of sidecars that cannot be read now, so it is unknown which files they need.
    """

    items: dict[str, Item]
    n_foreign: int
    files: FileReferences
    unreadable: frozenset[str]

    @property
    def size_bytes(self) -> int:
        """The bytes of all items together."""
        rest = (item.size_bytes for item in self.items.values() if item.noted is None)
        return self.files.size_bytes + sum(rest)

    def of(self, state: FileState) -> list[Item]:
        return [item for item in self.items.values() if item.state is state]


def take_stock(directory: Path) -> Stock:
    """List a directory by file names, sizes and sidecars; reads no header. Blocking. Raises DirectoryUnusable."""
    try:
        listing = scan.list_own(directory)
    except OSError as error:
        raise DirectoryUnusable(f"{directory} cannot be read: {error.strerror or error}") from error
    hits = HitLog(directory).load()
    items, files = dict[str, Item](), FileReferences()
    for id_, suffixes in sorted(listing.suffixes.items()):
        items[id_] = item = _item(directory, id_, suffixes, hits.get(id_, 0))
        if item.noted is not None:
            files.add(item.noted.snapshot(""))
    needed = set(files.ids())
    unreadable = frozenset(id_ for id_, item in items.items() if item.state is FileState.UNREADABLE)
    for id_, item in list(items.items()):
        if item.noted is not None:
            own_bytes = files.own_bytes(snapshot := item.noted.snapshot(""))
            shared_bytes = sum(snapshot.files.values()) - own_bytes
            items[id_] = replace(item, size_bytes=own_bytes, shared_bytes=shared_bytes)
        elif id_ in needed and JSON not in listing.suffixes[id_]:
            del items[id_]  # only a part of other snapshots
        elif unreadable and JSON not in (suffixes := listing.suffixes[id_]) and suffixes & {KV, EXT}:
            why = "perhaps a part of a snapshot whose sidecar cannot be read"
            items[id_] = replace(item, state=FileState.UNREADABLE, why=why)
    return Stock(items, listing.n_foreign, files, unreadable)


def _item(directory: Path, id_: str, suffixes: set[str], n_hits: int) -> Item:
    item = Item(id_, scan.size_bytes(directory, id_), _dated(directory, id_, suffixes), n_hits=n_hits)
    if not {KV, JSON} <= suffixes:
        there = " and ".join(sorted(suffixes))
        return replace(item, state=FileState.UNFINISHED, why=f"there is only {there}")
    path = directory / (id_ + JSON)
    try:
        noted = sidecar.parse(path.name, path.read_bytes())
        if noted.boot not in (None, sidecar.boot_id()):
            raise SnapshotInvalid(f"{id_}{KV}: was not yet on the disk when the machine went down")
        found = os.lstat(directory / (id_ + KV)).st_size
        if found != noted.size_bytes:
            raise SnapshotInvalid(f"{id_}{KV}: has {found} bytes, {noted.size_bytes} were written")
        if bad := scan.bad_files(directory, noted):
            return replace(_with_bad_files(item, bad, "missing or of another size; "), noted=noted)
    except FileNotFoundError:
        return replace(item, state=FileState.UNFINISHED, why="it went while it was looked at")
    except OSError as error:
        why = f"{path.name}: cannot be read: {error.strerror or error}"
        return replace(item, state=FileState.UNREADABLE, why=why)
    except SnapshotInvalid as error:
        return _broken(item, error)
    return replace(item, noted=noted)


def _broken(item: Item, error: SnapshotInvalid) -> Item:
    """``item`` marked as broken or unreadable, with the text of ``error`` as the reason. The file name at its beginning
    is cut off, because a list of items shows it already.
    """
    why = re.sub(rf"^{item.id}(\.kv|\.json)?: ", "", str(error))
    cause = error.__cause__
    is_read = not isinstance(cause, OSError) or isinstance(cause, FileNotFoundError)
    return replace(item, state=FileState.BROKEN if is_read else FileState.UNREADABLE, why=why)


def _with_bad_files(item: Item, bad: Iterable[str], how: str) -> Item:
    """``item`` marked as broken because of the files ``bad``. ``how``: what is wrong with them."""
    names = tuple(sorted(bad))
    why = f"{', '.join(names)} is {how}the next start keeps what is before it"
    return replace(item, state=FileState.BROKEN, why=why, bad_files=names)


def _dated(directory: Path, id_: str, suffixes: set[str]) -> float:
    for suffix in (JSON, *sorted(suffixes)):
        try:
            return os.lstat(directory / (id_ + suffix)).st_mtime
        except OSError:
            continue
    return 0.0


async def read_headers(
    directory: Path, items: Collection[Item], *, with_checksums: bool = False
) -> list[Item]:
    """Check the .kv file of each item against its sidecar. Returns the items; those that fail are marked as broken, or
    as unreadable if the file cannot be read. ``with_checksums``: also read all files of their parts, each once, and
    compare checksums. Canceling is safe.
    """
    gate = asyncio.Semaphore(_AT_ONCE)
    bad = set[str]()
    if with_checksums:
        checksums = dict[str, set[int]]()
        for item in items:
            for part in item.noted.parts if item.noted is not None else ():
                its = checksums.setdefault(part.file, set())
                if part.checksum is not None:
                    its.add(part.checksum)
        for name, known in sorted(checksums.items()):
            if not await asyncio.to_thread(_is_good, directory / name, known):
                bad.add(name)

    async def read(item: Item) -> Item:
        if item.noted is None:
            return item
        async with gate:
            try:
                scan.agree(item.noted, await read_slot_file(directory / (item.id + KV)))
            except SnapshotInvalid as error:
                return _broken(item, error)
        if not item.noted.parts and item.id + KV in bad:
            return replace(item, state=FileState.BROKEN, why="its rows have changed since others need them")
        if its := bad & {part.file for part in item.noted.parts}:
            # A start compares only sizes, so it uses the damaged file until ``remove`` has removed it.
            return _with_bad_files(item, {*its, *item.bad_files}, "damaged; with --remove, ")
        return item

    return list(await asyncio.gather(*map(read, items)))


def _is_good(path: Path, checksums: Collection[int]) -> bool:
    """True if the rows and states in a file are as they were written. For a slot file without ``checksums``, only true
    if its layout is understood. Blocking: reads the whole file.
    """
    try:
        if path.suffix == KV:
            with Source(path) as source:
                source.extent()
            for checksum in checksums:
                check_file(path, checksum)
        else:
            verify(path)
    except (SnapshotInvalid, OSError):
        return False
    return True


def remove(directory: Path, stock: Stock, item: Item) -> tuple[int, OSError | None]:
    """Remove an item's files; if it has ``bad_files``, only these. Files that other snapshots need stay, and those that
    an unreadable sidecar may need. Blocking. Returns the bytes that are still there, and the first error or None.
    """
    if item.bad_files:
        freed, n_left, first = dict.fromkeys(item.bad_files, 0), 0, None
    elif item.noted is None:
        return scan.remove(directory, item.id, keeps_data=item.id in stock.files.ids())
    else:
        freed, _ = stock.files.drop(item.noted.snapshot(""))
        if stock.unreadable:
            _, first = scan.remove(directory, item.id, keeps_data=True)
            return sum(freed.values()), first
        n_left, first = scan.remove(directory, item.id, keeps_data=item.id + KV not in freed)
    for name in freed:
        if name != item.id + KV:
            left, error = scan.remove(directory, name[: name.index(".")])
            n_left, first = n_left + left, first or error
    return n_left, first
