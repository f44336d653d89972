"""A copy of all sidecars in one file outside of the directory, so that a start with ten thousand snapshots opens one
file.

It is never the truth. An entry is used only if both files of its snapshot still have the recorded inode, size and
times of change; all others are read as if there were no manifest. So an outdated manifest (or one that a power cut
brought back) costs some file accesses, but never makes a snapshot appear. Only snapshots known to be on disk are
entered: a sidecar that still names a boot of the machine is read at each start.

One line with version and checksum, then JSON. Written under another name, synced, renamed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import orjson
from xxhash import xxh3_128_hexdigest

from llamaslot.cache.content import SnapshotKind
from llamaslot.file_id import FileId
from llamaslot.store.sidecar import JSON, Snapshot

log = logging.getLogger(__name__)

VERSION = 2
_HEAD = "llamaslot sidecars"


class Entry(NamedTuple):
    """A snapshot that is durably on disk, and the identity of its two files at that time."""

    snapshot: Snapshot
    kv: FileId
    json: FileId


class Manifest:
    """The file ``path`` about the snapshots in ``directory``. Without a path nothing is read or written.

    ``file_ids``: identities of the .kv files when their headers were read; ``durable``: ids known to be on disk.
    """

    def __init__(self, path: Path | None, directory: Path) -> None:
        self.path, self._directory = path, directory
        self.file_ids: dict[str, FileId] = {}
        self.durable: set[str] = set()
        self._writing = threading.Lock()

    async def read(self) -> dict[str, Entry]:
        """Entries by id; none, with a log line, if the file cannot be used. Canceling is safe."""
        return await asyncio.to_thread(self._read)

    def _read(self) -> dict[str, Entry]:
        if self.path is None:
            return {}
        try:
            return _decode(self.path.read_bytes())
        except FileNotFoundError:
            log.info("snapshots: there is no %s: reading all files", self.path)
        except OSError as error:
            log.warning("snapshots: cannot use %s: %s; reading all files", self.path, error.strerror or error)
        except _Unusable as error:
            log.warning("snapshots: cannot use %s: %s; reading all files", self.path, error)
        return {}

    async def write(self, snapshots: Mapping[str, Snapshot], last_used: Mapping[str, float]) -> None:
        """Write the durable snapshots and their times of use. A failure is logged.

        Canceling is safe: the file is written to its end all the same.
        """
        self.durable &= snapshots.keys()
        self.file_ids = {id_: file_id for id_, file_id in self.file_ids.items() if id_ in snapshots}
        if self.path is not None:
            known = [(snapshots[id_], self.file_ids[id_], last_used[id_]) for id_ in self.durable]
            await asyncio.to_thread(self._write, self.path, known)

    def _write(self, path: Path, known: list[tuple[Snapshot, FileId, float]]) -> None:
        new = path.with_name(path.name + ".new")
        try:
            with self._writing:  # the thread of a cancelled call may still be writing
                data = _encode(self._entries(known))
                with open(
                    os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb"
                ) as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.rename(new, path)
        except OSError as error:
            log.warning("snapshots: cannot write %s: %s", path, error.strerror or error)

    def _entries(self, known: list[tuple[Snapshot, FileId, float]]) -> list[Entry]:
        """The mark of a .kv file is that of when it was read: if the file has changed since, it will not match. A
        sidecar whose date is not the one we set is left out: another program has changed it.
        """
        entries = []
        for snapshot, file_id, last_used in known:
            with suppress(OSError):  # dropped meanwhile
                json = os.lstat(self._directory / (snapshot.id + JSON))
                if json.st_mtime == last_used:
                    entries.append(Entry(snapshot, file_id, FileId.of(json)))
        return entries


class _Unusable(Exception):
    """Why the content of the file is not used."""


def _encode(entries: list[Entry]) -> bytes:
    fingerprints = list(dict.fromkeys(entry.snapshot.fingerprint for entry in entries))
    number = {fingerprint: n for n, fingerprint in enumerate(fingerprints)}
    rows = []
    for entry in entries:
        fields = list(_values(entry.snapshot))
        fields[_FINGERPRINT] = number[entry.snapshot.fingerprint]
        rows.append([*fields, *entry.kv, *entry.json])
    body = orjson.dumps({"fingerprints": fingerprints, "snapshots": rows})
    return f"{_HEAD} {VERSION} {xxh3_128_hexdigest(body)}\n".encode() + body


def _decode(data: bytes) -> dict[str, Entry]:
    """Raises _Unusable unless ``_encode`` has made ``data``."""
    head, _, body = data.partition(b"\n")
    if head != f"{_HEAD} {VERSION} {xxh3_128_hexdigest(body)}".encode():
        raise _Unusable("it is damaged, or of another version")
    try:
        content = orjson.loads(body)
        fingerprints, rows = content["fingerprints"], content["snapshots"]
        entries = {}
        for row in rows:  # lists without names: 10,000 are read in half the time of objects
            row[_FINGERPRINT] = fingerprints[row[_FINGERPRINT]]
            row[_CHECKPOINTS] = tuple(row[_CHECKPOINTS])
            row[_KIND] = _KINDS[row[_KIND]]
            snapshot = Snapshot(*row[:-8])
            entries[snapshot.id] = Entry(snapshot, FileId(*row[-8:-4]), FileId(*row[-4:]))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _Unusable(f"not of this format: {error!r}") from None
    return entries


_FIELDS = [field.name for field in dataclasses.fields(Snapshot)]
_FINGERPRINT, _CHECKPOINTS, _KIND = map(_FIELDS.index, ("fingerprint", "checkpoints", "kind"))
_KINDS = {kind.value: kind for kind in SnapshotKind}
_values = attrgetter(*_FIELDS)
