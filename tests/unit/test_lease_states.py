"""A lease's life, line by line of its table, and how it ends in each state."""

from __future__ import annotations

import ast
import asyncio
import itertools
from collections.abc import Callable, Iterator

import pytest

from llamaslot.backend.lease import Lease
from llamaslot.backend.lease_states import ENDED, NEXT, STOPPED, LeaseEvent, LeaseState, Preempted
from llamaslot.backend.slot_table import SlotTable
from llamaslot.cache.content import NOTHING, Content
from llamaslot.cache.ids import pack
from llamaslot.errors import BackendRestarted
from llamaslot.observe.journal import DecisionRecorder, Journal
from llamaslot.scheduling.plan import Cost, Plan, PrefillTo, Source
from llamaslot.scheduling.rates import Rates
from llamaslot.scheduling.request import Placement, Request
from llamaslot.scheduling.settings import SchedulingSettings
from llamaslot.scheduling.slots import IllegalTransition, SlotKey, SlotState
from tests.support.inprocess import spawn
from tests.support.source import MODULES, SOURCE, SOURCE_GROUP, parsed

TOKENS = pack(range(1000))

ALLOWED = [
    line.split(" -> ")
    for line in """
PREPARING -> ACT -> ACTING
PREPARING -> PREFILL -> PREFILLING
PREPARING -> WAIT -> WAITING_EXCLUSIVE
PREPARING -> SEND -> SENT
PREPARING -> SETTLE -> SETTLED
PREPARING -> GIVE_BACK -> RELEASED
PREPARING -> LEAVE -> ABANDONED
ACTING -> ACTED -> PREPARING
ACTING -> RELEASE -> RELEASE_PENDING
PREFILLING -> PREFILLED -> PREPARING
PREFILLING -> LEAVE -> ABANDONED
WAITING_EXCLUSIVE -> ADMIT -> PREPARING
WAITING_EXCLUSIVE -> GIVE_BACK -> RELEASED
WAITING_EXCLUSIVE -> LEAVE -> ABANDONED
SENT -> CONFIRM -> PROCESSING
SENT -> TOKEN -> DECODING
SENT -> SETTLE -> SETTLED
SENT -> GIVE_BACK -> RELEASED
SENT -> LEAVE -> ABANDONED
PROCESSING -> TOKEN -> DECODING
PROCESSING -> SETTLE -> SETTLED
PROCESSING -> GIVE_BACK -> RELEASED
PROCESSING -> LEAVE -> ABANDONED
DECODING -> SETTLE -> SETTLED
DECODING -> GIVE_BACK -> RELEASED
DECODING -> LEAVE -> ABANDONED
SETTLED -> ACT -> ACTING
SETTLED -> GIVE_BACK -> RELEASED
RELEASE_PENDING -> GIVE_BACK -> RELEASED
RELEASE_PENDING -> LEAVE -> ABANDONED
""".strip().splitlines()
]


class Owner:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def on_change(self, lease: Lease) -> None:
        self.told.append("change")

    def on_long(self, lease: Lease) -> None:
        pass

    def on_look_again(self, lease: Lease) -> None:
        self.told.append("look again")

    def on_end(self, lease: Lease) -> None:
        self.told.append(lease.state.value)


class Desk:
    """One slot that is leased, with what its lease needs."""

    def __init__(self, *, prefill_s: float = 0.0, has_slot: bool = True) -> None:
        self.table = SlotTable(
            "stub", 1, 10_000, settings=SchedulingSettings(chunk_threshold_s=0.2), rates=Rates()
        )
        self.owner, self.now = Owner(), 0.0
        steps = (PrefillTo(SlotKey("stub", 0), 999),) if prefill_s else ()
        plan = (
            Plan(SlotKey("stub", 0), steps, Source.COLD, 0, Cost(prefill_s=prefill_s)) if has_slot else None
        )
        job = Request("a", TOKENS, placement=Placement.PINNED if has_slot else Placement.SERVER_CHOSEN)
        self.lease = Lease(
            self.owner,
            self.table,
            self.table.slots[0] if has_slot else None,
            job,
            plan,
            now=lambda: self.now,
            recorder=DecisionRecorder(Journal(), job, lambda: self.now),
        )

    @property
    def slot_state(self) -> SlotState:
        return self.table.slots[0].state


Call = Callable[[Lease], object]

#: How a lease gets into each state, by its methods.
WAYS: dict[LeaseState, tuple[Call, ...]] = {
    LeaseState.PREPARING: (),
    LeaseState.ACTING: (Lease.begin_action,),
    LeaseState.PREFILLING: (Lease.begin_prefill,),
    LeaseState.WAITING_EXCLUSIVE: (Lease.begin_wait,),
    LeaseState.SENT: (Lease.begin_request,),
    LeaseState.PROCESSING: (Lease.begin_request, Lease.mark_processing),
    LeaseState.DECODING: (Lease.begin_request, Lease.mark_processing, Lease.mark_decoding),
    LeaseState.SETTLED: (Lease.begin_request, lambda lease: lease.finish(Content(TOKENS))),
    LeaseState.RELEASE_PENDING: (Lease.begin_action, Lease.release),
    LeaseState.ABANDONED: (Lease.begin_prefill, Lease.release),
    LeaseState.RELEASED: (Lease.release,),
}


def in_state(state: LeaseState, desk: Desk | None = None) -> Desk:
    desk = desk or Desk()
    for call in WAYS[state]:
        call(desk.lease)
    assert desk.lease.state is state
    return desk


def test_the_table_has_these_lines_only() -> None:
    """A new line needs a test."""
    lines = [[before.name, event.name, after.name] for (before, event), after in NEXT.items()]
    assert sorted(lines) == sorted(ALLOWED)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(LeaseState, LeaseEvent)))
def test_each_event_in_each_state(state: LeaseState, event: LeaseEvent) -> None:
    """It leads where the table says; what is not there is an error that names both, and changes nothing."""
    lease = in_state(state).lease
    after = {(before, name): then for before, name, then in ALLOWED}.get((state.name, event.name))
    if after is not None:
        lease._become(event)
        assert lease.state is LeaseState[after]
    else:
        with pytest.raises(IllegalTransition, match=rf"{state.value} .* cannot {event.value}"):
            lease._become(event)
        assert lease.state is state


def test_every_state_has_a_way_in_and_out() -> None:
    """Each but the last two can end, and each is reached."""
    reached = {LeaseState.PREPARING, *NEXT.values()}
    assert reached == set(LeaseState)
    assert set(LeaseState) - {before for before, _ in NEXT} == {LeaseState.ABANDONED, LeaseState.RELEASED}


@pytest.mark.parametrize(
    ("state", "ends", "slot"),
    [
        (LeaseState.PREPARING, LeaseState.RELEASED, SlotState.FREE),
        (LeaseState.ACTING, LeaseState.RELEASE_PENDING, SlotState.LEASED),
        (LeaseState.PREFILLING, LeaseState.ABANDONED, SlotState.ABANDONED),
        (LeaseState.WAITING_EXCLUSIVE, LeaseState.RELEASED, SlotState.FREE),
        (LeaseState.SENT, LeaseState.ABANDONED, SlotState.ABANDONED),
        (LeaseState.PROCESSING, LeaseState.ABANDONED, SlotState.ABANDONED),
        (LeaseState.DECODING, LeaseState.ABANDONED, SlotState.ABANDONED),
        (LeaseState.SETTLED, LeaseState.RELEASED, SlotState.HOT),
        (LeaseState.RELEASE_PENDING, LeaseState.RELEASE_PENDING, SlotState.LEASED),
        (LeaseState.ABANDONED, LeaseState.ABANDONED, SlotState.ABANDONED),
        (LeaseState.RELEASED, LeaseState.RELEASED, SlotState.FREE),
    ],
)
def test_release_in_each_state(state: LeaseState, ends: LeaseState, slot: SlotState) -> None:
    """It is safe, and the second time without effect. The owner is told once, when it ends."""
    desk = in_state(state)
    for _ in range(2):
        desk.lease.release()
        assert (desk.lease.state, desk.slot_state) == (ends, slot)
    assert desk.lease.is_released
    n_ends = sum(told in ("released", "abandoned") for told in desk.owner.told)
    assert n_ends == (ends is not LeaseState.RELEASE_PENDING)


@pytest.mark.parametrize(
    "state", [LeaseState.PREPARING, LeaseState.WAITING_EXCLUSIVE, LeaseState.SENT, LeaseState.DECODING]
)
def test_without_a_slot_nothing_is_abandoned(state: LeaseState) -> None:
    """llama-server's work is in the slots of its other leases."""
    desk = in_state(state, Desk(has_slot=False)) if state is not LeaseState.DECODING else Desk(has_slot=False)
    if (
        state is LeaseState.DECODING
    ):  # its first token may come before the slot is known in which it is computed
        desk.lease.begin_request()
        desk.lease.mark_decoding()
        desk.lease.mark_processing()
        assert desk.lease.is_decoding
    desk.lease.release()
    assert desk.lease.state is LeaseState.RELEASED


def test_an_action_is_carried_out_after_the_release() -> None:
    """The slot comes back when it has ended."""
    desk = in_state(LeaseState.RELEASE_PENDING)
    desk.lease.set_content(Content(TOKENS))
    desk.lease.end_action()
    assert (desk.lease.state, desk.slot_state) == (LeaseState.RELEASED, SlotState.HOT)


@pytest.mark.parametrize("is_released_first", [True, False])
def test_a_slot_that_is_left_at_work_is_abandoned(is_released_first: bool) -> None:
    """After an action that has failed while llama-server computed for it."""
    desk = in_state(LeaseState.ACTING)
    if is_released_first:
        desk.lease.release()
    desk.lease.lose_track()
    desk.lease.end_action()
    desk.lease.release()
    assert (desk.lease.state, desk.slot_state) == (LeaseState.ABANDONED, SlotState.ABANDONED)


def test_another_action_ends_what_was_left_at_work() -> None:
    """llama-server has come to it, so it is through with what was there before."""
    desk = in_state(LeaseState.ACTING)
    desk.lease.lose_track()
    desk.lease.end_action()
    desk.lease.begin_action()
    desk.lease.set_content(NOTHING)
    desk.lease.end_action()
    desk.lease.release()
    assert (desk.lease.state, desk.slot_state) == (LeaseState.RELEASED, SlotState.FREE)


def test_a_slot_of_unknown_content_is_suspect() -> None:
    """Once it is given back."""
    desk = in_state(LeaseState.PROCESSING)
    desk.lease.finish(None)
    desk.lease.release()
    assert (desk.lease.state, desk.slot_state) == (LeaseState.RELEASED, SlotState.SUSPECT)


@pytest.mark.parametrize("call", [Lease.begin_action, Lease.begin_prefill, Lease.begin_request])
def test_nothing_begins_in_a_process_that_is_gone(call: Call) -> None:
    """The state stays as it was."""
    desk = Desk()
    desk.table.is_current = False
    with pytest.raises(BackendRestarted):
        call(desk.lease)
    assert desk.lease.state is LeaseState.PREPARING


def test_a_prefill_leads_back_and_an_answer_does_not() -> None:
    """After a prefill there may be another step."""
    lease = in_state(LeaseState.PREFILLING).lease
    lease.finish(Content(TOKENS[:400]))
    assert lease.state is LeaseState.PREPARING
    lease.begin_request()
    lease.finish(Content(TOKENS))
    assert lease.state is LeaseState.SETTLED  # type: ignore[comparison-overlap]


def test_whether_llama_server_has_begun_is_known_of_what_was_sent_last() -> None:
    """A prefill that has begun says nothing of the request after it."""
    lease = in_state(LeaseState.PREFILLING).lease
    assert not lease.is_confirmed
    lease.confirm(Content(TOKENS[:400]))
    assert lease.is_confirmed
    lease.finish(Content(TOKENS[:400]))
    lease.begin_request()
    assert not lease.is_confirmed
    lease.confirm(Content(TOKENS))
    assert lease.is_confirmed
    assert lease.state is LeaseState.PROCESSING


def test_a_slot_that_llama_server_may_have_chosen_is_abandoned() -> None:
    """One that it has not chosen is given back as it was."""
    desk = Desk()
    desk.lease.land(is_confirmed=False)
    assert desk.lease.state is LeaseState.SENT
    desk.lease.land(is_confirmed=True)
    assert (desk.lease.state, desk.lease.content) == (LeaseState.PROCESSING, NOTHING)
    desk.lease.release()
    assert desk.slot_state is SlotState.ABANDONED
    other = Desk()
    other.lease.finish(other.lease.content)
    other.lease.release()
    assert other.slot_state is SlotState.FREE


# -- who comes first, long prefills, preemption ------------------------------------------------------------------


@pytest.mark.parametrize("state", list(LeaseState))
def test_who_needs_little_comes_first_until_its_first_token(state: LeaseState) -> None:
    """And not while it waits until all others are at work."""
    is_first = state not in (LeaseState.WAITING_EXCLUSIVE, LeaseState.DECODING, LeaseState.SETTLED, *ENDED)
    assert in_state(state).lease.is_latency_sensitive is is_first


@pytest.mark.parametrize("state", [LeaseState.ACTING, LeaseState.SENT])
def test_what_does_not_begin_for_long_comes_first_no_more(state: LeaseState) -> None:
    """It is not that little."""
    desk = in_state(state)
    desk.now = 1.9
    assert desk.lease.is_latency_sensitive
    desk.now = 2.1
    assert not desk.lease.is_latency_sensitive


def test_a_long_prefill_is_in_line_until_its_first_turn() -> None:
    """Then others are looked at again, once; its slot actions come first, the prefill does not."""
    desk = Desk(prefill_s=5.0)
    lease = desk.lease
    assert (lease.is_long, lease.is_in_line, lease.is_latency_sensitive) == (True, True, False)
    lease.begin_action()
    assert lease.is_latency_sensitive
    lease.end_action()
    lease.plan_prefill(is_long=True)
    assert desk.owner.told == ["change"]
    lease.take_prefill_turn()
    lease.take_prefill_turn()
    assert (lease.is_long, lease.is_in_line) == (True, False)
    lease.end_prefill()
    assert not lease.is_long
    assert desk.owner.told == ["change", "look again"]


def test_a_plan_that_turns_out_short_leaves_the_line() -> None:
    """Or long, where what was restored is less than was planned."""
    desk = Desk(prefill_s=5.0)
    desk.lease.plan_prefill(is_long=False)
    assert (desk.lease.is_long, desk.owner.told) == (False, ["look again"])
    desk.lease.plan_prefill(is_long=True)
    assert desk.lease.is_in_line


def test_a_slot_is_wanted_only_where_it_can_be_given_up() -> None:
    """And another one is looked for where it cannot any more."""
    desk = Desk()
    lease = desk.lease
    lease.preempt(is_wanted=True)
    lease.raise_if_preempted(None)
    lease.allow_preemption()
    lease.preempt(is_wanted=True)
    with pytest.raises(Preempted) as raised:
        lease.raise_if_preempted(None)
    assert (raised.value.came_at, raised.value.n_times) == (0.0, 1)
    lease.preempt(is_wanted=False)
    lease.raise_if_preempted(None)
    lease.preempt(is_wanted=True)
    lease.forbid_preemption()
    assert (lease.is_preempted, desk.owner.told) == (False, ["look again"])


async def test_what_is_preempted_stops() -> None:
    """At once, and what has ended before has its result."""
    lease = Desk().lease
    never: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def wait() -> str:
        return await never

    stopped = spawn(lease.unless_preempted(wait()))
    await asyncio.sleep(0)
    lease.preempt(is_wanted=True)
    assert await stopped is STOPPED
    lease.preempt(is_wanted=False)

    async def end() -> str:
        return "done"

    assert await lease.unless_preempted(end()) == "done"


# -- nobody else writes to it ------------------------------------------------------------------------------------

#: What a lease is called where nothing says that it is one.
CALLED = {"lease", "_lease", "other", "rival", "maker", "behind", "first"}


def leases_in(tree: ast.Module) -> set[str]:
    """The names of all that a module says to be a lease."""
    found = set(CALLED)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            name = node.arg if isinstance(node, ast.arg) else _last(node.target)
            if any(isinstance(part, ast.Name) and part.id == "Lease" for part in ast.walk(node.annotation)):
                found.add(name)
    return found


def _last(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def written(tree: ast.Module) -> Iterator[str]:
    """``lease.content`` for each attribute of a lease that is assigned or deleted."""
    leases, attributes = leases_in(tree), vars(Desk().lease).keys()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or isinstance(node.ctx, ast.Load):
            continue
        if node.attr in attributes and _last(node.value) in leases:
            yield f"{_last(node.value)}.{node.attr}, line {node.lineno}"


def test_writing_is_noticed() -> None:
    """In each of its forms."""
    tree = ast.parse(
        "def f(it: Lease | None, x):\n it.plan = 1\n x.lease.n_done += 1\n self._lease.state, y = 1, 2\n"
        " del x.other.recorder\n x.recorder = it.plan\n x.lease.unknown = 1"
    )
    found = sorted(text.split(",")[0] for text in written(tree))
    assert found == ["_lease.state", "it.plan", "lease.n_done", "other.recorder"]


@SOURCE_GROUP
def test_only_a_lease_changes_itself() -> None:
    """Everybody else tells it what has happened."""
    others = [module for module in MODULES if module != SOURCE / "backend/lease.py"]
    found = {str(module.relative_to(SOURCE)): list(written(parsed(module))) for module in others}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}
