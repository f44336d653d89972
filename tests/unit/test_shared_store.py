"""A directory that several llamaslots share: which part each has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llamaslot.store.shared_store import StoreUnusable, claim, name_of


def test_each_model_has_a_part_that_is_found_again(tmp_path: Path) -> None:
    """Named after it, another one for another path; the same after a restart."""
    one, other = claim(tmp_path, "/m/qwen.gguf"), claim(tmp_path, "/other/qwen.gguf")
    assert one.directory != other.directory
    assert one.directory.name.startswith("qwen-")
    one.release()
    again = claim(tmp_path, "/m/qwen.gguf")
    assert (again.directory, again.taken) == (one.directory, ())
    for part in (other, again):
        part.release()


def test_a_second_one_of_the_same_model_gets_another_part(tmp_path: Path) -> None:
    """It is told which process has the first; the first that is free is taken."""
    parts = [claim(tmp_path, "m") for _ in range(3)]
    assert len({part.directory for part in parts}) == 3
    assert parts[2].taken == (str(os.getpid()),) * 2
    parts[1].release()
    second = claim(tmp_path, "m")
    assert second.directory == parts[1].directory
    for part in (parts[0], second, parts[2]):
        part.release()


@pytest.mark.parametrize("model", ["/m/a b/ü.gguf", "a/b:Q4_K_M", "..", "x" * 300, "https://h/x.gguf?a=1"])
def test_a_part_is_one_legible_file_name(model: str) -> None:
    """Whatever names the model."""
    name = name_of(model)
    assert "/" not in name
    assert not name.startswith(".")
    assert len(name) < 60


def test_a_store_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    """With its path."""
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnusable, match=r"the store .*file/s cannot be used: Not a directory"):
        claim(tmp_path / "file" / "s", "m")
