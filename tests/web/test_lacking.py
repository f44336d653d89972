"""A llama-server that defeats the purpose: one line says what it costs and what mends it, and llamaslot runs on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from tests.support.inprocess import NATIVE, letters, right, served, spawn

ONE, TWO, THREE = (letters(n, 800) for n in (1, 2, 3))
OWN_STEPS = {"prefill": {"own_above_s": 0}}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def all_answered(it: Any) -> None:
    for text in (ONE, TWO, THREE, ONE + "more", TWO + "more", THREE + "more"):
        assert (await it.ask(text)).text == right(it.fake, text)
    cold = await it.ask(ONE + "more", cache_prompt=False)
    assert cold.text == right(it.fake, ONE + "more")
    assert cold.timings["cache_n"] == 0
    for stream in (True, False):
        assert (await it.ask(ONE, n_cmpl=2, stream=stream)).status == 200


@pytest.mark.parametrize("settings", [{}, OWN_STEPS], ids=["at once", "in steps"])
async def test_without_a_slot_save_path(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: Any
) -> None:
    """All three slot actions are 501: contexts live in their slots only."""
    async with served(tmp_path, settings, has_save_path=False) as it:
        await all_answered(it)
        again = await it.ask(THREE + "more")
        assert again.n_reused >= 800 or again.source == "cold"
        status = (await it.get("/llamaslot/status")).json
    assert sum("--slot-save-path DIR" in line for line in warnings(caplog)) == 1
    assert len(warnings(caplog)) == 1
    assert any("--slot-save-path" in line for line in status["backend"]["warnings"])


async def test_without_the_directory_in_the_configuration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """llama-server could save, llamaslot does not know where."""
    async with served(tmp_path, {"backend": {"slot_save_path": None}}) as it:
        await all_answered(it)
        assert it.files() == []
    assert [line for line in warnings(caplog) if "backends[0].slot_save_path is not set" in line] == warnings(
        caplog
    )
    assert len(warnings(caplog)) == 1


async def test_with_another_directory_than_the_servers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The probe file does not appear here: it is said, and nothing is kept."""
    other = tmp_path / "elsewhere"
    other.mkdir()
    async with served(tmp_path, {"backend": {"slot_save_path": str(other)}}) as it:
        await all_answered(it)
        assert list(other.glob("*.kv")) == []
        for left in it.save_dir.glob("*.part"):
            left.unlink()  # what llama-server wrote there nobody else can delete
        for left in it.save_dir.iterdir():
            if not left.name.startswith("."):
                left.unlink()
    (line,) = warnings(caplog)
    assert "nothing is kept on disk" in line


@pytest.mark.parametrize("settings", [{}, OWN_STEPS], ids=["at once", "in steps"])
async def test_with_a_unified_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: Any) -> None:
    """Every task empties the idle slots: nothing can be kept, everybody is answered."""
    async with served(tmp_path, settings, unified=True) as it:
        await all_answered(it)
        assert it.files() == []
    (line,) = warnings(caplog)
    assert "--no-kv-unified" in line


async def test_a_cache_that_proves_unified_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A save of nothing where something should have been: the same line, once."""
    async with served(tmp_path, slots=1) as it:
        await it.ask(ONE)
        for text in (TWO, THREE):
            it.fake.faults.empty_save()
            assert (await it.ask(text)).text == right(it.fake, text)
    assert sum("--no-kv-unified" in line for line in warnings(caplog)) == 1


async def test_a_server_without_checkpoints_in_its_files(tmp_path: Path) -> None:
    """Older builds: a restored SWA slot is worth nothing, and the answer is right."""
    async with served(tmp_path, slots=1, kind="swa", checkpoints_in_file=False, batch=512, ubatch=128) as it:
        for text in (ONE, TWO, ONE + "more", TWO + "more"):
            assert (await it.ask(text)).text == right(it.fake, text)


async def test_one_slot_is_enough(tmp_path: Path) -> None:
    """Probes, users and turns share it."""
    async with served(tmp_path, slots=1) as it:
        for text in (ONE, TWO, ONE + "more"):
            assert (await it.ask(text)).text == right(it.fake, text)
        assert (await it.post("/infill", {"input_prefix": "x", "n_predict": 2})).status == 200
        assert it.fake.sent(NATIVE)


async def test_slots_at_work_for_others_are_waited_for(tmp_path: Path) -> None:
    """Somebody asks llama-server directly while llamaslot comes: it begins with the slots that are idle."""
    async with served(tmp_path, wait=False) as it:
        await it.fake.start()
        it.fake.hold()
        body = {"prompt": ONE, "n_predict": 4}
        stranger = spawn(it.post(NATIVE, body, to=it.fake.url))
        await it.fake.wait_for(lambda f: any(slot.is_processing for slot in f.slots))
        it.fake.go()
        await it.start()
        assert (await stranger).status == 200
        assert (await it.ask(TWO)).text == right(it.fake, TWO)
