"""The cells of an attention cache in a slot file: which position each of its rows is of. Read, and made.

A cell is ``i32 pos, u32 1 (number of sequences), i32 sequence``. With M-RoPE there are words in between: two more
positions, which are the same for text, and in newer builds the token.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterator

from msgspec import Struct

from llamaslot.cache.ids import WIDTH as WORD

PLAIN, OLDER_MROPE, MROPE = 3, 5, 6  # words per cell
_AT_ONCE = 4096  # cells: 0.1 ms with the GIL held
_MAX_RUNS = 1024


class NoCells(Exception):
    """The words are no cells that llamaslot knows. The text says why. ``is_width``: they are not of this width."""

    def __init__(self, reason: str, is_width: bool = False) -> None:
        super().__init__(reason)
        self.is_width = is_width


class Run(Struct, frozen=True):
    """``n`` tokens from position ``pos`` whose rows lie one after the other from row ``cell`` of each tensor."""

    pos: int
    cell: int
    n: int


class Cells(Struct, frozen=True):
    """``width``: words per cell. ``runs``: in order of position."""

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
        """Whether each position from the lowest to the highest has exactly one cell."""
        return all(run.pos + run.n == after.pos for run, after in zip(self.runs, self.runs[1:], strict=False))


def read_cells(read: Callable[[int, int], bytes], n: int, tokens: array[int]) -> Cells:
    """Read ``n`` cells by ``read(offset, size)``, which raises NoCells if there are no such bytes. ``tokens``: of the
    slot; no position may be beyond them. Raises NoCells.
    """
    faults = []
    for width in (PLAIN, MROPE, OLDER_MROPE):
        try:
            return Cells(width, _runs(read, n, width, tokens))
        except NoCells as error:
            faults.append(error)
    # The others are of widths that these cells do not have.
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
    """How many positions from ``cell`` on count up by one."""
    first, rest = positions[cell], len(positions) - cell
    if positions[-1] == first + rest - 1 and positions[cell:] == array("I", range(first, first + rest)):
        return rest
    length = 1
    while length < rest and positions[cell + length] == first + length:
        length += 1
    return length


def make_cells(tokens: bytes, width: int) -> Iterator[bytes]:
    """The cells of ``tokens``, little-endian int32, from position 0 on, of sequence 0: a few kB at a time."""
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
    """Little-endian u32 as an array."""
    words = array("I")
    words.frombytes(data)
    if sys.byteorder == "big":
        words.byteswap()
    return words
