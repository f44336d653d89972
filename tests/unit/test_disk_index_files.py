"""Generations of the index on disk: written, mapped, proved, made anew beside the event loop."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import stat
from pathlib import Path
from unittest import mock

import orjson
import pytest

from llamaslot.cache import layered_index
from llamaslot.cache.ids import pack
from llamaslot.cache.layered_index import LayeredIndex
from llamaslot.store import disk_index_files, disk_index_rebuild
from llamaslot.store.disk_index_files import MANIFEST, GenerationUnusable, open_generation
from llamaslot.store.disk_index_rebuild import DiskIndexRebuild
from llamaslot.tasks import TaskOwner
from tests.support.generations import grow_in_a_thread


def sequences(n: int, seed: int = 1) -> dict[str, bytes]:
    """Conversations that share a trunk, with some that are equal."""
    rng = random.Random(seed)
    trunk = [rng.randrange(131_072) for _ in range(500)]
    held = {}
    for i in range(n):
        tail = [rng.randrange(131_072) for _ in range(rng.randrange(300))]
        held[f"ls-{seed}-{i}"] = pack(trunk[: rng.randrange(501)] + tail)
    return held | {f"ls-{seed}-twin": held[f"ls-{seed}-0"], f"ls-{seed}-empty": b""}


def filled(held: dict[str, bytes], index: LayeredIndex | None = None) -> LayeredIndex:
    index = LayeredIndex() if index is None else index
    for holder, tokens in held.items():
        index.insert(holder, tokens)
    return index


def content(index: LayeredIndex) -> dict[str, bytes]:
    return {holder: index.tokens(holder) for holder in index.holders()}


def files(directory: Path) -> dict[str, Path]:
    """What lies there, by suffix."""
    found = {path.suffix: path for path in directory.iterdir()}
    assert len(found) == len(list(directory.iterdir()))
    return found


WHOLE = {".trie", ".columns", ".names", ".json"}


@pytest.fixture
async def tasks() -> TaskOwner:
    return TaskOwner()


@pytest.fixture(autouse=True)
def grown(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread, but for the tests that are about the process."""
    if "own_process" not in request.fixturenames:
        grow_in_a_thread(monkeypatch)


@pytest.fixture
def own_process() -> None:
    """For ``usefixtures``: generations are grown as in the program."""


async def made(
    directory: Path, held: dict[str, bytes], tasks: TaskOwner
) -> tuple[DiskIndexRebuild, LayeredIndex]:
    """A generation of ``held`` on disk, and who made it."""
    maker = DiskIndexRebuild(directory, "model a", tasks)
    index = LayeredIndex(await maker.open())
    assert await maker.renew(filled(held, index))
    return maker, index


@pytest.mark.usefixtures("own_process")
async def test_a_generation_outlives_the_process(tmp_path: Path, tasks: TaskOwner) -> None:
    """What was held is there after a restart, mapped, and no snapshot is read."""
    held = sequences(40)
    _, index = await made(tmp_path / "index", held, tasks)
    again = LayeredIndex(await DiskIndexRebuild(tmp_path / "index", "model a", tasks).open())
    for one in (index, again):
        one.check()
        assert content(one) == held
    assert files(tmp_path / "index").keys() == WHOLE
    assert again.base is not None
    assert isinstance(again.base.columns.point, memoryview)


@pytest.mark.usefixtures("own_process")
async def test_a_second_generation_is_made_of_the_first(tmp_path: Path, tasks: TaskOwner) -> None:
    """Without what was dropped, with what was added; the files of the first one go."""
    held = sequences(40)
    maker, index = await made(tmp_path, held, tasks)
    old, first = index.base, set(files(tmp_path).values())
    for holder in list(held)[::3]:
        index.drop(holder)
        del held[holder]
    held |= (more := sequences(20, seed=2))
    filled(more, index)
    assert await maker.renew(index)
    index.check()
    assert content(index) == held
    assert index.base is not None
    assert index.base.holders() == held.keys()
    assert set(files(tmp_path).values()) & first == {tmp_path / MANIFEST}
    assert old is not None
    assert old.match(held["ls-1-1"], 1)  # what is mapped lives on
    assert content(LayeredIndex(await DiskIndexRebuild(tmp_path, "model a", tasks).open())) == held


async def test_changes_while_a_generation_is_made_are_not_lost(tmp_path: Path, tasks: TaskOwner) -> None:
    """Adds, drops and replacements during the making hold afterwards."""
    held = sequences(30)
    maker, index = await made(tmp_path, held, tasks)
    held |= (more := sequences(10, seed=2))
    filled(more, index)
    making = tasks.spawn(maker.renew(index), "renew")
    for step in range(40):
        await asyncio.sleep(0)
        holder = f"ls-{step % 2 + 1}-{step // 4}"
        if step % 4 < 2:
            index.drop(holder)
            held.pop(holder, None)
        else:
            held[holder] = pack([step, 1])
            index.insert(holder, held[holder])
        assert content(index) == held
    assert await making
    index.check()
    assert content(index) == held


async def test_nobody_else_reads_the_files(tmp_path: Path, tasks: TaskOwner) -> None:
    """They hold the tokens of conversations."""
    old = os.umask(0)
    try:
        await made(tmp_path / "a" / "index", sequences(3), tasks)
    finally:
        os.umask(old)
    for path in (tmp_path / "a" / "index", *files(tmp_path / "a" / "index").values()):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


async def test_every_flipped_byte_is_noticed(tmp_path: Path, tasks: TaskOwner) -> None:
    """In the trie, the columns, the names and the manifest: marisa alone would answer wrongly and say nothing."""
    held = sequences(12)
    await made(tmp_path, held, tasks)
    rng = random.Random(3)
    for path in sorted(files(tmp_path).values()):
        whole = path.read_bytes()
        for at in {0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(60))}:
            flipped = bytearray(whole)
            flipped[at] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            with pytest.raises(GenerationUnusable):
                open_generation(tmp_path, "model a".__eq__)
        path.write_bytes(whole)
    found = open_generation(tmp_path, "model a".__eq__)
    assert found is not None
    assert content(LayeredIndex(found.index)) == held


@pytest.mark.parametrize("suffix", [".trie", ".columns", ".names"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "longer"])
async def test_what_is_not_whole_is_not_used(
    suffix: str, damage: str, tmp_path: Path, tasks: TaskOwner, caplog: pytest.LogCaptureFixture
) -> None:
    """One line says so, the index goes on without a generation, and the next one mends it."""
    held = sequences(5)
    await made(tmp_path, held, tasks)
    path = files(tmp_path)[suffix]
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"cut": whole[:-1], "empty": b"", "longer": whole + b"\n"}[damage])
    caplog.clear()
    maker = DiskIndexRebuild(tmp_path, "model a", tasks)
    assert await maker.open() is None
    assert [record.message.split(":")[0] for record in caplog.records] == ["index"]
    index = filled(held)
    assert await maker.renew(index)
    assert files(tmp_path).keys() == WHOLE
    assert content(LayeredIndex(await DiskIndexRebuild(tmp_path, "model a", tasks).open())) == held


@pytest.mark.parametrize(
    ("field", "value"), [("version", 2), ("byteorder", "middle"), ("namespace", "model b"), ("counts", [1])]
)
async def test_another_version_or_model_is_not_used(
    field: str, value: object, tmp_path: Path, tasks: TaskOwner
) -> None:
    """Even if its checksum is right."""
    await made(tmp_path, sequences(3), tasks)
    manifest = orjson.loads((tmp_path / MANIFEST).read_bytes())["manifest"] | {field: value}
    sealed = {"checksum": disk_index_files._checksum(manifest), "manifest": manifest}
    (tmp_path / MANIFEST).write_bytes(orjson.dumps(sealed))
    with pytest.raises(GenerationUnusable):
        open_generation(tmp_path, "model a".__eq__)


async def test_no_generation_is_no_fault(
    tmp_path: Path, tasks: TaskOwner, caplog: pytest.LogCaptureFixture
) -> None:
    """At the first start nothing is said; what a crash left of ours goes, what is not ours stays."""
    caplog.set_level(logging.INFO)
    left, foreign = tmp_path / (disk_index_files.new_id() + ".input"), tmp_path / "notes.trie"
    left.touch()
    foreign.touch()
    assert await DiskIndexRebuild(tmp_path, "model a", tasks).open() is None
    assert (caplog.records, left.exists(), foreign.exists()) == ([], False, True)


@pytest.mark.usefixtures("own_process")
@pytest.mark.parametrize("where", ["create", "the process", "accept"])
async def test_a_failure_changes_nothing(
    where: str, tmp_path: Path, tasks: TaskOwner, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk, a process that dies: one line, all holders are still found, the old generation is still valid."""
    held = sequences(5)
    maker, index = await made(tmp_path, held, tasks)
    held |= (more := sequences(5, seed=2))
    filled(more, index)
    caplog.clear()
    if where == "the process":
        failing = mock.patch.object(disk_index_files, "encode_recipe", return_value=b"\xff\xff\xff\xff")
    else:
        failing = mock.patch.object(disk_index_files, where, side_effect=OSError(28, "No space left"))
    with failing:
        assert not await maker.renew(index)
    assert len(caplog.records) == 1
    index.check()
    assert content(index) == held
    assert files(tmp_path).keys() == WHOLE
    assert await maker.renew(index)
    assert content(LayeredIndex(await DiskIndexRebuild(tmp_path, "model a", tasks).open())) == held


async def test_without_the_old_generation_on_disk_all_goes_on(
    tmp_path: Path, tasks: TaskOwner, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody has removed its files: what is mapped still answers, the next start is without one."""
    held = sequences(5)
    maker, index = await made(tmp_path, held, tasks)
    for path in files(tmp_path).values():
        path.unlink()
    caplog.clear()
    index.insert("more", pack([1]))
    assert not await maker.renew(index)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert content(index) == held | {"more": pack([1])}
    assert await DiskIndexRebuild(tmp_path, "model a", tasks).open() is None


@pytest.mark.usefixtures("own_process")
async def test_cancelling_at_every_await(tmp_path: Path, tasks: TaskOwner) -> None:
    """Wherever it is cancelled, the index is whole, and what is on disk is a generation that can be opened."""
    held = sequences(5)
    maker, index = await made(tmp_path, held, tasks)
    n_awaits, is_done = 0, False
    while not is_done:
        held |= (more := sequences(1, seed=n_awaits + 2))
        filled(more, index)
        making = tasks.spawn(maker.renew(index), "renew")
        for _ in range(n_awaits):
            if making.done():
                break
            # What is waited for is a thread or a process: give it the time that it needs to come to the next await.
            await _next_wait(making)
        is_done = making.done()
        making.cancel()
        await asyncio.wait([making])
        index.check()
        assert content(index) == held
        found = open_generation(tmp_path, "model a".__eq__)
        assert found is not None
        assert found.index.holders() <= held.keys()
        n_awaits += 1
    assert n_awaits > 4


async def _next_wait(task: asyncio.Task[bool]) -> None:
    """Until the task waits for another future than now, or has ended."""
    before = task._fut_waiter  # type: ignore[attr-defined]
    # Nobody says when a task comes to its next await.
    while not task.done() and task._fut_waiter in (before, None):  # type: ignore[attr-defined]  # noqa: ASYNC110
        await asyncio.sleep(0)


async def test_begins_when_it_is_due_and_only_once(
    tmp_path: Path, tasks: TaskOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``consider`` is called after each change; one generation is made at a time."""
    monkeypatch.setattr(layered_index, "NEW_MIN", 10)
    maker = DiskIndexRebuild(tmp_path, "model a", tasks)
    index = LayeredIndex(await maker.open())
    held = sequences(30)
    for holder, tokens in held.items():
        index.insert(holder, tokens)
        maker.consider(index)
        await asyncio.sleep(0)
        assert len(tasks) == (len(index) > 10)
    await tasks.all_ended()
    assert index.base is not None
    assert len(index.base) == 11
    maker.consider(index)
    await tasks.all_ended()
    assert len(index.base) == len(held)


async def test_does_not_try_again_at_once(
    tmp_path: Path, tasks: TaskOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failure it waits until there are a thousand more."""
    monkeypatch.setattr(layered_index, "NEW_MIN", 3)
    monkeypatch.setattr(disk_index_rebuild, "NEW_MIN", 5)
    maker = DiskIndexRebuild(tmp_path / "gone", "model a", tasks)
    index = filled(sequences(5))
    maker.consider(index)
    await tasks.all_ended()  # the directory is not there
    index.insert("more", b"")
    maker.consider(index)
    assert len(tasks) == 0
    assert await maker.open() is None
    filled(sequences(5, seed=2), index)
    maker.consider(index)
    assert len(tasks) == 1
    await tasks.all_ended()
    assert index.base is not None


async def test_a_mapped_file_is_never_written(tmp_path: Path, tasks: TaskOwner) -> None:
    """Each generation has names of its own, and a name that is taken is an error."""
    maker, index = await made(tmp_path, sequences(5), tasks)
    before = set(files(tmp_path).values())
    assert await maker.renew(index)
    assert before & set(files(tmp_path).values()) == {tmp_path / MANIFEST}
    with pytest.raises(FileExistsError):
        disk_index_files.write(files(tmp_path)[".trie"], [b"x"])
