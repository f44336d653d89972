"""Where rows and states lie in a slot file, and what is refused. Real files: tests/real/test_extents.py."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from llamaslot.cache.ids import pack
from llamaslot.errors import SnapshotInvalid
from llamaslot.store.slot_layout import LayoutUnknown, SlotLayout, read_layout
from tests.support.slot_files import KINDS, Model, row, slot_file

TOKENS = [random.Random(1).randrange(1000) for _ in range(40)]
CHECKPOINTS = (9, 30)


def layout_of(path: Path, data: bytes) -> SlotLayout:
    path.write_bytes(data)
    return read_layout(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "slot"


@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_and_state_is_found(kind: str, slot: int, path: Path) -> None:
    """In files of either slot."""
    model = KINDS[kind]
    checkpoints = CHECKPOINTS if model.has_states else ()
    data = slot_file(model, TOKENS, checkpoints, slot)
    layout = layout_of(path, data)
    assert layout.tokens == pack(TOKENS)
    assert layout.shape.kind == kind.split(" ")[0].replace("mrope", "dense").replace("mla", "dense")
    assert [state.n_tokens for state in layout.states] == ([*checkpoints, 40] if model.has_states else [])
    for tensor in range(len(layout.shape.tensors)):
        for pos in (0, 17, 39):
            ((at, size),) = layout.row_spans(tensor, pos, pos + 1)
            assert data[at : at + size] == row(model, TOKENS[: pos + 1], tensor)
    for state in layout.states:
        # the same conversation, saved when it had so many tokens
        short = slot_file(model, TOKENS[: state.n_tokens], (), slot)
        end = layout_of(path, short).end
        assert end is not None
        for (at, size), (there, n) in zip(state.parts, end.parts, strict=True):
            assert data[at : at + size] == short[there : there + n]


def test_rows_in_another_order_are_found(path: Path) -> None:
    """As unified KV leaves them, where slots take turns: the first 16 tokens lie behind the others."""
    model = Model(slots=1)
    data = bytearray(slot_file(model, TOKENS))
    cells = bytes(data).index(struct.pack("<iii", 0, 1, 0))
    for first, size in ((cells, 12), (len(data) - 4 * 40 * 16 - 3 * 12, 16)):
        starts = [first] if size == 12 else [first + tensor * (40 * 16 + 12) for tensor in range(4)]
        for at in starts:
            part = data[at : at + 40 * size]
            data[at : at + 40 * size] = part[16 * size :] + part[: 16 * size]
    layout = layout_of(path, bytes(data))
    assert len(layout.runs) == 2
    for tensor in range(4):
        found = b"".join(data[at : at + size] for at, size in layout.row_spans(tensor, 10, 20))
        assert found == b"".join(row(model, TOKENS[: pos + 1], tensor) for pos in range(10, 20))


def test_the_number_of_slots_is_not_part_of_the_shape(path: Path) -> None:
    """Rows and states fit a server that has others."""
    shapes = {
        layout_of(path, slot_file(replace(KINDS["window"], slots=n), TOKENS, CHECKPOINTS)).shape
        for n in (1, 2, 4)
    }
    assert len(shapes) == 1


def test_other_rows_are_another_shape(path: Path) -> None:
    models = [*KINDS.values(), Model((3, 0, 0)), Model(row_bytes=18), Model((2, 0, 4), state_bytes=32)]
    assert len({layout_of(path, slot_file(model, TOKENS)).shape for model in models}) == len(models)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("transposed", "--flash-attn on"),
        ("version", "version 3"),
        ("two streams", "more than one stream"),
        ("longer", "after its end"),
        ("position", "cells"),
        ("empty", "no tokens"),
        ("checkpoint", "positions"),
    ],
)
def test_what_cannot_be_told_apart_is_refused_with_the_reason(change: str, reason: str, path: Path) -> None:
    model = KINDS["window" if change == "checkpoint" else "dense"]
    data = bytearray(slot_file(model, TOKENS, (9,) if model.has_states else ()))
    cells = 12 + 4 * 44 + 8
    match change:
        case "transposed":
            struct.pack_into("<I", data, cells + 40 * 12, 1)
        case "version":
            struct.pack_into("<I", data, 4, 3)
        case "two streams":
            data[-4:] = struct.pack("<I", 1)
        case "longer":
            data += b"more bytes than there should be"
        case "position":
            struct.pack_into("<i", data, cells + 12 * 5, 6)
        case "empty":
            data = bytearray(struct.pack("<IIIiiI", 0x67677371, 4, 4, -1, 1, 0).ljust(48, b"\0"))
        case "checkpoint":
            at = bytes(data).index(struct.pack("<qii", 9, 0, 8))
            struct.pack_into("<q", data, at, 41)
    with pytest.raises(LayoutUnknown, match=reason):
        layout_of(path, bytes(data))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_anywhere_is_refused(kind: str, path: Path) -> None:
    """But at the end of a block: then it is a file of another kind of model, or one without checkpoints."""
    model = KINDS[kind]
    data = slot_file(model, TOKENS, CHECKPOINTS if model.has_states else ())
    whole, rng = layout_of(path, data), random.Random(3)
    for size in {0, 1, *rng.sample(range(len(data)), 100)} - {data.rfind(b"SCKP")}:
        try:
            layout = layout_of(path, data[:size])
        except SnapshotInvalid:
            continue
        assert layout.shape != whole.shape


@pytest.mark.parametrize("kind", KINDS)
def test_lying_words_are_refused_or_change_no_length(kind: str, path: Path) -> None:
    """Before, between and behind the rows, with values that lengths and counts should not have: never another error,
    and what is understood lies within the file."""
    model, rng = KINDS[kind], random.Random(4)
    data = slot_file(model, TOKENS[:12], (5,) if model.has_states else ())
    n_understood = 0
    for at in rng.sample(range(len(data) - 3), 150):
        for value in rng.sample((0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF), 2):
            changed = data[:at] + struct.pack("<I", value) + data[at + 4 :]
            try:
                layout = layout_of(path, changed)
            except SnapshotInvalid:
                continue
            n_understood += 1
            assert layout.n_tokens == 12
            for state in layout.states:
                assert all(at >= 0 and at + size <= len(data) for at, size in state.parts)
            for tensor in range(len(layout.shape.tensors)):
                assert sum(size for _, size in layout.row_spans(tensor, 0, 12)) == 12 * model.row_bytes
    assert n_understood, "changed rows are still rows"
