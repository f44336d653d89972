"""The prefix index: examples, and everything against a list that is searched one by one."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from llamaslot.cache.ids import common, count, pack
from llamaslot.cache.prefix_index import Branch, PrefixIndex, Shared


def index_of(**sequences: list[int]) -> PrefixIndex[str]:
    index: PrefixIndex[str] = PrefixIndex()
    for holder, ids in sequences.items():
        index.insert(holder, pack(ids))
        index.check()
    return index


def test_finds_the_longest_prefix_first() -> None:
    """Holders come by the tokens that they share with the query."""
    index = index_of(short=[1, 2], other=[1, 9, 9], long=[1, 2, 3, 4, 5])
    assert index.match(pack([1, 2, 3, 4, 6])) == [
        Shared("long", 4, 5),
        Shared("short", 2, 2),
        Shared("other", 1, 3),
    ]


def test_whole_prefixes_come_before_those_that_go_on() -> None:
    """At equal share the holder that ends there is first, then the shorter of the others."""
    index = index_of(longest=[1, 2, 5, 5, 5], longer=[1, 2, 4, 4], whole=[1, 2], longer_too=[1, 2, 6, 6])
    assert [hit.holder for hit in index.match(pack([1, 2, 3]))] == [
        "whole",
        "longer",
        "longer_too",
        "longest",
    ]
    assert {hit.n_shared for hit in index.match(pack([1, 2, 3]))} == {2}


def test_a_stranger_is_not_listed() -> None:
    """Who has no token in common with the query, or no tokens at all, is no match."""
    index = index_of(a=[1, 2], empty=[])
    assert index.match(pack([2, 1])) == []
    assert index.match(b"") == []
    assert "empty" in index
    assert index.tokens("empty") == b""


def test_tokens_that_share_bytes_share_nothing() -> None:
    """0x01020304 and 0x05020304 begin with the same three bytes and are two tokens."""
    index = index_of(a=[7, 0x01020304], b=[7, 0x05020304])
    assert index.match(pack([7, 0x01020304])) == [Shared("a", 2, 2), Shared("b", 1, 2)]
    assert index.n_tokens == 3


def test_a_query_may_end_inside_an_edge() -> None:
    """A holder that goes on after the query shares all of the query."""
    index = index_of(a=[1, 2, 3, 4])
    assert index.match(pack([1, 2])) == [Shared("a", 2, 4)]


def test_insert_replaces_what_the_holder_had() -> None:
    """A slot has one content: the old one is found no more."""
    index = index_of(a=[1, 2, 3])
    index.insert("a", pack([4, 5]))
    index.check()
    assert index.match(pack([1, 2, 3])) == []
    assert index.tokens("a") == pack([4, 5])
    assert (len(index), index.n_tokens) == (1, 2)


def test_several_holders_of_the_same_sequence() -> None:
    """A slot and its snapshot hold the same tokens: stored once, both found, one stays when the other goes."""
    index = index_of(slot=[1, 2, 3], snapshot=[1, 2, 3])
    assert index.n_tokens == 3
    assert [hit.holder for hit in index.match(pack([1, 2, 3, 4]))] == ["slot", "snapshot"]
    index.drop("slot")
    index.check()
    assert index.match(pack([1, 2, 3, 4])) == [Shared("snapshot", 3, 3)]


def test_drop_leaves_nothing_behind() -> None:
    """Dropping twice is harmless, and an index whose holders are gone is empty."""
    index = index_of(a=[1, 2, 3], b=[1, 2, 4], c=[1, 2])
    for holder in ("c", "a", "a", "b", "never there"):
        index.drop(holder)
        index.check()
    assert (len(index), index.n_tokens, list(index.holders())) == (0, 0, [])


def test_unknown_holder_is_a_key_error() -> None:
    """There are no tokens for a holder that is not there."""
    with pytest.raises(KeyError):
        index_of(a=[1]).tokens("b")


def test_half_a_token_is_refused_and_changes_nothing() -> None:
    """An edge ends on a whole token; what the holder had is kept."""
    index = index_of(a=[1, 2])
    with pytest.raises(ValueError, match="not whole tokens"):
        index.insert("a", b"123")
    index.check()
    assert index.tokens("a") == pack([1, 2])


def test_a_limit_visits_no_more_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One match among 5,000 that share a system prompt looks at a handful of nodes."""
    index: PrefixIndex[int] = PrefixIndex()
    rng = random.Random(1)
    for holder in range(5000):
        index.insert(holder, pack([1, 2, 3, *(rng.randrange(10, 20) for _ in range(rng.randrange(1, 40)))]))
    reached = 0
    push: Callable[..., None] = heapq.heappush

    def counted(*args: object) -> None:
        nonlocal reached
        reached += 1
        push(*args)

    monkeypatch.setattr(heapq, "heappush", counted)
    query = pack([1, 2, 3, 99])
    first = index.match(query, 10)
    assert reached < 100
    monkeypatch.undo()
    assert first == index.match(query)[:10]


def test_a_path_of_many_forks_is_no_recursion() -> None:
    """Depth is bounded by memory, not by Python's stack."""
    ids = list(range(1, 1501))
    index: PrefixIndex[int] = PrefixIndex()
    for n in ids:
        index.insert(n, pack(ids[:n]))
    index.check()
    assert [hit.n_shared for hit in index.match(pack(ids), 3)] == [1500, 1499, 1498]
    for n in ids:
        index.drop(n)
    index.check()


# Two tokens and short sequences: forks everywhere. Long runs of one token: edges that are split and merged again.
IDS = st.one_of(
    st.lists(st.integers(0, 1), max_size=8),
    st.lists(st.integers(-1, 2), max_size=5),
    st.builds(lambda n, tail: [1] * n + tail, st.integers(0, 300), st.lists(st.integers(0, 2), max_size=3)),
)
HOLDERS = st.integers(0, 15)


class AgainstOneByOne(RuleBasedStateMachine):
    """Random inserts and drops; after each, every question is answered as by a search one by one."""

    @initialize()
    def start(self) -> None:
        self.index: PrefixIndex[int] = PrefixIndex()
        self.oracle: dict[int, bytes] = {}

    def shares(self, query: bytes) -> list[Shared[int]]:
        return [
            Shared(holder, n_shared, count(tokens))
            for holder, tokens in self.oracle.items()
            if (n_shared := common(query, tokens))
        ]

    @rule(holder=HOLDERS, ids=IDS)
    def insert(self, holder: int, ids: list[int]) -> None:
        self.index.insert(holder, pack(ids))
        self.oracle[holder] = pack(ids)

    @rule(holder=HOLDERS)
    def drop(self, holder: int) -> None:
        self.index.drop(holder)
        self.oracle.pop(holder, None)

    @rule(ids=IDS, torn=st.sampled_from([b"", b"\x01", b"\x01\x00\x00"]), limit=st.integers(-1, 20))
    def match(self, ids: list[int], torn: bytes, limit: int) -> None:
        hits = self.index.match(pack(ids) + torn)
        assert sorted(hits) == sorted(self.shares(pack(ids)))
        keys = [(-hit.n_shared, hit.n_tokens) for hit in hits]
        assert keys == sorted(keys)  # one that ends exactly there is the shortest that shares as much
        assert self.index.match(pack(ids) + torn, limit) == hits[: max(limit, 0)]

    @invariant()
    def same_content(self) -> None:
        self.index.check()
        assert set(self.index.holders()) == set(self.oracle)
        assert len(self.index) == len(self.oracle)
        assert all(self.index.tokens(holder) == tokens for holder, tokens in self.oracle.items())
        prefixes = {tokens[:n] for tokens in self.oracle.values() for n in range(4, len(tokens) + 1, 4)}
        assert self.index.n_tokens == len(prefixes)


TestAgainstOneByOne = AgainstOneByOne.TestCase
TestAgainstOneByOne.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)


@given(st.lists(IDS, min_size=1, max_size=40), st.randoms())
@settings(max_examples=60, deadline=None)
def test_the_order_of_changes_does_not_matter(sequences: list[list[int]], rng: random.Random) -> None:
    """Whatever came and went, the same holders of the same sequences are found with the same shares."""
    straight, detour = PrefixIndex[int](), PrefixIndex[int]()
    for holder, ids in enumerate(sequences):
        straight.insert(holder, pack(ids))
    for holder in rng.sample(range(len(sequences)), len(sequences)):
        detour.insert(holder, pack(rng.choice(sequences)))
        detour.insert(holder, pack(sequences[holder]))
    for ids in sequences:
        assert sorted(straight.match(pack(ids))) == sorted(detour.match(pack(ids)))
    assert straight.n_tokens == detour.n_tokens


@given(st.lists(st.tuples(st.integers(0, 9), st.none() | IDS), max_size=40), st.lists(IDS, max_size=5))
@settings(max_examples=200, deadline=None)
def test_an_index_is_built_from_its_branches(
    changes: list[tuple[int, list[int] | None]], queries: list[list[int]]
) -> None:
    """It is the same tree, and goes on like the first; only sequences of the same length may change their order."""
    index = PrefixIndex[int]()
    for holder, ids in changes:
        if ids is None:
            index.drop(holder)
        else:
            index.insert(holder, pack(ids))
    built = PrefixIndex.of_branches(index.branches())
    assert list(built.branches()) == list(index.branches())
    for _ in range(2):
        built.check()
        assert sorted(built.branches()) == sorted(index.branches())
        assert built.n_tokens == index.n_tokens
        assert all(sorted(built.match(pack(ids))) == sorted(index.match(pack(ids))) for ids in queries)
        for each in (index, built):
            for holder, ids in enumerate(queries):
                each.insert(holder, pack(ids))


def test_an_index_takes_the_place_of_another() -> None:
    """Nothing of what it had is left, and it goes on like any index."""
    index, other = index_of(both=[1, 2, 3], mine=[1, 2, 9]), index_of(both=[1, 2, 3], its=[1, 5], more=[])
    index.become(other)
    index.check()
    assert list(index.branches()) == list(index_of(both=[1, 2, 3], its=[1, 5], more=[]).branches())
    index.insert("late", pack([1, 5, 9]))
    index.check()
    assert index.match(pack([1, 5]), 2) == [Shared("its", 2, 2), Shared("late", 2, 3)]


@given(
    st.lists(
        st.tuples(st.integers(-1, 4), st.integers(0, 9), st.lists(st.sampled_from("abc"), max_size=2)),
        max_size=5,
    )
)
@settings(max_examples=500, deadline=None)
def test_branches_of_no_index_are_refused(drawn: list[tuple[int, int, list[str]]]) -> None:
    """Or they are an index's, whose invariants hold."""
    branches = [
        Branch(n_above, pack([7, 8, 9])[:n_bytes], tuple(holders)) for n_above, n_bytes, holders in drawn
    ]
    try:
        index = PrefixIndex.of_branches(branches)
    except ValueError:
        return
    index.check()
    assert list(index.branches()) == (branches or [Branch(0, b"", ())])


@pytest.mark.parametrize(
    ("branches", "fault"),
    [
        ([(0, [1], "a")], "not the root"),
        ([(0, [], ""), (1, [1], "a")], "begins or ends"),
        ([(0, [], ""), (0, [1, 2], "a"), (1, [3], "b")], "begins or ends"),
        ([(0, [], ""), (0, [], "a")], "begins or ends"),
        ([(0, [], ""), (0, [1], "a"), (0, [1, 2], "b")], "begin alike"),
        ([(0, [], ""), (0, [1, 2], "a"), (0, [3], "b")], "another order"),
        ([(0, [], ""), (0, [1], ""), (1, [2], "a")], "neither a holder nor a fork"),
        ([(0, [], "a"), (0, [1], "a")], "two places"),
    ],
)
def test_why_branches_are_refused(branches: list[tuple[int, list[int], str]], fault: str) -> None:
    """Each is one that an index cannot have."""
    with pytest.raises(ValueError, match=fault):
        PrefixIndex.of_branches(Branch(n, pack(edge), tuple(holders)) for n, edge, holders in branches)


@pytest.mark.parametrize(
    ("invariant_name", "spoil"),
    [
        ("unique tokens are counted", lambda index: setattr(index, "_n_tokens", 0)),
        ("every holder is found", lambda index: index._ends.pop("b")),
        ("no empty edge", lambda index: setattr(index._ends["c"], "edge", b"")),
        ("edges are whole tokens", lambda index: setattr(index._ends["c"], "edge", b"12345")),
        ("parent links", lambda index: setattr(index._ends["c"], "parent", None)),
        ("children by their first token", lambda index: setattr(index._ends["c"], "edge", pack([5]))),
        ("depths add up", lambda index: setattr(index._ends["c"], "n_tokens", 9)),
        ("a holder or a fork", lambda index: index._ends["a"].holders.clear()),
        ("rank of the first holder", lambda index: setattr(index._ends["c"], "rank", 9 << 48)),
        ("children by rank", lambda index: index._ends["root"].parent.order.reverse()),
        ("order has all children", lambda index: index._ends["a"].children.clear()),
        ("one place for each holder", lambda index: index._ends["a"].holders.update(b=None)),
        ("the root is no edge's end", lambda index: setattr(index._root, "n_tokens", 1)),
    ],
)
def test_check_names_the_broken_invariant(
    invariant_name: str, spoil: Callable[[PrefixIndex[str]], object]
) -> None:
    """Each invariant that ``check`` knows is one that it can miss."""
    index = index_of(root=[9], a=[1, 2], b=[1, 2, 3, 4], c=[8, 8, 8])
    spoil(index)
    with pytest.raises(AssertionError, match=invariant_name):
        index.check()


def test_those_that_share_little_are_left_out() -> None:
    """A thousand begin alike. Those that share most of what they hold are found all the same, and what any of the
    others shares is known.
    """
    index: PrefixIndex[int] = PrefixIndex()
    begin = list(range(8))
    for n in range(1_000):
        index.insert(n, pack([*begin, 100 + n, *range(50)]))
    index.insert(2_000, pack([*begin, 100, *range(40), 7]))
    index.insert(2_001, pack([*begin, 9]))
    query = pack([*begin, 100, *range(45)])
    near, every = index.near(query, 20, 0.85), index.match(query)
    assert near.hits == [hit for hit in every if hit.n_shared >= 20 or hit.n_shared >= 0.85 * hit.n_tokens]
    assert [hit.holder for hit in near.hits] == [0, 2_000, 2_001]
    assert near.n_rest == len(begin)
    assert {holder: near.n_shared(holder) for holder in index.holders()} == {
        hit.holder: hit.n_shared for hit in every
    }
    assert near.n_shared(3_000) == 0
