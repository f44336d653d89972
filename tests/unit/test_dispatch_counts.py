"""What granting a slot costs, in counts: plans made, requests sorted, slots looked at."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import pytest

from bench.virtual import VirtualLoop
from llamaslot.backend.slot_table import SlotTable
from llamaslot.backend.slot_worth import SlotWorth
from llamaslot.cache.content import Content
from llamaslot.cache.ids import NEGLIGIBLE_TOKENS, pack
from llamaslot.cache.prefix_index import PrefixIndex
from llamaslot.fleet import dispatcher
from llamaslot.fleet.queue import Queue, Waiting
from llamaslot.observe.journal import DecisionRecorder, Journal
from llamaslot.scheduling.fairness import Shares
from llamaslot.scheduling.placement import place
from llamaslot.scheduling.plan import Plan, Save, Source, Wait
from llamaslot.scheduling.rates import Rates
from llamaslot.scheduling.request import Request, User
from llamaslot.scheduling.settings import QueueLimits, SchedulingSettings
from llamaslot.scheduling.slots import SlotEvent
from tests.support.house import House, tokens_of
from tests.support.snapshots import listed
from tests.support.stub import StubServer

N_SLOTS = 4


@pytest.fixture
def house() -> Iterator[House]:
    """Four slots with conversations of 6,000 tokens."""
    house = House(VirtualLoop(), StubServer(N_SLOTS), limits=QueueLimits(max_waiting=1000))
    table = house.dispatcher.tables[0]
    for slot in table.slots:
        owner = Request("owner", tokens_of(10_000 * (slot.id + 1), 6000))
        table.take(slot, owner, 0.0)
        table.give_back(slot, SlotEvent.KEEP, Content(owner.tokens, is_dirty=True), 0.0)
    yield house
    house.close()


@pytest.mark.parametrize("n_users", [1, 50])
def test_each_slot_granted_costs_one_plan_however_many_wait(
    house: House, n_users: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 250 waiting, each release plans for one, and reads the queue to the second at most."""
    n_requests, n_plans, n_read = 250, [0], [0]
    ordered = Queue.ordered

    def counting(*args: Any) -> Plan | Wait:
        n_plans[0] += 1
        return place(*args)

    def reading(self: Queue) -> Iterator[Waiting]:
        for waiting in ordered(self):
            n_read[0] += 1
            yield waiting

    monkeypatch.setattr(dispatcher, "place", counting)
    monkeypatch.setattr(Queue, "ordered", reading)

    async def short(number: int) -> None:
        user = User(f"key:{number % n_users}")
        request = Request(f"short {number}", tokens_of(500_000 + 100 * number, 40), user=user)
        with await house.dispatcher.lease(request):
            await asyncio.sleep(0.01)

    async def all_of_them() -> None:
        await asyncio.gather(*(short(number) for number in range(n_requests)))

    house.loop.run(all_of_them())
    assert n_plans[0] == n_requests
    assert n_read[0] <= 3 * n_requests
    house.dispatcher.check()


def test_few_slots_are_valued_again_for_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 256 slots only those whose content has changed, and their neighbors in the tree."""
    n_valued, compute = [0], SlotWorth._compute

    def counting(self: SlotWorth, slot: object) -> object:
        n_valued[0] += 1
        return compute(self, slot)  # type: ignore[arg-type]

    table = SlotTable("gpu0", 256, 65_536, settings=SchedulingSettings(), rates=Rates())
    table.can_save = table.can_erase = True
    for slot in table.slots:
        owner = Request("owner", tokens_of(10_000 * slot.id, 200))
        table.take(slot, owner, 0.0)
        table.give_back(slot, SlotEvent.KEEP, Content(owner.tokens, is_dirty=True), 0.0)
    monkeypatch.setattr(SlotWorth, "_compute", counting)
    for number in range(20):
        request = Request(f"short {number}", tokens_of(9_000_000 + 100 * number, 40))
        plan = place(request, [table.view(request, 1.0, {})], table.settings)
        n_valued[0] = 0 if number == 0 else n_valued[0]
        assert isinstance(plan, Plan)
        table.take(table.slots[plan.slot.id], request, 1.0, plan)
        table.give_back(
            table.slots[plan.slot.id], SlotEvent.KEEP, Content(request.tokens, is_dirty=True), 1.0
        )
    assert n_valued[0] <= 3 * 19
    table.check()


@pytest.mark.parametrize("seed", range(30))
def test_what_is_kept_of_a_slot_is_what_would_be_computed(seed: int) -> None:
    """Slots that hold parts of each other come and go, and their snapshots. Less than 64 tokens do not count."""
    rng = random.Random(seed)
    stems = [[rng.randrange(1000) for _ in range(300)] for _ in range(3)]
    table = SlotTable("gpu0", 12, 65_536, settings=SchedulingSettings(), rates=Rates())
    table.can_save = True
    for step in range(40):
        slot = rng.choice(table.slots)
        held = pack(
            rng.choice(stems)[: rng.choice([0, 70, 150, 300])] + [rng.randrange(1000)] * rng.choice([0, 90])
        )
        key = slot.key
        plan = Plan(key, (Save(key),) if rng.random() < 0.5 else (), Source.COLD, 0)
        pending = table.take(slot, Request("x", held), float(step), plan)
        check_worths(table)
        if pending is not None:
            if rng.random() < 0.7:
                table.add_snapshot(listed(f"s{step}", pending.content.tokens, len(pending.content.tokens)))
            table.end_pending_save(pending)
        check_worths(table)
        if step % 5 == 0:
            table.drop_snapshot(f"s{rng.randrange(step + 1)}")
        table.give_back(slot, SlotEvent.KEEP, Content(held, is_dirty=True), float(step))
        check_worths(table)


def check_worths(table: SlotTable) -> None:
    """Placing is told what computing it all again gives."""
    table.view(Request("asks", pack([1, 2, 3])), 0.0, {})
    table.check()
    figures = table.rates.prefill.seconds(0, NEGLIGIBLE_TOKENS)
    for slot in table.slots:
        if slot.is_idle:
            known, now = table.worth.of(slot), table.worth._compute(slot)
            assert known.content is slot.content
            assert known.eviction_cost_s == pytest.approx(now.eviction_cost_s, abs=figures)


def test_who_shares_more_or_less_than_before_is_told() -> None:
    """Against all shares, read after each change."""
    for seed in range(40):
        rng, told = random.Random(seed), set[int]()
        index: PrefixIndex[int] = PrefixIndex(on_cover=told.add)
        known = dict[int, int]()
        for _ in range(60):
            holder = rng.randrange(8)
            told.clear()
            if rng.random() < 0.3:
                index.drop(holder)
            else:
                index.insert(holder, pack([rng.randrange(2) for _ in range(rng.randrange(1, 7))]))
            now = {one: index.shared_with_others(one) for one in index.holders()}
            changed = {one for one, n in now.items() if one != holder and known.get(one) != n}
            assert changed <= told
            assert len(told) <= 6
            known = now


@pytest.mark.parametrize("seed", range(40))
def test_the_order_is_the_same_as_if_all_were_sorted(seed: int) -> None:
    """Users with more or fewer deficits, small requests, requests that had a slot before."""
    rng = random.Random(seed)
    loop = VirtualLoop()
    queue = Queue(QueueLimits(max_waiting=100))
    queue._shares = shares = Shares()
    users = [f"u{i}" for i in range(rng.choice([1, 4]))]
    for user in users * 2:
        shares.granted(user, rng.uniform(0, 9), set(users), set())
    waiting = list[Waiting]()
    for number in range(rng.randrange(1, 25)):
        request = Request(f"r{number}", user=User(rng.choice(users)))
        recorder = DecisionRecorder(Journal(), request, loop.time)
        is_back = rng.random() < 0.1
        one = Waiting(
            request.user.id, rng.uniform(0, 5), rng.random() < 0.4,
            request=request, granted=loop.create_future(), recorder=recorder, came_at=0.0, is_back=is_back,
        )  # fmt: skip
        one.n_preempted = int(rng.random() < 0.1)
        queue.add(one, 0.0)
        waiting.append(one)
    for one in rng.sample(waiting, rng.randrange(len(waiting))):
        queue.remove(one)
    if seed % 3 == 0 and len(queue) > 1:
        queue.granted(next(queue.ordered()), 20.0, 0.0)
    queues: dict[str, list[Waiting]] = {}
    for one in queue:
        if not one.is_back:
            queues.setdefault(one.user, []).append(one)
    order = shares.order(queues, queue.limits.small_request_max_overtake_s)
    assert list(queue.ordered()) == [one for one in queue if one.is_back] + order
    queue.check()
    loop.close()
