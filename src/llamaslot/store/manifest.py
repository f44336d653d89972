"""The manifest: a copy of all sidecars in one file outside of the directory, so that a start with ten thousand
snapshots reads one file.

An entry is used only if the .kv file and the sidecar of its snapshot still have the recorded inode, size and times of
change. All other snapshots are read from their own files. So an outdated manifest (or one that a power cut brought
back) costs some file accesses, but never makes a snapshot appear. It has only snapshots whose data has been synced: the
sidecars of others, which still name a boot of the machine, are read at each start.

The file has one line with version and checksum, then JSON with a list for each field: 10,000 objects would take four
times as long to read. It is written under another name, synced and renamed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from xxhash import xxh3_128_hexdigest

from llamaslot.cache.content import SnapshotKind
from llamaslot.file_id import FileId
from llamaslot.store.snapshot import JSON, Part, Snapshot
from llamaslot.tasks import in_slices

log = logging.getLogger(__name__)

VERSION = 4
_HEAD = "llamaslot sidecars"
Mark = tuple[int, int, int, int]  # the fields of a FileId, whose making takes longer
_N_MARK = 4
_Entry = tuple[Snapshot, float, Mark, Mark]
_SLICE = 256  # entries


class Known(NamedTuple):
    """The content of a manifest, by snapshot id: the snapshots, the times of their last use, and the ``FileId`` of each
    .kv file and of each sidecar when the manifest was written.
    """

    snapshots: dict[str, Snapshot]
    last_used: dict[str, float]
    kv: dict[str, Mark]
    json: dict[str, Mark]

    @classmethod
    def nothing(cls) -> Known:
        return cls({}, {}, {}, {})


class Manifest:
    """The manifest of the snapshots in ``directory``, in the file ``path``. If ``path`` is None, nothing is read or
    written. ``file_ids``: by snapshot id, the FileId of its .kv file when the header was read; ``durable``: ids of the
    snapshots whose data is known to be synced.
    """

    def __init__(self, path: Path | None, directory: Path) -> None:
        self.path, self._directory = path, directory
        self.file_ids: dict[str, Mark] = {}
        self.durable: set[str] = set()
        self._writing = threading.Lock()

    async def read(self) -> Known:
        """Read the manifest. If the file cannot be used, logs that and returns an empty one. Canceling is safe."""
        return await asyncio.to_thread(self._read)

    def _read(self) -> Known:
        if self.path is None:
            return Known.nothing()
        try:
            return _decode(self.path.read_bytes())
        except FileNotFoundError:
            if any(self._directory.glob("*.json")):  # a new directory has nothing to read
                log.info(
                    "snapshots: %s does not exist, the file with a copy of the metadata of all snapshots. llamaslot"
                    " reads each sidecar and slot-file header instead; this takes longer, and nothing is lost",
                    self.path,
                )  # fmt: skip
        except (OSError, _Unusable) as error:
            log.warning(
                "snapshots: cannot use %s, the file with a copy of the metadata of all snapshots: %s. llamaslot reads"
                " each sidecar and slot-file header instead; this takes longer, and nothing is lost",
                self.path, getattr(error, "strerror", None) or error,
            )  # fmt: skip
        return Known.nothing()

    async def write(self, snapshots: Mapping[str, Snapshot], last_used: Callable[[str], float]) -> None:
        """Write those ``snapshots`` that are ``durable``, with their times of last use. Logs a failure.

        Canceling is safe: the file is written all the same.
        """
        self.durable &= snapshots.keys()
        for id_ in self.file_ids.keys() - snapshots.keys():
            del self.file_ids[id_]
        if self.path is not None:
            known = [
                (snapshots[id_], self.file_ids[id_], last_used(id_))
                async for id_ in in_slices(list(self.durable))
                if id_ in snapshots
            ]
            await asyncio.to_thread(self._write, self.path, known)

    def _write(self, path: Path, known: list[tuple[Snapshot, Mark, float]]) -> None:
        new = path.with_name(path.name + ".new")
        try:
            with self._writing:  # the thread of a cancelled call may still be writing
                body = _encode(list(self._entries(known)))
                with open(
                    os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb"
                ) as file:
                    file.write(f"{_HEAD} {VERSION} {xxh3_128_hexdigest(body)}\n".encode())
                    file.write(body)
                    file.flush()
                    os.fsync(file.fileno())
                os.rename(new, path)
        except OSError as error:
            log.warning(
                "snapshots: cannot write %s, the file with a copy of the metadata of all snapshots: %s. The next start"
                " may have to read each sidecar and slot-file header instead, which takes longer",
                path, error.strerror or error,
            )  # fmt: skip

    def _entries(self, known: list[tuple[Snapshot, Mark, float]]) -> Iterator[_Entry]:
        """The entries to write: snapshot, time of last use, FileId of the .kv file when it was read, FileId of the
        sidecar now. If the .kv file has changed since it was read, a later start will find that the entry does not
        match. Snapshots whose sidecar is gone or has another date than llamaslot gave it are left out.
        """
        directory = os.path.join(self._directory, "")
        for snapshot, file_id, last_used in known:
            with suppress(OSError):  # dropped meanwhile
                json = os.lstat(f"{directory}{snapshot.id}{JSON}")
                if json.st_mtime == last_used:
                    yield snapshot, last_used, file_id, FileId.of(json)


class _Unusable(Exception):
    """The file is no valid manifest; the text says why."""


def _encode(entries: list[_Entry]) -> bytes:
    """The JSON of a manifest. In slices: made at once, that of 10,000 snapshots kept the event loop waiting for the GIL
    for 23 ms.
    """
    if not entries:
        return orjson.dumps({"n": 0})
    fingerprints = {name: n for n, name in enumerate(dict.fromkeys(its[0].fingerprint for its in entries))}
    get: dict[str, Callable[[Snapshot], Any]] = {name: attrgetter(name) for name in _FIELDS}
    get["fingerprint"] = lambda its: fingerprints[its.fingerprint]
    get["parts"] = lambda its: [tuple(part) for part in its.parts]
    return orjson.dumps(
        {
            "n": len(entries),
            "fingerprints": list(fingerprints),
            "snapshots": {name: _array(get[name](its[0]) for its in entries) for name in _FIELDS},
            "last_used": _array(its[1] for its in entries),
            "kv": [_array(its[2][n] for its in entries) for n in range(_N_MARK)],
            "json": [_array(its[3][n] for its in entries) for n in range(_N_MARK)],
        }
    )


def _array(values: Iterator[Any]) -> orjson.Fragment:
    """A JSON array."""
    slices = iter(lambda: orjson.dumps(list(islice(values, _SLICE)))[1:-1], b"")
    return orjson.Fragment(b"[" + b",".join(slices) + b"]")


def _decode(data: bytes) -> Known:
    """Parse a manifest. Raises _Unusable unless ``_encode`` has made ``data``."""
    head, _, body = data.partition(b"\n")
    if head != f"{_HEAD} {VERSION} {xxh3_128_hexdigest(body)}".encode():
        raise _Unusable("it is damaged, or of another version")
    try:
        content = orjson.loads(body)
        if not content["n"]:
            return Known.nothing()
        columns, fingerprints = content["snapshots"], content["fingerprints"]
        columns["fingerprint"] = [fingerprints[n] for n in columns["fingerprint"]]
        columns["checkpoints"] = map(tuple, columns["checkpoints"])
        columns["parts"] = [
            tuple(Part(*part) for part in parts) if parts else () for parts in columns["parts"]
        ]
        columns["kind"] = [_KINDS[kind] for kind in columns["kind"]]
        columns.setdefault("is_prewarmed", [False] * content["n"])  # a manifest of before has none
        ids = columns["id"]
        return Known(
            dict(zip(ids, _snapshots(columns), strict=True)),
            dict(zip(ids, content["last_used"], strict=True)),
            dict(zip(ids, zip(*content["kv"], strict=True), strict=True)),
            dict(zip(ids, zip(*content["json"], strict=True), strict=True)),
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _Unusable(f"not of this format: {error!r}") from None


def _snapshots(columns: Mapping[str, Iterable[Any]]) -> list[Snapshot]:
    """Make snapshots from a list of values for each field. Raises ValueError unless all lists are equally long."""
    return [Snapshot(*values) for values in zip(*(columns[name] for name in _FIELDS), strict=True)]


_FIELDS = Snapshot.__struct_fields__
_KINDS = {kind.value: kind for kind in SnapshotKind}
