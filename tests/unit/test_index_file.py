"""The copy of an index on disk: what is written is read again, whatever is damaged, and writing disturbs nothing."""

from __future__ import annotations

import asyncio
import errno
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from xxhash import xxh3_128

from llamaslot.cache.changes import Changes
from llamaslot.cache.ids import pack
from llamaslot.cache.prefix_index import PrefixIndex
from llamaslot.llama.identity import Identity
from llamaslot.store import index_file
from llamaslot.store.index_file import IndexFile
from llamaslot.tasks import TaskOwner

PROBS = dict.fromkeys(range(8), -1.0)
MODEL = Identity({"n_vocab": 9}, PROBS)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is written after six changes, not after a thousand."""
    monkeypatch.setattr(index_file, "MIN_CHANGES", 5)


class Held:
    """An index whose changes are counted, and its file."""

    def __init__(self, path: Path) -> None:
        self.index, self.changes, self.tasks = PrefixIndex[str](), Changes(), TaskOwner()
        self.file = IndexFile(path, MODEL, self.tasks)

    def insert(self, holder: str, tokens: bytes) -> None:
        self.index.insert(holder, tokens)
        self.changes.note(tokens)
        self.file.consider(self.index, self.changes)

    def fill(self, n: int = 6) -> None:
        for i in range(n):
            self.insert(f"ls-{i}", pack([1, 2, *range(i)]))

    async def read(self, model: Identity = MODEL) -> dict[str, bytes]:
        """What a next start finds."""
        index = await IndexFile(self.file.path, model, self.tasks).read()
        index.check()
        return contents(index)


def contents(index: PrefixIndex[str]) -> dict[str, bytes]:
    return {holder: index.tokens(holder) for holder in index.holders()}


@pytest.fixture
def held(tmp_path: Path) -> Held:
    return Held(tmp_path / "of the store" / "index")


async def test_what_was_written_is_read(held: Held) -> None:
    """Sequences of any kind: empty, equal, with ids of media and of namespaces."""
    rng = random.Random(1)
    held.insert("empty", b"")
    for i in range(50):
        held.insert(f"ls-{i}", pack([rng.choice((0, 1, -1, 0x100000)) for _ in range(rng.randrange(9))]))
    held.insert("twin", held.index.tokens("ls-7"))
    await held.tasks.all_ended()
    await held.file._write(held.index, held.changes)
    assert await held.read() == contents(held.index)
    assert held.file.path.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in held.file.path.parent.iterdir()] == ["index"]


async def test_it_is_written_after_many_changes_and_not_before(held: Held) -> None:
    """Once for each six."""
    held.fill(5)
    assert not len(held.tasks)
    held.insert("ls-5", pack([5]))
    held.insert("ls-6", pack([6]))
    await held.tasks.all_ended()
    assert await held.read() == contents(held.index)
    held.fill(5)
    assert not len(held.tasks)


async def test_changes_while_it_collects_the_branches_are_in_it(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins anew: half a tree of before and half of after would have wrong tokens."""
    monkeypatch.setattr("llamaslot.tasks._SLICE_S", -1.0)  # each branch in a slice of its own
    held.fill()
    for i in range(20):
        await asyncio.sleep(0)
        if i % 2:
            held.insert(f"late-{i}", pack([1, 2, 0, 1, *range(i)]))
        else:
            held.index.drop(f"ls-{i % 6}")
            held.changes.note(b"")
    await held.tasks.all_ended()
    assert await held.read() == contents(held.index)


async def test_a_damaged_file_is_not_used(held: Held, caplog: pytest.LogCaptureFixture) -> None:
    """Wherever a byte differs, or where it ends too soon."""
    held.fill()
    await held.tasks.all_ended()
    good = held.file.path.read_bytes()
    for at in range(0, len(good), 3):
        held.file.path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert not await held.read()
        held.file.path.write_bytes(good[:at])
        assert not await held.read()
    assert "cannot be used: it is damaged" in caplog.text
    held.file.path.write_bytes(good)
    assert await held.read() == contents(held.index)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content["branches"].reverse(),
        lambda content: content["branches"].pop(),
        lambda content: content["branches"].append([0, 4, ["ls-9"]]),
        lambda content: content["branches"].append([0, 0, ["ls-9"]]),
        lambda content: content["branches"][-1].__setitem__(0, 1),
        lambda content: content["branches"][-1].__setitem__(2, ["ls-0"]),
        lambda content: content["branches"][-1].__setitem__(2, None),
        lambda content: content.pop("branches"),
        lambda content: content.pop("model"),
    ],
)
async def test_a_file_whose_branches_are_no_tree_is_not_used(
    held: Held, caplog: pytest.LogCaptureFixture, spoil: Callable[[dict[str, Any]], object]
) -> None:
    """Although its checksum is right: a program that writes it wrongly must not cost a snapshot."""
    held.fill()
    await held.tasks.all_ended()
    _, line, tokens = held.file.path.read_bytes().split(b"\n", 2)
    for spoiled in (lambda _: None, spoil):
        content = orjson.loads(line)
        spoiled(content)
        body = orjson.dumps(content) + b"\n" + tokens
        held.file.path.write_bytes(index_file._head(xxh3_128(body)) + body)
        assert await held.read() == ({} if spoiled is spoil else contents(held.index))
    assert caplog.text.count("cannot be used") == 1


async def test_of_another_model_nothing_is_used(held: Held, caplog: pytest.LogCaptureFixture) -> None:
    """Of the same model in the words of another build everything is."""
    held.fill()
    await held.tasks.all_ended()
    assert await held.read(Identity({"n_vocab": 9}, dict.fromkeys(range(8), -1.015))) == contents(held.index)
    assert not await held.read(Identity({"n_vocab": 8}, PROBS))
    assert "it is of another model" in caplog.text


async def test_without_a_file_nothing_is_said(held: Held, caplog: pytest.LogCaptureFixture) -> None:
    """As at the first start."""
    with caplog.at_level(logging.INFO):
        assert not await held.read()
    assert not caplog.text


async def test_one_that_cannot_be_written_is_tried_again_after_as_many_changes(
    held: Held, caplog: pytest.LogCaptureFixture
) -> None:
    """One line for each attempt."""
    held.file.path.parent.write_text("no directory")
    held.fill()
    await held.tasks.all_ended()
    assert caplog.text.count("cannot be written") == 1
    held.fill(5)
    assert not len(held.tasks)
    held.insert("one more", pack([7]))
    await held.tasks.all_ended()
    assert caplog.text.count("cannot be written") == 2


async def test_a_write_that_fails_leaves_no_half_of_a_file(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk it would take what little room there is until the next write."""

    def is_full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    held.fill()
    await held.tasks.all_ended()
    before = contents(held.index)
    monkeypatch.setattr("llamaslot.store.index_file.os.fsync", is_full)
    held.insert("late", pack([7]))
    await held.file._write(held.index, held.changes)
    assert [path.name for path in held.file.path.parent.iterdir()] == ["index"]
    assert await held.read() == before


async def test_at_the_end_no_write_goes_on(held: Held) -> None:
    """The file is the old one or the new one, and later changes write nothing."""
    for n_awaits in range(12):
        held.file = IndexFile(held.file.path, MODEL, held.tasks)
        held.fill()
        for _ in range(n_awaits):
            await asyncio.sleep(0)
        await held.file.end()
        assert not len(held.tasks)
        assert await held.read() in ({}, contents(held.index))
        held.fill()
        assert not len(held.tasks)
