"""Of many slots only a few are looked at, and the choice is the same as if all were."""

from __future__ import annotations

import random

import pytest

from llamaslot.backend import slot_worth
from llamaslot.backend.slot_table import SlotTable
from llamaslot.cache.content import Content
from llamaslot.cache.ids import common, count, pack
from llamaslot.cache.namespaces import Namespace, marker
from llamaslot.scheduling.placement import place
from llamaslot.scheduling.plan import Plan, Wait
from llamaslot.scheduling.rates import Rates
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.settings import SchedulingSettings
from llamaslot.scheduling.slots import SlotEvent
from tests.support.snapshots import listed

N_SLOTS = 40
NAMESPACES = (Namespace(), Namespace("anna"))


def tokens(rng: random.Random, stems: list[list[int]]) -> list[int]:
    """A conversation: some part of a common stem, then its own."""
    stem = rng.choice(stems)
    own = [rng.randrange(50_000) for _ in range(rng.choice([0, 10, 80, 700, 3000]))]
    return stem[: rng.choice([0, 5, 40, len(stem)])] + own


def filled(rng: random.Random, stems: list[list[int]]) -> SlotTable:
    """Slots that are free, hold something, or are at work; some of it is on disk."""
    table = SlotTable("gpu0", N_SLOTS, 20_000, settings=SchedulingSettings(), rates=Rates())
    table.can_save = table.can_erase = True
    for _ in range(8):
        n = rng.randrange(500, 4000)
        table.rates.prefill.observe(0, n, n / 2000 * rng.uniform(0.9, 1.1))
    for slot in rng.sample(table.slots, N_SLOTS - rng.randrange(4)):
        if not slot.is_idle:
            continue
        held, namespace = pack(tokens(rng, stems)), rng.choice(NAMESPACES)
        snapshot = None
        if held and rng.random() < 0.3 and namespace == Namespace():
            snapshot = f"s{slot.id}"
            table.add_snapshot(listed(snapshot, held, len(held) * 10))
        content = Content(held, is_dirty=snapshot is None, snapshot=snapshot, namespace=namespace)
        now = rng.uniform(0, 3000)
        table.take(slot, Request("fill", held, namespace=namespace), now)
        table.give_back(slot, SlotEvent.KEEP, content, now)
        if rng.random() < 0.3:
            job = Request(f"busy{slot.id}", pack(tokens(rng, stems)), namespace=namespace)
            plan = place(job, [table.view(job, 3000.0, {})], table.settings)
            if isinstance(plan, Plan):
                table.take(table.slots[plan.slot.id], job, 3000.0, plan)
    return table


def cost(decision: Plan | Wait) -> tuple[bool, float]:
    place = decision.place if isinstance(decision, Wait) else decision
    assert place is not None
    its = place.cost
    return isinstance(decision, Wait), its.wait_s + its.eviction_cost_s + its.steps_s


@pytest.mark.parametrize("seed", range(60))
def test_the_choice_is_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the millisecond, within which the slot used longest ago is taken."""
    rng = random.Random(seed)
    stems = [[rng.randrange(50_000) for _ in range(rng.choice([20, 300, 2000]))] for _ in range(3)]
    table = filled(rng, stems)
    table.check()
    for _ in range(10):
        job = Request(
            "asks",
            pack(tokens(rng, stems) or [1]),
            n_system=rng.choice([0, 5, 300]),
            namespace=rng.choice(NAMESPACES),
            no_cache=rng.random() < 0.1,
        )
        reserved = {table.slots[slot].key: 1.0 for slot in rng.sample(range(N_SLOTS), 3)}
        few = table.view(job, 3001.0, reserved)
        monkeypatch.setattr(slot_worth, "_FEW_SLOTS", N_SLOTS)
        every = table.view(job, 3001.0, reserved)
        monkeypatch.undo()
        assert len(few.slots) < len(every.slots)
        assert few.snapshots == every.snapshots
        assert set(few.slots) <= set(every.slots)
        chosen, best = (place(job, [view], table.settings) for view in (few, every))
        assert cost(chosen)[0] is cost(best)[0]
        assert cost(chosen)[1] == pytest.approx(cost(best)[1], abs=0.0021)
        if isinstance(chosen, Plan) and isinstance(best, Plan):
            assert chosen.source is best.source
            assert (chosen.next_best is None) == (best.next_best is None)


def test_what_others_hold_of_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known from the tree alone what a search finds."""
    for seed in range(20):
        rng = random.Random(seed)
        table = filled(rng, [[rng.randrange(9) for _ in range(30)] for _ in range(3)])
        for slot in table.slots:
            if not slot.is_idle or not slot.content.tokens:
                continue
            others = [other for other in table.slots if other is not slot and other.is_idle]
            mine = marker(slot.content.namespace) + slot.content.tokens
            found = max(
                (common(marker(other.content.namespace) + other.content.tokens, mine) for other in others),
                default=0,
            ) - count(marker(slot.content.namespace))
            on_disk = table._candidates.on_disk(slot.content.tokens, slot.content.namespace)
            assert table.worth.covered(slot) == max(found, on_disk)
            assert table.worth.on_disk(slot) == on_disk
