"""Placement, read like transcripts: what the pool holds goes in, the plan comes out.

Costs in these tests: a millisecond per token computed, 10 ms to restore, unless they say otherwise.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from llamaslot.cache.ids import pack
from llamaslot.scheduling.placement import (
    BackendView,
    SlotView,
    SnapshotView,
    is_similar,
    prefill_stops,
    return_likelihood,
)
from llamaslot.scheduling.placement import place as place_over
from llamaslot.scheduling.plan import (
    Cost,
    Erase,
    Place,
    Plan,
    PrefillTo,
    Restore,
    Save,
    Source,
    Wait,
)
from llamaslot.scheduling.request import Placement, Request
from llamaslot.scheduling.settings import SchedulingSettings
from llamaslot.scheduling.slots import SlotKey, SlotState

SETTINGS = SchedulingSettings(similarity_min=0.85, small_prompt_tokens=1024, chunk_threshold_s=1.0)
FREE, HOT, LEASED, ABANDONED, SUSPECT = (
    SlotState.FREE,
    SlotState.HOT,
    SlotState.LEASED,
    SlotState.ABANDONED,
    SlotState.SUSPECT,
)


def job(n_tokens: int, **more: object) -> Request:
    return Request("job", pack(range(n_tokens)), **more)  # type: ignore[arg-type]


def key(slot: int, backend: str = "gpu0") -> SlotKey:
    return SlotKey(backend, slot)


def place(job: Request, view: BackendView, settings: SchedulingSettings) -> Plan | Wait:
    """With one backend."""
    return place_over(job, [view], settings)


def free(slot: int, used_at: float = 0.0) -> SlotView:
    return SlotView(key(slot), FREE, used_at=used_at)


def hot(slot: int, n_tokens: int = 5000, *, shared: int = 0, **more: object) -> SlotView:
    """A slot of somebody's: unsaved and worth it, unless told otherwise."""
    told: dict[str, object] = {
        "save_s": 0.1,
        "is_worth_saving": True,
        "eviction_cost_s": 0.5,
        "n_usable": shared,
    } | more
    return SlotView(key(slot), HOT, n_tokens, shared, **told)  # type: ignore[arg-type]


def saved(slot: int, n_tokens: int = 5000, *, shared: int = 0, **more: object) -> SlotView:
    """A slot whose content is on disk: losing it costs its restore only."""
    return hot(
        slot,
        n_tokens,
        shared=shared,
        **({"save_s": 0.0, "is_worth_saving": False, "eviction_cost_s": 0.1} | more),
    )


def busy(slot: int, n_tokens: int, *, shared: int, wait_s: float, state: SlotState = LEASED) -> SlotView:
    return SlotView(key(slot), state, n_tokens, shared, shared, wait_s=wait_s)


def view(*slots: SlotView, snapshots: tuple[SnapshotView, ...] = (), **more: object) -> BackendView:
    rate = {"prefill_s": lambda start, end: (end - start) / 1000}
    return BackendView(slots, snapshots=snapshots, **(rate | more))  # type: ignore[arg-type]


def plan_of(decision: Plan | Wait) -> Plan:
    assert isinstance(decision, Plan), decision
    return decision


# -- which slot ----------------------------------------------------------------------------------------------------


def test_a_similar_hot_slot_is_taken_before_a_free_one() -> None:
    """The next turn of a conversation goes to the slot that holds it, with nothing to do before it runs."""
    plan = plan_of(place(job(5200), view(free(0), hot(1, 5000, shared=5000)), SETTINGS))
    assert (plan.slot.id, plan.source, plan.n_reused, plan.steps) == (1, Source.RESIDENT, 5000, ())


def test_a_similar_slot_is_not_saved_before_it_is_gone_on_from() -> None:
    """Nearly all that it holds survives: the part that does not is no reason to write it all."""
    plan = plan_of(place(job(5200), view(hot(0, 5000, shared=4800)), SETTINGS))
    assert plan.steps == ()


def test_a_free_slot_is_taken_before_a_stranger_is_displaced() -> None:
    """Nothing is lost, so nothing else is cheaper."""
    plan = plan_of(place(job(3000), view(hot(0), free(1), saved(2)), SETTINGS))
    assert (plan.slot.id, plan.source, plan.n_reused) == (1, Source.COLD, 0)


def test_a_free_slot_is_taken_before_a_slot_that_shares_little() -> None:
    """What everybody shares (the same system prompt) is no reason to take somebody's slot when that costs more."""
    shares = hot(0, 20_000, shared=300, eviction_cost_s=10.0)
    assert plan_of(place(job(5000), view(shares, free(1)), SETTINGS)).slot.id == 1


def test_the_shared_part_of_a_victim_is_used() -> None:
    """A slot that must be taken anyway is taken with what it shares."""
    plan = plan_of(place(job(5000), view(hot(0), hot(1, 20_000, shared=2000)), SETTINGS))
    assert (plan.slot.id, plan.source, plan.n_reused) == (1, Source.RESIDENT, 2000)
    assert plan.steps[0] == Save(key(1))


def test_the_victim_is_the_one_whose_loss_costs_least() -> None:
    """One that is on disk already goes before one that would have to be saved."""
    assert plan_of(place(job(3000), view(hot(0), saved(1), hot(2)), SETTINGS)).slot.id == 1


def test_a_victim_that_is_worth_it_is_saved_first() -> None:
    """Saved, before anything else is done to the slot."""
    plan = plan_of(place(job(500), view(hot(0)), SETTINGS))
    assert plan.steps == (Save(key(0)),)


def test_a_victim_that_is_not_worth_it_is_overwritten() -> None:
    """Saving it would take longer than computing it again."""
    plan = plan_of(place(job(500), view(hot(0, is_worth_saving=False, save_s=0.0)), SETTINGS))
    assert plan.steps == ()


def test_ties_go_to_the_slot_used_longest_ago() -> None:
    """Among equals, and costs within a millisecond are equal."""
    slots = [saved(0, used_at=30.0), saved(1, used_at=10.0, eviction_cost_s=0.1002), saved(2, used_at=20.0)]
    assert plan_of(place(job(3000), view(*slots), SETTINGS)).slot.id == 1


def test_free_slots_tie_as_well() -> None:
    """The one that was left longest ago."""
    assert plan_of(place(job(3000), view(free(0, 9.0), free(1, 3.0), free(2, 5.0)), SETTINGS)).slot.id == 1


def test_similarity_is_the_part_of_the_slot_that_survives() -> None:
    """Not the part of the prompt that is shared: a long prompt may go on from a short context."""
    assert is_similar(hot(0, 100, shared=100), SETTINGS)
    assert is_similar(hot(0, 1000, shared=850), SETTINGS)
    assert not is_similar(hot(0, 1000, shared=849), SETTINGS)
    assert not is_similar(free(0), SETTINGS)


def test_an_empty_prompt_goes_anywhere_that_costs_nothing() -> None:
    """A body that llamaslot cannot read still gets a slot."""
    plan = plan_of(place(Request("opaque"), view(hot(0), free(1)), SETTINGS))
    assert (plan.slot.id, plan.steps, plan.n_reused) == (1, (), 0)


# -- waiting -------------------------------------------------------------------------------------------------------


def test_a_busy_slot_is_waited_for_when_that_is_cheaper() -> None:
    """20,000 tokens would take 20 s to compute; the slot that holds them is back in 3."""
    own = busy(1, 20_000, shared=20_000, wait_s=3.0)
    assert place(job(20_100), view(free(0), own), SETTINGS) == Wait(slot=key(1), for_s=3.0)


def test_a_busy_slot_is_not_waited_for_when_computing_is_faster() -> None:
    """1,000 tokens are computed in a second."""
    own = busy(1, 1000, shared=1000, wait_s=3.0)
    assert plan_of(place(job(1100), view(free(0), own), SETTINGS)).slot.id == 0


def test_a_busy_slot_is_not_waited_for_when_a_snapshot_is_faster() -> None:
    """What it holds is on disk as well, and another slot is free."""
    own = busy(1, 20_000, shared=20_000, wait_s=3.0)
    plan = plan_of(
        place(job(20_100), view(free(0), own, snapshots=(SnapshotView("s", 20_000, 0.2),)), SETTINGS)
    )
    assert (plan.slot.id, plan.source) == (0, Source.SNAPSHOT)


def test_a_busy_stranger_is_never_waited_for() -> None:
    """Any slot will do: no slot in particular is reserved, and there is no time at which to look again."""
    strangers = busy(0, 5000, shared=0, wait_s=1.0), busy(1, 5000, shared=100, wait_s=1.0)
    assert place(job(3000), view(*strangers), SETTINGS) == Wait(slot=None, for_s=None)


def test_an_overdue_slot_is_still_waited_for() -> None:
    """The estimate has run out, the slot is not back: look again soon."""
    decision = place(job(20_100), view(free(0), busy(1, 20_000, shared=20_000, wait_s=0.0)), SETTINGS)
    assert isinstance(decision, Wait)
    assert decision.slot == key(1)
    assert decision.for_s is not None
    assert decision.for_s > 0


def test_an_abandoned_slot_is_waited_for_like_a_busy_one() -> None:
    """Who leaves and asks again at once finds what was computed for him."""
    own = busy(1, 20_000, shared=20_000, wait_s=1.0, state=ABANDONED)
    assert place(job(20_100), view(free(0), own), SETTINGS) == Wait(slot=key(1), for_s=1.0)


def test_a_reserved_slot_is_left_alone() -> None:
    """Somebody earlier waits for slot 0; the next one takes the other, although it costs more."""
    slots = saved(0), hot(1)
    assert plan_of(place(job(3000), view(*slots), SETTINGS)).slot.id == 0
    assert plan_of(place(job(3000), view(*slots, reserved={key(0): 1.0}), SETTINGS)).slot.id == 1


def test_a_reservation_blocks_no_other_request() -> None:
    """Only the slot that is waited for is out of reach."""
    decision = place(
        job(3000), view(free(0), busy(1, 9000, shared=0, wait_s=9.0), reserved={key(1): 1.0}), SETTINGS
    )
    assert plan_of(decision).slot.id == 0


def test_a_leaving_snapshot_is_waited_for() -> None:
    """It is being written: after the commit it is restored. No slot is reserved meanwhile."""
    leaving = SnapshotView("leaving-0", 20_000, restore_s=0.2, wait_s=0.5)
    assert place(job(20_100), view(free(0), snapshots=(leaving,)), SETTINGS) == Wait(slot=None, for_s=0.5)


def test_a_leaving_snapshot_is_not_waited_for_when_computing_is_faster() -> None:
    """Half a second of waiting against a tenth of computing."""
    leaving = SnapshotView("leaving-0", 80, restore_s=0.2, wait_s=0.5)
    assert plan_of(place(job(100), view(free(0), snapshots=(leaving,)), SETTINGS)).source is Source.COLD


# -- snapshots -----------------------------------------------------------------------------------------------------


def test_a_snapshot_is_restored_into_an_erased_slot() -> None:
    """Erase first, always: with a draft model a restore into what is left breaks every request."""
    plan = plan_of(place(job(5100), view(free(0), snapshots=(SnapshotView("s", 5000, 0.01),)), SETTINGS))
    assert plan.steps == (Erase(key(0)), Restore(key(0), "s"))
    assert (plan.source, plan.snapshot, plan.n_reused) == (Source.SNAPSHOT, "s", 5000)


def test_the_victim_is_saved_before_it_is_erased() -> None:
    """The order of the steps is the order of this sentence: saved, erased, restored."""
    plan = plan_of(place(job(5100), view(hot(0), snapshots=(SnapshotView("s", 5000, 0.01),)), SETTINGS))
    assert plan.steps == (Save(key(0)), Erase(key(0)), Restore(key(0), "s"))


def test_the_longer_snapshot_wins_when_what_it_adds_is_worth_its_bytes() -> None:
    """1,000 tokens more for 50 ms more."""
    snapshots = SnapshotView("short", 4000, 0.05), SnapshotView("long", 5000, 0.1)
    assert plan_of(place(job(5100), view(free(0), snapshots=snapshots), SETTINGS)).snapshot == "long"


def test_a_snapshot_is_not_restored_when_computing_is_faster() -> None:
    """100 tokens are computed in 0.1 s; the slow disk takes a second."""
    plan = plan_of(place(job(200), view(free(0), snapshots=(SnapshotView("s", 100, 1.0),)), SETTINGS))
    assert (plan.source, plan.steps) == (Source.COLD, ())


def test_what_is_resident_wins_over_the_same_on_disk() -> None:
    """A restore costs time, going on costs none."""
    decision = place(
        job(5100),
        view(free(0), hot(1, 5000, shared=5000), snapshots=(SnapshotView("s", 5000, 0.01),)),
        SETTINGS,
    )
    assert plan_of(decision).source is Source.RESIDENT


# -- small prompts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other", [free(1), hot(1, 500, eviction_cost_s=9.0), hot(1, 5000, eviction_cost_s=0.0)], ids=repr
)
def test_a_small_prompt_does_not_displace_a_hot_slot(other: SlotView) -> None:
    """Not even a cheap one, while there is a slot that is free, small, or nobody's loss."""
    cheap = saved(0, 5000, shared=60, eviction_cost_s=0.001, n_usable=60)
    assert plan_of(place(job(100), view(cheap, other), SETTINGS)).slot.id == 1


def test_a_small_prompt_displaces_when_there_is_no_other_choice() -> None:
    """All slots are hot: the one whose loss costs least, saved first."""
    plan = plan_of(place(job(100), view(hot(0), hot(1, eviction_cost_s=0.2)), SETTINGS))
    assert (plan.slot.id, plan.steps) == (1, (Save(key(1)),))


def test_a_small_prompt_goes_on_in_its_own_slot() -> None:
    """A short conversation of its own is a match, no loss."""
    assert plan_of(place(job(100), view(free(0), hot(1, 90, shared=90)), SETTINGS)).slot.id == 1


def test_a_small_prompt_does_not_wait_behind_seven_others_while_three_slots_are_idle() -> None:
    """One answer takes 0.2 s: behind one of them is cheaper than a context that is lost (0.3 s), behind two is not."""
    alike = busy(0, 300, shared=280, wait_s=0.2)
    others = (
        hot(1, save_s=0.1, eviction_cost_s=0.2),
        hot(2, save_s=0.2, eviction_cost_s=0.2),
        hot(3, save_s=0.2, eviction_cost_s=0.2),
    )
    assert place(job(300), view(alike, *others), SETTINGS) == Wait(slot=key(0), for_s=0.2)
    decision = place(job(300), view(alike, *others, reserved={key(0): 0.7}), SETTINGS)
    assert (plan_of(decision).slot.id, plan_of(decision).steps) == (1, (Save(key(1)),))


def test_a_small_prompt_does_not_wait_at_any_price_where_a_context_costs_next_to_nothing() -> None:
    """It is on disk, and back in 10 ms: that is less than the rest of an answer."""
    alike = busy(0, 300, shared=280, wait_s=0.5)
    assert plan_of(place(job(300), view(alike, saved(1, eviction_cost_s=0.01)), SETTINGS)).slot.id == 1


def test_a_small_prompt_waits_where_a_context_costs_more_than_that() -> None:
    """It would have to be saved first, which takes longer than those who are ahead."""
    alike = busy(0, 300, shared=280, wait_s=0.2)
    dear = hot(1, save_s=3.0, eviction_cost_s=1.0)
    waits = place(job(300), view(alike, dear, reserved={key(0): 0.6}), SETTINGS)
    assert isinstance(waits, Wait)
    assert waits.slot == key(0)
    assert waits.for_s == pytest.approx(0.8)


def test_who_waits_for_a_reserved_slot_counts_those_who_are_ahead() -> None:
    """Also a large prompt, and also where the slot itself is idle already: its own is behind another's."""
    own = hot(0, 20_000, shared=20_000)
    assert place(job(20_100), view(own, free(1), reserved={key(0): 3.0}), SETTINGS) == Wait(
        slot=key(0), for_s=3.0
    )
    assert plan_of(place(job(20_100), view(own, free(1), reserved={key(0): 25.0}), SETTINGS)).slot.id == 1


def test_a_large_prompt_takes_the_cheapest_whatever_it_holds() -> None:
    """The rule is for small prompts only."""
    cheap, dear = saved(0, 5000, eviction_cost_s=0.001), hot(1, 500, eviction_cost_s=9.0)
    assert plan_of(place(job(2000), view(cheap, dear), SETTINGS)).slot.id == 0


# -- what must not be reused ---------------------------------------------------------------------------------------


def test_nothing_cached_is_used_when_that_is_asked_for() -> None:
    """Neither the slot that holds the prompt nor its snapshot: the slot whose loss costs least, erased."""
    pool = view(hot(0, 5000, shared=5000), saved(1), snapshots=(SnapshotView("s", 5000, 0.01),))
    plan = plan_of(place(job(500, no_cache=True), pool, SETTINGS))
    assert (plan.slot.id, plan.source, plan.n_reused, plan.snapshot) == (1, Source.COLD, 0, None)
    assert plan.steps == (Erase(key(1)),)


def test_a_slot_that_would_have_matched_is_saved_before_it_is_erased() -> None:
    """Its owner's context is lost all the same."""
    plan = plan_of(place(job(500, no_cache=True), view(hot(0, 5000, shared=500)), SETTINGS))
    assert plan.steps == (Save(key(0)), Erase(key(0)))


def test_a_busy_slot_is_never_waited_for_by_one_that_uses_nothing() -> None:
    """What it holds would not be used."""
    own = busy(1, 20_000, shared=20_000, wait_s=0.1)
    assert plan_of(place(job(20_100, no_cache=True), view(free(0), own), SETTINGS)).slot.id == 0


def test_a_slot_of_another_space_is_saved_and_emptied_first() -> None:
    """llama-server compares tokens by itself, and knows no spaces."""
    foreign = hot(0, 5000)._replace(is_other_namespace=True)
    plan = plan_of(place(job(5000), view(foreign), SETTINGS))
    assert plan.steps == (Save(key(0)), Erase(key(0)), PrefillTo(key(0), 4999))
    assert (plan.source, plan.n_reused) == (Source.COLD, 0)


def test_without_slot_actions_nothing_is_computed_ahead_in_a_slot_of_another_space() -> None:
    """The job's own request then computes everything itself."""
    foreign = hot(0, 5000)._replace(is_other_namespace=True)
    assert plan_of(place(job(5000), view(foreign, can_erase=False), SETTINGS)).steps == (Save(key(0)),)


def test_a_cold_prompt_is_computed_ahead_in_an_erased_slot() -> None:
    """What is found there afterwards is its own work."""
    plan = plan_of(place(job(5000, no_cache=True), view(hot(0)), SETTINGS))
    assert plan.steps == (Save(key(0)), Erase(key(0)), PrefillTo(key(0), 4999))


def test_without_slot_actions_a_cold_prompt_computes_everything_itself() -> None:
    """Nothing can be erased, so a prefill would find what must not be used."""
    plan = plan_of(place(job(5000, no_cache=True), view(free(0), can_erase=False), SETTINGS))
    assert plan.steps == ()


def test_a_suspect_slot_is_erased_before_its_use() -> None:
    """Nobody knows what is in it, so nothing is expected of it."""
    plan = plan_of(place(job(500), view(SlotView(key(0), SUSPECT)), SETTINGS))
    assert (plan.steps, plan.source, plan.n_reused) == ((Erase(key(0)),), Source.COLD, 0)


# -- prefill -------------------------------------------------------------------------------------------------------


def test_a_long_prefill_stops_at_the_last_token_but_one() -> None:
    """The last one is left to the client's own request."""
    assert plan_of(place(job(5000), view(free(0)), SETTINGS)).steps == (PrefillTo(key(0), 4999),)


def test_a_short_prefill_is_left_to_the_request() -> None:
    """A second, by what is known of the speed, is not worth a step of its own."""
    assert plan_of(place(job(1000), view(free(0)), SETTINGS)).steps == ()


def test_only_what_is_new_counts() -> None:
    """50,000 tokens of which 49,800 are there."""
    assert plan_of(place(job(50_000), view(hot(0, 49_800, shared=49_800)), SETTINGS)).steps == ()


def test_a_prefill_after_a_restore_goes_on_from_it() -> None:
    """The snapshot has half of the prompt."""
    plan = plan_of(place(job(9000), view(free(0), snapshots=(SnapshotView("s", 4500, 0.01),)), SETTINGS))
    assert plan.steps == (Erase(key(0)), Restore(key(0), "s"), PrefillTo(key(0), 8999))


def test_what_is_long_is_what_takes_much_longer_than_a_request_costs() -> None:
    """On a fast server a tenth of a second may be worth it, and nowhere does anybody wait behind more than a second."""
    by_cost = replace(SETTINGS, chunk_threshold_s=None)
    fast = view(prefill_s=lambda start, end: (end - start) / 10_000, request_s=0.004)
    assert prefill_stops(job(900), 0, fast, by_cost) == [899]
    assert prefill_stops(job(700), 0, fast, by_cost) == []
    assert prefill_stops(job(1100), 0, view(request_s=3.0), by_cost) == [1099]


def test_a_boundary_is_a_stop_where_that_costs_less_than_what_it_saves() -> None:
    """Each is a request of 4 ms more; what a next prompt that parts there would have to compute again takes 10 ms, or
    200."""
    fast = view(prefill_s=lambda start, end: (end - start) / 10_000, request_s=0.004)
    cut = job(9000, boundaries=(100, 7500, 8900))
    assert prefill_stops(cut, 0, fast, replace(SETTINGS, chunk_threshold_s=None)) == [7500, 8900]


def test_boundaries_are_stops_on_the_way() -> None:
    """Those that lie ahead, in their order; one that is reused already, or the end itself, is none."""
    cut = job(9000, boundaries=(1000, 4000, 7000, 8999))
    assert prefill_stops(cut, 0, view(), SETTINGS) == [1000, 4000, 7000, 8999]
    assert prefill_stops(cut, 2000, view(), SETTINGS) == [4000, 7000, 8999]
    assert prefill_stops(cut, 4000, view(), SETTINGS) == [7000, 8999]
    assert prefill_stops(cut, 8500, view(), SETTINGS) == []


def test_what_prewarms_is_computed_up_to_the_last_token_but_one() -> None:
    """However short: it is saved there, and only there."""
    request = job(400, is_prewarm=True)
    assert prefill_stops(request, 0, view(), SETTINGS) == [399]
    assert prefill_stops(request, 399, view(), SETTINGS) == [399]
    assert prefill_stops(job(400), 0, view(), SETTINGS) == []


@given(
    n=st.integers(0, 20_000),
    n_reused=st.integers(0, 20_000),
    boundaries=st.lists(st.integers(0, 20_000), max_size=4, unique=True).map(sorted),
    request_s=st.sampled_from([0.0, 0.002, 0.02, 0.2]),
    chunk_threshold_s=st.sampled_from([None, 0.0, 1.0]),
    is_steered=st.booleans(),
)
def test_stops_ascend_between_what_is_there_and_the_end(
    n: int,
    n_reused: int,
    boundaries: list[int],
    request_s: float,
    chunk_threshold_s: float | None,
    is_steered: bool,
) -> None:
    """Whatever the boundaries: each stop computes something, more than a request costs, and after the last one there is
    no long prefill left."""
    settings, seen = replace(SETTINGS, chunk_threshold_s=chunk_threshold_s), view(request_s=request_s)
    n_reused = min(n_reused, n)
    placement = Placement.STEERED if is_steered else Placement.PINNED
    stops = prefill_stops(job(n, boundaries=tuple(boundaries), placement=placement), n_reused, seen, settings)
    assert stops == sorted(set(stops))
    assert all((n_reused < stop or is_steered) and stop < n for stop in stops)
    pieces = [seen.prefill_s(begin, end) for begin, end in pairwise([n_reused, *stops])]
    if not is_steered and chunk_threshold_s is None:
        assert all(piece_s >= 20 * request_s or piece_s > 1 for piece_s in pieces)
    elif not is_steered:
        assert all(piece_s >= min(20 * request_s, 1) for piece_s in pieces[:-1])
    at_last = stops[-1] if stops else n_reused
    assert at_last >= n - 1 or seen.prefill_s(at_last, n - 1) <= settings.long_s(request_s)
    assert not (is_steered and stops) or at_last == n - 1


def test_what_everybody_begins_with_makes_no_match() -> None:
    """10,000 tokens of system prompt are most of what the slot holds, and still it is somebody else's: saved first."""
    other = hot(0, 11_000, shared=10_000, is_other_conversation=True)
    plan = plan_of(place(job(12_000), view(other), SETTINGS))
    assert (plan.n_reused, plan.steps[0]) == (10_000, Save(key(0)))
    assert (
        plan_of(
            place(
                job(12_000), view(other, free(1), snapshots=(SnapshotView("other", 10_000, 0.1),)), SETTINGS
            )
        ).slot.id
        == 1
    )


def test_a_busy_slot_that_only_begins_alike_is_not_waited_for() -> None:
    """What it will hold is somebody else's."""
    begins_alike = busy(1, 11_000, shared=10_000, wait_s=0.5)._replace(is_other_conversation=True)
    assert plan_of(place(job(12_000), view(free(0), begins_alike), SETTINGS)).slot.id == 0


def test_a_shared_prefix_that_is_just_being_computed_is_waited_for() -> None:
    """Two new conversations at once: the second restores what the first computes."""
    coming = SnapshotView("leaving-0", 10_000, restore_s=0.2, wait_s=8.0)
    decision = place(job(12_000), view(free(0), snapshots=(coming,)), SETTINGS)
    assert isinstance(decision, Wait)
    assert (decision.slot, decision.for_s) == (None, 8.0)


def test_weight_halves_after_half_an_hour() -> None:
    """A context that nobody has used for long is a smaller loss, and never none."""
    assert return_likelihood(0) == 1
    assert return_likelihood(-5) == 1
    assert return_likelihood(1800) == pytest.approx(0.5)
    assert 0 < return_likelihood(10**6) < 0.01


# -- all of it -----------------------------------------------------------------------------------------------------


@st.composite
def slot_views(draw: st.DrawFn, slot: int) -> SlotView:
    state = draw(st.sampled_from(list(SlotState)))
    n_tokens = 0 if state in (FREE, SUSPECT) else draw(st.integers(1, 30_000))
    shared = draw(st.integers(0, n_tokens))
    is_worth = state is HOT and draw(st.booleans())
    return SlotView(
        key(slot),
        state,
        n_tokens,
        shared,
        shared,
        save_s=0.1 if is_worth else 0.0,
        is_worth_saving=is_worth,
        eviction_cost_s=draw(st.floats(0, 30)) if state is HOT else 0.0,
        wait_s=0.0 if state in (FREE, HOT, SUSPECT) else draw(st.floats(0, 60)),
        used_at=draw(st.floats(0, 1e6)),
    )


@given(data=st.data())
def test_every_decision_can_be_carried_out(data: st.DataObject) -> None:
    """A plan is for an idle slot that nobody waits for, saves before it erases and erases before it restores; whoever
    waits does so because nothing is idle or because it is cheaper."""
    slots = tuple(data.draw(slot_views(i)) for i in range(data.draw(st.integers(1, 4))))
    reserved = {key(slot): 1.0 for slot in data.draw(st.sets(st.integers(0, len(slots) - 1)))}
    snapshots = tuple(
        SnapshotView(f"s{i}", data.draw(st.integers(64, 30_000)), 0.2, data.draw(st.sampled_from([0.0, 0.4])))
        for i in range(data.draw(st.integers(0, 2)))
    )
    one = job(
        data.draw(st.integers(0, 30_000)),
        no_cache=data.draw(st.booleans()),
    )
    pool = view(*slots, snapshots=snapshots, reserved=reserved)
    decision = place(one, pool, SETTINGS)
    takeable = {slot.key for slot in slots if slot.state in (FREE, HOT, SUSPECT)} - reserved.keys()
    if isinstance(decision, Wait):
        assert decision.for_s is None or decision.for_s > 0
        assert decision.slot is None or decision.slot not in takeable
        assert decision.for_s is not None or not takeable, "nobody waits for any slot while one can be taken"
        return
    assert decision.slot in takeable
    kinds = [type(step) for step in decision.steps]
    order = [kind for kind in (Save, Erase, Restore) if kind in kinds]
    assert kinds == order + [PrefillTo] * (len(kinds) - len(order))
    assert Restore not in kinds or Erase in kinds
    assert all(step.slot == decision.slot for step in decision.steps)
    if one.no_cache:
        assert decision.n_reused == 0
        assert Erase in kinds
    if slots[decision.slot.id].is_worth_saving and Erase in kinds:
        assert Save in kinds, "what is worth it is saved before it is erased"


# -- over two backends ---------------------------------------------------------------------------------------------


def on(backend: str, *slots: SlotView, ms_per_token: float = 1.0, **more: object) -> BackendView:
    """``slots`` are those of ``backend``, which computes a token in so many milliseconds."""
    own = tuple(slot._replace(key=key(slot.key.id, backend)) for slot in slots)
    rate = {"prefill_s": lambda start, end: (end - start) * ms_per_token / 1000}
    return BackendView(own, **(rate | more))  # type: ignore[arg-type]


def test_a_request_goes_to_the_backend_that_holds_its_prefix() -> None:
    """Also where the other one has a free slot."""
    views = [on("a", free(0), free(1)), on("b", free(0), hot(1, 5000, shared=5000))]
    plan = plan_of(place_over(job(5200), views, SETTINGS))
    assert (plan.slot, plan.source, plan.n_reused) == (key(1, "b"), Source.RESIDENT, 5000)
    assert plan.next_best is not None
    assert plan.next_best.slot.backend == "a"


@pytest.mark.parametrize(("wait_s", "backend"), [(3.0, "b"), (30.0, "a")])
def test_a_request_spills_over_where_waiting_costs_more_than_computing(wait_s: float, backend: str) -> None:
    """20,000 tokens take 20 s on an idle slot of the other backend."""
    views = [on("a", free(0)), on("b", busy(0, 20_000, shared=20_000, wait_s=wait_s))]
    decision = place_over(job(20_100), views, SETTINGS)
    assert decision.slot == key(0, backend)
    assert isinstance(decision, Wait) == (backend == "b")


def test_each_backends_own_rates_count() -> None:
    """The faster one computes a new prompt; a snapshot is restored where that is quick."""
    slow, fast = on("slow", free(0), ms_per_token=4.0), on("fast", free(0))
    assert plan_of(place_over(job(5000), [slow, fast], SETTINGS)).slot.backend == "fast"
    near = (SnapshotView("s", 4900, restore_s=0.1),)
    far = (SnapshotView("s", 4900, restore_s=9.0),)
    slow = on("slow", free(0), ms_per_token=4.0, snapshots=near)
    plan = plan_of(place_over(job(5000), [slow, on("fast", free(0), snapshots=far)], SETTINGS))
    assert (plan.slot.backend, plan.snapshot) == ("slow", "s")
    assert {step.slot for step in plan.steps} == {key(0, "slow")}
    assert plan.cost == Cost(restore_s=0.1, prefill_s=0.4)


def test_a_slot_that_is_waited_for_is_reserved_on_its_own_backend_only() -> None:
    """Slots of two backends have the same numbers."""
    held = {key(0, "a"): 5.0}
    views = [on("a", free(0), reserved=held), on("b", free(0), reserved=held)]
    assert plan_of(place_over(job(500), views, SETTINGS)).slot == key(0, "b")


def test_without_any_backend_a_request_waits() -> None:
    """For any slot."""
    assert place_over(job(500), [], SETTINGS) == Wait()


# -- why -----------------------------------------------------------------------------------------------------------


def test_a_plan_carries_the_terms_of_its_cost() -> None:
    """Each in seconds; what they are the sum of is what was compared."""
    on_disk = SnapshotView("ls-1", 19_900, restore_s=0.25)
    plan = plan_of(
        place(job(20_100), view(hot(0), hot(1, eviction_cost_s=0.75), snapshots=(on_disk,)), SETTINGS)
    )
    assert (plan.slot.id, plan.snapshot) == (0, "ls-1")
    assert plan.cost == Cost(save_s=0.1, eviction_cost_s=0.5, restore_s=0.25, prefill_s=0.2)
    assert plan.cost.steps_s == pytest.approx(0.55)


def test_the_next_best_is_the_cheapest_other_slot() -> None:
    """With the terms of its own cost."""
    plan = plan_of(place(job(5200), view(hot(0, shared=5000), hot(1, 9000), free(2)), SETTINGS))
    assert plan.slot.id == 0
    assert plan.cost == Cost(prefill_s=0.2)
    assert plan.next_best == Place(key(2), Source.COLD, 0, Cost(prefill_s=5.2))


def test_with_one_slot_the_next_best_is_another_source() -> None:
    """There is no other slot to compare with."""
    on_disk = SnapshotView("ls-1", 4900, restore_s=0.25)
    plan = plan_of(place(job(5000), view(free(0), snapshots=(on_disk,)), SETTINGS))
    assert plan.next_best == Place(key(0), Source.COLD, 0, Cost(prefill_s=5.0))


def test_a_wait_carries_what_it_is_cheaper_than() -> None:
    """What is waited for, and the cheapest that could be had at once."""
    own = busy(1, 20_000, shared=20_000, wait_s=3.0)
    wait = place(job(20_100), view(free(0), own), SETTINGS)
    assert isinstance(wait, Wait)
    assert wait.place == Place(key(1), Source.RESIDENT, 20_000, Cost(wait_s=3.0, prefill_s=0.1))
    assert wait.instead == Place(key(0), Source.COLD, 0, Cost(prefill_s=20.1))
