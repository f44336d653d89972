"""A fleet of which servers die, hang, come back, change their model and are drained, in random order."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from llamaslot.backend.health import Health
from llamaslot.backend.slot_table import SlotTable
from llamaslot.cache.ids import count
from tests.support.answers import Answer
from tests.support.fake import FakeServer
from tests.support.fleet import A, B, Fleet, ask_often, fleet
from tests.support.inprocess import letters, right, spawn

N_BACKENDS, N_STEPS, N_CONVERSATIONS = 20, 60, 12
SEEDS = [int(os.environ["FLEET_SEED"])] if "FLEET_SEED" in os.environ else [1]


class Chaos:
    """What is done to a fleet, and what its clients see. ``n_harms``: so far, of any server."""

    def __init__(self, it: Fleet, seed: int) -> None:
        self.it, self.rng = it, random.Random(seed)
        self.texts = [letters(seed * 100 + n, 300) for n in range(N_CONVERSATIONS)]
        self.dead, self.frozen, self.drained = set[str](), set[str](), set[str]()
        self.asked = dict[int, asyncio.Task[None]]()  # by conversation
        self.n_harms, self.seen = 0, Counter[str]()

    # -- clients -------------------------------------------------------------------------------------------------

    def ask(self) -> None:
        """One conversation goes on."""
        if idle := [n for n in range(N_CONVERSATIONS) if n not in self.asked or self.asked[n].done()]:
            number = self.rng.choice(idle)
            self.asked[number] = spawn(self._talk(number))

    async def _talk(self, number: int) -> None:
        """Whatever happens to one server, the answer is right; to two that it was on in turn, it may be an error."""
        name, n_before = "ab"[number % 2], self.n_harms
        answer = await self.it.ask(self.texts[number], model=name, stream=bool(number % 3))
        self.seen[str(answer.status)] += 1
        expected = right(FakeServer(None, model=A if name == "a" else B), self.texts[number])
        if answer.status == 200 and answer.text == expected:
            self.texts[number] += expected + letters(self.rng.randrange(1000), 40)
            return
        self.seen["refused" if answer.status != 200 else "broken off"] += 1
        n_harms = self.n_harms - n_before
        assert n_harms or not self._has(name), (answer.status, answer.raw[-300:])
        if answer.status == 200:  # broken off, with an error event
            assert expected.startswith(answer.text), (expected, answer.text)
            assert answer.error
        elif not _has_begun(answer):
            assert n_harms > 1 or not self._has(name), (answer.status, answer.raw[-300:])

    def _has(self, model: str) -> bool:
        """Whether a server of that model can take requests."""
        its = A if model == "a" else B
        away = self.dead | self.frozen | self.drained
        return any(fake.model is its for name, fake in self.it.fakes.items() if name not in away)

    # -- harm ----------------------------------------------------------------------------------------------------

    def _one(self, *besides: set[str]) -> str | None:
        left = sorted(self.it.fakes.keys() - set().union(*besides))
        return self.rng.choice(left) if left else None

    async def kill(self) -> None:
        if len(self.dead | self.frozen) < 12 and (name := self._one(self.dead, self.frozen)):
            self.dead.add(name)
            self.n_harms += 1
            await self.it.fakes[name].kill()

    async def start(self) -> None:
        if self.dead:
            name = self.rng.choice(sorted(self.dead))
            await self.it.fakes[name].start()
            self.dead.discard(name)

    async def change_model(self) -> None:
        """Loading takes longer than llamaslot needs to see that a connection was reset."""
        if name := self._one(self.dead, self.frozen):
            self.n_harms += 1
            fake, session = self.it.fakes[name], self.it.named(name).session
            await fake.kill()
            await self.it.until(lambda: session is None or self.it.named(name).session is not session)
            fake.model = self.rng.choice([A, B])
            await fake.start()

    async def freeze(self) -> None:
        if len(self.frozen) < 3 and (name := self._one(self.dead, self.frozen)):
            self.frozen.add(name)
            self.n_harms += 1
            self.it.fakes[name].freeze()

    async def thaw(self) -> None:
        if self.frozen:
            name = self.rng.choice(sorted(self.frozen))
            self.it.fakes[name].thaw()
            self.frozen.discard(name)

    async def drain(self) -> None:
        if len(self.drained) < 4 and (name := self._one(self.dead, self.frozen, self.drained)):
            self.drained.add(name)
            self.n_harms += 1
            spawn(self.it.send("POST", f"/llamaslot/drain?backend={name}"))
            await asyncio.sleep(0)

    async def undrain(self) -> None:
        if self.drained:
            name = self.rng.choice(sorted(self.drained))
            assert (await self.it.send("POST", f"/llamaslot/undrain?backend={name}")).status == 200
            self.drained.discard(name)

    async def spoil(self) -> None:
        """The next save or restore goes wrong, or a connection is lost."""
        if name := self._one(self.dead, self.frozen):
            faults = self.it.fakes[name].faults
            self.n_harms += 1
            harms: list[Callable[[], object]] = [
                faults.disk_full,
                faults.truncate_save,
                lambda: faults.fail("save"),
                lambda: faults.fail("restore"),
                lambda: faults.disconnect_before_headers("save"),
                lambda: faults.disconnect_after_work("save"),
                lambda: faults.disconnect_before_headers("/completion"),
            ]
            self.rng.choice(harms)()

    async def wait(self) -> None:
        await asyncio.sleep(self.rng.choice([0, 0, 0.01, 0.05]))

    async def step(self) -> None:
        harms = [self.kill, self.start, self.start, self.change_model, self.freeze, self.thaw]
        harms += [self.drain, self.undrain, self.spoil, self.spoil, self.wait, self.wait]
        for _ in range(self.rng.randrange(4)):
            self.ask()
        await self.rng.choice(harms)()

    async def mend(self) -> None:
        """All serve again."""
        for name in sorted(self.frozen):
            self.it.fakes[name].thaw()
        for name in sorted(self.dead):
            await self.it.fakes[name].start()
        for name in sorted(self.drained):
            await self.it.send("POST", f"/llamaslot/undrain?backend={name}")
        self.dead, self.frozen, self.drained = set(), set(), set()

    def check_beliefs(self) -> None:
        """Each slot begins with what it is believed to hold, and each snapshot is a file."""
        for backend in self.it.registry.backends:
            table, fake = backend.leases.table, self.it.fakes[backend.name]
            assert isinstance(table, SlotTable)
            for slot in table.slots:
                believed, held = slot.content.tokens, fake.engine.slots[slot.id].tokens
                assert held.startswith(believed), f"{slot} holds {count(held)}"
            for id_ in table.model_snapshots.snapshots:
                assert id_ in backend.store.catalog.snapshots  # type: ignore[union-attr]


def _has_begun(answer: Answer) -> bool:
    return answer.raw.startswith(b"data:")


@pytest.mark.parametrize("seed", SEEDS)
async def test_whatever_happens_to_servers_no_request_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    """No lease is left, no context is believed that is not there, and every request of which no byte was sent is
    answered, as long as one server that can take it stays unharmed.
    """
    caplog.set_level(logging.ERROR)
    ask_often(monkeypatch, 0.1)
    monkeypatch.setattr("llamaslot.backend.backend._HEALTH_POLL_S", (0.1,))
    # It is never the prompt that ends a server.
    monkeypatch.setattr("llamaslot.fleet.bad_prompts._KEPT_S", 0.0)
    models = [A if n % 2 else B for n in range(N_BACKENDS)]
    settings = {"store": {"idle_save_s": 0}, "models": {"aliases": {}}}
    async with fleet(tmp_path, models, settings) as it:
        chaos = Chaos(it, seed)
        for _ in range(N_STEPS):
            await chaos.step()
        await chaos.mend()
        await asyncio.gather(*chaos.asked.values())
        await it.until(lambda: all(its.health is Health.UP for its in it.registry.backends))
        await it.rest()
        chaos.check_beliefs()
        for number in range(N_CONVERSATIONS):  # all is well again
            await chaos._talk(number)
        await it.rest()
        chaos.check_beliefs()
        assert chaos.seen["200"] >= 2 * chaos.seen["refused"], chaos.seen
    assert not [record for record in caplog.records if record.name == "llamaslot.tasks"]
