"""Extents: a file with those rows or states of a saved slot that the store did not have before.

An extent has the rows of the tokens [start, end), and states at token counts up to ``end``. It has no rows if the model
is purely recurrent, or if ``start == end``: then it is there only for its states::

    "lsextent" | tokens | rows per tensor | parts per state | footer (JSON) | its u64 xxh3, u64 length | "lsextend"

The footer (``Extent``) has offset, length and checksum of each section. A file that was cut short or not finished has
no footer, so it is no extent. An extent never changes.

A checksum covers a whole section or file. So before only a part of a file is used, all of the file is read and checked
(``check_extent``, ``check_file``). That happens once in this process for each ``FileId``; only a success is remembered.

All functions block while they read or write, so call them in threads. None needs more memory than the footer.
"""

from __future__ import annotations

import functools
import mmap
import os
import random
import struct
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import msgspec
import xxhash
from msgspec import Struct

from llamaslot.cache.ids import WIDTH
from llamaslot.errors import SnapshotInvalid
from llamaslot.file_id import FileId
from llamaslot.store.copying import BLOCK, Copier, checksum_of, sync_directory
from llamaslot.store.slot_file import MAGIC, TOKENS_AT, U32, Shape
from llamaslot.store.slot_layout import SlotLayout, Span, read_layout

VERSION = 1
PART = ".part"  # the suffix of an extent that is being written, instead of its own
HEAD, TAIL = b"lsextent", b"lsextend"
_END = struct.Struct("<QQ8s")  # checksum and length of the footer, TAIL
_FOOTER_GUESS = 64 << 10  # bytes first read from the end: the footer of 64 layers and 16 states has 12 kB
_MAX_FOOTER = 64 << 20
UNCHECKED = -1


class Section(Struct, frozen=True, array_like=True):
    """A section of a file: ``size`` bytes from offset ``at`` on. ``checksum``: their xxh3_64, or UNCHECKED in a slot
    file, which has no checksums.
    """

    at: int
    size: int
    checksum: int

    def is_as(self, checksum: int) -> bool:
        """True if ``checksum`` is the section's, or if the section has none."""
        return self.checksum in (checksum, UNCHECKED)


class KeptState(Struct, frozen=True):
    """A state in an extent: the fields of ``slot_layout.State`` and of its ``StateParts``."""

    n_tokens: int
    pos_min: int
    pos_max: int
    window: Section
    recurrent: Section
    draft: Section
    speculation: Section

    @property
    def sections(self) -> tuple[Section, ...]:
        return self.window, self.recurrent, self.draft, self.speculation

    @property
    def size_bytes(self) -> int:
        return sum(section.size for section in self.sections)


class Extent(Struct, frozen=True):
    """The footer of an extent. ``start``, ``end``: the tokens of the conversation that it has; ``n_streams``: as in the
    saved slot file; ``rows``: one section per tensor of ``shape``; ``size_bytes``: of all that precedes the footer.
    """

    version: int
    start: int
    end: int
    shape: Shape
    n_streams: int
    tokens: Section
    rows: tuple[Section, ...]
    states: tuple[KeptState, ...]
    size_bytes: int

    def state_at(self, n_tokens: int) -> KeptState:
        """The state after ``n_tokens`` tokens. Raises KeyError if there is none."""
        for state in self.states:
            if state.n_tokens == n_tokens:
                return state
        raise KeyError(n_tokens)

    @property
    def sections(self) -> Iterator[Section]:
        yield self.tokens
        yield from self.rows
        for state in self.states:
            yield from state.sections


class Piece(Struct, frozen=True):
    """The tokens [start, end) of a conversation, whose rows are in the extent or slot file ``path``. ``checksum``: of
    the whole file, if it is a slot file whose checksum is known; else None.
    """

    path: Path
    start: int
    end: int
    checksum: int | None = None


def write_extent(
    landing: Path, layout: SlotLayout, start: int, end: int, keep: Collection[int], target: Path
) -> Extent:
    """Write an extent to ``target``: the rows of the tokens [start, end) of the slot file ``landing``, and its states
    at the token counts in ``keep``. The file and its name are synced when this returns. It is written under the suffix
    PART, and removed after an error.

    Raises SnapshotInvalid if ``landing`` has another size than in ``layout``, OSError (no space).
    """
    assert 0 <= start <= end <= layout.n_tokens, f"[{start}, {end}) of {layout.n_tokens} tokens"
    states = [state for state in layout.states if state.n_tokens in keep]
    assert len(states) == len(set(keep)), f"states at {sorted(keep)}"
    with _open(landing, layout.size_bytes) as source, _Writer(target) as writer:
        tokens = writer.data(layout.tokens[start * WIDTH : end * WIDTH])
        rows = [
            writer.spans(source.fd, layout.row_spans(tensor, start, end))
            for tensor in range(len(layout.shape.tensors))
        ]
        kept = [
            KeptState(
                state.n_tokens,
                state.pos_min,
                state.pos_max,
                *(writer.spans(source.fd, [part]) for part in state.parts),
            )
            for state in states
        ]
        return writer.finish(
            Extent(
                VERSION, start, end, layout.shape, layout.n_streams, tokens, tuple(rows), tuple(kept),
                writer.size_bytes,
            )
        )  # fmt: skip


def verify(path: Path) -> Extent:
    """Read a whole extent, compare all checksums, and return its footer. Raises SnapshotInvalid with the reason in one
    line.
    """
    with _open(path) as source:
        extent = source.extent()
        buffer = memoryview(mmap.mmap(-1, BLOCK))
        for section in extent.sections:
            if not section.is_as(checksum_of(source.fd, section.at, section.size, buffer)):
                raise SnapshotInvalid(f"{path.name}: {section.size} bytes at {section.at} have changed")
    return extent


def differing_tokens(
    landing: Path, layout: SlotLayout, pieces: Iterable[Piece], n_tokens: int = 32, seed: int | None = None
) -> int:
    """Compare the rows of ``n_tokens`` random tokens of ``pieces`` with those in the slot file ``landing``. Returns the
    number of tokens whose rows differ.

    Of each token the rows of all tensors are compared, or of 16 random ones if there are more: a difference in one
    layer shows in all later ones. Tokens and shape must be the same in both. Raises SnapshotInvalid, OSError.
    """
    pieces = [piece for piece in pieces if piece.start < piece.end]
    if not pieces or not layout.shape.tensors:
        return 0
    rng, n_different = random.Random(seed), 0
    chosen = rng.choices(pieces, [piece.end - piece.start for piece in pieces], k=n_tokens)
    with _open(landing, layout.size_bytes) as source:
        for piece in pieces:
            if not (n := chosen.count(piece)):
                continue
            with _open(piece.path) as other:
                extent = other.extent()
                for _ in range(n):
                    token = rng.randrange(piece.start, piece.end)
                    for tensor in _some_tensors(layout.shape, rng):
                        row_bytes = layout.shape.tensors[tensor].row_bytes
                        ((at, size),) = layout.row_spans(tensor, token, token + 1)
                        there = extent.rows[tensor].at + (token - extent.start) * row_bytes
                        if source.read(at, size) != other.read(there, row_bytes):
                            n_different += 1
                            break
    return n_different


def _some_tensors(shape: Shape, rng: random.Random) -> Collection[int]:
    n = len(shape.tensors)
    return range(n) if n <= 16 else rng.sample(range(n), 16)


class Source:
    """An extent or slot file opened for reading. A context manager."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises SnapshotInvalid if that fails."""
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SnapshotInvalid(f"{path.name}: cannot be read: {error.strerror or error}") from error
        self.size_bytes = os.fstat(self.fd).st_size

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def read(self, at: int, size: int) -> bytes:
        """Read ``size`` bytes at ``at``. Raises SnapshotInvalid if there are fewer."""
        data = os.pread(self.fd, size, at)
        if len(data) != size:
            raise SnapshotInvalid(f"{self.path.name}: ends at {at + len(data)}, not at {at + size}")
        return data

    def tokens(self, extent: Extent) -> bytes:
        """Read the extent's tokens, and compare their checksum. Raises SnapshotInvalid."""
        data = self.read(extent.tokens.at, extent.tokens.size)
        if not extent.tokens.is_as(xxhash.xxh3_64_intdigest(data)):
            raise SnapshotInvalid(f"{self.path.name}: its tokens have changed")
        return data

    def extent(self) -> Extent:
        """Read the file's footer. For a slot file, make one from its layout (``extent_of``). Raises SnapshotInvalid."""
        name, size = self.path.name, self.size_bytes
        if self.read(0, min(size, 4)) == U32.pack(MAGIC):
            return extent_of(read_layout(self.path), name)
        end = self.read(max(0, size - _FOOTER_GUESS), min(size, _FOOTER_GUESS))
        if len(end) < _END.size or not end.endswith(TAIL):
            raise SnapshotInvalid(f"{name}: no extent, or cut short")
        checksum, length, _ = _END.unpack(end[-_END.size :])
        if length > min(size - _END.size, _MAX_FOOTER):
            raise SnapshotInvalid(f"{name}: a footer of {length} bytes in {size}")
        footer = end[-_END.size - length : -_END.size]
        if length > len(end) - _END.size:
            footer = self.read(size - _END.size - length, length)
        if xxhash.xxh3_64_intdigest(footer) != checksum:
            raise SnapshotInvalid(f"{name}: its footer has changed")
        try:
            extent = msgspec.json.decode(footer, type=Extent)
        except msgspec.DecodeError as error:
            raise SnapshotInvalid(f"{name}: an extent of another form: {error}") from None
        if extent.version != VERSION:
            raise SnapshotInvalid(f"{name}: extent of version {extent.version}; llamaslot knows {VERSION}")
        if fault := _fault(extent, size - _END.size - length):
            raise SnapshotInvalid(f"{name}: {fault}")
        return extent


def extent_of(layout: SlotLayout, name: str) -> Extent:
    """The footer that describes a slot file as an extent of all its tokens. Raises SnapshotInvalid if the file's rows
    are not in the order of its tokens.
    """
    n = layout.n_tokens
    if layout.shape.tensors and [(run.pos, run.cell, run.n) for run in layout.runs] != [(0, 0, n)]:
        raise SnapshotInvalid(f"{name}: its rows are not in the order of its tokens")
    rows = zip(layout.rows_at, layout.shape.tensors, strict=True)
    states = (
        KeptState(
            state.n_tokens, state.pos_min, state.pos_max, *(Section(*part, UNCHECKED) for part in state.parts)
        )
        for state in layout.states
    )
    return Extent(
        version=VERSION,
        start=0,
        end=n,
        shape=layout.shape,
        n_streams=layout.n_streams,
        tokens=Section(TOKENS_AT, n * WIDTH, UNCHECKED),
        rows=tuple(Section(at, tensor.row_bytes * n, UNCHECKED) for at, tensor in rows),
        states=tuple(states),
        size_bytes=layout.size_bytes,
    )


def _fault(extent: Extent, size: int) -> str:
    """Why the sizes in a footer do not fit each other or ``size``, the bytes before the footer; "" if they do."""
    n = extent.end - extent.start
    if not 0 <= extent.start <= extent.end or extent.tokens.size != n * WIDTH:
        return f"{extent.tokens.size} bytes for the tokens [{extent.start}, {extent.end})"
    if [rows.size for rows in extent.rows] != [tensor.row_bytes * n for tensor in extent.shape.tensors]:
        return f"its rows are not those of {n} tokens"
    at = len(HEAD)
    for section in extent.sections:
        if section.at != at or section.size < 0:
            return f"a part at {section.at}, expected at {at}"
        at += section.size
    return "" if at == extent.size_bytes == size else f"{at} bytes of parts, {size} bytes"


def _open(path: Path, size_bytes: int | None = None) -> Source:
    source = Source(path)
    if size_bytes is not None and source.size_bytes != size_bytes:
        source.__exit__()
        raise SnapshotInvalid(f"{path.name}: has {source.size_bytes} bytes now, had {size_bytes}")
    return source


class _Writer:
    """Writes an extent beside ``target``, under the suffix PART. A context manager that removes the file unless
    ``finish`` was called.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._copier = Copier(target.with_suffix(PART))
        self._is_whole = False

    def __enter__(self) -> _Writer:
        try:
            self._copier.write(HEAD)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *args: object) -> None:
        self._copier.close()
        if not self._is_whole:
            self._copier.target.unlink(missing_ok=True)

    @property
    def size_bytes(self) -> int:
        return self._copier.at

    def data(self, data: bytes) -> Section:
        at = self._copier.at
        self._copier.write(data)
        return Section(at, len(data), xxhash.xxh3_64_intdigest(data))

    def spans(self, source: int, spans: Iterable[Span]) -> Section:
        at, checksum = self._copier.at, xxhash.xxh3_64()
        for span in spans:
            self._copier.copy(source, *span, checksum)
        return Section(at, self._copier.at - at, checksum.intdigest())

    def finish(self, extent: Extent) -> Extent:
        """Write the footer, sync the file, give it its name, and sync the directory."""
        footer = msgspec.json.encode(extent)
        self._copier.write(footer)
        self._copier.write(_END.pack(xxhash.xxh3_64_intdigest(footer), len(footer), TAIL))
        os.fsync(self._copier.fd)
        os.rename(self._copier.target, self._target)
        self._is_whole = True
        sync_directory(self._target.parent)
        return extent


_REMEMBERED = 8192  # files whose check or checksum is remembered


def check_extent(path: Path) -> None:
    """Raise SnapshotInvalid, with the reason in one line, unless all checksums of the extent are right."""
    _verified(path, _file_id(path))


@functools.lru_cache(_REMEMBERED)
def _verified(path: Path, file_id: FileId) -> None:
    verify(path)


def check_file(path: Path, checksum: int) -> None:
    """Raise SnapshotInvalid, with the reason in one line, unless the whole file has that checksum. Raises OSError."""
    if checksum_of_file(path) != checksum:
        raise SnapshotInvalid(f"{path.name}: has changed since other snapshots began to need it")


def checksum_of_file(path: Path) -> int:
    """The xxh3_64 of a whole file. Takes a second or more for several GB. Raises SnapshotInvalid, OSError."""
    return _computed(path, _file_id(path))


@functools.lru_cache(_REMEMBERED)
def _computed(path: Path, file_id: FileId) -> int:
    with Source(path) as source:
        return checksum_of(source.fd, 0, source.size_bytes, memoryview(mmap.mmap(-1, BLOCK)))


def _file_id(path: Path) -> FileId:
    try:
        return FileId.of(os.stat(path))
    except OSError as error:
        raise SnapshotInvalid(f"{path.name}: cannot be read: {error.strerror or error}") from error
