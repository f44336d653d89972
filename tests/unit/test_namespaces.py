"""What is computed in one space is found from no other."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaslot.cache.ids import count, head, pack
from llamaslot.cache.namespaces import PUBLIC, SHARED, InNamespaces, Namespace, marker
from llamaslot.cache.prefix_index import PrefixIndex

ANNA, BERT = Namespace("key:anna"), Namespace("key:bert")
SCALED = Namespace("", '[{"id":0,"scale":0.5}]')


def index_of(**held: tuple[Namespace, bytes]) -> InNamespaces[str]:
    index: PrefixIndex[str] = PrefixIndex()
    for holder, (namespace, tokens) in held.items():
        index.insert(holder, marker(namespace) + tokens)
    return InNamespaces(index, lambda holder: held[holder][0])


@pytest.mark.parametrize(
    "namespace", [SHARED, ANNA, SCALED, PUBLIC, Namespace("key:anna", SCALED.lora), Namespace("named:a b")]
)
def test_a_space_is_told_in_a_word_and_back(namespace: Namespace) -> None:
    """As a sidecar has it."""
    assert Namespace.of_text(namespace.text) == namespace


def test_everybodys_sequences_stand_in_an_index_as_they_are() -> None:
    """What was on disk before there were spaces is found as ever."""
    assert marker(SHARED) == b""


def test_a_mark_is_ids_that_no_vocabulary_has() -> None:
    """Four of them."""
    ids = memoryview(marker(ANNA)).cast("i").tolist()
    assert len(ids) == 4
    assert all(0x100000 <= id_ < 0x110000 for id_ in ids)


def test_only_what_is_of_the_same_space_is_found() -> None:
    """And in each as if there were no others."""
    tokens = pack(range(100))
    index = index_of(
        shared=(SHARED, tokens),
        anna=(ANNA, tokens),
        bert=(BERT, tokens),
        scaled=(SCALED, tokens),
        public=(PUBLIC, tokens),
    )
    for namespace, holder in ((SHARED, "shared"), (ANNA, "anna"), (BERT, "bert"), (SCALED, "scaled")):
        assert index.match(tokens, (namespace,)) == [(holder, 100, 100)]
        assert index.cover(tokens, namespace) == 100
        assert index.longest_full_prefix(tokens, (namespace,)) == (holder, 100, 100)
        assert index.tokens(holder) == tokens
    assert {hit.holder for hit in index.match(tokens, (ANNA, PUBLIC))} == {"anna", "public"}
    assert index.match(tokens, (Namespace("key:carl"),)) == []
    assert index.match(b"", (ANNA,)) == []


def test_of_two_spaces_the_longer_prefix_comes_first() -> None:
    """An isolated user goes on from his own, or from what the operator has computed, whichever is more."""
    tokens = pack(range(100))
    index = index_of(
        own=(ANNA, head(tokens, 60)), public=(PUBLIC, head(tokens, 80)), far=(PUBLIC, head(tokens, 20))
    )
    assert [hit.holder for hit in index.match(tokens, (ANNA, PUBLIC))] == ["public", "own", "far"]
    assert [hit.holder for hit in index.match(tokens, (ANNA, PUBLIC), 2)] == ["public", "own"]
    whole = index.longest_full_prefix(tokens, (ANNA, PUBLIC))
    assert whole == ("public", 80, 80)


@given(st.integers(0, 10**9))
def test_in_each_space_the_answers_are_those_of_an_index_of_its_own(seed: int) -> None:
    """Random sequences that share much, in random spaces."""
    rng = random.Random(seed)
    namespaces = [SHARED, ANNA, BERT, SCALED]
    held = {
        f"h{i}": (rng.choice(namespaces), pack([rng.randrange(2) for _ in range(rng.randrange(1, 12))]))
        for i in range(20)
    }
    index = index_of(**held)
    for namespace in namespaces:
        alone: PrefixIndex[str] = PrefixIndex()
        for holder, (where, tokens) in held.items():
            if where == namespace:
                alone.insert(holder, tokens)
        query = pack([rng.randrange(2) for _ in range(rng.randrange(1, 12))])
        assert sorted(index.match(query, (namespace,))) == sorted(alone.match(query))
        assert index.cover(query, namespace) == next((hit.n_shared for hit in alone.hits(query)), 0)
        ours, theirs = index.longest_full_prefix(query, (namespace,)), alone.longest_full_prefix(query)
        assert (ours and ours.n_tokens) == (theirs and theirs.n_tokens)
        assert count(query) >= index.cover(query, namespace)
