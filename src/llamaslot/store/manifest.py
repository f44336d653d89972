"""A copy of all sidecars in one file outside of the directory, so that a start with ten thousand snapshots opens one
file.

It is never the truth. An entry is used only if both files of its snapshot still have the recorded inode, size and
times of change; all others are read as if there were no manifest. So an outdated manifest (or one that a power cut
brought back) costs some file accesses, but never makes a snapshot appear. Only snapshots known to be on disk are
entered: a sidecar that still names a boot of the machine is read at each start.

One line with version and checksum, then JSON: a list for each field, as 10,000 objects take four times as long to
read. Written under another name, synced, renamed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from xxhash import xxh3_128_hexdigest

from llamaslot.cache.content import SnapshotKind
from llamaslot.file_id import FileId
from llamaslot.store.sidecar import JSON, Part, Snapshot

log = logging.getLogger(__name__)

VERSION = 4
_HEAD = "llamaslot sidecars"
Mark = tuple[int, int, int, int]  # a FileId, which takes longer to make


class Known(NamedTuple):
    """What a manifest tells: snapshots that are durably on disk, the times of their last use, and the ids of their two
    files at that time, by id.
    """

    snapshots: dict[str, Snapshot]
    last_used: dict[str, float]
    kv: dict[str, Mark]
    json: dict[str, Mark]

    @classmethod
    def nothing(cls) -> Known:
        return cls({}, {}, {}, {})


class Manifest:
    """A copy of the sidecars of the snapshots in ``directory``, in the file ``path``. Without a path nothing is read
    or written. ``file_ids``: ids of the .kv files when their headers were read; ``durable``: ids of snapshots known to
    be on disk.
    """

    def __init__(self, path: Path | None, directory: Path) -> None:
        self.path, self._directory = path, directory
        self.file_ids: dict[str, Mark] = {}
        self.durable: set[str] = set()
        self._writing = threading.Lock()

    async def read(self) -> Known:
        """Read the manifest; nothing, with a log line, if the file cannot be used. Canceling is safe."""
        return await asyncio.to_thread(self._read)

    def _read(self) -> Known:
        if self.path is None:
            return Known.nothing()
        try:
            return _decode(self.path.read_bytes())
        except FileNotFoundError:
            if any(self._directory.glob("*.json")):  # a new directory has nothing to read
                log.info("snapshots: there is no copy of the sidecars (%s): reading all files", self.path)
        except OSError as error:
            log.warning("snapshots: cannot use %s: %s; reading all files", self.path, error.strerror or error)
        except _Unusable as error:
            log.warning("snapshots: cannot use %s: %s; reading all files", self.path, error)
        return Known.nothing()

    async def write(self, snapshots: Mapping[str, Snapshot], last_used: Mapping[str, float]) -> None:
        """Write the durable snapshots and their times of use. A failure is logged.

        Canceling is safe: the file is written to its end all the same.
        """
        self.durable &= snapshots.keys()
        self.file_ids = {id_: file_id for id_, file_id in self.file_ids.items() if id_ in snapshots}
        if self.path is not None:
            known = [(snapshots[id_], self.file_ids[id_], last_used[id_]) for id_ in self.durable]
            await asyncio.to_thread(self._write, self.path, known)

    def _write(self, path: Path, known: list[tuple[Snapshot, Mark, float]]) -> None:
        new = path.with_name(path.name + ".new")
        try:
            with self._writing:  # the thread of a cancelled call may still be writing
                data = _encode(list(self._entries(known)))
                with open(
                    os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb"
                ) as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.rename(new, path)
        except OSError as error:
            log.warning(
                "snapshots: cannot write %s: %s; the next start may read all files",
                path, error.strerror or error,
            )  # fmt: skip

    def _entries(
        self, known: list[tuple[Snapshot, Mark, float]]
    ) -> Iterator[tuple[Snapshot, float, Mark, Mark]]:
        """The entries to write. The id of a .kv file is that of when it was read: if the file has changed since, the
        entry will not match. A sidecar whose date is not the one that llamaslot set is left out: another program has
        changed it.
        """
        directory = os.path.join(self._directory, "")
        for snapshot, file_id, last_used in known:
            with suppress(OSError):  # dropped meanwhile
                json = os.lstat(f"{directory}{snapshot.id}{JSON}")
                if json.st_mtime == last_used:
                    yield snapshot, last_used, file_id, FileId.of(json)


class _Unusable(Exception):
    """Why the content of the file is not used."""


def _encode(entries: list[tuple[Snapshot, float, Mark, Mark]]) -> bytes:
    content: dict[str, Any] = {"n": len(entries)}
    if entries:
        snapshots, last_used, kv, json = zip(*entries, strict=True)
        columns: dict[str, Any] = dict(zip(_FIELDS, zip(*map(_values, snapshots), strict=True), strict=True))
        fingerprints = {each: n for n, each in enumerate(dict.fromkeys(columns["fingerprint"]))}
        columns["fingerprint"] = [fingerprints[each] for each in columns["fingerprint"]]
        columns["parts"] = [[tuple(part) for part in parts] for parts in columns["parts"]]
        content |= {"fingerprints": list(fingerprints), "snapshots": columns, "last_used": last_used}
        content |= {"kv": list(zip(*kv, strict=True)), "json": list(zip(*json, strict=True))}
    body = orjson.dumps(content)
    return f"{_HEAD} {VERSION} {xxh3_128_hexdigest(body)}\n".encode() + body


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
        columns["parts"] = [tuple(Part(*part) for part in parts) for parts in columns["parts"]]
        columns["kind"] = [_KINDS[kind] for kind in columns["kind"]]
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
_values = attrgetter(*_FIELDS)
