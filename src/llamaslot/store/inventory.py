"""The content of a snapshot directory, for people. Read without a lock, also while llamaslot uses the directory.

Nothing here changes a file. A snapshot that a running llamaslot is writing looks unfinished.
"""

from __future__ import annotations

import asyncio
import enum
import os
import re
from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from llamaslot.errors import SnapshotInvalid
from llamaslot.store import scan, sidecar
from llamaslot.store.directory import DirectoryUnusable
from llamaslot.store.header import read_slot_file
from llamaslot.store.hits import NEVER, HitLog, Hits
from llamaslot.store.sidecar import JSON, KV, Noted

_AT_ONCE = 8  # headers read at the same time


class FileState(enum.StrEnum):
    WHOLE = "whole"
    UNFINISHED = "unfinished"  # left by a crash, or being written
    BROKEN = "broken"


class Item(Struct, frozen=True):
    """The files of one id. ``noted``: its sidecar, None if that cannot be read; ``last_used``: seconds since the
    epoch; ``why``: its fault.
    """

    id: str
    size_bytes: int
    last_used: float
    state: FileState = FileState.WHOLE
    why: str = ""
    noted: Noted | None = None
    hits: Hits = NEVER


class Stock(Struct, frozen=True):
    """Items by id, and the number of other files."""

    items: dict[str, Item]
    n_foreign: int

    def of(self, state: FileState) -> list[Item]:
        return [item for item in self.items.values() if item.state is state]


def take_stock(directory: Path) -> Stock:
    """Names, sizes and sidecars; no header is read. Blocking. Raises DirectoryUnusable."""
    try:
        listing = scan.list_own(directory)
    except OSError as error:
        raise DirectoryUnusable(f"{directory} cannot be read: {error.strerror or error}") from error
    hits = HitLog(directory).load()
    items = {
        id_: _item(directory, id_, suffixes, hits.get(id_, NEVER))
        for id_, suffixes in sorted(listing.suffixes.items())
    }
    return Stock(items, listing.n_foreign)


def _item(directory: Path, id_: str, suffixes: set[str], hits: Hits) -> Item:
    item = Item(id_, scan.size_bytes(directory, id_), _dated(directory, id_, suffixes), hits=hits)
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
    except FileNotFoundError:
        return replace(item, state=FileState.UNFINISHED, why="it went while it was looked at")
    except OSError as error:
        return replace(
            item, state=FileState.BROKEN, why=f"{path.name}: cannot be read: {error.strerror or error}"
        )
    except SnapshotInvalid as error:
        return _broken(item, error)
    return replace(item, noted=noted)


def _broken(item: Item, error: SnapshotInvalid) -> Item:
    """In our list the file name in the error is redundant."""
    why = re.sub(rf"^{item.id}(\.kv|\.json)?: ", "", str(error))
    return replace(item, state=FileState.BROKEN, why=why)


def _dated(directory: Path, id_: str, suffixes: set[str]) -> float:
    for suffix in (JSON, *sorted(suffixes)):
        try:
            return os.lstat(directory / (id_ + suffix)).st_mtime
        except OSError:
            continue
    return 0.0


async def read_headers(directory: Path, items: Iterable[Item]) -> list[Item]:
    """The items, with those marked broken whose file does not match the sidecar. Canceling is safe."""
    gate = asyncio.Semaphore(_AT_ONCE)

    async def read(item: Item) -> Item:
        if item.noted is None:
            return item
        async with gate:
            try:
                scan.agree(item.noted, await read_slot_file(directory / (item.id + KV)))
            except SnapshotInvalid as error:
                return _broken(item, error)
        return item

    return list(await asyncio.gather(*map(read, items)))
