"""How much of a common prefix llama-server can use, by the kind of the model's memory."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaslot.cache.content import Content
from llamaslot.cache.ids import pack
from llamaslot.cache.reuse import CacheKind, ReturnedAnswers, RewindModel, Strikes, checkpoints_after, usable

DENSE, SWA, RECURRENT = CacheKind.DENSE, CacheKind.SWA, CacheKind.RECURRENT
KINDS = st.sampled_from(list(CacheKind))
COUNTS = st.integers(0, 10_000)


def test_dense_goes_back_to_any_token() -> None:
    """All that is shared, wherever the prompts part."""
    assert usable(DENSE, 4970, 5700, (), 6000) == 4970


@pytest.mark.parametrize("kind", list(CacheKind))
def test_one_token_is_always_computed(kind: CacheKind) -> None:
    """The same prompt once more: its last token gives the first of the answer."""
    assert usable(kind, 5000, 5000, (4996,), 5000) <= 4999
    assert usable(DENSE, 5000, 5000, (), 5000) == 4999


def test_recurrent_goes_on_from_its_exact_end() -> None:
    """Held 5,000, and the prompt goes on from there."""
    assert usable(RECURRENT, 5000, 5000, (), 6000) == 5000


def test_recurrent_goes_back_to_a_checkpoint_only() -> None:
    """The last one at or before the point where the prompts part; without one, nothing."""
    assert usable(RECURRENT, 4998, 5700, (4484, 4996), 6000) == 4996
    assert usable(RECURRENT, 4970, 5700, (4484, 4996), 6000) == 4484
    assert usable(RECURRENT, 4400, 5700, (4484, 4996), 6000) == 0


def test_recurrent_that_is_not_known_exactly_has_no_end_to_go_on_from() -> None:
    """An answer follows whose tokens are not known: only a checkpoint is sure."""
    assert usable(RECURRENT, 5000, None, (4996,), 6000) == 4996
    assert usable(RECURRENT, 5000, None, (), 6000) == 0


def test_a_window_needs_one_token_more() -> None:
    """Of 5,000 tokens the real server reuses 4,995 where a recurrent model reuses 4,996."""
    assert usable(SWA, 5000, 5700, (4996,), 6000) == 4995
    assert usable(SWA, 5000, 5000, (), 6000) == 0


@given(kind=KINDS, shared=COUNTS, held=COUNTS | st.none(), at=st.lists(COUNTS), n=COUNTS)
def test_never_more_than_is_shared(
    kind: CacheKind, shared: int, held: int | None, at: list[int], n: int
) -> None:
    """Nor less than nothing, nor the whole prompt; and a dense model is never worse off."""
    if held is not None:
        shared = min(shared, held)
    found = usable(kind, shared, held, at, n)
    assert 0 <= found <= max(min(shared, n - 1), 0)
    assert found <= usable(DENSE, shared, held, at, n)


def test_a_prompt_leaves_a_checkpoint_near_its_end() -> None:
    """Four tokens before each stop, if it was computed at all."""
    assert checkpoints_after((), 0, [1000, 5000]) == (996, 4996)
    assert checkpoints_after((), 4997, [5000]) == ()


def test_checkpoints_behind_the_reused_part_are_gone() -> None:
    """The slot went back before them."""
    assert checkpoints_after((996, 4996, 7000), 4996, [6000]) == (996, 4996, 5996)


def test_old_checkpoints_are_not_counted_on() -> None:
    """llama-server keeps a limited number: after ten turns those of the first one are gone."""
    at: tuple[int, ...] = ()
    for turn in range(10):
        at = checkpoints_after(at, 1000 * turn, [1000 * turn + 999])
    assert 995 not in at
    assert at[-1] == 9995
    assert len(at) == 8


@given(kept=st.lists(COUNTS), reused=COUNTS, stops=st.lists(COUNTS))
def test_checkpoints_ascend(kept: list[int], reused: int, stops: list[int]) -> None:
    """Each once, in order."""
    at = checkpoints_after(kept, reused, stops)
    assert list(at) == sorted(set(at))


def test_two_failures_are_out() -> None:
    """One only counts; what delivers in between starts anew; few tokens are no failure."""
    strikes = Strikes()
    assert not strikes.count("a", 5000, 100)
    assert not strikes.count("b", 5000, 100)
    assert not strikes.count("a", 5000, 4990)
    assert not strikes.count("a", 5000, 100)
    assert not strikes.count("a", 60, 0)
    assert not strikes.count("a", 5000, 100)
    assert strikes.count("a", 5000, 100)


def rewind_model(cache_kind: CacheKind) -> RewindModel:
    return RewindModel(cache_kind)


ANSWERED = Content(pack(range(5000)), is_exact=False, checkpoints=(4996,), n_more=700)


@pytest.mark.parametrize("cache_kind", [SWA, RECURRENT])
def test_an_answer_is_expected_to_come_back(cache_kind: CacheKind) -> None:
    """Its tokens are not known, but the next prompt goes on behind it: from the exact end of the slot."""
    assert rewind_model(cache_kind).of_slot(ANSWERED, 5000, 6000) == 5700


@pytest.mark.parametrize("cache_kind", [SWA, RECURRENT])
def test_a_prompt_that_parts_earlier_goes_back(cache_kind: CacheKind) -> None:
    """Or one that is too short to hold the answer: to the last checkpoint."""
    assert rewind_model(cache_kind).of_slot(ANSWERED, 4999, 6000) in (4995, 4996)
    assert rewind_model(cache_kind).of_slot(ANSWERED, 5000, 5700) in (4995, 4996)


def test_dense_models_promise_no_answer() -> None:
    """They use as much of it as comes back, so that nothing is lost by promising less."""
    assert rewind_model(DENSE).of_slot(ANSWERED, 5000, 6000) == 5000


def test_an_answer_is_likely_to_come_back_as_far_as_answers_did() -> None:
    """For the choice of a place: all of it at first, then the usual share, the same after a restart. Nothing of it
    where the prompt is too short for it or parts before it."""
    known = rewind_model(DENSE)
    assert known.likely_of_slot(ANSWERED, 5000, 6000) == 5700
    assert known.likely_of_slot(ANSWERED, 5000, 5700) == 5000
    assert known.likely_of_slot(ANSWERED, 4999, 6000) == 4999
    for n_returned in (100, 200, 150):
        known.returned.answered(200, n_returned)
    assert known.likely_of_slot(ANSWERED, 5000, 6000) == 5525
    again = ReturnedAnswers.from_json(json.loads(json.dumps(known.returned.to_json())))
    assert again.likely(700) == 525


@pytest.mark.parametrize("cache_kind", [SWA, RECURRENT])
def test_models_that_cannot_go_back_find_a_whole_answer_or_none(cache_kind: CacheKind) -> None:
    """What is likely is what is counted on."""
    known = rewind_model(cache_kind)
    assert known.likely_of_slot(ANSWERED, 5000, 6000) == known.of_slot(ANSWERED, 5000, 6000) == 5700
    known.returned.answered(700, 350)
    assert known.likely_of_slot(ANSWERED, 5000, 6000) == known.of_slot(ANSWERED, 5000, 6000) < 5000


@pytest.mark.parametrize("returned", [None, 3, "all", [2.0], ["x"], [-1]])
def test_spoilt_shares_of_answers_are_ignored(returned: object) -> None:
    """They are learned anew."""
    assert ReturnedAnswers.from_json({"returned": returned}).likely(700) == 700


def test_an_answer_that_did_not_come_back_is_not_counted_on_for_a_while() -> None:
    """Some template drops a part of it: until eight in a row have come back."""
    known = rewind_model(RECURRENT)
    known.returned.answered(300, 0)
    for _ in range(8):
        assert known.of_slot(ANSWERED, 5000, 6000) == 4996
        known.returned.answered(300, 300)
    assert known.of_slot(ANSWERED, 5000, 6000) == 5700


def test_whether_answers_come_back_is_kept() -> None:
    """Over a restart."""
    returned = ReturnedAnswers()
    returned.answered(300, 299)
    assert not ReturnedAnswers.from_json(returned.to_json()).are_whole
    assert ReturnedAnswers.from_json(None).are_whole
