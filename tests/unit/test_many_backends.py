"""Of many backends a placement looks closely at a few, and finds what it would find among all."""

from __future__ import annotations

import asyncio
import contextlib
import random
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaslot.backend.slot_table import SlotTable
from llamaslot.cache.content import Content
from llamaslot.cache.ids import pack
from llamaslot.cache.namespaces import Namespace
from llamaslot.cache.prefix_index import PrefixIndex
from llamaslot.fleet.dispatcher import Dispatcher
from llamaslot.scheduling.placement import TIE_S, place
from llamaslot.scheduling.plan import Plan, Wait
from llamaslot.scheduling.rates import Rates
from llamaslot.scheduling.request import Request, User
from llamaslot.scheduling.settings import QueueLimits, SchedulingSettings
from llamaslot.scheduling.slots import SlotEvent, SlotKey
from llamaslot.store.model_snapshots import ModelSnapshots
from tests.support.snapshots import listed

N = 40
SETTINGS = SchedulingSettings()


def tables(n_ctx: int = 16_384) -> list[SlotTable]:
    """Of one slot each, that holds a conversation of its own; the last one is used longest ago."""
    found = []
    for number in range(N):
        rates = Rates()
        rates.prefill.observe(0, 1000, 1.0)
        table = SlotTable(f"gpu{number}", 1, n_ctx, settings=SETTINGS, rates=rates)
        holds(table, own(number), used_at=100.0 - number)
        found.append(table)
    return found


def own(number: int) -> bytes:
    return pack(range(1000 * number, 1000 * number + 900))


def holds(table: SlotTable, tokens: bytes, used_at: float) -> None:
    (slot,) = table.slots
    table.take(slot, Request("before", tokens), used_at)
    event = SlotEvent.KEEP if tokens else SlotEvent.EMPTY
    table.give_back(slot, event, Content(tokens, is_exact=False, is_dirty=bool(tokens)), used_at)


def pool_of(every: list[SlotTable]) -> Dispatcher:
    dispatcher = Dispatcher(SETTINGS, QueueLimits(), lambda: 200.0)
    for table in every:
        dispatcher.add(table.backend)
        dispatcher.attach(table)
    dispatcher.check()
    return dispatcher


async def looked_at(
    every: list[SlotTable], tokens: bytes, reserved: dict[SlotKey, float] | None = None
) -> list[str]:
    return names(pool_of(every), Request("r", tokens), reserved)


def names(
    dispatcher: Dispatcher, request: Request, reserved: dict[SlotKey, float] | None = None
) -> list[str]:
    few = dispatcher._index.worth_a_look(dispatcher.backends.open, request, 200.0, reserved or {})
    return [table.backend for table in few]


@pytest.mark.parametrize("number", [0, 17, 39])
async def test_the_one_that_holds_its_tokens_comes_first(number: int) -> None:
    """Wherever it stands; only a few others are looked at."""
    found = await looked_at(tables(), own(number) + pack([1]))
    assert found[0] == f"gpu{number}"
    assert len(found) < 8


async def test_a_new_conversation_sees_empty_slots_and_those_used_longest_ago() -> None:
    """As its placement would choose."""
    every = tables()
    holds(every[5], b"", used_at=200.0)
    assert await looked_at(every, pack(range(90_000, 91_000))) == ["gpu5", "gpu39"]


async def test_reserved_slots_are_passed_over() -> None:
    """They are for requests that wait for them."""
    reserved = {SlotKey(f"gpu{number}", 0): 1.0 for number in (39, 38)}
    assert await looked_at(tables(), pack(range(90_000, 91_000)), reserved) == ["gpu37", "gpu36"]


async def test_a_faster_one_is_always_among_them() -> None:
    """It computes the prompt soonest."""
    every = tables()
    for _ in range(20):
        every[7].rates.prefill.observe(0, 1000, 0.1)
    assert "gpu7" in await looked_at(every, pack(range(90_000, 91_000)))


async def test_a_small_prompt_takes_no_large_context() -> None:
    """Although what is in a file already costs less to lose than what is small, and nowhere else."""
    every = tables()
    for number, table in enumerate(every):
        table.can_save = True
        long = pack(range(1000 * number, 1000 * number + 1200))
        if number != 7:
            snapshot = listed(f"s{number}", long, 1000)
            table.add_snapshot(snapshot)
            (slot,) = table.slots
            table.take(slot, Request("saved", long), 1.0)
            table.give_back(slot, SlotEvent.KEEP, Content(long, snapshot=snapshot.id), 1.0)
    prompt = pack(range(90_000, 90_300))
    looked = await looked_at(every, prompt)
    assert "gpu7" in looked
    views = [table.view(Request("r", prompt), 200.0, {}) for table in every]
    assert place(Request("r", prompt), views, SETTINGS).slot == SlotKey("gpu7", 0)


async def test_slots_that_are_too_small_are_left_out() -> None:
    """Unless all are."""
    small, large = tables(n_ctx=800)[:2], tables()[2:4]
    assert await looked_at([*small, *large], own(0)) == ["gpu2", "gpu3"]
    assert await looked_at(small, own(0)) == ["gpu0", "gpu1"]


class Many:
    """Backends of two to four slots, some faster than others, with conversations that partly begin alike, partly saved
    in the directory that all share; or all as fast, or each with a directory of its own.
    """

    def __init__(
        self,
        seed: int,
        n_backends: int = N,
        *,
        n_slots: int | None = None,
        speeds: tuple[float, ...] = (0.3, 1.0),
        is_shared: bool = True,
    ) -> None:
        self.rng, self.now = random.Random(seed), 0.0
        self.dispatcher = Dispatcher(SETTINGS, QueueLimits(), lambda: self.now)
        self.library = ModelSnapshots()
        self.stems = [self.some(n) for n in (20, 300, 2000)]
        self.shared: tuple[int, ...] = (0, 5, 40, 2000)
        self.ends: tuple[int, ...] = (10, 80, 700, 3000)
        if len(speeds) == 1:
            # A placement does not look for what shares fewer than 64 tokens. And what a slot holds behind a beginning
            # that many share is so long that no backend takes it for the end of the same conversation.
            self.stems, self.shared, self.ends = self.stems[1:], (0, 2000), (700, 3000)
        self.held: list[list[int]] = []
        for number in range(n_backends):
            rates = Rates()
            noise = self.rng.uniform(0.97, 1.03) if len(speeds) > 1 else 1.0
            rates.prefill.observe(0, 1000, self.rng.choice(speeds) * noise)
            table = SlotTable(
                f"gpu{number}",
                n_slots or self.rng.choice([2, 3, 4]),
                16_384,
                settings=SETTINGS,
                rates=rates,
            )
            table.can_save = table.can_erase = True
            table.use_snapshots(self.library if is_shared else ModelSnapshots())
            self.dispatcher.add(table.backend)
            self.dispatcher.attach(table)
            for slot in table.slots:
                self.now += self.rng.uniform(0, 5)
                self.fill(table, slot.id)

    def some(self, n: int) -> list[int]:
        return [self.rng.randrange(50_000) for _ in range(n)]

    def text(self) -> list[int]:
        stem = self.rng.choice(self.stems)
        return stem[: self.rng.choice(self.shared)] + self.some(self.rng.choice(self.ends))

    def fill(self, table: SlotTable, number: int) -> None:
        tokens = self.text()
        self.held.append(tokens)
        held, slot, snapshot = pack(tokens), table.slots[number], None
        if self.rng.random() < 0.3:
            snapshot = f"s{len(self.held)}"
            table.add_snapshot(listed(snapshot, held, len(held) * 10))
        table.take(slot, Request("fill", held), self.now)
        content = Content(held, is_dirty=snapshot is None, snapshot=snapshot)
        if self.rng.random() < 0.8:
            table.give_back(slot, SlotEvent.KEEP, content, self.now)

    def asks(self, number: int) -> Request:
        tokens = self.text() if self.rng.random() < 0.5 else self.rng.choice(self.held) + self.some(30)
        return Request(f"asks {number}", pack(tokens), user=User(f"u{number}"))


def seconds_of(decision: Plan | Wait) -> float:
    its = decision.place if isinstance(decision, Wait) else decision
    assert its is not None
    return its.cost.wait_s + its.cost.eviction_cost_s + its.cost.steps_s


def slot_of(decision: Plan | Wait) -> SlotKey | None:
    return decision.slot


def among_few_and_all(many: Many, request: Request) -> tuple[Plan | Wait, Plan | Wait]:
    """The decisions among the few backends that are looked at, and among all."""
    dispatcher = many.dispatcher
    few = dispatcher._index.worth_a_look(dispatcher.backends.open, request, many.now)
    assert len(few) < 8
    chosen, best = (
        place(request, [table.view(request, many.now, {}) for table in some], SETTINGS)
        for some in (few, dispatcher.tables)
    )
    return chosen, best


@pytest.mark.parametrize("seed", range(4))
async def test_the_choice_is_as_good_as_among_all(seed: int) -> None:
    """To 5 % and 50 ms, while slots are taken and given back, and backends go and come."""
    many = Many(seed)
    dispatcher = many.dispatcher
    for number in range(20):
        many.now += many.rng.uniform(0, 20)
        request = many.asks(number)
        chosen, best = among_few_and_all(many, request)
        assert seconds_of(chosen) <= seconds_of(best) * 1.05 + 0.05, (chosen, best)
        lease = await dispatcher.lease(request)
        if many.rng.random() < 0.7:
            lease.release()
        if number % 5 == 4:
            name = many.rng.choice([table.backend for table in dispatcher.tables])
            table = dispatcher.backends[name].table
            assert table is not None
            dispatcher.detach(name)
            dispatcher._index.check()
            fresh = SlotTable(name, len(table.slots), 16_384, settings=SETTINGS, rates=table.rates)
            fresh.can_save = fresh.can_erase = True
            fresh.use_snapshots(many.library)
            dispatcher.attach(fresh)
        dispatcher._index.check()


@settings(max_examples=30)
@given(seed=st.integers(0, 1 << 30), n_backends=st.integers(9, 16), is_shared=st.booleans())
def test_among_equally_fast_backends_the_choice_is_that_among_all(
    seed: int, n_backends: int, is_shared: bool
) -> None:
    """The same slot, or one at the same cost to a millisecond: of any prompt, with directories shared or not."""
    asyncio.run(chooses_as_among_all(Many(seed, n_backends, speeds=(1.0,), is_shared=is_shared)))


async def chooses_as_among_all(many: Many) -> None:
    dispatcher = many.dispatcher
    for number in range(6):
        request = many.asks(number)
        chosen, best = among_few_and_all(many, request)
        is_same = slot_of(chosen) == slot_of(best)
        assert is_same or abs(seconds_of(chosen) - seconds_of(best)) <= 2 * TIE_S, (chosen, best)
        (await dispatcher.lease(request)).release()


@pytest.mark.parametrize("n_backends", [20, 100])
async def test_a_placement_looks_at_as_much_among_any_number(
    n_backends: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At five backends, and at the tokens of one prompt in each of their indexes and in that of all."""
    many, n_views, n_walks = Many(1, n_backends, n_slots=4), [0], [0]
    view, descend = SlotTable.view, PrefixIndex._descend

    def viewing(*args: object, **more: object) -> object:
        n_views[0] += 1
        return view(*args, **more)  # type: ignore[arg-type]

    def walking(*args: object) -> object:
        n_walks[0] += 1
        return descend(*args)  # type: ignore[arg-type]

    for number in range(30):  # what was never used is ranked at first
        (await many.dispatcher.lease(many.asks(number))).release()
    monkeypatch.setattr(SlotTable, "view", viewing)
    monkeypatch.setattr(PrefixIndex, "_descend", walking)
    for number in range(10):
        (await many.dispatcher.lease(many.asks(100 + number))).release()
    assert n_views[0] <= 50
    assert n_walks[0] <= 10 * 120


@pytest.mark.parametrize("n_backends", [4, 20])
async def test_only_backends_that_have_changed_are_told(n_backends: int) -> None:
    """Each prefill looks again whose turn it is, at each change of which it is told."""
    many, told = Many(1, n_backends), list[str]()
    with contextlib.ExitStack() as stack:
        for name, leases in many.dispatcher.backends.items():
            stack.enter_context(leases.changes.subscribed(partial(told.append, name)))
        lease = await many.dispatcher.lease(many.asks(1))
        assert set(told) == {lease.table.backend}
        told.clear()
        lease.release()
        assert set(told) == {lease.table.backend}


async def test_what_another_namespace_holds_is_not_near() -> None:
    """No other user's tokens attract it."""
    every = tables()
    request = Request("r", own(17) + pack([1]), namespace=Namespace("anna"))
    assert "gpu17" not in names(pool_of(every), request)


def test_what_many_others_are_about_to_save_hides_no_snapshot() -> None:
    """Requests wait for a shared prefix only on the backend that computes it; those of others are not for it."""
    library, system = ModelSnapshots(), pack(range(2000))
    table = SlotTable("gpu0", 1, 16_384, settings=SETTINGS, rates=Rates())
    table.can_save = True
    table.use_snapshots(library)
    table.add_snapshot(listed("saved", system + pack(range(5000, 5100)), 1000))
    request = Request("r", system + pack([1, 2, 3]))
    for number in range(1, 21):
        backend = f"gpu{number}"
        library.pending.add(Content(system), 5.0, backend, SlotKey(backend, 0))
    (found,) = table.view(request, 1.0, {}).snapshots
    assert (found.id, found.n_usable) == ("saved", 2000)
    its = library.pending.add(Content(system), 5.0, "gpu0", SlotKey("gpu0", 0))
    assert its.holder in [snapshot.id for snapshot in table.view(request, 1.0, {}).snapshots]
    library.check()
