"""A snapshot: its fields, its id, and the names of its files.

A snapshot is ``<id>.kv`` and its sidecar ``<id>.json`` (module ``sidecar``), which llamaslot writes last. The .kv file
is either a whole slot file, as llama-server wrote it, or only the header of one. Then the sidecar names the *parts* of
its content: rows and states in files that other snapshots may need too (``<id>.ext``, or the .kv file of another
snapshot). A file that no sidecar names belongs to no snapshot, and the next scan removes it. The tokens are in the
header of the .kv file, not in the sidecar.
"""

from __future__ import annotations

import re
import secrets
from typing import Any, NamedTuple

from msgspec import Struct
from msgspec.structs import asdict, replace
from xxhash import xxh3_128_hexdigest

from llamaslot.cache.content import SnapshotKind
from llamaslot.cache.ids import WIDTH
from llamaslot.sizes import readable_size

KV, EXT, JSON, PART, NEW, PROBE = ".kv", ".ext", ".json", ".part", ".json.new", ".probe"
_OURS = re.compile(r"(ls-[0-9a-f]{16})(\.kv|\.ext|\.json|\.part|\.json\.new|\.probe)")
N_STATES = 2  # so many states are put into a slot file for a restore: the latest ones


class Part(NamedTuple):
    """A part of a snapshot: the rows of the tokens [start, end) in ``file``, or, if both are equal, the state of the
    model after so many tokens. ``size_bytes``: of the whole file, which may have more than this part. ``checksum``: the
    xxh3_64 of the whole file if it is a slot file, which has no checksum inside. None for an extent, and in sidecars of
    earlier versions of llamaslot.
    """

    file: str
    start: int
    end: int
    size_bytes: int
    checksum: int | None = None

    @property
    def is_state(self) -> bool:
        return self.start == self.end


class Snapshot(Struct, frozen=True):
    """A saved slot on disk, without its tokens, which are in the header of its .kv file and in the index.

    ``digest``: a hash of the tokens. ``size_bytes``: of its .kv file. ``created_at``: seconds since the epoch.
    ``checkpoints``: token counts to which a model that cannot rewind freely can return. ``source``: the request that it
    was saved for. ``is_pinned``: it is neither evicted nor superseded. ``is_prewarmed``: it was pinned because the
    configuration's ``prewarm`` names it, and is unpinned when ``prewarm`` no longer does. ``namespace``: whose requests
    may resume from it (``Namespace.text``); "" is the shared one.

    ``parts``: where its content is: rows from the first token to the last, then states by position; empty for a whole
    slot file. ``row_bytes``: bytes of the rows of each token. ``own_from``: rows before this token come from another
    conversation's snapshot; its own slot may have computed them with other rounding.
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
    is_prewarmed: bool = False
    namespace: str = ""
    parts: tuple[Part, ...] = ()
    row_bytes: int = 0
    own_from: int = 0

    @property
    def files(self) -> dict[str, int]:
        """All files that the snapshot needs, except its sidecar, with their bytes. Others may need them too."""
        return {self.id + KV: self.size_bytes, **{part.file: part.size_bytes for part in self.parts}}

    def restored_bytes(self, n_tokens: int | None = None) -> int:
        """About how many bytes llama-server reads to restore the snapshot, or its first ``n_tokens``."""
        n = self.n_tokens if n_tokens is None else n_tokens
        if not self.parts:
            return self.size_bytes if n >= self.n_tokens else self.size_bytes * n // self.n_tokens
        states = sorted((part.end, part.size_bytes) for part in self.parts if part.is_state and part.end <= n)
        return n * (self.row_bytes + WIDTH) + sum(size for _, size in states[-N_STATES:]) * 2

    @property
    def read_size(self) -> tuple[int, int]:
        """The snapshot's number of tokens, and about how many bytes a slot file with these has."""
        return self.n_tokens, self.restored_bytes()

    def with_tokens(self, tokens: bytes) -> WithTokens:
        """The same snapshot with ``tokens``, which must be those of the snapshot."""
        return WithTokens(**{**asdict(self), "tokens": tokens})

    @property
    def file_name(self) -> str:
        """The name of the snapshot's .kv file."""
        return self.id + KV

    def __repr__(self) -> str:
        kind = "" if self.kind is SnapshotKind.LEAF else f" {self.kind}"
        kind += " pinned" if self.is_pinned else ""
        return (
            f"<Snapshot {self.id} {self.n_tokens} tok {readable_size(self.size_bytes)} {self.source}{kind}>"
        )


class WithTokens(Snapshot, frozen=True):
    """A snapshot with its ``tokens``: little-endian int32 bytes. Do not keep such objects: the tokens of ten thousand
    snapshots do not fit into memory; an index stores what they have in common once.
    """

    tokens: bytes = b""

    @classmethod
    def of(cls, tokens: bytes, **fields: Any) -> WithTokens:
        """A snapshot with these tokens, its number of tokens and digest; ``fields`` are the other fields."""
        return cls(tokens=tokens, n_tokens=len(tokens) // WIDTH, digest=digest_of(tokens), **fields)

    def cut(self, n_tokens: int) -> WithTokens:
        """The snapshot's first ``n_tokens``, as a snapshot with the same id. Changes no file."""
        if n_tokens == self.n_tokens:
            return self
        checkpoints = tuple(at for at in self.checkpoints if at <= n_tokens)
        return replace(
            self, n_tokens=n_tokens, tokens=self.tokens[: n_tokens * WIDTH], checkpoints=checkpoints
        )

    @property
    def listed(self) -> Snapshot:
        """The same snapshot without tokens."""
        fields = asdict(self)
        del fields["tokens"]
        return Snapshot(**fields)


def digest_of(tokens: bytes) -> str:
    """A hash of the tokens: 32 hexadecimal digits."""
    return xxh3_128_hexdigest(tokens)


def new_id() -> str:
    """A unique id for a snapshot: ``ls-`` and 16 hexadecimal digits."""
    return "ls-" + secrets.token_hex(8)


def own_name(name: str) -> tuple[str, str] | None:
    """The id and suffix of a file whose name is one of llamaslot's; None for other files."""
    match = _OURS.fullmatch(name)
    return (match[1], match[2]) if match else None
