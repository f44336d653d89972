"""How much of a common prefix llama-server can use, by the kind of the model's memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaslot.core.reuse import Memory, checkpoints_after, usable

DENSE, SWA, RECURRENT = Memory.DENSE, Memory.SWA, Memory.RECURRENT
KINDS = st.sampled_from(list(Memory))
COUNTS = st.integers(0, 10_000)


def test_dense_goes_back_to_any_token() -> None:
    """All that is shared, wherever the prompts part."""
    assert usable(DENSE, 4970, 5700, (), 6000) == 4970


@pytest.mark.parametrize("kind", list(Memory))
def test_one_token_is_always_computed(kind: Memory) -> None:
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
    kind: Memory, shared: int, held: int | None, at: list[int], n: int
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


@given(kept=st.lists(COUNTS), reused=COUNTS, stops=st.lists(COUNTS))
def test_checkpoints_ascend(kept: list[int], reused: int, stops: list[int]) -> None:
    """Each once, in order."""
    at = checkpoints_after(kept, reused, stops)
    assert list(at) == sorted(set(at))
