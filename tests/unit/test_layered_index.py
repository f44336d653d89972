"""The index of snapshots: with a generation, without one, and while one is made, it answers as one by one."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llamaslot.cache import layered_index
from llamaslot.cache.disk_index import DiskIndex, freeze, is_freezable
from llamaslot.cache.ids import common, count, pack
from llamaslot.cache.layered_index import LayeredIndex, Sowing
from llamaslot.cache.prefix_index import PrefixIndex, Shared

IDS = st.one_of(
    st.lists(st.integers(0, 1), max_size=8),
    st.lists(st.integers(-1, 2), max_size=5),  # media too: no generation has those
    st.builds(lambda n, tail: [1] * n + tail, st.integers(120, 300), st.lists(st.integers(0, 2), max_size=3)),
)
HOLDERS = st.integers(0, 15).map("ls-{}".format)


def grow(base: DiskIndex | None, sowing: Sowing) -> DiskIndex:
    """What the process that makes a generation does, without its files."""
    index: PrefixIndex[str] = PrefixIndex()
    if base is not None:
        fresh = DiskIndex(base.trie, base.columns, base.names)  # as it is on disk: nothing is dropped there
        for holder in sowing.gone:
            fresh.drop(holder)
        for holder, tokens in fresh.sequences():
            index.insert(holder, tokens)
    for holder in sowing.added.holders():
        if is_freezable(sowing.added.tokens(holder)):
            index.insert(holder, sowing.added.tokens(holder))
    return freeze(index)


class AgainstOneByOne(RuleBasedStateMachine):
    """Two indexes, one that never has a generation: after each step both say what a search one by one says."""

    @initialize()
    def start(self) -> None:
        self.index, self.plain = LayeredIndex(), LayeredIndex()
        self.oracle: dict[str, bytes] = {}
        self.made: DiskIndex | None = None
        self.is_sealed = False

    @rule(holder=HOLDERS, ids=IDS)
    def insert(self, holder: str, ids: list[int]) -> None:
        self.oracle[holder] = pack(ids)
        self.index.insert(holder, pack(ids))
        self.plain.insert(holder, pack(ids))

    @rule(holder=HOLDERS)
    def drop(self, holder: str) -> None:
        self.oracle.pop(holder, None)
        self.index.drop(holder)
        self.plain.drop(holder)

    @precondition(lambda self: not self.is_sealed)
    @rule()
    def seal(self) -> None:
        self.made = grow(self.index.base, self.index.seal())
        self.is_sealed = True
        assert not self.index.is_due

    @precondition(lambda self: self.is_sealed)
    @rule(is_made=st.sampled_from([True, True, False]))
    def finish(self, is_made: bool) -> None:
        assert self.made is not None
        if is_made:
            self.index.adopt(self.made)
        else:
            self.index.unseal()
        self.is_sealed = False

    @rule(ids=IDS, torn=st.sampled_from([b"", b"\x01"]), limit=st.integers(-1, 20), exclude=st.sets(HOLDERS))
    def ask(self, ids: list[int], torn: bytes, limit: int, exclude: set[str]) -> None:
        query = pack(ids)
        expected = [
            Shared(holder, n, count(tokens))
            for holder, tokens in self.oracle.items()
            if (n := common(query, tokens))
        ]
        left = [hit for hit in expected if hit.holder not in exclude]
        full = max((hit.n_tokens for hit in left if hit.n_shared == hit.n_tokens), default=None)
        for index in (self.index, self.plain):
            hits = index.match(query + torn)
            assert sorted(hits) == sorted(expected)
            keys = [(-hit.n_shared, hit.n_tokens) for hit in hits]
            assert keys == sorted(keys)
            assert index.match(query + torn, limit) == hits[: max(limit, 0)]
            assert index.cover(query, exclude) == max((hit.n_shared for hit in left), default=0)
            found = index.longest_full_prefix(query + torn, exclude)
            assert (found and found.n_tokens) == full
            assert found is None or found in left

    @invariant()
    def same_content(self) -> None:
        for index in (self.index, self.plain):
            index.check()
            assert index.holders() == self.oracle.keys()
            assert len(index) == len(self.oracle)
            assert all(holder in index for holder in self.oracle)
            assert all(index.tokens(holder) == tokens for holder, tokens in self.oracle.items())


TestAgainstOneByOne = AgainstOneByOne.TestCase
TestAgainstOneByOne.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)


def filled(n: int, first: int = 0) -> LayeredIndex:
    index = LayeredIndex()
    for i in range(first, first + n):
        index.insert(f"ls-{i}", pack([1, i]))
    return index


def test_a_generation_is_due_after_a_thousand_or_a_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 1,000 additions, and more than a tenth of the generation if that is more."""
    monkeypatch.setattr(layered_index, "NEW_MIN", 10)
    index = filled(10)
    assert not index.is_due
    index.insert("one more", b"")
    assert index.is_due
    index.adopt(grow(None, index.seal()))
    for i in range(200, 211):
        assert not index.is_due
        index.insert(f"ls-{i}", pack([2, i]))
    assert index.is_due
    monkeypatch.setattr(layered_index, "NEW_SHARE", 1.0)  # of 11
    assert not index.is_due


def test_a_generation_is_due_when_a_fifth_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of what the generation had, and not just a few."""
    monkeypatch.setattr(layered_index, "GONE_MIN", 3)
    index = filled(100)
    index.adopt(grow(None, index.seal()))
    for i in range(21):
        assert not index.is_due
        index.drop(f"ls-{i}")
    assert index.is_due
    index.adopt(grow(index.base, index.seal()))
    assert not index.is_due
    assert len(index) == 79


def test_what_no_generation_takes_makes_none_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences with media stay in the overlay, and no second generation is made because of them."""
    monkeypatch.setattr(layered_index, "NEW_MIN", 3)
    index = LayeredIndex()
    for i in range(5):
        index.insert(f"ls-{i}", pack([i, -1]))
    assert index.is_due
    index.adopt(grow(None, index.seal()))
    assert not index.is_due
    assert len(index) == 5
    index.check()


def test_half_a_token_is_refused_and_changes_nothing() -> None:
    """What the holder had is kept, wherever it lies."""
    index = filled(2)
    index.adopt(grow(None, index.seal()))
    with pytest.raises(ValueError, match="not whole tokens"):
        index.insert("ls-1", b"123")
    assert index.tokens("ls-1") == pack([1, 1])
    with pytest.raises(KeyError):
        index.tokens("unknown")
