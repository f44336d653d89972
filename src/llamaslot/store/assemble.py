"""Puts a slot file of a conversation's first p tokens together from extents and other slot files, for llama-server to
restore.

On a dense model p may be any number. On other models an extent must have the state after p tokens. It is written as the
window's cache and the recurrent state, and once more as a checkpoint, behind earlier ones: after the restore of a
sliding window without that checkpoint, llama-server computes all tokens again.

Blocking, for threads: 0.6 s of CPU per GiB, nearly all of it in the kernel, without the GIL.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from pathlib import Path

import xxhash
from msgspec import Struct

from llamaslot.cache.ids import WIDTH
from llamaslot.errors import SnapshotInvalid
from llamaslot.store.copying import Copier
from llamaslot.store.extent import (
    UNCHECKED,
    Extent,
    KeptState,
    Piece,
    Section,
    Source,
    check_extent,
    check_file,
)
from llamaslot.store.slot_file import (
    APPENDIX,
    APPENDIX_HEAD,
    APPENDIX_VERSION,
    BLOB_HEAD,
    BLOB_MAGIC,
    CACHE_HEAD,
    CHECKPOINT,
    MAGIC,
    ROW_HEAD,
    U32,
    U64,
    Shape,
    make_cells,
)


class DoesNotFit(SnapshotInvalid):
    """The parts do not make up the requested slot file, although each file may be undamaged."""


class StateAt(Struct, frozen=True):
    """The model's state after ``n_tokens`` tokens, in the extent or slot file ``path``."""

    path: Path
    n_tokens: int


def assemble(pieces: Sequence[Piece], state: StateAt | None, earlier: Sequence[StateAt], target: Path) -> int:
    """Write a slot file with the tokens of ``pieces`` to ``target``. Returns its size in bytes.

    ``pieces``: from token 0 to p without a gap. ``state``: after p tokens, None on a dense model. ``earlier``: states
    to write as checkpoints, by number of tokens.

    Checksums are compared: of a section that is copied whole, while it is copied. Where only a part is copied, the
    whole extent, or the whole slot file if its checksum is known, is read before, once in this process.

    Raises SnapshotInvalid, which names the file, if a file is damaged or gone; DoesNotFit; OSError (no space). Nothing
    is left in ``target`` then. The file is not synced.
    """
    with contextlib.ExitStack() as stack:
        sources: dict[Path, tuple[Source, Extent]] = {}
        for path in dict.fromkeys([item.path for item in (*pieces, *earlier, *([state] if state else ()))]):
            source = stack.enter_context(Source(path))
            sources[path] = source, source.extent()
        shape = _common_shape(pieces, sources)
        if shape.has_states is (state is None):
            raise DoesNotFit(
                f"{pieces[-1].path.name}: has no state for a model with states, or one for a model without"
            )
        _check(pieces, sources)
        n_streams = sources[pieces[-1].path][1].n_streams
        writer = _Writer(stack.enter_context(Copier(target)), sources, shape, n_streams)
        writer.write(pieces, state, earlier)
        return writer.size_bytes


def _common_shape(pieces: Sequence[Piece], sources: dict[Path, tuple[Source, Extent]]) -> Shape:
    at = 0
    for piece in pieces:
        extent = sources[piece.path][1]
        if piece.start != at or not extent.start <= piece.start < piece.end <= extent.end:
            raise DoesNotFit(
                f"{piece.path.name}: has [{extent.start}, {extent.end}), not [{at}, {piece.end})"
            )
        at = piece.end
    shape = sources[pieces[-1].path][1].shape
    for path, (_, extent) in sources.items():
        if extent.shape != shape:
            raise DoesNotFit(f"{path.name}: its rows have another shape than {pieces[-1].path.name}")
    return shape


def _check(pieces: Sequence[Piece], sources: dict[Path, tuple[Source, Extent]]) -> None:
    """Check the files whose damage ``_Writer`` would not see, because it reads only a part of them. Raises
    SnapshotInvalid.
    """
    for piece in pieces:
        extent = sources[piece.path][1]
        is_whole = (piece.start, piece.end) == (extent.start, extent.end)
        if piece.checksum is not None:
            check_file(piece.path, piece.checksum)
        elif not is_whole and extent.tokens.checksum != UNCHECKED:
            check_extent(piece.path)


class _Writer:
    def __init__(
        self, copier: Copier, sources: dict[Path, tuple[Source, Extent]], shape: Shape, n_streams: int
    ) -> None:
        self._copier, self._sources, self._shape = copier, sources, shape
        self._n_streams = n_streams

    @property
    def size_bytes(self) -> int:
        return self._copier.at

    def write(self, pieces: Sequence[Piece], state: StateAt | None, earlier: Sequence[StateAt]) -> None:
        tokens = b"".join(self._tokens(piece) for piece in pieces)
        n_tokens = len(tokens) // WIDTH
        write = self._copier.write
        write(struct.pack("<IIIiII", MAGIC, self._shape.version, n_tokens + 4, -1, 1, n_tokens))
        write(tokens)
        write(bytes(4))  # no media
        if self._shape.attention is not None:
            self._rows(pieces, tokens)
        if state is None:
            return
        kept = self._state(state, n_tokens)
        self._state_blocks(state.path, kept)
        earlier = [before for before in earlier if before.n_tokens < n_tokens]
        write(APPENDIX_HEAD.pack(APPENDIX, APPENDIX_VERSION, len(earlier) + 1))
        for before in (*earlier, state):
            self._checkpoint(before.path, self._state(before, before.n_tokens))

    def _tokens(self, piece: Piece) -> bytes:
        source, extent = self._sources[piece.path]
        tokens = source.tokens(extent)
        return tokens[(piece.start - extent.start) * WIDTH : (piece.end - extent.start) * WIDTH]

    def _state(self, state: StateAt, n_tokens: int) -> KeptState:
        try:
            return self._sources[state.path][1].state_at(n_tokens)
        except KeyError:
            raise DoesNotFit(f"{state.path.name}: has no state after {n_tokens} tokens") from None

    def _rows(self, pieces: Sequence[Piece], tokens: bytes) -> None:
        cache, write = self._shape.attention, self._copier.write
        assert cache is not None
        write(struct.pack("<II", self._n_streams, len(tokens) // WIDTH))
        for cells in make_cells(tokens, cache.cell_words):
            write(cells)
        write(CACHE_HEAD.pack(0, len(cache.k), *cache.rotation))
        for index, tensor in enumerate(cache.tensors):
            write(ROW_HEAD.pack(tensor.type, tensor.row_bytes))
            for piece in pieces:
                extent = self._sources[piece.path][1]
                self._part(
                    piece.path, extent.rows[index], tensor.row_bytes,
                    piece.start - extent.start, piece.end - extent.start,
                )  # fmt: skip
        write(bytes(4 * (self._n_streams - 1)))

    def _state_blocks(self, path: Path, state: KeptState) -> None:
        if self._shape.window is not None:
            self._copier.write(U32.pack(self._n_streams))
            self._whole(path, state.window)
            self._copier.write(bytes(4 * (self._n_streams - 1)))
        if self._shape.recurrent:
            self._whole(path, state.recurrent)

    def _checkpoint(self, path: Path, state: KeptState) -> None:
        write = self._copier.write
        size = BLOB_HEAD.size + state.window.size + state.recurrent.size
        if self._shape.window is not None:
            size += 4 * self._n_streams
        write(CHECKPOINT.pack(state.n_tokens, state.pos_min, state.pos_max))
        write(U64.pack(size))
        write(BLOB_HEAD.pack(BLOB_MAGIC, 0))
        self._state_blocks(path, state)
        for section in (state.draft, state.speculation):
            write(U64.pack(section.size))
            self._whole(path, section)

    def _whole(self, path: Path, section: Section) -> None:
        self._part(path, section, 1, 0, section.size)

    def _part(self, path: Path, section: Section, width: int, start: int, end: int) -> None:
        """Append the items [start, end) of a section, of ``width`` bytes each. Raises SnapshotInvalid if these are all
        of its items and its checksum is another.
        """
        checksum = xxhash.xxh3_64()
        self._copier.copy(
            self._sources[path][0].fd, section.at + start * width, (end - start) * width, checksum
        )
        if (end - start) * width == section.size and not section.is_as(checksum.intdigest()):
            raise SnapshotInvalid(f"{path.name}: {section.size} bytes at {section.at} have changed")
