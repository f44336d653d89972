"""The *sidecar*, the JSON file that makes a slot file a snapshot: its content, and reading and writing it. The
modification time of a sidecar is the time of the snapshot's last use.

llamaslot renames a .kv file of a gigabyte before the kernel has written it to disk. If llamaslot is killed, nothing is
lost. After a power cut, zeros may follow a valid header, and would be restored as a user's context. So a sidecar first
has the id of this boot of the machine, and is rewritten without it once the data is synced. A sidecar with the id of
another boot makes no snapshot.
"""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import Any

import orjson
from msgspec import Struct
from msgspec.structs import asdict, replace

from llamaslot.cache.content import SnapshotKind
from llamaslot.errors import SnapshotInvalid
from llamaslot.store.snapshot import EXT, JSON, KV, NEW, Part, Snapshot, own_name

# A sidecar with parts has version 3, one with a namespace version 2: a llamaslot that knows only version 1 would offer
# that snapshot to every user. All others have version 1.
VERSION = 3
_VERSIONS = (1, 2, VERSION)
_PART_TYPES = [str, int, int, int], [str, int, int, int, int]
_MODE = 0o660  # llama-server and llamaslot may run as two users of one group; the umask restricts the mode


class Sidecar(Struct, frozen=True):
    """The content of a sidecar: the fields of ``Snapshot``, and ``boot``. ``digest``: a hash of the tokens; "" in a
    sidecar of an older version, and before the saved file has been read.
    """

    id: str
    n_tokens: int
    size_bytes: int
    fingerprint: str
    created_at: float
    checkpoints: tuple[int, ...]
    source: str
    boot: str | None  # id of the machine's boot, until the data is known to be synced; then None
    kind: SnapshotKind = SnapshotKind.LEAF
    is_pinned: bool = False
    is_prewarmed: bool = False
    namespace: str = ""
    parts: tuple[Part, ...] = ()
    row_bytes: int = 0
    own_from: int = 0
    digest: str = ""

    @classmethod
    def of(cls, snapshot: Snapshot) -> Sidecar:
        """The sidecar of a snapshot that was saved during this boot and whose data may not be synced yet."""
        names = set(cls.__struct_fields__) - {"boot"}
        return cls(**{name: getattr(snapshot, name) for name in names}, boot=boot_id())

    def snapshot(self, digest: str) -> Snapshot:
        fields = asdict(self)
        del fields["boot"]
        return Snapshot(**{**fields, "digest": digest})


def parse(name: str, data: bytes) -> Sidecar:
    """Parse a sidecar. Raises SnapshotInvalid for any fault or an unknown version."""
    try:
        fields = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise SnapshotInvalid(f"{name}: broken JSON: {error}") from None
    if not isinstance(fields, dict) or fields.get("version") not in _VERSIONS:
        raise SnapshotInvalid(f"{name}: no sidecar of version {VERSION}")
    checkpoints = _field(name, fields, "checkpoints", list)
    if not all(type(at) is int for at in checkpoints):
        raise SnapshotInvalid(f"{name}: 'checkpoints' is no list of token counts")
    noted = Sidecar(
        id=_field(name, fields, "id", str),
        n_tokens=_field(name, fields, "n_tokens", int),
        size_bytes=_field(name, fields, "size_bytes", int),
        fingerprint=_field(name, fields, "fingerprint", str),
        created_at=float(_field(name, fields, "created_at", int, float)),
        checkpoints=tuple(checkpoints),
        source=_field(name, fields, "source", str),
        boot=_field(name, fields, "boot", str, type(None)),
        # Fields that came later: a sidecar without them is of a conversation in a whole slot file.
        kind=_kind(name, _field(name, {"kind": SnapshotKind.LEAF.value, **fields}, "kind", str)),
        is_pinned=_field(name, {"is_pinned": False, **fields}, "is_pinned", bool),
        is_prewarmed=_field(name, {"is_prewarmed": False, **fields}, "is_prewarmed", bool),
        namespace=_field(name, {"space": "", **fields}, "space", str),
        parts=_parts(name, _field(name, {"parts": [], **fields}, "parts", list), fields["n_tokens"]),
        row_bytes=_field(name, {"row_bytes": 0, **fields}, "row_bytes", int),
        own_from=_field(name, {"own_from": 0, **fields}, "own_from", int),
        digest=_field(name, {"digest": "", **fields}, "digest", str),
    )
    if noted.id + JSON != name:
        raise SnapshotInvalid(f"{name}: belongs to {noted.id}")
    return noted


def _parts(name: str, rows: list[Any], n_tokens: int) -> tuple[Part, ...]:
    parts, end = [], 0
    for row in rows:
        if not _is_part(row):
            raise SnapshotInvalid(f"{name}: 'parts' has {row!r}")
        part = Part(*row)
        if not part.is_state and (part.start != end or part.end < end):
            raise SnapshotInvalid(f"{name}: its parts leave a gap at {end}")
        end = end if part.is_state else part.end
        parts.append(part)
    if parts and end != n_tokens:
        raise SnapshotInvalid(f"{name}: its parts end at {end}, not at {n_tokens}")
    return tuple(parts)


def _is_part(row: Any) -> bool:
    if not isinstance(row, list) or [type(value) for value in row] not in _PART_TYPES:
        return False
    own = own_name(row[0])
    return own is not None and own[1] in (KV, EXT) and min(row[1:]) >= 0


def _kind(name: str, value: str) -> SnapshotKind:
    try:
        return SnapshotKind(value)
    except ValueError:
        raise SnapshotInvalid(f"{name}: {value!r} is no kind of snapshot") from None


def _field(name: str, fields: dict[str, Any], key: str, *types: type) -> Any:
    if type(value := fields.get(key)) not in types:  # not isinstance: true is an int
        raise SnapshotInvalid(f"{name}: {key!r} is missing or of the wrong type")
    return value


@functools.cache
def boot_id() -> str:
    """The kernel's id of this boot of the machine, the same inside containers; "" if the kernel tells none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def write(directory: Path, noted: Sidecar, last_used: float) -> None:
    """Write a sidecar under another name, sync it, set its modification time to ``last_used``, and rename it. Blocking;
    raises OSError. The directory is not synced: if a power cut loses the name, the snapshot is lost with it.
    """
    version = VERSION if noted.parts else 2 if noted.namespace else 1
    fields = {"version": version, **asdict(noted)}
    if noted.parts:
        fields["parts"] = [[value for value in part if value is not None] for part in noted.parts]
    else:
        del fields["parts"], fields["row_bytes"], fields["own_from"]
    fields["space"] = fields.pop("namespace")  # its name in the file
    content = orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)
    new = directory / (noted.id + NEW)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _MODE), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.utime(new, (last_used, last_used))
    os.rename(new, directory / (noted.id + JSON))


def write_data(path: Path, data: bytes, *, is_durable: bool = False) -> None:
    """Write a new file; with ``is_durable``, sync it (fsync). Blocking; raises OSError, also if the file exists."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE), "wb") as file:
        file.write(data)
        if is_durable:
            file.flush()
            os.fsync(file.fileno())


def sync_data(path: Path) -> None:
    """Sync a file to disk (fdatasync). Blocking, for seconds; raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def make_durable(directory: Path, noted: Sidecar, last_used: float) -> None:
    """Sync all files of a snapshot, and rewrite its sidecar without the boot. Blocking, for seconds. Raises OSError."""
    for name in dict.fromkeys([*(part.file for part in noted.parts), noted.id + KV]):
        sync_data(directory / name)
    write(directory, replace(noted, boot=None), last_used)


def marked(noted: Sidecar, snapshot: Snapshot) -> Sidecar:
    """A copy of ``noted`` with the kind and the pin of ``snapshot``."""
    return replace(
        noted, kind=snapshot.kind, is_pinned=snapshot.is_pinned, is_prewarmed=snapshot.is_prewarmed
    )


def change_kind(directory: Path, snapshot: Snapshot) -> None:
    """Write kind and pin of the snapshot into its sidecar (``marked``); other fields stay as they are there. Blocking;
    raises OSError and SnapshotInvalid.
    """
    path = directory / (snapshot.id + JSON)
    noted = parse(path.name, path.read_bytes())
    noted = marked(noted, snapshot)
    write(directory, noted, path.stat().st_mtime)


def date(directory: Path, last_used: dict[str, float]) -> None:
    """Set the modification times of sidecars to the times of last use, by id. Blocking. Skips a sidecar that is gone or
    belongs to another user of the machine.
    """
    for id_, at in last_used.items():
        with contextlib.suppress(OSError):
            os.utime(directory / (id_ + JSON), (at, at))
