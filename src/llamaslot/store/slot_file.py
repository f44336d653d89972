"""The format of llama-server's slot files: reads the tokens in the header, reads and makes cells, and describes the
shape that two files must share so that rows of one fit the other.

A slot file is little-endian, and has no padding, no checksum, and no lengths but these. So llamaslot understands a file
only if it understands every byte::

    header          u32 magic, u32 version, u32 n_words, n_words words
    cache           of the layers with full attention; none on a purely recurrent model
    cache           of the layers with a sliding window, if there are such
    recurrent state, if there is one
    appendix        u32 "SCKP", u32 version, u32 count, then per checkpoint:
                    i64 n_tokens, i32 pos_min, i32 pos_max, 3 x (u64 size, bytes): model, draft model, speculation

    cache           u32 n_streams, then for each stream u32 n_cells and, unless that is 0:
                    the cells; u32 v_transposed, n_layers, k_rotation, v_rotation;
                    per layer i32 type, u64 row_bytes, n_cells rows of K; then the same of V (none with MLA)
    recurrent state u32 1, i32 pos, u32 0, u32 0, u32 n_layers, then i32 type, u64 row_bytes, row, again and again

A cache of full attention has one row per token and tensor. The rows of a token are the same bytes in each save of a
conversation. A *state* is all that a model which cannot rewind needs to go on after one token: the window's cache, the
recurrent state, or both. A file has a state for its end, and one in each checkpoint, behind 8 bytes: a magic and the
slot's number.

In a cache all streams but the slot's own are empty. A state is stored without the empty ones (``StateParts``), so that
it fits a server with another number of slots.

The words of a header are ``-1, 1, n_tokens, tokens..., n_media, first token of each media chunk..., media chunks``;
older builds wrote only the tokens. A media token is -1 in the list. A full disk leaves a truncated file whose header
claims all tokens. So the size that the server reported (``n_written``) must be stored elsewhere and compared.

A cell is ``i32 pos, u32 1 (number of sequences), i32 sequence``. With M-RoPE there are more words before the sequence:
two positions, which are the same as the first for text, and in newer builds the token.
"""

from __future__ import annotations

import asyncio
import os
import struct
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

from msgspec import Struct

from llamaslot.cache.ids import WIDTH as WORD
from llamaslot.errors import SnapshotInvalid

VERSION = 4  # of the slot file
APPENDIX, APPENDIX_VERSION = 0x504B4353, 1
BLOB_HEAD, BLOB_MAGIC = struct.Struct("<II"), 0xAF143CD8  # magic, slot (a restore ignores it)
CHECKPOINT = struct.Struct("<qii")  # n_tokens, pos_min, pos_max
CACHE_HEAD = struct.Struct("<IIII")  # v_transposed, n_layers, k_rotation, v_rotation
ROW_HEAD = struct.Struct("<iQ")  # type, row_bytes
RECURRENT_HEAD = struct.Struct("<IiIII")  # n_cells, pos, number of sequences, s_transposed, n_layers
APPENDIX_HEAD = struct.Struct("<III")  # magic, version, count

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")

MAGIC = 0x67677371  # "qsgg" as it lies in the file
VERSIONS = range(2, 5)  # the header is the same in these versions; a server restores only its own version
# 64 MiB of ids, far above any context. It limits how much is read of a file whose count is damaged.
MAX_TOKENS = 1 << 24

_START = struct.Struct("<III")  # magic, version, n_words
_PACKED = struct.Struct("<iII")  # -1, version of the list, n_tokens
TOKENS_AT = _START.size + _PACKED.size  # offset of the tokens in the packed form
_LIST_VERSION = 1
_NULL = b"\xff\xff\xff\xff"  # LLAMA_TOKEN_NULL, -1

PLAIN, OLDER_MROPE, MROPE = 3, 5, 6  # words per cell
_AT_ONCE = 4096  # cells handled in one step, which holds the GIL for 0.1 ms
_MAX_RUNS = 1024


class Rows(Struct, frozen=True):
    """The rows of one tensor of one layer: ggml's type, and bytes per row. ``row_bytes`` may be 0."""

    type: int
    row_bytes: int


class CacheShape(Struct, frozen=True):
    """The shape of an attention cache. ``k`` and ``v``: the rows of each layer; ``v`` is empty with MLA.
    ``cell_words``: 32-bit words per cell, more with M-RoPE. ``rotation``: the two numbers for K and V that the server
    writes.
    """

    cell_words: int
    rotation: tuple[int, int]
    k: tuple[Rows, ...]
    v: tuple[Rows, ...]

    @property
    def tensors(self) -> tuple[Rows, ...]:
        return self.k + self.v


class Shape(Struct, frozen=True):
    """Two slot files with the same shape fit each other: rows and states of one can be put into the other. The number
    of slots does not matter. ``attention`` and ``window``: the shapes of these caches, None without one. ``recurrent``:
    the tensors of the recurrent state, () without one.
    """

    version: int
    attention: CacheShape | None
    window: CacheShape | None
    recurrent: tuple[Rows, ...]

    @property
    def has_states(self) -> bool:
        """True if the model can resume only at a state; a dense model resumes at any token."""
        return self.window is not None or bool(self.recurrent)

    @property
    def tensors(self) -> tuple[Rows, ...]:
        """The tensors that have a row per token."""
        return () if self.attention is None else self.attention.tensors

    @property
    def bytes_per_token(self) -> int:
        """The bytes of all rows of one token. 0 on a purely recurrent model."""
        return sum(tensor.row_bytes for tensor in self.tensors)

    @property
    def kind(self) -> str:
        """The kind of the model, as a word: dense, window, recurrent or hybrid."""
        if self.recurrent:
            return "recurrent" if self.attention is None else "hybrid"
        return "dense" if self.window is None else "window"


class NoCells(Exception):
    """The words in a file are no cells that llamaslot knows; the text says why. ``is_width``: cells with another number
    of words may fit.
    """

    def __init__(self, reason: str, is_width: bool = False) -> None:
        super().__init__(reason)
        self.is_width = is_width


class Run(Struct, frozen=True):
    """``n`` tokens from position ``pos`` on, whose rows follow each other in each tensor, from row ``cell`` on."""

    pos: int
    cell: int
    n: int


class Cells(Struct, frozen=True):
    """The cells of a cache. ``width``: 32-bit words per cell. ``runs``: in order of position. ``low``, ``high``: the
    lowest and the highest position.
    """

    width: int
    runs: tuple[Run, ...]

    @property
    def low(self) -> int:
        return self.runs[0].pos

    @property
    def high(self) -> int:
        return self.runs[-1].pos + self.runs[-1].n - 1

    @property
    def is_whole(self) -> bool:
        """True if each position from ``low`` to ``high`` has exactly one cell."""
        return all(run.pos + run.n == after.pos for run, after in zip(self.runs, self.runs[1:], strict=False))


def read_cells(read: Callable[[int, int], bytes], n: int, tokens: array[int]) -> Cells:
    """Read ``n`` cells with ``read(offset, size)``, which raises NoCells if the file has no such bytes. ``tokens``:
    those of the slot, with which positions and tokens in the cells are compared. Raises NoCells if no known number of
    words per cell fits.
    """
    faults = []
    for width in (PLAIN, MROPE, OLDER_MROPE):
        try:
            return Cells(width, _runs(read, n, width, tokens))
        except NoCells as error:
            faults.append(error)
    # The most telling fault: those with ``is_width`` come from trying the wrong number of words.
    raise next((fault for fault in faults if not fault.is_width), faults[0])


def _runs(read: Callable[[int, int], bytes], n: int, width: int, tokens: array[int]) -> tuple[Run, ...]:
    runs: list[Run] = []
    for first in range(0, n, _AT_ONCE):
        n_here = min(_AT_ONCE, n - first)
        words = to_words(read(first * width * WORD, n_here * width * WORD))
        positions = words[0::width]
        if words[1::width] != array("I", [1]) * n_here:
            raise NoCells("its cells are not of one sequence each", is_width=True)
        if width > PLAIN and not words[2::width] == words[3::width] == positions:
            raise NoCells("its cells are of media")
        own = words[4::width] if width == MROPE else None
        cell = 0
        while cell < n_here:
            pos, length = positions[cell], _run_length(positions, cell)
            if pos + length > len(tokens):
                raise NoCells(f"a cell at position {pos + length - 1} of {len(tokens)} tokens")
            if own is not None and own[cell : cell + length] != tokens[pos : pos + length]:
                raise NoCells("its cells are of other tokens than its header")
            if runs and runs[-1].pos + runs[-1].n == pos:
                runs[-1] = Run(runs[-1].pos, runs[-1].cell, runs[-1].n + length)
            else:
                runs.append(Run(pos, first + cell, length))
            if len(runs) > _MAX_RUNS:
                raise NoCells("its cells are in no order")
            cell += length
    return tuple(sorted(runs, key=lambda run: run.pos))


def _run_length(positions: array[int], cell: int) -> int:
    """The number of positions from index ``cell`` on, each of which is one more than the previous one."""
    first, rest = positions[cell], len(positions) - cell
    if positions[-1] == first + rest - 1 and positions[cell:] == array("I", range(first, first + rest)):
        return rest
    length = 1
    while length < rest and positions[cell + length] == first + length:
        length += 1
    return length


def make_cells(tokens: bytes, width: int) -> Iterator[bytes]:
    """The cells of ``tokens`` (little-endian int32), from position 0 on and of sequence 0, some kB at a time.
    ``width``: 32-bit words per cell.
    """
    for at in range(0, len(tokens), _AT_ONCE * WORD):
        ids = to_words(tokens[at : at + _AT_ONCE * WORD])
        n, first = len(ids), at // WORD
        words = array("I", bytes(WORD * width * n))
        words[0::width] = positions = array("I", range(first, first + n))
        words[1::width] = array("I", [1]) * n
        if width > PLAIN:
            words[2::width] = words[3::width] = positions
        if width == MROPE:
            words[4::width] = ids
        if sys.byteorder == "big":
            words.byteswap()
        yield words.tobytes()


def to_words(data: bytes) -> array[int]:
    """Little-endian 32-bit words as an array."""
    words = array("I")
    words.frombytes(data)
    if sys.byteorder == "big":
        words.byteswap()
    return words


class SlotFile(Struct, frozen=True):
    """The header of a slot file.

    ``tokens``: little-endian int32 bytes, up to the first media token; ``n_tokens`` counts all tokens.
    ``size_bytes``: the actual size of the whole file.
    """

    tokens: bytes
    n_tokens: int
    has_media: bool
    size_bytes: int


async def read_slot_file(path: Path) -> SlotFile:
    """Read the header of the slot file ``path``: at most 12 + 4 * (n_tokens + 4) bytes.

    Raises SnapshotInvalid, with the reason in one line, for a file that is missing or unreadable (``__cause__`` is the
    OSError), too short, or no slot file of a known version. Canceling is safe.
    """
    # One call of a thread opens, reads and closes the file: aiofiles took 1.7 times as long, and left the file open if
    # it was cancelled in between.
    return await asyncio.to_thread(read_slot_file_now, path)


def read_slot_file_now(path: Path) -> SlotFile:
    """As ``read_slot_file``, but blocking."""
    try:
        with open(path, "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            start = file.read(_START.size + _PACKED.size)
            n_words = _n_words(path.name, start, size_bytes)
            n_tokens, is_packed = _n_tokens(path.name, start, n_words)
            if is_packed:
                body = file.read((n_tokens + 1) * WORD)
            else:
                body = start[_START.size : _START.size + n_words * WORD]
                body += file.read(n_words * WORD - len(body))
    except OSError as error:
        raise SnapshotInvalid(f"{path.name}: cannot be read: {error.strerror or error}") from error
    if len(body) < (n_tokens + is_packed) * WORD:
        raise SnapshotInvalid(f"{path.name}: cut short in its header of {n_tokens} tokens")
    tokens, n_media = body[: n_tokens * WORD], 0
    if is_packed:
        n_media = int.from_bytes(body[n_tokens * WORD :], "little")
        if n_media == 0 and n_words != n_tokens + 4:
            raise SnapshotInvalid(
                f"{path.name}: {n_words} words do not fit its {n_tokens} tokens without media"
            )
    text = _before_media(tokens)
    return SlotFile(
        tokens=text,
        n_tokens=n_tokens,
        has_media=n_media > 0 or len(text) < len(tokens),
        size_bytes=size_bytes,
    )


def slot_file_head(tokens: bytes) -> bytes:
    """The header that a current llama-server writes for ``tokens`` (little-endian int32), as bytes."""
    n_tokens = len(tokens) // WORD
    start = _START.pack(MAGIC, VERSIONS[-1], n_tokens + 4) + _PACKED.pack(-1, _LIST_VERSION, n_tokens)
    return start + tokens + bytes(WORD)


def _n_words(name: str, start: bytes, size_bytes: int) -> int:
    """The number of words in the header, which must fit into the file. Raises SnapshotInvalid."""
    if len(start) < _START.size:
        raise SnapshotInvalid(f"{name}: {size_bytes} bytes are too few for a slot file")
    magic, version, n_words = _START.unpack_from(start)
    if magic != MAGIC:
        raise SnapshotInvalid(f"{name}: no slot file: it begins with {magic:#010x}, not with {MAGIC:#010x}")
    if version not in VERSIONS:
        known = f"{VERSIONS.start} to {VERSIONS.stop - 1}"
        raise SnapshotInvalid(f"{name}: slot file of version {version}; llamaslot knows {known}")
    if _START.size + n_words * WORD > size_bytes:
        raise SnapshotInvalid(f"{name}: claims {n_words} words of header, but has {size_bytes} bytes in all")
    return int(n_words)


def _n_tokens(name: str, start: bytes, n_words: int) -> tuple[int, bool]:
    """The number of tokens in the header, and True if they are in the packed form of newer builds. Raises
    SnapshotInvalid.
    """
    is_packed = n_words > 0 and start.startswith(_NULL, _START.size)
    n_tokens = n_words
    if is_packed:
        if n_words < 4:
            raise SnapshotInvalid(f"{name}: a token list of {n_words} words is too short")
        _, list_version, n_tokens = _PACKED.unpack_from(start, _START.size)
        if list_version != _LIST_VERSION:
            raise SnapshotInvalid(
                f"{name}: token list of version {list_version}; llamaslot knows {_LIST_VERSION}"
            )
        if n_tokens + 4 > n_words:
            raise SnapshotInvalid(f"{name}: claims {n_tokens} tokens in {n_words} words")
    if n_tokens > MAX_TOKENS:
        raise SnapshotInvalid(f"{name}: claims {n_tokens} tokens, more than {MAX_TOKENS}")
    return n_tokens, is_packed


def _before_media(tokens: bytes) -> bytes:
    """The tokens before the first -1. A hit of ``find``, which is as fast as memchr, may lie across two tokens: skip
    it.
    """
    at = tokens.find(_NULL)
    while at >= 0 and at % WORD:
        at = tokens.find(_NULL, at + 1)
    return tokens if at < 0 else tokens[:at]
