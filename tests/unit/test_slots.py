"""A slot's life, line by line of its table."""

from __future__ import annotations

import itertools

import pytest

from llamaslot.cache.content import NOTHING, Content
from llamaslot.cache.ids import pack
from llamaslot.cache.namespaces import PUBLIC, Namespace
from llamaslot.scheduling.request import Placement, Request
from llamaslot.scheduling.slots import IDLE, NEXT, IllegalTransition, Slot, SlotEvent, SlotState

HELD = Content(pack([1, 2, 3]), is_dirty=True)

ALLOWED = [
    (SlotState.FREE, "lease", SlotState.LEASED),
    (SlotState.HOT, "lease", SlotState.LEASED),
    (SlotState.SUSPECT, "lease", SlotState.LEASED),
    (SlotState.LEASED, "keep", SlotState.HOT),
    (SlotState.LEASED, "empty", SlotState.FREE),
    (SlotState.LEASED, "leave", SlotState.ABANDONED),
    (SlotState.LEASED, "fail", SlotState.SUSPECT),
    (SlotState.ABANDONED, "keep", SlotState.HOT),
    (SlotState.ABANDONED, "empty", SlotState.FREE),
    (SlotState.ABANDONED, "fail", SlotState.SUSPECT),
]
FORBIDDEN = [
    (state, event)
    for state, event in itertools.product(SlotState, SlotEvent)
    if (state, event.value) not in {(before, name) for before, name, _ in ALLOWED}
]


@pytest.mark.parametrize(("before", "event", "after"), ALLOWED)
def test_what_is_allowed(before: SlotState, event: str, after: SlotState) -> None:
    """Each line of the table leads where it says."""
    slot = Slot("gpu0", 1, before, HELD)
    slot.become(SlotEvent(event), HELD)
    assert slot.state is after


@pytest.mark.parametrize(("state", "event"), FORBIDDEN)
def test_what_is_forbidden(state: SlotState, event: SlotEvent) -> None:
    """Anything else is an error that names both, and changes nothing."""
    slot = Slot("gpu0", 1, state, HELD)
    with pytest.raises(IllegalTransition, match=rf"{state.value}.* cannot {event.value}"):
        slot.become(event, NOTHING)
    assert (slot.state, slot.content) == (state, HELD)


def test_the_table_has_these_lines_only() -> None:
    """A new line needs a test."""
    assert {(state, event.value): after for (state, event), after in NEXT.items()} == {
        (before, event): after for before, event, after in ALLOWED
    }


@pytest.mark.parametrize("event", [SlotEvent.EMPTY, SlotEvent.FAIL])
def test_nothing_is_believed_of_an_empty_or_suspect_slot(event: SlotEvent) -> None:
    """Whatever is said of its content."""
    slot = Slot("gpu0", 1, SlotState.LEASED, HELD)
    slot.become(event, HELD)
    assert slot.content == NOTHING


def test_content_stays_when_nothing_is_said() -> None:
    """A lease alone changes nothing in the slot."""
    slot = Slot("gpu0", 1, SlotState.HOT, HELD)
    slot.become(SlotEvent.LEASE)
    assert slot.content is HELD


def test_idle_is_what_can_be_leased() -> None:
    """The two say the same."""
    assert {state for state, event in NEXT if event is SlotEvent.LEASE} == IDLE
    assert all(Slot("gpu0", 0, state).is_idle == (state in IDLE) for state in SlotState)


def test_the_readout_of_a_slot() -> None:
    """One line for logs, tests and the dashboard; never a token."""
    slot = Slot("gpu0", 3, SlotState.LEASED, HELD, leased_by="req-1")
    assert repr(slot) == "<Slot gpu0/3 LEASED 3 tok dirty by req-1>"
    assert repr(Slot("gpu0", 0)) == "<Slot gpu0/0 FREE 0 tok>"


def test_who_needs_a_turn() -> None:
    """Whoever makes llama-server choose slots by itself."""
    assert Request("a", placement=Placement.SERVER_CHOSEN).is_exclusive
    assert Request("a", n_children=2).is_exclusive
    assert not Request("a", no_cache=True).is_exclusive


def test_who_may_go_on_from_what() -> None:
    """From one's own space, and an isolated user from what the operator has computed; of nothing at all everybody."""
    tokens = pack([1, 2])
    shared, public = Content(tokens), Content(tokens, namespace=PUBLIC)
    anna, scaled = (
        Content(tokens, namespace=Namespace("anna")),
        Content(tokens, namespace=Namespace("", "[]")),
    )
    for job, usable in (
        (Request("everybody's"), [shared]),
        (Request("anna's", namespace=Namespace("anna")), [public, anna]),
        (Request("with LoRA scales", namespace=Namespace("", "[]")), [scaled]),
        (Request("anna's, with LoRA scales", namespace=Namespace("anna", "[]")), []),
        (Request("the operator's", namespace=PUBLIC), [public]),
    ):
        assert [held for held in (shared, public, anna, scaled) if job.may_use(held)] == usable
        assert job.may_use(NOTHING)
        assert not job.may_use(Content(is_exact=False, namespace=Namespace("bertha")))


@pytest.mark.parametrize(
    ("content", "n_tokens", "may"),
    [
        (Content(pack([1, 2, 3])), 3, True),
        (Content(pack([1, 2, 3])), 4, False),
        (Content(pack([1, 2, 3]), is_exact=False, n_more=2), 5, True),
        (Content(pack([1, 2, 3]), is_exact=False, n_more=2), 6, False),
        (Content(pack([1, 2, 3]), is_exact=False), 600, True),
    ],
)
def test_what_is_not_known_may_be_there(content: Content, n_tokens: int, may: bool) -> None:
    """As far as the number of tokens goes, if that is known."""
    assert content.may_hold(n_tokens) is may
