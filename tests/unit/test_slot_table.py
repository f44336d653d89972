"""The books of one llama-server: who holds what, what is on its way to the disk, and what a loss would cost."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from llamaslot.backend.slot_table import SlotTable
from llamaslot.cache.content import NOTHING, Content, SnapshotKind
from llamaslot.cache.ids import head, pack
from llamaslot.cache.namespaces import SHARED, Namespace
from llamaslot.cache.reuse import CacheKind
from llamaslot.scheduling.placement import place
from llamaslot.scheduling.plan import Cost, Plan, Save, Source, Wait
from llamaslot.scheduling.rates import Rates
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.settings import SchedulingSettings
from llamaslot.scheduling.slots import Slot, SlotEvent, SlotKey, SlotState
from llamaslot.store import WithTokens
from llamaslot.store.model_snapshots import ModelSnapshots, supersedes

A, B = pack(range(1000, 3000)), pack(range(5000, 7000))
SYSTEM_USER: dict[SlotKey, float] = {}


def make(n_slots: int = 2, *, can_save: bool = True, cache_kind: CacheKind = CacheKind.DENSE) -> SlotTable:
    """A millisecond per token; 100 bytes per token, so that a file costs its 5 ms and next to nothing more."""
    rates = Rates()
    for n in (1000, 2000):
        rates.size.observe(n, n * 100)
    table = SlotTable("gpu0", n_slots, 16_384, settings=SchedulingSettings(), rates=rates)
    table.can_save = table.can_erase = can_save
    table.cache_kind = cache_kind
    return table


def snapshot(id_: str, tokens: bytes, checkpoints: tuple[int, ...] = (), **more: Any) -> WithTokens:
    fields = {"fingerprint": "model", "created_at": 0.0, "source": "test", "checkpoints": checkpoints}
    return WithTokens.of(tokens, id=id_, size_bytes=len(tokens) * 25, **fields, **more)


def hold(table: SlotTable, slot: int, tokens: bytes, now: float = 0.0, **more: object) -> Slot:
    """The slot after somebody's answer."""
    content = Content(tokens, is_exact=False, is_dirty=True)
    taken = table.slots[slot]
    table.take(taken, Request("before", tokens), now)
    table.give_back(taken, SlotEvent.KEEP, replace(content, **more), now)
    table.check()
    return taken


def key(slot: int) -> SlotKey:
    return SlotKey("gpu0", slot)


def plan(slot: int, *steps: Save) -> Plan:
    return Plan(key(slot), steps, Source.COLD, 0, cost=Cost(prefill_s=2.0))


# -- leases --------------------------------------------------------------------------------------------------------


def test_a_leased_slot_counts_as_holding_what_its_job_will_leave() -> None:
    """So that a second request of the same conversation waits for it instead of computing everything twice."""
    table = make()
    table.take(table.slots[0], Request("a", A), 10.0, plan(0))
    table.check()
    seen = table.view(Request("b", A + pack([1])), 10.0, SYSTEM_USER).slots[0]
    assert (seen.state, seen.n_tokens, seen.n_shared, seen.n_usable) == (SlotState.LEASED, 2000, 2000, 2000)


def test_a_leased_slot_is_expected_back_after_its_steps_and_an_answer() -> None:
    """2 s of steps, and then as long as answers usually take; less of it is left as time passes."""
    table = make()
    table.take(table.slots[0], Request("a", A), 10.0, plan(0))
    answer_s = table.rates.answer.seconds_left(0)
    asks = Request("b", A)
    assert table.view(asks, 10.0, SYSTEM_USER).slots[0].wait_s == pytest.approx(2 + answer_s)
    table.begin_answer(table.slots[0], 11.0)
    assert table.view(asks, 11.0, SYSTEM_USER).slots[0].wait_s == pytest.approx(answer_s)
    assert table.view(asks, 14.0, SYSTEM_USER).slots[0].wait_s == pytest.approx(answer_s - 3)


def test_a_slot_leased_for_a_save_still_holds_what_is_saved() -> None:
    """Its owner, asking at that moment, waits for the few milliseconds that it takes."""
    table = make()
    slot = hold(table, 0, A)
    table.take(slot, Request("idle save", A), 10.0)
    decision = place(
        Request("owner", A + pack([1])),
        [table.view(Request("owner", A + pack([1])), 10.0, SYSTEM_USER)],
        table.settings,
    )
    assert isinstance(decision, Wait)
    assert decision.slot == key(0)


def test_a_slot_that_will_hold_unknown_content_is_not_waited_for() -> None:
    """A stranger landed in it: the conversation that was there is gone."""
    table = make()
    slot = hold(table, 0, A)
    table.take(slot, Request("turn"), 10.0)
    table.expect_unknown_content(slot, SHARED)
    table.check()
    assert table.view(Request("owner", A), 10.0, SYSTEM_USER).slots[0].n_shared == 0


def test_what_is_kept_is_found() -> None:
    """HOT, in the index, and nobody's any more."""
    table = make()
    slot = hold(table, 0, A, now=7.0)
    assert (slot.state, slot.leased_by, slot.used_at) == (SlotState.HOT, None, 7.0)
    assert table.view(Request("next", A + B), 8.0, SYSTEM_USER).slots[0].n_usable == 2000


def test_keeping_nothing_is_being_free() -> None:
    """A slot with no tokens is worth nothing."""
    table = make()
    assert hold(table, 0, b"").state is SlotState.FREE


def test_an_abandoned_slot_is_busy_until_the_server_is_idle() -> None:
    """Its client has gone; it goes through ABANDONED to HOT and can then be leased."""
    table = make()
    slot = table.slots[0]
    table.take(slot, Request("gone", A), 1.0, plan(0))
    table.give_back(slot, SlotEvent.LEAVE, Content(A, is_exact=False, is_dirty=True), 2.0)
    table.check()
    seen = table.view(Request("back", A), 2.0, SYSTEM_USER).slots[0]
    assert (seen.state, seen.n_shared) == (SlotState.ABANDONED, 2000)
    assert seen.wait_s > 0
    table.give_back(slot, SlotEvent.KEEP, Content(head(A, 512), is_exact=False, is_dirty=True), 3.0)
    table.check()
    assert table.view(Request("back", A), 3.0, SYSTEM_USER).slots[0].n_usable == 512


def test_a_suspect_slot_is_believed_to_hold_nothing() -> None:
    """A step failed half-way."""
    table = make()
    slot = table.slots[0]
    table.take(slot, Request("a", A), 1.0, plan(0))
    table.give_back(slot, SlotEvent.FAIL, Content(A), 2.0)
    table.check()
    assert (slot.state, slot.content) == (SlotState.SUSPECT, NOTHING)


# -- leaving -------------------------------------------------------------------------------------------------------


def test_what_a_plan_saves_is_leaving_in_the_same_breath() -> None:
    """Neither resident nor on disk: its owner, asking now, waits for the commit and reserves no slot."""
    table = make()
    slot = hold(table, 0, A)
    leaving = table.take(slot, Request("b", B), 10.0, plan(0, Save(key(0))))
    table.check()
    assert leaving is not None
    owner = Request("owner", A + pack([1]))
    seen = table.view(owner, 10.0, SYSTEM_USER)
    assert [view.n_usable for view in seen.snapshots] == [2000]
    assert seen.snapshots[0].wait_s > 0
    decision = place(owner, [seen], table.settings)
    assert isinstance(decision, Wait)
    assert decision.slot is None


def test_a_save_that_takes_longer_is_still_waited_for() -> None:
    """It is on its way as long as nobody says otherwise."""
    table = make()
    slot = hold(table, 0, A)
    table.take(slot, Request("b", B), 10.0, plan(0, Save(key(0))))
    assert table.view(Request("owner", A), 99.0, SYSTEM_USER).snapshots[0].wait_s > 0


def test_what_has_left_is_not_waited_for() -> None:
    """The save has ended, well or not. Said twice, it has ended once."""
    table = make()
    slot = hold(table, 0, A)
    leaving = table.take(slot, Request("b", B), 10.0, plan(0, Save(key(0))))
    assert leaving is not None
    table.end_pending_save(leaving)
    table.end_pending_save(leaving)
    table.check()
    assert table.view(Request("owner", A), 10.0, SYSTEM_USER).snapshots == ()


def test_what_is_leaving_is_in_no_generation_and_not_in_the_next_pool() -> None:
    """It concerns this process only; the snapshots are shared with the table after a restart."""
    library, table, after = ModelSnapshots(), make(), make()
    table.use_snapshots(library)
    table.add_snapshot(snapshot("s", B))
    slot = hold(table, 0, A)
    leaving = table.take(slot, Request("next", B), 1.0, plan(0, Save(key(0))))
    after.use_snapshots(library)
    assert leaving is not None
    assert library.index.holders() == {"s"}
    assert [view.id for view in table.view(Request("a", A), 1.0, SYSTEM_USER).snapshots] == [leaving.holder]
    library.pending.end_of("gpu0")  # as when its process is gone
    assert not after.view(Request("a", A), 1.0, SYSTEM_USER).snapshots
    assert [view.id for view in after.view(Request("b", B), 1.0, SYSTEM_USER).snapshots] == ["s"]
    for one in (table, after):
        one.check()


def test_without_a_save_nothing_is_leaving() -> None:
    """What is not saved is lost: nobody waits for it."""
    table = make()
    assert table.take(hold(table, 0, A), Request("b", B), 10.0, plan(0)) is None


# -- snapshots -----------------------------------------------------------------------------------------------------


def test_snapshots_are_offered_by_what_they_share() -> None:
    """The longest first; what shares next to nothing is none."""
    table = make()
    for id_, tokens in ("half", head(A, 1000)), ("whole", A), ("other", B), ("few", head(A, 20) + B):
        table.add_snapshot(snapshot(id_, tokens))
    table.check()
    seen = table.view(Request("owner", A + pack([1])), 0.0, SYSTEM_USER).snapshots
    assert [(view.id, view.n_usable) for view in seen] == [("whole", 2000), ("half", 1000)]


def test_who_uses_nothing_is_offered_nothing() -> None:
    """Nor is anybody while slot files cannot be used."""
    table = make()
    table.add_snapshot(snapshot("s", A))
    assert table.view(Request("a", A, no_cache=True), 0.0, SYSTEM_USER).snapshots == ()
    table.can_save = False
    assert table.view(Request("a", A), 0.0, SYSTEM_USER).snapshots == ()


def test_a_slot_whose_snapshot_is_dropped_is_dirty_again() -> None:
    """It is the only holder now."""
    table = make()
    table.add_snapshot(snapshot("s", A))
    slot = hold(table, 0, A, is_dirty=False, snapshot="s")
    table.drop_snapshot("s")
    table.drop_snapshot("s")
    table.check()
    assert slot.content.is_dirty
    assert slot.content.snapshot is None


def test_a_snapshot_dropped_while_its_slot_is_leased_is_not_believed_in() -> None:
    """The lease has a belief of its own, and gives it back after the drop."""
    table = make()
    table.add_snapshot(snapshot("s", A))
    slot = hold(table, 0, A, is_dirty=False, snapshot="s")
    believed = slot.content
    table.take(slot, Request("again", A), 1.0)
    table.drop_snapshot("s")
    table.give_back(slot, SlotEvent.KEEP, believed, 2.0)
    table.check()
    assert slot.content.is_dirty
    assert slot.content.snapshot is None


def test_agreeing_with_the_catalog() -> None:
    """What is gone is dropped, and the slot that came from it is dirty again."""
    table, there = make(), snapshot("there", B)
    table.add_snapshot(snapshot("gone", A))
    table.add_snapshot(there)
    hold(table, 0, A, is_dirty=False, snapshot="gone")
    table.keep_only({"there": there, "another": snapshot("another", B)})
    table.check()
    assert table.snapshot("gone") is None
    assert table.snapshot("there") == there
    assert table.slots[0].content.is_dirty


def test_a_newer_snapshot_of_the_conversation_supersedes() -> None:
    """Also when the two part inside the last answer; not when it is shorter, nor another conversation."""
    old = snapshot("old", A)
    assert supersedes(snapshot("new", A + B), old, 0.85)
    assert supersedes(snapshot("new", head(A, 1800) + B), old, 0.85)
    assert not supersedes(snapshot("new", head(A, 1600) + B), old, 0.85)
    assert not supersedes(snapshot("new", head(A, 1999)), old, 0.85)
    assert not supersedes(snapshot("new", B), old, 0.85)


@pytest.mark.parametrize("special", [{"kind": SnapshotKind.TRUNK}, {"is_pinned": True}])
def test_trunks_and_pinned_snapshots_are_never_superseded(special: dict[str, Any]) -> None:
    """They are there for conversations that have not begun."""
    assert not supersedes(snapshot("new", A + B), snapshot("old", A, **special), 0.85)


# -- worth ---------------------------------------------------------------------------------------------------------


def test_a_save_is_worth_it_when_computing_takes_longer() -> None:
    """2 s of computing against 5 ms of saving; for 40 tokens it is not looked at."""
    table = make()
    assert table.worth.is_worth_saving(hold(table, 0, A))
    assert not table.worth.is_worth_saving(hold(table, 1, head(B, 40)))


def test_the_wait_of_one_request_for_a_save_is_shared_by_the_slots() -> None:
    """Two seconds of computing, which delay all four, against four in which one request waits for a batch."""
    for n_slots, is_worth in ((1, False), (4, True)):
        table = make(n_slots)
        table.rates.save_delay.seconds = 4.0
        assert table.worth.of(hold(table, 0, A)).is_worth_saving is is_worth


def test_no_request_waits_for_the_save_of_a_small_content_that_is_soon_computed() -> None:
    """A second of computing: four times a wait of 0.2 s are less, those of 0.3 s are more. In idle time it is saved,
    and a large one is worth the wait."""
    for delay_s, is_worth in ((0.2, True), (0.3, False)):
        table = make()
        table.rates.save_delay.seconds = delay_s
        slot = hold(table, 0, head(A, 1000))
        assert table.worth.of(slot).is_worth_saving is is_worth
        assert table.worth.is_worth_saving(slot)
        assert table.worth.of(hold(table, 1, B)).is_worth_saving


def test_what_is_saved_or_cannot_be_is_not_worth_saving() -> None:
    """Clean content; content that a snapshot holds; a server without slot files."""
    table = make()
    slot = hold(table, 0, A)
    table.add_snapshot(snapshot("longer", A + B))
    assert not table.worth.is_worth_saving(slot)
    table.drop_snapshot("longer")
    assert table.worth.is_worth_saving(slot)
    table.can_save = False
    assert not table.worth.is_worth_saving(slot)
    table.can_save = True
    table.add_snapshot(snapshot("s", B))
    assert not table.worth.is_worth_saving(hold(table, 1, B, is_dirty=False, snapshot="s"))


def test_a_few_tokens_more_than_the_snapshot_are_not_worth_a_save() -> None:
    """Only what nobody else holds counts."""
    table = make()
    table.add_snapshot(snapshot("s", A))
    assert not table.worth.is_worth_saving(hold(table, 0, A + pack([1, 2, 3])))
    assert table.worth.is_worth_saving(hold(table, 1, A + B))


@pytest.mark.parametrize("cache_kind", [CacheKind.SWA, CacheKind.RECURRENT])
def test_a_model_that_cannot_rewind_is_not_helped_by_half_a_snapshot(cache_kind: CacheKind) -> None:
    """A longer or shorter one of the same conversation cannot be gone back to."""
    table = make(cache_kind=cache_kind)
    table.add_snapshot(snapshot("s", A))
    assert table.worth.is_worth_saving(hold(table, 0, A + pack(range(64))))


def test_the_eviction_cost_is_what_the_owner_would_pay() -> None:
    """Everything again when nobody else has it; a restore when it is on disk; nothing for nothing."""
    table = make()
    slot = hold(table, 0, A)
    assert table.worth.eviction_cost_s(slot, is_saved=False) == pytest.approx(2.0)
    assert table.worth.eviction_cost_s(slot, is_saved=True) == pytest.approx(table.rates.restore_s(2000))
    table.add_snapshot(snapshot("s", A))
    assert table.worth.eviction_cost_s(slot, is_saved=False) == pytest.approx(table.rates.restore_s(2000))
    assert table.worth.eviction_cost_s(table.slots[1], is_saved=False) == 0


def test_the_eviction_cost_counts_only_what_would_be_lost() -> None:
    """The system prompt that another slot holds too is no loss."""
    table = make(can_save=False)
    slot = hold(table, 0, A)
    hold(table, 1, head(A, 1500) + B)
    assert table.worth.eviction_cost_s(slot, is_saved=False) == pytest.approx(0.5)


def test_the_eviction_cost_fades() -> None:
    """A context that nobody has used for half an hour is half the loss."""
    table = make(can_save=False)
    hold(table, 0, A, now=0.0)
    fresh = table.view(Request("b", B), 0.0, SYSTEM_USER).slots[0].eviction_cost_s
    assert table.view(Request("b", B), 1800.0, SYSTEM_USER).slots[0].eviction_cost_s == pytest.approx(
        fresh / 2
    )


def test_looking_changes_nothing() -> None:
    """A question is a question."""
    table = make()
    hold(table, 0, A)
    table.add_snapshot(snapshot("s", B))
    job = Request("b", A + B)
    assert table.view(job, 5.0, SYSTEM_USER).slots == table.view(job, 5.0, SYSTEM_USER).slots
    assert table.view(job, 5.0, SYSTEM_USER).snapshots == table.view(job, 5.0, SYSTEM_USER).snapshots
    table.check()


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda table: table._busy.clear(), "a slot is busy exactly while it is not idle"),
        (lambda table: setattr(table.slots[1], "leased_by", None), "a leased slot has an owner"),
        (lambda table: table._index.drop(0), "a slot is indexed by what it holds"),
        (lambda table: table._index.insert(0, B), "the index holds what the slot holds"),
        (lambda table: table.model_snapshots.index.insert("nobody", B), "snapshots are indexed"),
        (lambda table: table._snapshots.pop("s"), "a slot's snapshot exists"),
    ],
)  # fmt: skip
def test_a_broken_pool_is_noticed(spoil: object, name: str) -> None:
    """Each invariant is checked, and says which it is."""
    table = make()
    table.add_snapshot(snapshot("s", A))
    hold(table, 0, A, is_dirty=False, snapshot="s")
    table.take(table.slots[1], Request("b", B), 1.0)
    table.check()
    spoil(table)  # type: ignore[operator]
    with pytest.raises(AssertionError, match=name):
        table.check()


def test_a_slot_of_another_user_is_foreign() -> None:
    """Nothing of it is found, and it is emptied before it is used."""
    table, anna, bert = make(), Namespace("key:anna"), Namespace("key:bert")
    hold(table, 0, A, namespace=anna)
    seen = {
        namespace: table.view(Request("asks", A + B, namespace=namespace), 0.0, SYSTEM_USER).slots[0]
        for namespace in (anna, bert)
    }
    assert (seen[anna].is_other_namespace, seen[anna].n_shared) == (False, 2000)
    assert (seen[bert].is_other_namespace, seen[bert].n_shared) == (True, 0)


def test_a_slot_that_has_just_answered_is_gone_on_from_by_its_follow_up() -> None:
    """A snapshot of an older run has a few tokens more than is known of the slot, and the answer behind those comes
    back with the follow-up as a rule: nothing is restored."""
    table = make()
    older = A[: 4 * 1500] + B[: 4 * 40]
    table.add_snapshot(snapshot("older", older))
    hold(table, 0, A[: 4 * 1460], n_more=45)
    follow_up = Request("follow-up", A[: 4 * 1520])
    plan = place(follow_up, [table.view(follow_up, 1.0, SYSTEM_USER)], table.settings)
    assert isinstance(plan, Plan)
    assert (plan.slot, plan.source, plan.n_reused) == (key(0), Source.RESIDENT, 1505)
    for _ in range(3):
        table.rewind_model.returned.answered(45, 0)  # the template drops it
    plan = place(follow_up, [table.view(follow_up, 1.0, SYSTEM_USER)], table.settings)
    assert isinstance(plan, Plan)
    assert (plan.source, plan.snapshot) == (Source.SNAPSHOT, "older")


def test_what_is_long_follows_what_a_request_costs() -> None:
    """As it is learned."""
    table = make()
    for _ in range(50):
        table.rates.request.observe(0.003)
    assert table.long_s == pytest.approx(0.06, rel=0.01)
    view = table.view(Request("new", A), 0.0, SYSTEM_USER)
    assert view.request_s == pytest.approx(0.003, rel=0.01)
