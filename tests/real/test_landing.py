"""The real llama.cpp writes and reads in memory, and snapshots are kept on disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import models
from tests.support.growing import Messages, Stored, place_of
from tests.support.users import words

pytestmark = pytest.mark.real


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A directory on another file system than ``tmp_path``."""
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no other file system")
    with tempfile.TemporaryDirectory(dir=shared) as directory:
        yield Path(directory)


@pytest.mark.parametrize("kind", [models.dense, models.hybrid])
async def test_a_conversation_comes_back_after_a_restart_of_both(
    kind: Callable[[Path], Path], memory: Path, tmp_path: Path
) -> None:
    """Saved and restored through a landing place on another file system, which is empty between the two."""
    async with place_of(kind, tmp_path, context=4096, landing=memory) as place:
        messages: Messages = [{"role": "user", "content": words(place.rng, 500)}]
        for _ in range(3):
            await place.turn(messages, 400)
            await place.forget()
        await place.stack.llamaslot.stop()
        await place.stack.server.restart()
        assert os.listdir(memory) == [".llamaslot.lock"]
        assert Stored.of(tmp_path / "kept").n_snapshots >= 1  # llamaslot has stopped
        await place.stack.llamaslot.start()
        reply = await place.ask(messages)
        assert reply.n_reused >= reply.n_prompt - 450
        assert await place.figure("snapshot_restores_total") == 1
        assert await place.n_other_answers(3) == 0
