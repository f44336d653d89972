"""The format of a slot file of llama-server: its words, and what two files must have in common to fit each other.

Little-endian, no padding, no checksum and no lengths but these; so a file is only understood if every byte is::

    header          see header.py
    cache           of the layers with full attention; none on a purely recurrent model
    cache           of the layers with a sliding window, if there are such
    recurrent state, if there is one
    appendix        u32 "SCKP", u32 version, u32 count, then per checkpoint:
                    i64 n_tokens, i32 pos_min, i32 pos_max, 3 x (u64 size, bytes): model, draft model, speculation

    cache           u32 n_streams, then for each stream u32 n_cells and, unless that is 0:
                    the cells (slot_cells.py); u32 v_transposed, n_layers, k_rotation, v_rotation;
                    per layer i32 type, u64 row_bytes, n_cells rows of K; then the same of V (none with MLA)
    recurrent state u32 1, i32 pos, u32 0, u32 0, u32 n_layers, then i32 type, u64 row_bytes, row, again and again

A cache of full attention has one row per token: they are the same bytes in each save of a conversation. A *state* is
what a model that cannot rewind needs to go on at one token: the window's cache, the recurrent state, or both. A file
has one for its end, and one in each checkpoint, behind 8 bytes: a magic and the slot's number.

In a cache all streams but the slot's own are empty. A state is kept without those (``StateParts``), so that it fits a
server with another number of slots.
"""

from __future__ import annotations

import struct

from msgspec import Struct

VERSION = 4  # of the slot file
APPENDIX, APPENDIX_VERSION = 0x504B4353, 1
BLOB_HEAD, BLOB_MAGIC = struct.Struct("<II"), 0xAF143CD8  # magic, slot (a restore ignores it)
CHECKPOINT = struct.Struct("<qii")  # n_tokens, pos_min, pos_max
CACHE_HEAD = struct.Struct("<IIII")  # v_transposed, n_layers, k_rotation, v_rotation
ROW_HEAD = struct.Struct("<iQ")  # type, row_bytes
RECURRENT_HEAD = struct.Struct("<IiIII")  # n_cells, pos, number of sequences, s_transposed, n_layers
APPENDIX_HEAD = struct.Struct("<III")  # magic, version, count

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


class Rows(Struct, frozen=True):
    """The rows of one tensor of one layer: ggml's type, and bytes per row. ``row_bytes`` may be 0."""

    type: int
    row_bytes: int


class CacheShape(Struct, frozen=True):
    """An attention cache: K and V of each layer. ``cell_words``: 32-bit words per cell, more with M-RoPE;
    ``rotation``: of K and V, as the server writes it.
    """

    cell_words: int
    rotation: tuple[int, int]
    k: tuple[Rows, ...]
    v: tuple[Rows, ...]

    @property
    def tensors(self) -> tuple[Rows, ...]:
        return self.k + self.v


class Shape(Struct, frozen=True):
    """What two files must have in common for rows and states of one to fit the other. ``recurrent``: the tensors of a
    recurrent state, () without one. The number of slots does not matter.
    """

    version: int
    attention: CacheShape | None
    window: CacheShape | None
    recurrent: tuple[Rows, ...]

    @property
    def has_states(self) -> bool:
        """Whether a slot can only be resumed at a state. Else it can at any token."""
        return self.window is not None or bool(self.recurrent)

    @property
    def tensors(self) -> tuple[Rows, ...]:
        """The tensors that have a row per token."""
        return () if self.attention is None else self.attention.tensors

    @property
    def bytes_per_token(self) -> int:
        """Of rows. 0 on a purely recurrent model."""
        return sum(tensor.row_bytes for tensor in self.tensors)

    @property
    def kind(self) -> str:
        """dense, window, recurrent or hybrid."""
        if self.recurrent:
            return "recurrent" if self.attention is None else "hybrid"
        return "dense" if self.window is None else "window"
