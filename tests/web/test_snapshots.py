"""Contexts that leave their slot come back from disk; whatever is wrong with a file costs time and nothing else."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from llamaslot.cache.ids import pack
from tests.support import fake_files
from tests.support.inprocess import NATIVE, Served, letters, right, served
from tests.support.stack import size_of

ONE, TWO, THREE = (letters(n, 800) for n in (1, 2, 3))


async def one_on_disk(it: Served) -> Path:
    """ONE's context is on disk only; TWO's is in the only slot. The file."""
    await it.ask(ONE)
    await it.ask(TWO)
    await it.saved()
    (file,) = it.files()
    return file


async def answered_all_the_same(it: Served) -> None:
    """ONE's owner gets the right answer, as if nothing had been kept; TWO's context is not lost either."""
    answer = await it.ask(ONE + "more")
    assert answer.status == 200
    assert answer.text == right(it.fake, ONE + "more")
    assert answer.timings["cache_n"] == answer.n_reused == 0
    assert answer.source == "cold"
    assert (await it.ask(TWO + "more")).text == right(it.fake, TWO + "more")


async def test_a_context_comes_back_from_disk(tmp_path: Path) -> None:
    """Saved before it was overwritten, restored into an emptied slot, and nothing of it computed again."""
    async with served(tmp_path, slots=1) as it:
        await one_on_disk(it)
        answer = await it.ask(ONE + "more")
        await it.saved()
        actions = [seen.action for seen in it.fake.requests if seen.action]
        metrics = await it.metrics()
        n_bytes = sum(file.stat().st_size for file in it.files())
    assert answer.text == right(it.fake, ONE + "more")
    assert (answer.source, answer.n_reused, answer.timings["cache_n"]) == ("snapshot", 800, 800)
    assert actions[-3:] == ["save", "erase", "restore"]
    assert metrics["llamaslot_snapshot_saves_total"] == 2
    assert metrics["llamaslot_snapshot_restores_total"] == 1
    assert metrics["llamaslot_snapshots"] == 2
    assert metrics["llamaslot_snapshot_stored_bytes"] == n_bytes


async def test_a_conversation_keeps_one_snapshot(tmp_path: Path) -> None:
    """A longer one of the same conversation takes the place of the shorter one."""
    async with served(tmp_path, slots=1) as it:
        text = ONE
        for _ in range(4):
            answer = await it.ask(text)
            text += answer.text + " and then? "
            await it.ask(TWO)
        await it.until(lambda: len(it.files()) == 2)


def overwrite(data: bytes) -> Any:
    return lambda file: file.write_bytes(data)


def grown(file: Path) -> None:
    with file.open("ab") as handle:
        handle.write(b"x")


def foreign_tokens(file: Path) -> None:
    """Another conversation of the same length, whole in itself."""
    ids = random.Random(1).choices(range(97, 122), k=803)
    size = file.stat().st_size
    fake_files.write(file, fake_files.Saved(pack(ids), (), frozenset({"A"})), 64)
    os.truncate(file, size)


DAMAGES: dict[str, Any] = {
    "missing": lambda file: file.unlink(),
    "empty": overwrite(b""),
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "grown": grown,
    "no slot file": overwrite(b"x" * 52_000),
    "another conversation": foreign_tokens,
    "its payload broken": lambda file: file.write_bytes(
        file.read_bytes()[:3240] + b"\0" * (file.stat().st_size - 3240)
    ),
    "a directory": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_file_that_is_not_what_it_was(tmp_path: Path, damage: str) -> None:
    """Missing, truncated, foreign: noticed before or by the restore, counted, and the request is answered."""
    async with served(tmp_path, slots=1) as it:
        file = await one_on_disk(it)
        DAMAGES[damage](file)
        await answered_all_the_same(it)
        assert await it.count('steps_failed_total{step="restore"}') == 1
        if file.is_dir():
            file.rmdir()


async def test_a_restore_that_fails(tmp_path: Path) -> None:
    """llama-server says 400 and leaves the slot empty: everything is computed, and that file is not tried again."""
    async with served(tmp_path, slots=1) as it:
        await one_on_disk(it)
        it.fake.faults.fail("restore", 400, "Unable to restore slot")
        await answered_all_the_same(it)
        assert await it.count('steps_failed_total{step="restore"}') == 1


async def test_after_a_restore_that_fails_the_next_best_is_restored(tmp_path: Path) -> None:
    """A snapshot of another conversation that begins alike: only what that one lacks is computed."""
    async with served(tmp_path, slots=1) as it:
        for text in (ONE, ONE[:600] + THREE[:200], TWO):
            await it.ask(text)
        await it.saved()
        it.fake.faults.fail("restore", 400, "Unable to restore slot")
        answer = await it.ask(ONE + "more")
        assert await it.count('steps_failed_total{step="restore"}') == 1
    assert answer.text == right(it.fake, ONE + "more")
    assert (answer.source, answer.n_reused) == ("snapshot", 600)


async def test_what_another_process_has_restored_is_not_believed(tmp_path: Path) -> None:
    """llama-server has restarted since the slot was leased, perhaps with another model: it is connected to first."""
    async with served(tmp_path, slots=1) as it:
        await one_on_disk(it)
        session, hang = it.backend.session, it.fake.faults.hang("restore")
        async with it.asking(ONE + "more") as asked:
            await hang.reached.wait()
            it.fake.media_marker = "<__media_of_another_process__>"
            hang.release()
            answer = await asked
        assert it.backend.session is not session
    assert answer.text == right(it.fake, ONE + "more")


async def test_an_erase_that_fails(tmp_path: Path) -> None:
    """Nothing is restored into what may still be there."""
    async with served(tmp_path, slots=1) as it:
        await one_on_disk(it)
        it.fake.faults.fail("erase")
        answer = await it.ask(ONE + "more")
        assert answer.text == right(it.fake, ONE + "more")
        assert it.fake.sent(action="restore") == []
        assert await it.count('steps_failed_total{step="erase"}') == 1


SAVES: dict[str, Any] = {
    "failed": lambda faults: faults.fail("save"),
    "truncated": lambda faults: faults.truncate_save(),
    "of nothing": lambda faults: faults.empty_save(),
    "of another conversation": lambda faults: faults.wrong_save(),
    "on a full disk": lambda faults: faults.disk_full(),
}


@pytest.mark.parametrize("fault", SAVES)
async def test_a_save_that_goes_wrong(tmp_path: Path, fault: str) -> None:
    """It leaves no file; the one who asked is answered, and the one who lost is answered rightly too."""
    async with served(tmp_path, slots=1) as it:
        await it.ask(ONE)
        SAVES[fault](it.fake.faults)
        assert (await it.ask(TWO)).text == right(it.fake, TWO)
        assert it.files() == []
        assert list(it.save_dir.glob("*.part")) == []
        assert await it.count('steps_failed_total{step="save"}') == 1
        await answered_all_the_same(it)


async def test_a_disk_that_stays_full(tmp_path: Path) -> None:
    """Everybody is served, from the slots alone."""
    async with served(tmp_path, slots=2) as it:
        it.fake.faults.disk_full(times=100)
        for text in (ONE, TWO, THREE, ONE, TWO, THREE):
            assert (await it.ask(text)).text == right(it.fake, text)
        assert it.files() == []


async def test_a_quota_too_small_for_anything(tmp_path: Path) -> None:
    """Nothing is kept, and everybody is served."""
    async with served(tmp_path, {"store": {"quota": "10KiB"}}, slots=1) as it:
        for text in (ONE, TWO, ONE):
            assert (await it.ask(text)).text == right(it.fake, text)
        assert it.files() == []


async def test_the_quota_holds(tmp_path: Path) -> None:
    """The one used longest ago goes first."""
    texts = [letters(n, 500) for n in range(6)]
    async with served(tmp_path, {"store": {"quota": "100KiB"}}, slots=1) as it:
        for text in texts:
            await it.ask(text)
            assert sum(map(size_of, it.files())) <= 100 << 10
        await it.saved()
        assert 2 <= len(it.files()) <= 3
        assert (await it.ask(texts[4] + "more")).source == "snapshot"
        assert (await it.ask(texts[0] + "more")).source == "cold"


async def test_a_belief_that_proved_wrong_is_counted(tmp_path: Path) -> None:
    """The server reuses less than was expected: the answer is right, and it is known."""
    async with served(tmp_path) as it:
        await it.ask(ONE)
        it.fake.slots[0].clear()
        it.fake.slots[1].clear()
        answer = await it.ask(ONE + "more")
        assert answer.text == right(it.fake, ONE + "more")
        assert answer.timings["cache_n"] == 0
        assert await it.count("reuse_mispredictions_total") == 1


async def test_owners_who_ask_while_their_context_is_saved(tmp_path: Path) -> None:
    """Neither in the slot any more nor on disk yet: they wait for the commit instead of computing it again."""
    async with served(tmp_path, slots=2) as it:
        for text in (ONE, TWO):
            await it.ask(text)
        hang = it.fake.faults.hang("save")
        async with it.asking(THREE) as newcomer:
            await hang.reached.wait()
            victim = next(lease.slot_id for lease in it.pool.dispatcher.leases)
            owner = ONE if it.fake.slots[victim].tokens.startswith(pack(it.fake.model.tokenize(ONE))) else TWO
            async with it.asking(owner + "more") as again:
                await it.until(lambda: it.pool.dispatcher.n_waiting == 1)
                hang.release()
                assert (await newcomer).text == right(it.fake, THREE)
                answer = await again
        assert (answer.source, answer.timings["cache_n"]) == ("snapshot", 800)
        assert answer.text == right(it.fake, owner + "more")


@pytest.mark.parametrize("kind", ["swa", "recurrent"])
@pytest.mark.parametrize("chunk_threshold_s", [0, 3600])
async def test_models_that_cannot_go_back_are_answered_rightly(
    tmp_path: Path, kind: str, chunk_threshold_s: float
) -> None:
    """Conversations that grow, part, and come back from disk."""
    settings = {"prefill": {"chunk_threshold_s": chunk_threshold_s}}
    async with served(tmp_path, settings, slots=1, kind=kind, batch=512, ubatch=128) as it:
        first = await it.ask(ONE)
        longer = ONE + first.text + " and? "
        assert (await it.ask(longer)).text == right(it.fake, longer)
        assert (await it.ask(TWO)).text == right(it.fake, TWO)
        answer = await it.ask(longer + "more")
        assert answer.text == right(it.fake, longer + "more")
        assert answer.timings["cache_n"] > 700
        parted = ONE[:500] + "another way"
        assert (await it.ask(parted)).text == right(it.fake, parted)


async def test_the_first_seconds_of_a_stranger_are_not_kept(tmp_path: Path) -> None:
    """What is cheaper to compute than to save is not saved."""
    async with served(tmp_path, slots=1) as it:
        await it.ask("short")
        await it.ask(ONE)
        assert it.fake.sent(action="save")[-1].status == 200
        assert it.files() == []
        assert len(it.fake.sent(NATIVE)) > 2
