"""Slot files of the real llama.cpp: what their headers say, and a catalog that takes them in."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamaslot.cache.ids import pack
from llamaslot.errors import SnapshotInvalid
from llamaslot.store import Catalog, NotShared, SavedSlot, prove_shared, read_slot_file
from llamaslot.store.quota import Limits
from tests.support import models
from tests.support.real import RealServer

pytestmark = pytest.mark.real
KINDS: list[Callable[[Path], Path]] = [models.dense, models.swa, models.recurrent, models.hybrid]
PROMPT = [ord(letter) for letter in "The header of a slot file holds exactly the tokens of its slot. " * 12]


async def fill(server: RealServer, slot: int = 0, n_predict: int = 24) -> list[int]:
    """Prompt and answer in a slot; the ids generated."""
    answer = await server.post(
        "/completion",
        {
            "prompt": PROMPT,
            "n_predict": n_predict,
            "id_slot": slot,
            "cache_prompt": True,
            "return_tokens": True,
        },
    )
    generated: list[int] = answer["tokens"]
    assert len(generated) == n_predict
    return generated


async def save(server: RealServer, name: str, slot: int = 0) -> dict[str, Any]:
    answer: dict[str, Any] = await server.post(f"/slots/{slot}?action=save", {"filename": name})
    return answer


@pytest.mark.parametrize("kind", KINDS)
async def test_the_header_is_prompt_and_answer(
    kind: Callable[[Path], Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """All tokens but the last generated one, which was never decoded; n_written is the size of the file.

    And through a catalog: reserved, saved by the server, committed, verified, restored after a restart of both.
    """
    model = kind(tmp_path_factory.getbasetemp() / "models")
    async with RealServer(model, tmp_path, slots=2, context=2048) as server:
        tokens = pack(PROMPT + (await fill(server))[:-1])
        catalog = Catalog(tmp_path, Limits(64 << 20), now=time.time, on_drop=lambda _: None)
        await catalog.open()
        draft = await catalog.reserve(1 << 20)
        answer = await save(server, draft.part_name)
        file = await read_slot_file(tmp_path / draft.part_name)
        assert (file.tokens, file.n_tokens, file.has_media) == (tokens, answer["n_saved"], False)
        assert file.size_bytes == answer["n_written"]
        saved = SavedSlot(
            tokens_expected=pack(PROMPT),
            n_saved=answer["n_saved"],
            n_written=answer["n_written"],
            fingerprint="model",
            checkpoints=(),
            source="test",
        )
        snapshot = await catalog.commit(draft, saved)
        await catalog.settle()
        catalog.close()
        await server.restart()
        catalog = Catalog(tmp_path, Limits(64 << 20), now=time.time, on_drop=lambda _: None)
        assert await catalog.open() == [snapshot.listed]
        with catalog.pin(snapshot.id):
            await catalog.verify(snapshot.id)
            restored = await server.post("/slots/1?action=restore", {"filename": snapshot.file_name})
        assert restored["n_restored"] == snapshot.n_tokens
        catalog.close()


async def test_an_empty_slot_proves_the_directory(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A slot that holds nothing is saved without an error, as 48 bytes or so: enough for a probe."""
    model = models.dense(tmp_path_factory.getbasetemp() / "models")
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    async with RealServer(model, there, slots=2, context=512) as server:

        async def probe(name: str) -> None:
            assert (await save(server, name))["n_saved"] == 0

        await prove_shared(there, probe)
        assert list(there.iterdir()) == []
        with pytest.raises(NotShared, match="did not appear"):
            await prove_shared(here, probe)


async def test_a_truncated_file_is_noticed_by_its_size(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A full disk: the header of the real file still claims all tokens."""
    model = models.dense(tmp_path_factory.getbasetemp() / "models")
    async with RealServer(model, tmp_path, slots=1, context=2048) as server:
        await fill(server)
        catalog = Catalog(tmp_path, Limits(64 << 20), now=time.time, on_drop=lambda _: None)
        await catalog.open()
        draft = await catalog.reserve(1 << 20)
        answer = await save(server, draft.part_name)
        with (tmp_path / draft.part_name).open("r+b") as file:
            file.truncate(answer["n_written"] // 2)
        assert (await read_slot_file(tmp_path / draft.part_name)).n_tokens == answer["n_saved"]
        saved = SavedSlot(
            tokens_expected=b"",
            n_saved=answer["n_saved"],
            n_written=answer["n_written"],
            fingerprint="model",
            checkpoints=(),
            source="test",
        )
        with pytest.raises(SnapshotInvalid, match="were written"):
            await catalog.commit(draft, saved)
        catalog.close()
