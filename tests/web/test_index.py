"""What is on disk is found through an index that outlives the processes, of llama-server and of llamaslot."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from llamaslot.backend.health import Health
from llamaslot.cache.ids import pack
from llamaslot.store import index_file
from llamaslot.store.index_file import IndexFile
from llamaslot.store.model_snapshots import ModelSnapshots
from tests.support.fake import FakeModel
from tests.support.inprocess import Served, letters, right, served
from tests.support.opens import OPENS

TEXTS = [letters(n, 300) for n in range(6)]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index file is written after three changes, not after a thousand."""
    monkeypatch.setattr(index_file, "MIN_CHANGES", 2)


def library(it: Served) -> ModelSnapshots:
    assert it.backend.store is not None
    found = it.backend.store.libraries.current("gpu0")
    assert found is not None
    return found


def tokens_of(it: Served, text: str) -> bytes:
    return pack(it.fake.model.tokenize(text))


def file_of(it: Served) -> IndexFile:
    """Of the only model."""
    file = library(it).file
    assert file is not None
    return file


@asynccontextmanager
async def filled(directory: Path, **more: Any) -> AsyncIterator[Served]:
    """All contexts but the last are on disk only, some of them in the index file."""
    async with served(directory, slots=1, **more) as it:
        for text in TEXTS:
            await it.ask(text)
        await it.until(file_of(it).path.exists)
        await it.saved()
        yield it


async def restarted(it: Served) -> set[str]:
    """Both: nothing is left in a slot. The names of slot files and sidecars that were opened at the start."""
    await it.stop()
    await it.fake.restart()
    with OPENS.noted() as seen:
        await it.start()
    return set(seen)


async def test_after_a_restart_snapshots_are_found_through_the_index_file(tmp_path: Path) -> None:
    """What it finds is restored and answered from, and none of its files was opened before."""
    async with filled(tmp_path) as it:
        opened = await restarted(it)
        index, found = library(it).index, set((await file_of(it).read()).holders())
        assert len(found) >= 3
        assert not opened & {f"{id_}{suffix}" for id_ in found for suffix in (".kv", ".json")}
        n_restored = 0
        for text in TEXTS:
            (hit,) = index.match(tokens_of(it, text), 1)
            answer = await it.ask(text + "more")
            assert answer.text == right(it.fake, text + "more")
            assert (answer.source, answer.n_reused) == ("snapshot", 300)
            n_restored += hit.holder in found
        assert n_restored == len(found)


async def test_without_the_files_in_meta_dir_all_is_found_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are copies of what lies beside the slot files."""
    async with filled(tmp_path) as it:
        await it.stop()
        for path in (file_of(it).path, it.config.store.meta_dir / "gpu0.sidecars"):
            path.unlink()
        await it.fake.restart()
        with caplog.at_level(logging.INFO, "llamaslot.store"):
            await it.start()
        assert "does not exist" in caplog.text
        for text in TEXTS:
            answer = await it.ask(text + "more")
            assert (answer.source, answer.text) == ("snapshot", right(it.fake, text + "more"))


async def test_a_clean_stop_writes_down_the_sidecars(tmp_path: Path) -> None:
    """So that the next start opens none of them, with an index file or without."""
    async with served(tmp_path, slots=1) as it:
        for text in TEXTS[:2]:
            await it.ask(text)
        opened = await restarted(it)
        assert len(library(it).snapshots) == 2
        assert not {f"{id_}.json" for id_ in library(it).snapshots} & opened
        assert (await it.ask(TEXTS[0] + "more")).source == "snapshot"


async def test_a_restart_of_llama_server_keeps_the_index(tmp_path: Path) -> None:
    """The slot table is a new one, the library the same; what was leaving a slot of the old process is in neither."""
    async with filled(tmp_path) as it:
        before, table = library(it), it.backend.leases.table
        await it.fake.restart()
        answer = await it.ask(TEXTS[0] + "more")
        assert answer.source == "snapshot"
        assert it.backend.leases.table is not table
        assert library(it) is before
        library(it).check()


async def test_another_model_has_another_library(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing of the index file of the old one is used for it; for the old one all is found again."""
    async with filled(tmp_path) as it:
        before = library(it)
        with caplog.at_level(logging.WARNING, "llamaslot.store"):
            await it.fake.restart(FakeModel(weights="B"))
            await it.until(lambda: it.backend.health is Health.UP)  # it may have looked just in between
            assert (await it.ask(TEXTS[0] + "more")).source == "cold"
        assert "cannot be used: it is of another model" in caplog.text
        assert library(it) is not before
        assert not library(it).snapshots.keys() & before.snapshots.keys()
        await it.fake.restart(FakeModel())
        await it.until(lambda: it.backend.health is Health.UP)
        assert (await it.ask(TEXTS[0] + "more")).source == "snapshot"


async def test_what_is_evicted_is_not_found_any_more(tmp_path: Path) -> None:
    """Not in this slot table, and not through the index file after a restart."""
    async with filled(tmp_path) as it:
        for file in it.files():
            assert it.backend.store is not None
            await it.backend.store.catalog.drop(file.stem)
        assert len(library(it).index) == 0
        await restarted(it)
        library(it).check()
        assert (await it.ask(TEXTS[0] + "more")).source == "cold"


async def test_an_index_that_cannot_be_written_costs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One line says so; contexts come back from disk all the same, also after a restart."""
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "gpu0.index").write_text("somebody's file")
    async with served(tmp_path, slots=1) as it:
        with caplog.at_level(logging.WARNING, "llamaslot.store"):
            for text in TEXTS:
                await it.ask(text)
            await it.until(lambda: "cannot be written" in caplog.text)
        assert "cannot be used: " in caplog.text
        assert (await it.ask(TEXTS[0] + "more")).source == "snapshot"
        await restarted(it)
        assert (await it.ask(TEXTS[1] + "more")).source == "snapshot"
    assert (tmp_path / "meta" / "gpu0.index").read_text() == "somebody's file"
