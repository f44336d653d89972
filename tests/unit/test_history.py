"""The history over restarts, and with a file that cannot be used."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from llamaslot.observe.activity import Activity, Stage
from llamaslot.observe.history import KEPT, VERSION, History
from llamaslot.tasks import gather

NOON = 1_700_000_000.0


def ended(id_: str, **more: object) -> Activity:
    told = {"id": id_, "at": NOON, "backend": "gpu0", "model": "m", "n_reused": 80, "n_computed": 20}
    return Activity(**{**told, **more})  # type: ignore[arg-type]


def modes_in(directory: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mode for file in directory.iterdir()}


@asynccontextmanager
async def opened(path: Path, now: float = NOON + 1) -> AsyncIterator[History]:
    history = History(path, lambda: now)
    await history.load()
    try:
        yield history
    finally:
        await history.close()


async def test_it_survives_a_restart(tmp_path: Path) -> None:
    """Requests with their timelines, sums, owners of snapshots, and when it all began."""
    path = tmp_path / "history.sqlite"
    async with opened(path) as history:
        assert not path.exists()  # nothing to keep yet
        history.add(ended("a", stages=[Stage("answer", 0.5, 1.0)]))
        history.add(ended("b", saved_s=3.0))
        history.own("ls-1", "key:ada")
        await history.write()
        modes = modes_in(tmp_path)
        assert modes.keys() >= {path.name, f"{path.name}-wal"}  # which has the same in it
        assert {mode & 0o077 for mode in modes.values()} == {0}
    async with opened(path, NOON + 3600) as history:
        assert [its.id for its in history.latest] == ["a", "b"]
        assert history.latest[0].stages == [Stage("answer", 0.5, 1.0)]
        assert (history.series.ever.n, history.series.ever.saved_s, history.began) == (2, 3.0, NOON + 1)
        assert history.owners == {"ls-1": "key:ada"}
        history.add(ended("c"))
        assert [its.serial for its in history.latest] == [1, 2, 3]
    async with opened(path, NOON + 3700) as history:
        assert history.series.ever.n == 3


async def test_it_is_bounded(tmp_path: Path) -> None:
    """In memory and in the file."""
    path = tmp_path / "history.sqlite"
    async with opened(path) as history:
        for n in range(KEPT + 50):
            history.add(ended(f"r{n}"))
            if n == KEPT - 100:
                await history.write()
        assert len(history.latest) == KEPT
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*), max(serial) FROM requests").fetchone() == (KEPT, KEPT + 50)
    db.close()


async def test_requests_that_end_while_it_is_read_are_kept(tmp_path: Path) -> None:
    """Behind those that were read."""
    path = tmp_path / "history.sqlite"
    async with opened(path) as history:
        history.add(ended("old"))
    history = History(path)
    history.add(ended("early"))
    await history.load()
    assert [(its.id, its.serial) for its in history.latest] == [("old", 1), ("early", 2)]
    await history.close()
    async with opened(path) as history:
        assert [its.id for its in history.latest] == ["old", "early"]


async def test_a_stop_while_it_is_read_counts_nothing_twice(tmp_path: Path) -> None:
    """The stop needs what is in the file too, and finds it only half read."""
    path = tmp_path / "history.sqlite"
    async with opened(path) as history:
        history.add(ended("a"))
    history = History(path, lambda: NOON + 1)
    await gather(history.load(), history.close())
    async with opened(path) as history:
        assert (history.series.ever.n, [its.id for its in history.latest]) == (1, ["a"])


async def test_prompts_are_not_kept_on_disk(tmp_path: Path) -> None:
    """Also where ``log.prompts`` lets the page quote them."""
    path = tmp_path / "history.sqlite"
    async with opened(path) as history:
        history.add(ended("a", diverged={"at": 7, "text": {"now": "a secret"}}))
        assert history.latest[0].diverged == {"at": 7, "text": {"now": "a secret"}}
    assert b"a secret" not in path.read_bytes()
    async with opened(path) as history:
        assert history.latest[0].diverged == {"at": 7}


@pytest.mark.parametrize("content", [b"no database at all" * 100, b"SQLite format 3\0" + b"\xff" * 4000])
async def test_a_damaged_file_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    """The page works without it, and the file stays for whoever wants to mend it."""
    path = tmp_path / "history.sqlite"
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        async with opened(path) as history:
            history.add(ended("a"))
            await history.write()
            await history.write()
            assert [its.id for its in history.latest] == ["a"]
            assert not history.is_kept
    assert caplog.text.count("the page forgets its history at a restart") == 1
    assert path.read_bytes() == content


async def test_a_locked_file_is_written_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is lost when another process holds it for a while."""
    path = tmp_path / "history.sqlite"
    async with opened(path) as history:
        history.add(ended("a"))
        await history.write()
        other = sqlite3.connect(path)
        other.execute("BEGIN EXCLUSIVE")
        history.add(ended("b"))
        history.own("ls-1", "key:ada")
        await history.write()
        assert caplog.text.count("database is locked") == 1
        other.rollback()
        other.close()
        await history.write()
    async with opened(path) as history:
        assert [its.id for its in history.latest] == ["a", "b"]
        assert (history.series.ever.n, history.owners) == (2, {"ls-1": "key:ada"})


async def test_two_of_them_do_not_replace_each_others_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two llamaslots with one directory the second waits for the file, and says so."""
    path = tmp_path / "history.sqlite"
    second = History(path, lambda: NOON + 1)
    async with opened(path) as first:
        first.add(ended("a"))
        await first.write()
        second.add(ended("b"))
        await second.write()
        assert "is another llamaslot using this directory" in caplog.text
        first.add(ended("c"))
    await second.close()
    async with opened(path) as history:
        assert [its.id for its in history.latest] == ["a", "c", "b"]
        assert history.series.ever.n == 3


async def test_a_file_that_could_not_be_opened_once_is_used_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With too many open files for a moment: a lock of its own that was left would keep it out for ever."""

    def fails(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("unable to open database file")

    path = tmp_path / "history.sqlite"
    async with opened(path) as history:
        history.add(ended("a"))
        with monkeypatch.context() as patch:
            patch.setattr(sqlite3, "connect", fails)
            await history.write()
    async with opened(path) as history:
        assert [its.id for its in history.latest] == ["a"]


async def test_a_later_schema_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An older llamaslot does not know what it would destroy."""
    path = tmp_path / "history.sqlite"
    async with opened(path) as history:
        history.add(ended("a"))
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {VERSION + 1}")
    db.close()
    async with opened(path) as history:
        history.add(ended("b"))
    assert "an older llamaslot does not change it" in caplog.text
    db = sqlite3.connect(path)
    assert db.execute("SELECT count(*) FROM requests").fetchone() == (1,)
    db.close()


async def test_without_a_directory_it_is_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A directory that cannot be written to harms no request."""
    async with opened(tmp_path / "none" / "history.sqlite") as history:
        history.add(ended("a"))
        await history.write()
        assert history.series.ever.n == 1
    assert "unable to open database file" in caplog.text
