"""The index of what is on disk, over restarts of both, on the real llama.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaslot.store import index_file
from llamaslot.store.model_snapshots import ModelSnapshots
from tests.support import models
from tests.support.inprocess import Front, fronted, letters
from tests.support.opens import OPENS
from tests.support.real import RealServer

pytestmark = pytest.mark.real

TEXTS = [letters(n, 1500) for n in range(5)]


def library(it: Front) -> ModelSnapshots:
    """Of the only model."""
    assert it.backend.store is not None
    return next(iter(it.backend.store.libraries))


async def test_a_context_that_the_index_file_finds_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are restarted; none of its files is opened before it is asked for."""
    monkeypatch.setattr(index_file, "MIN_CHANGES", 2)
    (tmp_path / "kv").mkdir()
    async with (
        RealServer(models.dense(tmp_path), tmp_path / "kv", slots=1) as server,
        fronted(tmp_path, server.url, tmp_path / "kv") as it,
    ):
        for text in TEXTS:
            await it.ask(text)
        file = library(it).file
        assert file is not None
        await it.until(file.path.exists)
        await it.stop()
        await server.restart()
        with OPENS.noted() as opened:
            await it.start()
        found = set((await file.read()).holders())
        assert len(found) >= 3
        assert not {Path(name).stem for name in opened} & found
        answers = [await it.ask(text + "more") for text in TEXTS]
    assert {answer.source for answer in answers} == {"snapshot"}
    for answer in answers:
        assert answer.n_reused >= 0.98 * int(answer.headers["x-llamaslot-prompt-tokens"])
