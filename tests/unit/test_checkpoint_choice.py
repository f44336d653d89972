"""Which checkpoints of a slot file are kept in the store."""

from __future__ import annotations

from llamaslot.store.checkpoint_choice import states_to_keep


def test_the_states_that_are_kept() -> None:
    """The last one, and those that save computing 512 tokens before a mark, to which a later request may rewind."""
    at = [1996, 2000, 2600, 3100, 3596, 3600, 5000]
    assert states_to_keep([], [100]) == []
    assert states_to_keep(at, []) == [5000]
    assert states_to_keep(at, [2000, 3600]) == [2000, 3600, 5000]
    assert states_to_keep(at, [2000, 2400, 2599]) == [2000, 5000]
    assert states_to_keep(at, [2000, 2610, 2700, 3200]) == [2000, 2600, 5000]
    assert states_to_keep(at, [1000]) == [5000]


def test_without_marks_states_far_apart_are_kept() -> None:
    at = list(range(1000, 40_001, 1000))
    assert states_to_keep(at, []) == [9000, 18_000, 27_000, 36_000, 40_000]


def test_states_weigh_hardly_more_than_rows() -> None:
    """If a state is as large as the rows of many tokens, few states are kept between the first and those of the last
    turn. The first is also kept when the conversation has gone on.
    """
    mib, at = 1 << 20, list(range(1500, 60_001, 1000))
    rows = {"a large hybrid": 35 << 10, "a small one": 4 << 10, "no rows": 0, "a small state": 1 << 20}
    kept = {
        model: states_to_keep(at, at, state_bytes=150 * mib, row_bytes=row_bytes)
        for model, row_bytes in rows.items()
    }
    assert kept["a small state"] == at
    for model in rows:
        assert (kept[model][0], kept[model][-3:]) == (1500, at[-3:])
        assert states_to_keep([*kept[model], 60_500, 61_500], kept[model], state_bytes=150 * mib)[0] == 1500
    assert len(kept["a large hybrid"]) * 150 * mib < 1.1 * 60_000 * rows["a large hybrid"]
    assert kept["a small one"] == kept["no rows"]
    assert len(kept["no rows"]) == 10  # each 8,192 tokens
