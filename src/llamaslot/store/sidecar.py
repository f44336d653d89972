"""The types and file names of the store, and the sidecar that makes a slot file a snapshot.

A snapshot is ``<id>.kv``, written by llama-server, and ``<id>.json``, written by us after everything else: a file
without its sidecar is ignored. Sidecars hold no tokens (those are in the header of the .kv file), so there is no
second copy of a conversation. The modification time of a sidecar is the time of the last use.

A .kv file of a gigabyte is renamed before the kernel has written it to disk. A killed process loses nothing by that;
a power cut could leave zeros behind a valid header, which would be restored as the context of a user. So a sidecar
first carries the id of this boot, and is rewritten without it once the data is synced. One of another boot is not
used.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
from pathlib import Path
from typing import Any

import orjson
from msgspec import Struct
from msgspec.structs import asdict, replace
from xxhash import xxh3_128_hexdigest

from llamaslot.cache.content import SnapshotKind
from llamaslot.cache.ids import WIDTH
from llamaslot.errors import SnapshotInvalid

# written if there is a namespace: a reader of version 1 must not take the snapshot for a shared one
VERSION = 2
_VERSIONS = (1, VERSION)
KV, JSON, PART, NEW, PROBE = ".kv", ".json", ".part", ".json.new", ".probe"
_OURS = re.compile(r"(ls-[0-9a-f]{16})(\.kv|\.json|\.part|\.json\.new|\.probe)")
_MODE = 0o660  # llama-server and llamaslot may be two users of one group; the umask restricts it


class Snapshot(Struct, frozen=True):
    """A complete saved slot, as it is listed: its tokens are in the file's header and in the index.

    ``digest``: a hash of the tokens; ``created_at``: seconds since the epoch; ``checkpoints``: token counts to which
    a model that cannot rewind can return; ``source``: what it was saved for. ``is_pinned``: it must be there before
    it is requested (prewarmed), so it is neither evicted nor superseded. ``namespace``: the namespace that may resume
    from it (``cache.namespaces``), "" for all.
    """

    id: str
    n_tokens: int
    digest: str
    size_bytes: int
    fingerprint: str
    created_at: float
    checkpoints: tuple[int, ...]
    source: str
    kind: SnapshotKind = SnapshotKind.LEAF
    is_pinned: bool = False
    namespace: str = ""

    def with_tokens(self, tokens: bytes) -> WithTokens:
        """Add its ``tokens``, which must be its own."""
        return WithTokens(**{**asdict(self), "tokens": tokens})

    @property
    def file_name(self) -> str:
        """The file name for llama-server's restore."""
        return self.id + KV

    def __repr__(self) -> str:
        kind = "" if self.kind is SnapshotKind.LEAF else f" {self.kind}"
        kind += " pinned" if self.is_pinned else ""
        return f"<Snapshot {self.id} {self.n_tokens} tok {readable(self.size_bytes)} {self.source}{kind}>"


class WithTokens(Snapshot, frozen=True):
    """A snapshot with its ``tokens``: little-endian int32 bytes.

    Do not store these: ten thousand contexts are more than the index of them, and more than fits into memory.
    """

    tokens: bytes = b""

    @classmethod
    def of(cls, tokens: bytes, **fields: Any) -> WithTokens:
        """A snapshot that holds ``tokens``; ``fields`` are its other fields."""
        return cls(tokens=tokens, n_tokens=len(tokens) // WIDTH, digest=digest_of(tokens), **fields)

    @property
    def listed(self) -> Snapshot:
        """The same without tokens."""
        fields = asdict(self)
        del fields["tokens"]
        return Snapshot(**fields)


def digest_of(tokens: bytes) -> str:
    """A hash of the tokens: 32 hexadecimal digits."""
    return xxh3_128_hexdigest(tokens)


class Noted(Struct, frozen=True):
    """The content of a sidecar: a snapshot without the digest of its tokens."""

    id: str
    n_tokens: int
    size_bytes: int
    fingerprint: str
    created_at: float
    checkpoints: tuple[int, ...]
    source: str
    boot: str | None  # boot of the machine, until the .kv file is known to be on disk
    kind: SnapshotKind = SnapshotKind.LEAF
    is_pinned: bool = False
    namespace: str = ""

    @classmethod
    def of(cls, snapshot: Snapshot) -> Noted:
        """The sidecar of a snapshot that was saved in this boot and may not be on disk yet."""
        names = set(cls.__struct_fields__) - {"boot"}
        return cls(**{name: getattr(snapshot, name) for name in names}, boot=boot_id())

    def snapshot(self, digest: str) -> Snapshot:
        return Snapshot(
            id=self.id,
            n_tokens=self.n_tokens,
            digest=digest,
            size_bytes=self.size_bytes,
            fingerprint=self.fingerprint,
            created_at=self.created_at,
            checkpoints=self.checkpoints,
            source=self.source,
            kind=self.kind,
            is_pinned=self.is_pinned,
            namespace=self.namespace,
        )


def new_id() -> str:
    """A unique name: ``ls-`` and 16 hexadecimal digits."""
    return "ls-" + secrets.token_hex(8)


def own_name(name: str) -> tuple[str, str] | None:
    """The id and suffix of a file that is ours by its name; None for other files."""
    match = _OURS.fullmatch(name)
    return (match[1], match[2]) if match else None


def readable(size_bytes: int) -> str:
    """A size for people: ``114.0 MiB``."""
    size, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size_bytes} B" if unit == "B" else f"{size:.1f} {unit}"


def parse(name: str, data: bytes) -> Noted:
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
    noted = Noted(
        id=_field(name, fields, "id", str),
        n_tokens=_field(name, fields, "n_tokens", int),
        size_bytes=_field(name, fields, "size_bytes", int),
        fingerprint=_field(name, fields, "fingerprint", str),
        created_at=float(_field(name, fields, "created_at", int, float)),
        checkpoints=tuple(checkpoints),
        source=_field(name, fields, "source", str),
        boot=_field(name, fields, "boot", str, type(None)),
        # Later fields: a sidecar without them is of a plain conversation.
        kind=_kind(name, _field(name, {"kind": SnapshotKind.LEAF.value, **fields}, "kind", str)),
        is_pinned=_field(name, {"is_pinned": False, **fields}, "is_pinned", bool),
        namespace=_field(name, {"space": "", **fields}, "space", str),
    )
    if noted.id + JSON != name:
        raise SnapshotInvalid(f"{name}: belongs to {noted.id}")
    return noted


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
    """The kernel's id of this boot, the same inside containers; "" if there is none, which then never changes."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def write(directory: Path, noted: Noted, last_used: float) -> None:
    """Write the sidecar under another name, sync it, set its date, rename it. Blocking; raises OSError.

    The directory is not synced: a name lost in a power cut is a snapshot that does not exist.
    """
    fields = {"version": VERSION if noted.namespace else 1, **asdict(noted)}
    fields["space"] = fields.pop("namespace")  # its name in the file
    content = orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)
    new = directory / (noted.id + NEW)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _MODE), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.utime(new, (last_used, last_used))
    os.rename(new, directory / (noted.id + JSON))


def make_durable(directory: Path, noted: Noted, last_used: float) -> None:
    """Sync the .kv file and record that in the sidecar. Blocking, for seconds; raises OSError."""
    fd = os.open(directory / (noted.id + KV), os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)
    write(directory, replace(noted, boot=None), last_used)


def change_kind(directory: Path, snapshot: Snapshot) -> None:
    """Write kind and pin of the snapshot into its sidecar; leave the rest. Blocking; raises OSError and
    SnapshotInvalid.
    """
    path = directory / (snapshot.id + JSON)
    noted = parse(path.name, path.read_bytes())
    noted = replace(noted, kind=snapshot.kind, is_pinned=snapshot.is_pinned)
    write(directory, noted, path.stat().st_mtime)


def date(directory: Path, last_used: dict[str, float]) -> None:
    """Write the times of last use, by id. Blocking; a snapshot that is gone or not ours to date is skipped."""
    for id_, at in last_used.items():
        with contextlib.suppress(OSError):
            os.utime(directory / (id_ + JSON), (at, at))
