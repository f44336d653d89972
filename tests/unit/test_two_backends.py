"""One queue in front of two backends: who gets a slot of which."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from llamaslot.backend.lease import Lease
from llamaslot.backend.slot_table import SlotTable
from llamaslot.cache.content import Content
from llamaslot.cache.ids import pack
from llamaslot.errors import BackendDown
from llamaslot.fleet.dispatcher import Dispatcher
from llamaslot.scheduling.plan import Source
from llamaslot.scheduling.rates import Rates
from llamaslot.scheduling.request import Placement, Request
from llamaslot.scheduling.settings import QueueLimits, SchedulingSettings
from llamaslot.scheduling.slots import SlotEvent, SlotKey
from llamaslot.store.model_snapshots import ModelSnapshots
from tests.support.inprocess import spawn

SETTINGS = SchedulingSettings(small_prompt_tokens=100)
OWN = pack(range(1000, 3000))


class Two:
    """Backends ``a`` and ``b`` of a slot each, unless told otherwise, without a server behind them."""

    def __init__(self, *, slots: int = 1, seconds_per_1000: dict[str, float] | None = None) -> None:
        self.now = 0.0
        self.dispatcher = Dispatcher(SETTINGS, QueueLimits(), lambda: self.now)
        self.tables: dict[str, SlotTable] = {}
        for name in ("a", "b"):
            rates = Rates()
            rates.prefill.observe(0, 1000, (seconds_per_1000 or {}).get(name, 1.0))
            self.tables[name] = SlotTable(name, slots, 16_384, settings=SETTINGS, rates=rates)
            self.dispatcher.add(name)
            self.dispatcher.attach(self.tables[name])

    def holds(self, backend: str, tokens: bytes, slot: int = 0) -> None:
        """A slot of ``backend`` holds a conversation."""
        table = self.tables[backend]
        table.take(table.slots[slot], Request("before", tokens), self.now)
        table.give_back(
            table.slots[slot], SlotEvent.KEEP, Content(tokens, is_exact=False, is_dirty=True), self.now
        )

    async def lease(self, name: str, tokens: bytes = b"", **more: object) -> Lease:
        return await self.dispatcher.lease(replace(Request(name, tokens), **more))

    def end(self, lease: Lease) -> None:
        lease.release()
        self.dispatcher.check()


async def settled(task: asyncio.Task[Lease]) -> bool:
    """Whether it has got a slot, once everything that can run has run."""
    for _ in range(3):
        await asyncio.sleep(0)
    return task.done()


async def test_a_follow_up_goes_to_the_backend_that_holds_its_prefix() -> None:
    """And what is leased, planned and indexed is that backend's."""
    two = Two()
    two.holds("b", OWN)
    lease = await two.lease("follow-up", OWN + pack([1, 2, 3]))
    assert lease.slot_key == SlotKey("b", 0)
    assert lease.plan is not None
    assert (lease.plan.slot, lease.plan.source, lease.plan.n_reused) == (
        SlotKey("b", 0),
        Source.RESIDENT,
        2000,
    )
    assert lease.table is two.tables["b"]
    assert two.dispatcher.leases == [lease]
    two.end(lease)


async def test_another_request_with_the_same_prefix_spills_over() -> None:
    """The answer in the slot that holds it takes longer than computing it on the other backend."""
    two = Two(seconds_per_1000={"a": 0.1, "b": 0.1})
    two.holds("b", OWN)
    first = await two.lease("first", OWN + pack([1]))
    second = await two.lease("second", OWN + pack([2]))
    assert (first.slot_key.backend, second.slot_key.backend) == ("b", "a")
    two.end(first)
    two.end(second)


async def test_a_new_prompt_goes_to_the_faster_backend() -> None:
    """By what each has learned of itself."""
    two = Two(seconds_per_1000={"a": 4.0, "b": 1.0})
    lease = await two.lease("new", OWN)
    assert lease.slot_key.backend == "b"
    two.end(lease)


async def test_there_is_one_queue() -> None:
    """Whoever is next gets the first slot that is given back, whichever backend's it is."""
    two = Two()
    a, b = [await two.lease(f"{n}", pack(range(5000 * n, 5000 * n + 500))) for n in (1, 2)]
    assert {a.slot_key.backend, b.slot_key.backend} == {"a", "b"}
    third = spawn(two.lease("third", pack(range(90_000, 90_500))))
    assert not await settled(third)
    assert two.dispatcher.n_waiting == 1
    two.end(b)
    assert (await third).slot_key == b.slot_key
    two.end(a)
    two.end(await third)


async def test_each_backend_has_an_exclusive_section_of_its_own() -> None:
    """A request for which llama-server chooses the slot closes one backend; others are placed on the other one."""
    two = Two(slots=2)
    first = await two.lease("first", placement=Placement.SERVER_CHOSEN)
    section = two.dispatcher.backends[first.table.backend]
    section.request_exclusive(first)
    section.pause_admission(first)
    other = "b" if first.table.backend == "a" else "a"
    placed = await two.lease("placed", OWN)
    assert placed.slot_key.backend == other
    second = await two.lease("second", placement=Placement.SERVER_CHOSEN)
    assert second.table.backend == other
    third = spawn(two.lease("third", placement=Placement.SERVER_CHOSEN))
    assert not await settled(third)
    two.end(first)
    assert (await third).table is first.table
    for lease in (placed, second, await third):
        two.end(lease)


async def test_a_backend_that_is_down_is_not_waited_for() -> None:
    """Requests are told when none is left."""
    two = Two()
    two.holds("b", OWN)
    two.dispatcher.detach("b", BackendDown("gone"))
    lease = await two.lease("follow-up", OWN + pack([1]))
    assert (lease.slot_key.backend, lease.plan and lease.plan.n_reused) == ("a", 0)
    waits = spawn(two.lease("waits", pack(range(500))))
    assert not await settled(waits)
    two.dispatcher.detach("a", BackendDown("gone too"))
    with pytest.raises(BackendDown):
        await waits
    with pytest.raises(BackendDown):
        await two.lease("late", OWN)
    lease.release()
    two.dispatcher.attach(SlotTable("b", 1, 16_384, settings=SETTINGS, rates=Rates()))
    lease = await two.lease("again", OWN)
    assert lease.slot_key.backend == "b"
    two.end(lease)


async def test_what_one_backend_is_saving_is_waited_for_on_the_other() -> None:
    """Both find the same snapshots, so neither resumes from an older one meanwhile."""
    two = Two()
    library = ModelSnapshots()
    for table in two.tables.values():
        table.can_save = table.can_erase = True
        table.use_snapshots(library)
    two.holds("a", OWN)
    other = await two.lease("another", pack(range(9000, 9500)))
    while other.slot_key != SlotKey("a", 0):  # the save precedes it there
        other = await two.lease("one more", pack(range(9600, 9900)))
    view = two.tables["b"].view(Request("follow-up", OWN + pack([1])), two.now, {})
    assert [snapshot.n_usable for snapshot in view.snapshots] == [2000]
    assert view.snapshots[0].wait_s > 0
