"""The header of a slot file: its tokens, and what is wrong with files that are none."""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaslot.cache.ids import pack
from llamaslot.errors import SnapshotInvalid
from llamaslot.store.slot_file import MAX_TOKENS, SlotFile, read_slot_file
from tests.support.snapshots import MAGIC, slot_file, some_tokens

TOKENS = pack([5, 0, 2_000_000, 7])
NULL = -1  # a media token


def put(path: Path, data: bytes, size_bytes: int | None = None) -> None:
    """A file with this content; behind it a hole up to ``size_bytes``."""
    path.write_bytes(data)
    os.truncate(path, len(data) if size_bytes is None else size_bytes)


async def fault_of(path: Path, data: bytes) -> str:
    """What is said of a file with this content."""
    put(path, data)
    with pytest.raises(SnapshotInvalid) as caught:
        await read_slot_file(path)
    text = str(caught.value)
    assert text.startswith(path.name), "does not name the file"
    assert "\n" not in text
    return text


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ls-0123456789abcdef.kv"


async def test_the_tokens_are_read_back(path: Path) -> None:
    """Exactly the ids that the server saved, as bytes."""
    put(path, slot_file(TOKENS, 500))
    assert await read_slot_file(path) == SlotFile(TOKENS, 4, has_media=False, size_bytes=500)


async def test_an_empty_slot_has_no_tokens(path: Path) -> None:
    """llama-server saves a slot that holds nothing without an error: 48 bytes."""
    put(path, slot_file(b"", 48))
    assert await read_slot_file(path) == SlotFile(b"", 0, has_media=False, size_bytes=48)


async def test_bare_tokens_of_older_builds(path: Path) -> None:
    """Before the packed list, the words were the tokens themselves."""
    put(path, struct.pack("<III", MAGIC, 2, 4) + TOKENS + b"state")
    assert await read_slot_file(path) == SlotFile(TOKENS, 4, has_media=False, size_bytes=33)


@pytest.mark.parametrize("n_tokens", [0, 1, 2, 3])
async def test_bare_tokens_that_end_before_the_first_read(path: Path, n_tokens: int) -> None:
    """So few that they lie in what is read first, with state behind them that is not theirs."""
    put(path, struct.pack("<III", MAGIC, 3, n_tokens) + TOKENS[: 4 * n_tokens] + b"state" * 9)
    assert (await read_slot_file(path)).tokens == TOKENS[: 4 * n_tokens]


async def test_media_are_noticed_and_end_the_tokens(path: Path) -> None:
    """Tokens from the first media token on identify nothing."""
    tokens = pack([1, 2, NULL, NULL, 3])
    put(path, slot_file(tokens, 300, media=[2]))
    assert await read_slot_file(path) == SlotFile(pack([1, 2]), 5, has_media=True, size_bytes=300)


async def test_a_media_token_without_its_chunk_is_media_all_the_same(path: Path) -> None:
    """-1 is no text token, whatever the list of chunks says."""
    put(path, slot_file(pack([1, NULL, 3])))
    assert (await read_slot_file(path)).has_media


async def test_bytes_of_two_tokens_are_no_media_token(path: Path) -> None:
    """ff ff ff ff across the border of two tokens is not -1."""
    tokens = pack([0x7FFF0000 | 1, 0x0000FFFF, 3])
    tokens = tokens[:2] + b"\xff\xff\xff\xff" + tokens[6:]
    put(path, slot_file(tokens, 300))
    assert await read_slot_file(path) == SlotFile(tokens, 3, has_media=False, size_bytes=300)


async def test_the_body_is_not_read(path: Path) -> None:
    """A gigabyte of KV state behind the header costs nothing; here it is a hole."""
    put(path, slot_file(TOKENS), 1 << 40)
    read = await read_slot_file(path)
    assert (read.tokens, read.size_bytes) == (TOKENS, 1 << 40)


async def test_foreign_content(path: Path) -> None:
    """Another magic number is another kind of file."""
    assert "no slot file: it begins with 0x46554747" in await fault_of(path, b"GGUF" + bytes(40))


@pytest.mark.parametrize("version", [0, 1, 5, 1 << 31])
async def test_unknown_versions(path: Path, version: int) -> None:
    """A header of another version may be laid out in another way."""
    assert f"version {version}; llamaslot knows 2 to 4" in await fault_of(
        path, slot_file(TOKENS, version=version)
    )


@pytest.mark.parametrize("n_bytes", [0, 4, 11])
async def test_too_short_for_any_header(path: Path, n_bytes: int) -> None:
    """As a full disk leaves it: nothing, or a few bytes."""
    assert f"{n_bytes} bytes are too few" in await fault_of(path, slot_file(TOKENS)[:n_bytes])


@pytest.mark.parametrize("n_bytes", [12, 20, 24, 30, 43])
async def test_cut_short_in_the_header(path: Path, n_bytes: int) -> None:
    """More words are claimed than the file has bytes."""
    assert f"claims 8 words of header, but has {n_bytes} bytes" in await fault_of(
        path, slot_file(TOKENS)[:n_bytes]
    )


async def test_an_absurd_count_of_words(path: Path) -> None:
    """Four billion words in a small file are not even tried."""
    data = struct.pack("<III", MAGIC, 4, 0xFFFFFFFF) + slot_file(TOKENS, 500)[12:]
    assert "claims 4294967295 words of header, but has 500 bytes" in await fault_of(path, data)


async def test_an_absurd_count_of_tokens_in_a_large_file(path: Path) -> None:
    """A damaged count must not make us read gigabytes, however large the file is."""
    n_words = MAX_TOKENS + 5
    data = struct.pack("<IIIiII", MAGIC, 4, n_words, -1, 1, n_words - 4)
    put(path, data, 1 << 40)
    with pytest.raises(SnapshotInvalid, match=f"claims {MAX_TOKENS + 1} tokens, more than {MAX_TOKENS}"):
        await read_slot_file(path)


async def test_more_tokens_than_words(path: Path) -> None:
    """The count inside must fit into the count outside."""
    data = bytearray(slot_file(TOKENS, 500))
    data[20:24] = struct.pack("<I", 5)
    assert "claims 5 tokens in 8 words" in await fault_of(path, bytes(data))


async def test_words_that_belong_to_nothing(path: Path) -> None:
    """Fewer tokens than words, and no media that would explain it."""
    data = struct.pack("<IIIiII", MAGIC, 4, 9, -1, 1, 4) + TOKENS + bytes(100)
    assert "9 words do not fit its 4 tokens" in await fault_of(path, data)


async def test_a_packed_list_of_another_version(path: Path) -> None:
    """The list has a version of its own."""
    data = bytearray(slot_file(TOKENS))
    data[16:20] = struct.pack("<I", 2)
    assert "token list of version 2" in await fault_of(path, bytes(data))


async def test_a_packed_list_too_short_for_its_counts(path: Path) -> None:
    """-1, 1 and two counts are the least."""
    data = struct.pack("<IIIiII", MAGIC, 4, 3, -1, 1, 0) + bytes(50)
    assert "a token list of 3 words" in await fault_of(path, data)


async def test_a_missing_file(path: Path) -> None:
    """The cause is kept: who asks may want to tell missing from unreadable."""
    with pytest.raises(SnapshotInvalid, match="cannot be read: No such file") as caught:
        await read_slot_file(path)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


async def test_a_file_that_cannot_be_opened(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An OSError of any kind is a SnapshotInvalid with that as its cause."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(SnapshotInvalid, match="cannot be read: Permission denied") as caught:
        await read_slot_file(path)
    assert isinstance(caught.value.__cause__, PermissionError)


async def test_canceling_leaves_no_open_file(path: Path) -> None:
    """Canceled at any await, the file is closed; a forgotten one would warn, and warnings are errors."""
    put(path, slot_file(some_tokens(50_000)))
    for n_rounds in range(12):
        task = asyncio.get_running_loop().create_task(read_slot_file(path))
        for _ in range(n_rounds):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])


@settings(deadline=None)
@given(
    tokens=st.lists(st.integers(-3, 5) | st.integers(0, 2**31 - 1), max_size=40),
    flips=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=3),
    cut=st.integers(0, 300),
)
def test_damage_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, tokens: list[int], flips: list[tuple[int, int]], cut: int
) -> None:
    """Whatever the bytes are: SnapshotInvalid, or whole tokens without any that is -1. Nothing else is raised."""
    data = bytearray(slot_file(pack(tokens), 250))
    for at, value in flips:
        data[at] = value
    path = tmp_path_factory.getbasetemp() / "damaged.kv"
    put(path, bytes(data[:cut]))
    try:
        read = asyncio.run(read_slot_file(path))
    except SnapshotInvalid:
        return
    assert len(read.tokens) % 4 == 0
    assert len(read.tokens) // 4 <= read.n_tokens
    assert pack([NULL]) not in {read.tokens[at : at + 4] for at in range(0, len(read.tokens), 4)}
    assert read.has_media or len(read.tokens) // 4 == read.n_tokens
