"""Several real llama-servers behind one address: reuse over all of them, and what one that fails costs."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from llamaslot.backend.health import Health
from llamaslot.scheduling.slots import Slot
from tests.support import models
from tests.support.answers import Answer
from tests.support.fleet import RealFleet, backend_of, real_fleet
from tests.support.inprocess import spawn
from tests.support.users import words

pytestmark = pytest.mark.real

# A turn of fewer than 64 tokens would not be worth a save.
N_CONTEXT, N_MORE, N_ANSWER = 1500, 100, 8
SAVES = {"store": {"idle_save_s": 0}}


class Conversation:
    """A text that grows by a question and its answer with each turn."""

    def __init__(self, seed: int, model: str = "any") -> None:
        self._rng, self._model = random.Random(seed), model
        self.text, self.n_held = words(self._rng, N_CONTEXT), 0

    async def turn(self, it: RealFleet) -> Answer:
        """One request that must be answered."""
        self.text += words(self._rng, N_MORE)
        answer = await it.ask(self.text, n=N_ANSWER, model=self._model)
        assert answer.status == 200, answer.raw
        self.text += answer.text
        return answer

    @property
    def n_new(self) -> int:
        """Tokens of a follow-up that no cache can have: its question, and the last token of the answer before."""
        return N_MORE + 1


async def follow_ups(it: RealFleet, users: Sequence[Conversation], n_turns: int) -> float:
    """All of them at once, each its turns in a row. The share that was reused of what an unlimited cache would reuse,
    by the servers' counters."""
    n_before = await it.n_computed()
    n_could = n_new = 0

    async def talk(user: Conversation) -> None:
        nonlocal n_could, n_new
        for _ in range(n_turns):
            n_could += len(user.text) - 1
            n_new += user.n_new
            await user.turn(it)

    await asyncio.gather(*map(talk, users))
    n_computed = await it.n_computed() - n_before
    return 1 - (n_computed - n_new) / n_could


async def begun(it: RealFleet, n: int, model: str = "any") -> list[Conversation]:
    """So many conversations after their first turn, saved."""
    users = [Conversation(seed, model) for seed in range(n)]
    for user in users:
        await user.turn(it)
    await all_saved(it)
    return users


async def all_saved(it: RealFleet) -> None:
    tables = [its.leases.table for its in it.registry.backends]
    await it.until(
        lambda: (
            not any(table.worth.is_worth_saving(slot) for table in tables if table for slot in table.filled())
        )
    )


async def test_follow_ups_reuse_their_contexts_on_three_servers(tmp_path: Path) -> None:
    """Nine users on six slots of three servers with one directory, against an unlimited cache.

    Seen: 0.988 to 0.995. A turn that costs less to compute than to save is computed again.
    """
    async with real_fleet(tmp_path, [models.dense(tmp_path)] * 3, SAVES, slots=2, context=4096) as it:
        assert it.members() == [{"gpu0", "gpu1", "gpu2"}]
        users = await begun(it, 9)
        assert await follow_ups(it, users, 3) >= 0.95


async def test_one_that_is_killed_costs_no_request(tmp_path: Path) -> None:
    """Those on it are answered by others, from what was saved; started again it is used by itself."""
    async with real_fleet(tmp_path, [models.dense(tmp_path)] * 3, SAVES, slots=2, context=4096) as it:
        users = await begun(it, 6)
        n_before = [len(user.text) for user in users]
        turns = [spawn(user.turn(it)) for user in users]
        victim = it.servers["gpu1"]
        await it.until(lambda: any(not slot.is_idle for slot in slots_of(it, "gpu1")))
        await victim.kill()
        answers = await asyncio.gather(*turns)  # each of them 200
        assert all(len(user.text) > n for user, n in zip(users, n_before, strict=True))
        assert len(answers) == 6
        assert await follow_ups(it, users, 1) >= 0.95
        await it.until(lambda: it.named("gpu1").health is Health.DOWN)
        await victim.start()
        await it.all_up()
        places = await asyncio.gather(*(user.turn(it) for user in [Conversation(100 + n) for n in range(6)]))
        assert "gpu1" in set(map(backend_of, places))


def slots_of(it: RealFleet, name: str) -> Sequence[Slot]:
    """What llamaslot knows of a server's slots."""
    table = it.named(name).leases.table
    return table.slots if table is not None else ()


async def test_one_that_hangs_is_not_noticed_by_others(tmp_path: Path) -> None:
    """Stopped by a signal: conversations on the others go on, its own are continued there; it comes back."""
    async with real_fleet(tmp_path, [models.dense(tmp_path)] * 3, SAVES, slots=2, context=4096) as it:
        users = await begun(it, 6)
        os.kill(it.servers["gpu2"].pid, signal.SIGSTOP)
        try:
            answers = await asyncio.gather(*(user.turn(it) for user in users))
            assert "gpu2" not in set(map(backend_of, answers))
        finally:
            os.kill(it.servers["gpu2"].pid, signal.SIGCONT)
        await it.all_up()


async def test_two_models_share_a_directory(tmp_path: Path) -> None:
    """Each finds its own snapshots; after a restart of all too."""
    pair = [models.dense(tmp_path), models.dense(tmp_path, seed=2)]
    async with real_fleet(tmp_path, pair, SAVES, slots=1, context=4096) as it:
        names = [its.last_session.model_name for its in it.registry.backends if its.last_session]
        assert len(set(names)) == 2
        assert sorted(map(sorted, it.members())) == [["gpu0"], ["gpu1"]]
        users = [user for name in names for user in await begun(it, 2, name)]
        assert await follow_ups(it, users, 2) >= 0.95
        await all_saved(it)
        await it.stop()
        for server in it.servers.values():
            await server.restart()
        await it.start()
        assert await follow_ups(it, users, 1) >= 0.95


async def test_a_directory_that_is_not_shared_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Although the configuration says so: which, and what to do. The server serves all the same."""
    async with real_fleet(tmp_path, [models.dense(tmp_path)] * 2, SAVES, slots=1, context=2048) as it:
        await it.stop()
        other = it.servers["gpu1"]
        await other.stop()
        other.save_into(tmp_path / "elsewhere")
        await other.start()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "llamaslot"):
            await it.start()
        told = [text for text in caplog.messages if "did not appear in" in text]
        assert len(told) == 1
        assert told[0].startswith("gpu1: ")
        assert it.members() == [{"gpu0", "gpu1"}]
        await asyncio.gather(*(Conversation(seed).turn(it) for seed in range(2)))
