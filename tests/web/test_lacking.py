"""A llama-server that defeats the purpose: one line says what it costs and what mends it, and llamaslot runs on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from llamaslot.store import read_slot_file
from tests.support.fake_model import pack
from tests.support.inprocess import NATIVE, letters, right, served, spawn

ONE, TWO, THREE = (letters(n, 800) for n in (1, 2, 3))
OWN_STEPS = {"prefill": {"chunk_threshold_s": 0}}


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
    assert any("--slot-save-path" in line for line in status["backends"][0]["warnings"])


async def test_without_the_directory_in_the_configuration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """llama-server could save, llamaslot does not know where."""
    async with served(tmp_path, {"backend": {"slot_save_path": None}}) as it:
        await all_answered(it)
        assert it.files() == []
    assert [line for line in warnings(caplog) if "slot_save_path is not set" in line] == warnings(caplog)
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


OLD: dict[str, Any] = {"checkpoints_in_file": False, "batch": 512, "ubatch": 128}


async def test_an_old_build_with_a_sliding_window(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A restored slot is worth nothing there: no file is written, and one line names what mends it."""
    async with served(tmp_path, slots=1, kind="swa", **OLD) as it:
        for text in (ONE, TWO, ONE + "more", TWO + "more"):
            assert (await it.ask(text)).text == right(it.fake, text)
        assert it.files() == []
        (warning,) = it.backend.session.warnings if it.backend.session else ()
    (line,) = warnings(caplog)
    assert warning in line
    assert "--swa-full" in line


async def test_an_old_build_with_a_recurrent_model(tmp_path: Path) -> None:
    """The slot goes back to the end of its prompt before it is saved: of that the next turn reuses all."""
    async with served(tmp_path, slots=1, kind="recurrent", **OLD) as it:
        await it.ask(ONE)
        await it.ask(TWO)
        await it.saved()
        (file,) = it.files()
        assert (await read_slot_file(it.save_dir / file)).tokens == pack(it.fake.model.tokenize(ONE))
        again = await it.ask(ONE + "another answer than the model gave")
        assert (again.source, again.timings["cache_n"]) == ("snapshot", 800)
        assert again.text == right(it.fake, ONE + "another answer than the model gave")


async def test_going_back_to_the_end_of_the_prompt_fails(tmp_path: Path) -> None:
    """Then the slot is not saved, and whoever needs it is answered all the same."""
    async with served(tmp_path, slots=1, kind="recurrent", **OLD) as it:
        await it.ask(ONE)
        it.fake.faults.fail_stream()
        answer = await it.ask(TWO)
        assert answer.text == right(it.fake, TWO)
        assert it.files() == []


@pytest.mark.parametrize("kind", ["swa", "recurrent"])
async def test_a_build_that_leaves_checkpoints_of_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """After a restore it would go on from somebody else's state: nothing is restored there."""
    async with served(tmp_path, slots=1, kind=kind, stale_checkpoints=True, **OLD) as it:
        for text in (ONE, TWO, ONE + "more", TWO + "more"):
            assert (await it.ask(text)).text == right(it.fake, text)
        n_probes = len(it.fake.sent(action="restore"))
        await it.ask(ONE)
        assert len(it.fake.sent(action="restore")) == n_probes
        assert it.files() == []
    (line,) = warnings(caplog)
    assert "another conversation" in line


@pytest.mark.parametrize("kind", ["swa", "recurrent"])
@pytest.mark.parametrize("are_kept", [True, False])
async def test_whether_files_keep_checkpoints_is_found_out(tmp_path: Path, kind: str, are_kept: bool) -> None:
    """When the server is met, by trying."""
    async with served(tmp_path, slots=1, kind=kind, **{**OLD, "checkpoints_in_file": are_kept}) as it:
        assert it.backend.leases.table is not None
        assert it.backend.leases.table.rewind_model.keeps_checkpoints is are_kept


async def test_one_slot_is_enough(tmp_path: Path) -> None:
    """Probes, users and turns share it."""
    async with served(tmp_path, slots=1) as it:
        for text in (ONE, TWO, ONE + "more"):
            assert (await it.ask(text)).text == right(it.fake, text)
        assert (
            await it.post("/infill", {"input_prefix": "x", "input_suffix": "", "n_predict": 2})
        ).status == 200
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
