"""Which model is running is proved by what it does, not by what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaslot.cache.ids import unpack
from llamaslot.llama.identity import (
    N_PROBE_TOKENS,
    TOLERANCE,
    Identity,
    gguf_mark,
    probe_tokens,
    told_properties,
)

BEHAVIOUR = {token: -0.5 * token for token in range(1, 9)}
SAID = {"n_vocab": 259, "size": 1000, "n_slots": 4, "lora": []}


def identity(behaviour: dict[int, float] | None = None, gguf: str | None = "mark", **said: Any) -> Identity:
    return Identity({**SAID, **said}, BEHAVIOUR if behaviour is None else behaviour, gguf)


def moved(by: float) -> dict[int, float]:
    return {token: value + by for token, value in BEHAVIOUR.items()}


@pytest.mark.parametrize(
    ("other", "is_same"),
    [
        (identity(), True),
        (identity(moved(TOLERANCE * 0.9)), True),
        (identity(moved(TOLERANCE * 1.5)), False),
        (identity({**BEHAVIOUR, 3: -9.0}), False),
        (identity(gguf=None), True),  # not to be read now: behaviour decides
        (identity(gguf="other"), False),
        (identity(n_slots=3), False),
        (identity(size=1001), False),
        (identity(lora=[{"id": 0, "scale": 1.0}]), False),
        (identity({}), False),
        (identity({token: BEHAVIOUR[token] for token in (1, 2, 3, 4, 5)}), False),
        (identity({token: BEHAVIOUR[token] for token in (1, 2, 3, 4, 5, 6)}), True),
        (identity({**{token: BEHAVIOUR[token] for token in range(1, 7)}, 100: -4.1, 101: -4.2}), True),
        (identity({token + 100: value for token, value in BEHAVIOUR.items()}), False),
    ],
)
def test_when_snapshots_stay_valid(other: Identity, is_same: bool) -> None:
    """In doubt they do not; both ways round."""
    assert identity().is_same(other) is is_same
    assert other.is_same(identity()) is is_same


@given(
    st.dictionaries(st.integers(0, 2**31), st.floats(-30, 0), min_size=8, max_size=8), st.none() | st.text()
)
def test_an_identity_written_down_is_the_same(behaviour: dict[int, float], gguf: str | None) -> None:
    """What is rounded stays within the tolerance."""
    before = identity(behaviour, gguf)
    after = Identity.from_text(before.to_text())
    assert after is not None
    assert before.is_same(after)
    assert after.to_text() == before.to_text()


@pytest.mark.parametrize(
    "text", ["", "model A", "{}", "[]", '{"told": 1}', '{"behaviour": {"x": 1}, "told": {}}', "1"]
)
def test_what_is_no_identity_is_nobody(text: str) -> None:
    """A sidecar may hold anything."""
    assert Identity.from_text(text) is None


def test_what_the_server_says_is_only_what_a_file_depends_on() -> None:
    """Not the context size or the name: they may change with a flag."""
    meta = {
        "vocab_type": 2,
        "n_vocab": 259,
        "n_ctx": 8192,
        "n_ctx_train": 1,
        "n_embd": 64,
        "n_params": 5,
        "size": 6,
    }
    said = told_properties({"id": "name", "meta": meta}, 4, [])
    assert "n_ctx" not in said
    assert "id" not in said
    assert (said["n_slots"], said["size"]) == (4, 6)
    assert told_properties({}, 4, [])["size"] is None


@pytest.mark.parametrize("n_vocab", [0, 1, 2, 259, 151_936])
def test_the_probe_stays_within_the_vocabulary(n_vocab: int) -> None:
    """Fixed tokens, the same each time."""
    tokens = unpack(probe_tokens(n_vocab))
    assert len(tokens) == N_PROBE_TOKENS
    assert all(0 <= token < max(n_vocab, 2) for token in tokens)
    assert probe_tokens(n_vocab) == probe_tokens(n_vocab)


async def test_the_mark_of_a_file_tells_it_from_others(tmp_path: Path) -> None:
    """Another size, other bytes at its beginning, middle (a tensor) or end; the name does not matter."""
    data = bytes(range(256)) * 40_000
    marks = set()
    for name, content in {
        "a": data,
        "longer": data + b"x",
        "begin": b"x" + data[1:],
        "middle": data[: len(data) // 2] + b"x" * 100_000 + data[len(data) // 2 + 100_000 :],
        "end": data[:-1] + b"x",
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        marks.add(await gguf_mark(path))
    assert len(marks) == 5
    (tmp_path / "same").write_bytes(data)
    assert await gguf_mark(tmp_path / "same") in marks


@pytest.mark.parametrize("size", [0, 1, 100, 5000])
async def test_small_files_have_a_mark_too(tmp_path: Path, size: int) -> None:
    """A draft model for tests is smaller than the samples."""
    path = tmp_path / "small"
    path.write_bytes(b"x" * size)
    assert str(await gguf_mark(path)).startswith(f"{size}-")


async def test_a_file_that_cannot_be_read_has_no_mark(tmp_path: Path) -> None:
    """llama-server may run in a container."""
    assert await gguf_mark(tmp_path / "none") is None
    assert await gguf_mark(tmp_path) is None
