"""Finds where the rows of each token, and the states at certain tokens, lie in a slot file of llama-server.
``slot_file`` describes the format.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from msgspec import Struct

from llamaslot.cache.ids import WIDTH
from llamaslot.errors import SnapshotInvalid
from llamaslot.store.slot_file import (
    APPENDIX,
    APPENDIX_HEAD,
    APPENDIX_VERSION,
    BLOB_HEAD,
    BLOB_MAGIC,
    CACHE_HEAD,
    CHECKPOINT,
    RECURRENT_HEAD,
    ROW_HEAD,
    U32,
    U64,
    VERSION,
    CacheShape,
    Cells,
    NoCells,
    Rows,
    Run,
    Shape,
    read_cells,
    read_slot_file_now,
    to_words,
)

# Far above what exists. They limit how much work a damaged file can cause.
_MAX_LAYERS, _MAX_STREAMS, _MAX_CHECKPOINTS, _MAX_TYPE = 2048, 1024, 4096, 128

Span: TypeAlias = tuple[int, int]  # offset and size in bytes


class LayoutUnknown(SnapshotInvalid):
    """llamaslot cannot find the rows in a slot file: the file is damaged, cut short, or of a kind that llamaslot does
    not know. Such a file can only be kept and restored whole.
    """


class StateParts(Struct, frozen=True):
    """Where the parts of a state lie in a file. ``window``: the window's cache, from its n_cells to its last row of V;
    ``recurrent``: the whole recurrent state; ``draft`` and ``speculation`` belong to a draft model. A part that does
    not exist has size 0.
    """

    window: Span = (0, 0)
    recurrent: Span = (0, 0)
    draft: Span = (0, 0)
    speculation: Span = (0, 0)

    def __iter__(self) -> Iterator[Span]:
        return iter((self.window, self.recurrent, self.draft, self.speculation))


class State(Struct, frozen=True):
    """The model's state after ``n_tokens`` tokens. ``pos_min``, ``pos_max``: as in a checkpoint of llama-server."""

    n_tokens: int
    pos_min: int
    pos_max: int
    parts: StateParts

    @property
    def size_bytes(self) -> int:
        return sum(size for _, size in self.parts)


class SlotLayout(Struct, frozen=True):
    """The layout of a slot file of which every byte was understood. ``tokens``: little-endian int32 bytes.
    ``n_streams``: as the server wrote it. ``rows_at``: for each of ``shape.tensors``, the offset of its first row in
    the file. ``runs``: which rows belong to which tokens, in order of positions. ``checkpoints``: in the order of the
    appendix. ``end``: the state after all tokens, None on a dense model.
    """

    tokens: bytes
    shape: Shape
    n_streams: int
    rows_at: tuple[int, ...]
    runs: tuple[Run, ...]
    checkpoints: tuple[State, ...]
    end: State | None
    size_bytes: int

    @property
    def n_tokens(self) -> int:
        return len(self.tokens) // WIDTH

    @property
    def states(self) -> tuple[State, ...]:
        """All states, ascending by number of tokens: the checkpoints, and ``end`` unless a checkpoint is there."""
        states = {} if self.end is None else {self.end.n_tokens: self.end}
        states |= {state.n_tokens: state for state in self.checkpoints}
        return tuple(states[n] for n in sorted(states))

    def row_spans(self, tensor: int, start: int, end: int) -> Iterator[Span]:
        """The ranges of the file with the rows of the tokens [start, end), of ``shape.tensors[tensor]``."""
        row_bytes, first = self.shape.tensors[tensor].row_bytes, self.rows_at[tensor]
        for run in self.runs:
            low, high = max(start, run.pos), min(end, run.pos + run.n)
            if low < high:
                yield first + (run.cell + low - run.pos) * row_bytes, (high - low) * row_bytes


def read_layout(path: Path) -> SlotLayout:
    """Find the layout of the slot file ``path``. Reads the header and the words before each group of rows, no rows.

    Raises LayoutUnknown with the reason in one line, SnapshotInvalid as ``read_slot_file`` does. Blocking: call it in a
    thread. It holds the GIL for at most 0.1 ms at a time.
    """
    header = read_slot_file_now(path)
    if header.has_media:
        raise LayoutUnknown(f"{path.name}: holds media")
    if not header.n_tokens:
        raise LayoutUnknown(f"{path.name}: holds no tokens")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise LayoutUnknown(f"{path.name}: cannot be read: {error.strerror or error}") from error
    try:
        return _Parser(path.name, fd, header.tokens, header.size_bytes).layout()
    except OSError as error:
        raise LayoutUnknown(f"{path.name}: cannot be read: {error.strerror or error}") from error
    finally:
        os.close(fd)


class _Misfit(Exception):
    """The bytes at some offset are not what the file should have there: ``args`` are the reason and the offset."""


class _Cache(Struct, frozen=True):
    """An attention cache in the file. ``core``: the bytes of its one stream that is not empty. A state keeps these."""

    shape: CacheShape
    n_streams: int
    cells: Cells
    core: Span
    rows_at: tuple[int, ...]


class _Recurrent(Struct, frozen=True):
    tensors: tuple[Rows, ...]
    pos: int
    core: Span


class _Parser:
    """Parses one slot file. The file does not tell the kind of model, so the parser tries each possible order of
    blocks. Exactly one must fit.
    """

    def __init__(self, name: str, fd: int, tokens: bytes, size: int) -> None:
        self._name, self._fd, self._tokens, self._size = name, fd, tokens, size
        self._n_tokens = len(tokens) // WIDTH
        self._ids = to_words(tokens)
        self._caches: dict[tuple[int, int, bool], tuple[_Cache, int] | _Misfit] = {}

    def layout(self) -> SlotLayout:
        start = self._first_block()
        found: list[SlotLayout] = []
        # If no order fits, report the reason of the attempt that got furthest into the file.
        furthest, reason = -1, ""
        for kinds in ("c", "cc", "cr", "ccr", "r", "m", "mr"):
            try:
                found.append(self._as(kinds, start))
            except _Misfit as misfit:
                at = misfit.args[1]
                if at > furthest:
                    furthest, reason = at, misfit.args[0]
        if len(found) != 1:
            raise LayoutUnknown(f"{self._name}: {reason if not found else 'can be read in two ways'}")
        return found[0]

    def _first_block(self) -> int:
        version, n_words, first = struct.unpack("<4xIIi", self._read(0, 16))
        if version != VERSION:
            raise LayoutUnknown(
                f"{self._name}: slot file of version {version}; rows are known in version {VERSION}"
            )
        if first != -1 or n_words != self._n_tokens + 4:
            raise LayoutUnknown(f"{self._name}: its tokens are in the form of an older build")
        return int(12 + n_words * 4)

    def _as(self, kinds: str, at: int) -> SlotLayout:
        """Parse the file as blocks of these kinds, one letter each: "c" a cache, "m" a cache without V (MLA), "r" a
        recurrent state. Raises _Misfit.
        """
        attention: _Cache | None = None
        window: _Cache | None = None
        recurrent: _Recurrent | None = None
        for kind in kinds:
            if kind == "r":
                recurrent, at = self._recurrent(at, self._size)
            elif attention is None:
                attention, at = self._cache(at, self._size, has_v=kind == "c")
            else:
                window, at = self._cache(at, self._size, has_v=True)
            self._check_end(at, attention, window, recurrent)
        shape = Shape(
            VERSION,
            attention.shape if attention else None,
            window.shape if window else None,
            recurrent.tensors if recurrent else (),
        )
        checkpoints = self._appendix(at, shape)
        end = None
        if shape.has_states:
            parts = StateParts(
                window=window.core if window else (0, 0), recurrent=recurrent.core if recurrent else (0, 0)
            )
            # llama-server goes back to a checkpoint only if its pos_min is below the window of the next token.
            pos_min = max(0, window.cells.low - 1) if window else self._n_tokens - 1
            end = State(self._n_tokens, pos_min, self._n_tokens - 1, parts)
        return SlotLayout(
            tokens=self._tokens,
            shape=shape,
            n_streams=attention.n_streams if attention else 1,
            rows_at=attention.rows_at if attention else (),
            runs=attention.cells.runs if attention else (),
            checkpoints=checkpoints,
            end=end,
            size_bytes=self._size,
        )

    def _check_end(
        self, at: int, attention: _Cache | None, window: _Cache | None, recurrent: _Recurrent | None
    ) -> None:
        """Raise _Misfit unless the blocks up to ``at`` hold all tokens of the slot."""
        n, last = self._n_tokens, self._n_tokens - 1
        if attention is not None:
            cells = attention.cells
            if not cells.is_whole or (cells.low, cells.high) != (0, last):
                raise _Misfit(f"its cells are not those of its {n} tokens", at)
        if window is not None and attention is not None:
            cells = window.cells
            if not cells.is_whole or cells.high != last or window.n_streams != attention.n_streams:
                raise _Misfit(f"its window does not end with its {n} tokens", at)
        if recurrent is not None and recurrent.pos != last:
            raise _Misfit(f"its recurrent state is at {recurrent.pos}, not after its {n} tokens", at)

    # -- blocks --------------------------------------------------------------------------------------------------

    def _cache(self, at: int, limit: int, has_v: bool) -> tuple[_Cache, int]:
        key = at, limit, has_v
        if key not in self._caches:
            try:
                self._caches[key] = self._read_cache(at, limit, has_v)
            except _Misfit as misfit:
                self._caches[key] = misfit
        found = self._caches[key]
        if isinstance(found, _Misfit):
            raise found
        return found

    def _read_cache(self, at: int, limit: int, has_v: bool) -> tuple[_Cache, int]:
        n_streams = self._u32(at, limit)
        if not 0 < n_streams <= _MAX_STREAMS:
            raise _Misfit(f"{n_streams} streams at {at}", at)
        at, cache = at + 4, None
        for _ in range(n_streams):
            n_cells = self._u32(at, limit)
            if n_cells and cache is not None:
                raise _Misfit("cells in more than one stream", at)
            if n_cells:
                cache, at = self._read_stream(at, n_cells, n_streams, limit, has_v)
            else:
                at += 4
        if cache is None:
            raise _Misfit("no cells", at)
        return cache, at

    def _read_stream(
        self, at: int, n_cells: int, n_streams: int, limit: int, has_v: bool
    ) -> tuple[_Cache, int]:
        core_at = at
        at += 4
        if n_cells > self._n_tokens:
            raise _Misfit(f"{n_cells} cells for {self._n_tokens} tokens", at)
        cells_at = at

        def read(offset: int, size: int) -> bytes:
            if cells_at + offset + size > limit:
                raise NoCells(f"{n_cells} cells, cut short at {limit}", is_width=True)
            return self._read(cells_at + offset, size)

        try:
            cells = read_cells(read, n_cells, self._ids)
        except NoCells as error:
            raise _Misfit(str(error), at) from None
        at += n_cells * cells.width * WIDTH
        v_transposed, n_layers, *rotation = CACHE_HEAD.unpack(self._within(at, CACHE_HEAD.size, limit))
        at += CACHE_HEAD.size
        if v_transposed:
            raise _Misfit("V is transposed: start llama-server with --flash-attn on", sys.maxsize)
        if not 0 < n_layers <= _MAX_LAYERS:
            raise _Misfit(f"{n_layers} layers at {at}", at)
        tensors, rows_at = [], []
        for _ in range(n_layers * (2 if has_v else 1)):
            tensor = self._rows(at, limit)
            at += ROW_HEAD.size
            tensors.append(tensor)
            rows_at.append(at)
            at += tensor.row_bytes * n_cells
            if at > limit:
                raise _Misfit(f"cut short: rows up to {at} in {limit} bytes", limit)
        shape = CacheShape(
            cells.width, (rotation[0], rotation[1]), tuple(tensors[:n_layers]), tuple(tensors[n_layers:])
        )
        return _Cache(shape, n_streams, cells, (core_at, at - core_at), tuple(rows_at)), at

    def _recurrent(self, at: int, limit: int) -> tuple[_Recurrent, int]:
        core_at = at
        n_cells, pos, n_sequences, transposed, n_layers = RECURRENT_HEAD.unpack(
            self._within(at, RECURRENT_HEAD.size, limit)
        )
        if (n_cells, n_sequences, transposed) != (1, 0, 0) or not 0 < n_layers <= _MAX_LAYERS:
            raise _Misfit(f"no recurrent state at {at}", at)
        at += RECURRENT_HEAD.size
        tensors = []
        while at < limit and self._u32(at, limit) != APPENDIX:
            tensor = self._rows(at, limit)
            at += ROW_HEAD.size + tensor.row_bytes
            tensors.append(tensor)
            if at > limit or len(tensors) > 2 * n_layers:
                raise _Misfit("its recurrent state is cut short, or of another form", limit)
        if not tensors:
            raise _Misfit("a recurrent state without rows", at)
        return _Recurrent(tuple(tensors), pos, (core_at, at - core_at)), at

    def _appendix(self, at: int, shape: Shape) -> tuple[State, ...]:
        if at == self._size:
            return ()
        magic, version, count = APPENDIX_HEAD.unpack(self._within(at, APPENDIX_HEAD.size, self._size))
        if magic != APPENDIX:
            raise _Misfit(f"bytes after its end at {at}, or another kind of model", at)
        if version != APPENDIX_VERSION or count > _MAX_CHECKPOINTS:
            raise _Misfit(f"{count} checkpoints of version {version}", at)
        if count and not shape.has_states:
            raise _Misfit("checkpoints of a model without states", at)
        at += APPENDIX_HEAD.size
        states = []
        for _ in range(count):
            n_tokens, pos_min, pos_max = CHECKPOINT.unpack(self._within(at, CHECKPOINT.size, self._size))
            at += CHECKPOINT.size
            blobs = []
            for _ in range(3):
                (size,) = U64.unpack(self._within(at, U64.size, self._size))
                at += U64.size
                if at + size > self._size:
                    raise _Misfit("its checkpoints are cut short", at)
                blobs.append((at, size))
                at += size
            if not 0 < n_tokens <= self._n_tokens or not 0 <= pos_min <= pos_max == n_tokens - 1:
                raise _Misfit(f"a checkpoint of {n_tokens} tokens, positions {pos_min} to {pos_max}", at)
            parts = self._blob(*blobs[0], shape, n_tokens)
            states.append(State(n_tokens, pos_min, pos_max, StateParts(*parts, blobs[1], blobs[2])))
        if at != self._size:
            raise _Misfit(f"{self._size - at} bytes after its last checkpoint", at)
        return tuple(states)

    def _blob(self, at: int, size: int, shape: Shape, n_tokens: int) -> tuple[Span, Span]:
        """Where the window's cache and the recurrent state lie in a checkpoint of ``size`` bytes at ``at``. Raises
        _Misfit.
        """
        limit = at + size
        magic, sequence = BLOB_HEAD.unpack(self._within(at, BLOB_HEAD.size, limit))
        if magic != BLOB_MAGIC or sequence >= _MAX_STREAMS:
            raise _Misfit("a checkpoint of another form", at)
        at += BLOB_HEAD.size
        window = recurrent = (0, 0)
        if shape.window is not None:
            cache, at = self._read_cache(at, limit, has_v=bool(shape.window.v))
            cells = cache.cells
            if cache.shape != shape.window or not cells.is_whole or cells.high != n_tokens - 1:
                raise _Misfit("a checkpoint whose window is another", at)
            window = cache.core
        if shape.recurrent:
            state, at = self._recurrent(at, limit)
            if state.tensors != shape.recurrent or state.pos != n_tokens - 1:
                raise _Misfit("a checkpoint whose recurrent state is another", at)
            recurrent = state.core
        if at != limit:
            raise _Misfit("a checkpoint that is longer than its state", at)
        return window, recurrent

    # -- bytes ---------------------------------------------------------------------------------------------------

    def _rows(self, at: int, limit: int) -> Rows:
        type_, row_bytes = ROW_HEAD.unpack(self._within(at, ROW_HEAD.size, limit))
        if not 0 <= type_ < _MAX_TYPE or row_bytes > limit - at:
            raise _Misfit(f"rows of type {type_} with {row_bytes} bytes at {at}", at)
        return Rows(type_, row_bytes)

    def _u32(self, at: int, limit: int) -> int:
        return int(U32.unpack(self._within(at, U32.size, limit))[0])

    def _within(self, at: int, size: int, limit: int) -> bytes:
        if at + size > limit:
            raise _Misfit(f"cut short at {limit}", limit)
        return self._read(at, size)

    def _read(self, at: int, size: int) -> bytes:
        data = os.pread(self._fd, size, at)
        if len(data) != size:
            raise LayoutUnknown(f"{self._name}: is {at + len(data)} bytes long, was {self._size}")
        return data
