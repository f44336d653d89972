"""The index of what is on disk, over restarts of both, on the real llama.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaslot.cache import layered_index
from tests.support import models
from tests.support.inprocess import fronted, letters
from tests.support.opens import OPENS
from tests.support.real import RealServer

pytestmark = pytest.mark.real

TEXTS = [letters(n, 1500) for n in range(5)]


async def test_a_context_that_the_generation_finds_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are restarted; none of its files is opened before it is asked for."""
    monkeypatch.setattr(layered_index, "NEW_MIN", 2)
    (tmp_path / "kv").mkdir()
    async with (
        RealServer(models.dense(tmp_path), tmp_path / "kv", slots=1) as server,
        fronted(tmp_path, server.url, tmp_path / "kv") as it,
    ):
        for text in TEXTS:
            await it.ask(text)
        assert it.pool.libraries is not None
        libraries = it.pool.libraries
        await it.until(lambda: libraries.current is not None and libraries.current.index.base is not None)
        await it.stop()
        await server.restart()
        with OPENS.noted() as opened:
            await it.start()
        assert it.pool.libraries is not None
        assert it.pool.libraries.current is not None
        base = it.pool.libraries.current.index.base
        assert base is not None
        found = set(base.holders())
        assert len(found) >= 3
        assert not {Path(name).stem for name in opened} & found
        answers = [await it.ask(text + "more") for text in TEXTS]
    assert {answer.source for answer in answers} == {"snapshot"}
    for answer in answers:
        assert answer.n_reused >= 0.98 * int(answer.headers["x-llamaslot-prompt-tokens"])
