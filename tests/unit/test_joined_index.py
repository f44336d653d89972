"""Several indexes as one: they answer as a search one by one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaslot.cache.ids import common, count, pack
from llamaslot.cache.joined_index import Joined
from llamaslot.cache.prefix_index import PrefixIndex, Shared

IDS = st.lists(st.integers(0, 1), max_size=8)


@given(st.lists(st.tuples(st.integers(0, 2), IDS), max_size=12), IDS, st.integers(0, 8))
@settings(max_examples=200, deadline=None)
def test_the_answers_are_those_of_a_search_one_by_one(
    held: list[tuple[int, list[int]]], ids: list[int], limit: int
) -> None:
    """Whichever layers are empty."""
    layers = [PrefixIndex[str](), PrefixIndex[str](), PrefixIndex[str]()]
    for i, (layer, sequence) in enumerate(held):
        layers[layer].insert(f"ls-{i}", pack(sequence))
    index, query = Joined(*layers), pack(ids)
    expected = [
        Shared(f"ls-{i}", n, len(sequence))
        for i, (_, sequence) in enumerate(held)
        if (n := common(query, pack(sequence)))
    ]
    hits = index.match(query)
    assert sorted(hits) == sorted(expected)
    assert hits == sorted(hits, key=lambda hit: (-hit.n_shared, hit.n_tokens))
    assert index.match(query, limit) == hits[:limit]
    assert list(index.hits(query)) == hits
    full = max((hit.n_tokens for hit in expected if hit.n_shared == hit.n_tokens), default=None)
    found = index.longest_full_prefix(query)
    assert (found and found.n_tokens) == full
    assert found is None or found in expected
    for i, (_, sequence) in enumerate(held):
        assert count(index.tokens(f"ls-{i}")) == len(sequence)
    with pytest.raises(KeyError):
        index.tokens("unknown")
