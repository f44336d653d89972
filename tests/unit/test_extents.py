"""Extents and slot files made of them, without a server. With one: tests/real/test_extents.py."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from llamaslot.cache.ids import pack
from llamaslot.errors import SnapshotInvalid
from llamaslot.store import extent as extents
from llamaslot.store.assemble import StateAt, assemble
from llamaslot.store.extent import (
    PART,
    Extent,
    Piece,
    Source,
    differing_tokens,
    verify,
    write_extent,
)
from llamaslot.store.slot_layout import read_layout
from tests.support.slot_files import KINDS, Model, slot_file

TOKENS = [random.Random(1).randrange(1000) for _ in range(60)]
STATES = (9, 20, 33, 47)


class Store:
    """A directory with a growing conversation of one model: saved at 20, 47 and 60 tokens, an extent each."""

    def __init__(self, directory: Path, model: Model) -> None:
        self.directory, self.model = directory, model
        self.pieces: list[Piece] = []
        self.states: dict[int, StateAt] = {}
        start = 0
        for end in (20, 47, 60):
            landing = self.landing(TOKENS[:end], [n for n in STATES if n <= end])
            layout = read_layout(landing)
            keep = [state.n_tokens for state in layout.states if state.n_tokens > start]
            path = directory / f"{end}.extent"
            write_extent(landing, layout, start, end, keep, path)
            self.pieces.append(Piece(path, start, end))
            self.states |= {n: StateAt(path, n) for n in keep}
            start = end

    def landing(self, tokens: list[int], checkpoints: list[int], name: str = "landing") -> Path:
        path = self.directory / name
        path.write_bytes(slot_file(self.model, tokens, checkpoints if self.model.has_states else ()))
        return path

    def cut(self, n_tokens: int) -> bytes:
        pieces = [Piece(p.path, p.start, min(p.end, n_tokens)) for p in self.pieces if p.start < n_tokens]
        earlier = [self.states[n] for n in sorted(self.states) if n < n_tokens]
        target = self.directory / "cut"
        size = assemble(pieces, self.states.get(n_tokens), earlier, target)
        assert size == target.stat().st_size
        return target.read_bytes()


def footer_of(path: Path) -> Extent:
    with Source(path) as source:
        return source.extent()


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(tmp_path, KINDS[request.param])


def test_a_cut_is_the_file_that_the_server_would_have_written_there(store: Store) -> None:
    """At each token, or at each state: byte for byte, but for where the end of a save has become a checkpoint."""
    has_states = store.model.has_states
    for n_tokens in sorted(store.states) if has_states else range(1, 61):
        cut = store.cut(n_tokens)
        checkpoints = [n for n in sorted(store.states) if n <= n_tokens]
        whole = slot_file(store.model, TOKENS[:n_tokens], checkpoints)
        if not has_states or not store.model.layers[1]:
            assert cut == whole
        else:  # pos_min of a checkpoint is as low as its server was told to keep tokens: not to be known afterwards
            assert len(cut) == len(whole)
            assert sum(a != b for a, b in zip(cut, whole, strict=True)) <= 4 * len(checkpoints)


def test_an_extent_says_what_it_has(store: Store) -> None:
    layout = read_layout(store.directory / "landing")
    for piece in store.pieces:
        extent = footer_of(piece.path)
        assert (extent.start, extent.end) == (piece.start, piece.end)
        assert extent.shape == layout.shape
        tokens = piece.path.read_bytes()[extent.tokens.at :][: extent.tokens.size]
        assert tokens == pack(TOKENS[piece.start : piece.end])
        assert verify(piece.path) == extent
        rows = sum(section.size for section in extent.rows)
        assert rows == layout.shape.bytes_per_token * (extent.end - extent.start)
    assert sorted(os.listdir(store.directory)) == ["20.extent", "47.extent", "60.extent", "landing"]


def test_states_alone_are_an_extent(store: Store) -> None:
    """Those at tokens that are known already, worth keeping only later."""
    if not store.model.has_states:
        return
    layout = read_layout(store.directory / "landing")
    path = store.directory / "states"
    extent = write_extent(store.directory / "landing", layout, 60, 60, [33], path)
    assert extent.start == extent.end
    before = store.cut(33)
    store.states[33] = StateAt(path, 33)
    assert store.cut(33) == before


def test_rows_are_compared_bit_for_bit(tmp_path: Path) -> None:
    """Of one conversation none differ; of the same tokens computed by other weights all do."""
    store = Store(tmp_path, KINDS["dense"])
    landing = tmp_path / "landing"
    assert differing_tokens(landing, read_layout(landing), store.pieces, 50, seed=1) == 0
    other = tmp_path / "other"
    other.write_bytes(slot_file(Model(seed=7), TOKENS))
    assert differing_tokens(other, read_layout(other), store.pieces, 50, seed=1) == 50
    assert differing_tokens(other, read_layout(other), [], 50) == 0


# -- faults ----------------------------------------------------------------------------------------------------------


def test_a_damaged_extent_is_found_by_verify(store: Store) -> None:
    """Each bit of it counts. Where a part is used whole, it is found before llama-server sees it, too."""
    path, rng = store.pieces[2].path, random.Random(2)
    data = path.read_bytes()
    for at in rng.sample(range(8, len(data)), 40):
        changed = bytearray(data)
        changed[at] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(SnapshotInvalid):
            verify(path)
        with pytest.raises(SnapshotInvalid):
            store.cut(60)
        assert not (store.directory / "cut").exists()


def test_damage_is_found_where_a_part_is_used_only_partly(tmp_path: Path) -> None:
    """In the rows that are used, or behind them: a checksum covers all rows of a tensor."""
    store = Store(tmp_path, KINDS["dense"])
    cut, path = store.cut(50), store.pieces[2].path
    data, rows = path.read_bytes(), footer_of(path).rows[1]
    for at in (rows.at + 5, rows.at + rows.size - 1):
        changed = bytearray(data)
        changed[at] ^= 1
        path.write_bytes(changed)
        for _ in range(2):
            with pytest.raises(SnapshotInvalid, match="have changed"):
                store.cut(50)
        path.write_bytes(data)
        assert store.cut(50) == cut


def test_an_extent_that_is_used_partly_is_read_whole_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path, KINDS["dense"])
    read = list[Path]()

    def noted(path: Path) -> Extent:
        read.append(path)
        return verify(path)

    monkeypatch.setattr(extents, "verify", noted)
    for n_tokens in (50, 51, 60, 30, 50):
        store.cut(n_tokens)
    assert read == [store.pieces[2].path, store.pieces[1].path]


def test_an_extent_cut_short_is_none(store: Store) -> None:
    path = store.pieces[2].path
    data = path.read_bytes()
    for size in (0, 7, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(SnapshotInvalid):
            footer_of(path)
    path.unlink()
    with pytest.raises(SnapshotInvalid, match="No such file"):
        footer_of(path)


def test_a_lying_footer_is_no_other_error(tmp_path: Path) -> None:
    """With a checksum that fits: the numbers must fit each other and the file."""
    store = Store(tmp_path, KINDS["window"])
    path = store.pieces[0].path
    data = path.read_bytes()
    length = struct.unpack("<QQ8s", data[-24:])[1]
    footer = data[-24 - length : -24].decode()
    lies: list[Callable[[str], str]] = [
        lambda text: text.replace('"start":0', '"start":1'),
        lambda text: text.replace('"end":20', '"end":4611686018427387904'),
        lambda text: text.replace('"row_bytes":16', '"row_bytes":-16'),
        lambda text: text.replace('"tokens":[8,80', '"tokens":[9,80'),
        lambda text: text.replace('"version":1', '"version":2'),
        lambda text: text.replace('"version"', '"conversion"'),
        lambda text: "[" * 100_000,
        lambda text: "",
    ]
    for lie in lies:
        changed = lie(footer).encode()
        assert changed != footer.encode()
        end = struct.pack("<QQ8s", xxhash.xxh3_64_intdigest(changed), len(changed), b"lsextend")
        path.write_bytes(data[: -24 - length] + changed + end)
        with pytest.raises(SnapshotInvalid):
            footer_of(path)
    path.write_bytes(data[:-24] + struct.pack("<QQ8s", 0, 1 << 60, b"lsextend"))
    with pytest.raises(SnapshotInvalid):
        footer_of(path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_is_not_whole_is_not_there(
    store: Store, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever write fails."""
    landing = store.directory / "landing"
    layout = read_layout(landing)
    pwrite = os.pwrite
    before = sorted(os.listdir(store.directory))
    for n_writes in (0, 1, 2, 3):
        left = n_writes

        def fail(fd: int, data: bytes, at: int) -> int:
            nonlocal left
            left -= 1
            if left < 0:
                raise error
            return pwrite(fd, data, at)

        monkeypatch.setattr(os, "pwrite", fail)
        with pytest.raises(type(error)):
            write_extent(landing, layout, 0, 60, [], store.directory / "new.extent")
        left = n_writes
        with pytest.raises(type(error)):
            store.cut(60)
        monkeypatch.setattr(os, "pwrite", pwrite)
        assert sorted(os.listdir(store.directory)) == before


def test_a_landing_file_that_changed_is_not_taken(store: Store) -> None:
    """Its length, between reading the layout and copying."""
    landing = store.directory / "landing"
    layout = read_layout(landing)
    os.truncate(landing, layout.size_bytes - 1)
    with pytest.raises(SnapshotInvalid):
        write_extent(landing, layout, 0, 60, [], store.directory / "new.extent")
    assert not (store.directory / "new.extent").with_suffix(PART).exists()


def test_what_does_not_fit_is_not_put_together(tmp_path: Path) -> None:
    """A gap, tokens that an extent does not have, another shape, a state that is not there or is missing."""
    store = Store(tmp_path, KINDS["hybrid"])
    (tmp_path / "other").mkdir()
    other = Store(tmp_path / "other", Model((2, 0, 4), row_bytes=18))
    first, second, _ = store.pieces
    at_20, at_47 = store.states[20], store.states[47]
    target = tmp_path / "cut"
    for pieces, state in [
        ([second], at_47),
        ([first, Piece(second.path, 21, 47)], at_47),
        ([Piece(first.path, 0, 21)], at_20),
        ([first, other.pieces[1]], at_47),
        ([first], StateAt(first.path, 19)),
        ([first], None),
    ]:
        with pytest.raises(SnapshotInvalid):
            assemble(pieces, state, [], target)
        assert not target.exists()


def test_an_extent_is_read_as_it_was_written(tmp_path: Path) -> None:
    store = Store(tmp_path, KINDS["window"])
    extent = footer_of(store.pieces[0].path)
    assert isinstance(extent, Extent)
    assert [state.n_tokens for state in extent.states] == [9, 20]
    assert extent.state_at(9).pos_min == 0
    with pytest.raises(KeyError):
        extent.state_at(10)
