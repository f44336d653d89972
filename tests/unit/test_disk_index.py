"""A generation of the prefix index: against the radix tree that it was made from, and the traps of marisa."""

from __future__ import annotations

import random
from collections.abc import Callable

import marisa_trie  # type: ignore[import-not-found]  # compiled, without stubs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaslot.cache import disk_index
from llamaslot.cache.disk_index import CHUNK, DiskIndex, freeze, is_freezable
from llamaslot.cache.ids import common, count, pack
from llamaslot.cache.prefix_index import PrefixIndex, Shared

# Forks everywhere, and around the ends of chunks; ids that are special as characters or bytes.
ODD = [0, 1, 0xD7FF, 0xD800, 0xDBFF, 0xDC00, 0xDFFF, 0xE000, 0xFEFF, 0xFFFE, 0x10FFFF]
IDS = st.one_of(
    st.lists(st.integers(0, 1), max_size=8),
    st.lists(st.sampled_from(ODD), max_size=6),
    st.builds(
        lambda n, tail: [1] * n + tail,
        st.one_of(
            st.integers(0, 5), st.integers(CHUNK - 3, CHUNK + 3), st.integers(2 * CHUNK - 3, 5 * CHUNK)
        ),
        st.lists(st.integers(0, 2), max_size=3),
    ),
)


def generation(**sequences: list[int]) -> DiskIndex:
    index: PrefixIndex[str] = PrefixIndex()
    for holder, ids in sequences.items():
        index.insert(holder, pack(ids))
    made = freeze(index)
    made.check()
    return made


def shares(held: dict[str, bytes], query: bytes) -> list[Shared[str]]:
    return [Shared(name, n, count(tokens)) for name, tokens in held.items() if (n := common(query, tokens))]


@given(st.lists(IDS, max_size=20), st.lists(IDS, min_size=1, max_size=8), st.data())
@settings(max_examples=30, deadline=None)
def test_answers_as_a_search_one_by_one(
    held: list[list[int]], queries: list[list[int]], data: st.DataObject
) -> None:
    """Every question, before and after drops, also with a torn token or media behind the prompt."""
    oracle = {f"s{i}": pack(ids) for i, ids in enumerate(held)}
    index: PrefixIndex[str] = PrefixIndex()
    for name, tokens in oracle.items():
        index.insert(name, tokens)
    base = freeze(index)
    for drops in (set[str](), data.draw(st.sets(st.sampled_from(sorted(oracle) or ["none"])))):
        for name in drops:
            base.drop(name)
            oracle.pop(name, None)
        base.check()
        assert dict(base.sequences()) == oracle == {name: base.tokens(name) for name in base.holders()}
        assert all(base.n_tokens(name) == count(tokens) for name, tokens in oracle.items())
        tail = data.draw(st.sampled_from([b"", b"\x01", b"\x01\x00\x00", pack([-1]), pack([0x110000, 1])]))
        limit = data.draw(st.integers(-1, 25))
        exclude = data.draw(st.sets(st.sampled_from(sorted(oracle) or ["none"])))
        for ids in (*queries, *held):
            query, expected = pack(ids) + tail, shares(oracle, pack(ids) + tail[: len(tail) // 4 * 4])
            hits = base.match(query)
            assert sorted(hits) == sorted(expected)
            keys = [(-hit.n_shared, hit.n_tokens) for hit in hits]
            assert keys == sorted(keys)
            assert base.match(query, limit) == hits[: max(limit, 0)]
            left = [hit for hit in expected if hit.holder not in exclude]
            assert base.cover(query, exclude) == max((hit.n_shared for hit in left), default=0)
            full = max((hit.n_shared for hit in left if hit.n_shared == hit.n_tokens), default=None)
            found = base.longest_full_prefix(query, exclude)
            assert (found and found.n_shared) == full
            assert found is None or found in left


def test_long_sequences_that_fork_late() -> None:
    """A trunk of 20,000 tokens and hundreds of branches: exact shares, the shortest of equals first."""
    rng = random.Random(1)
    trunk = [rng.randrange(131_072) for _ in range(20_000)]
    index: PrefixIndex[str] = PrefixIndex()
    held = {}
    for i in range(300):
        tail = [rng.randrange(131_072) for _ in range(rng.randrange(400))]
        held[f"s{i}"] = pack(trunk[: rng.randrange(20_000)] + tail)
        index.insert(f"s{i}", held[f"s{i}"])
    base = freeze(index)
    base.check()
    for tokens in held.values():
        query = tokens[: rng.randrange(len(tokens) + 1) // 4 * 4] + pack(trunk)
        assert base.cover(query) == index.cover(query) == max(hit.n_shared for hit in shares(held, query))
        keys = [(hit.n_shared, hit.n_tokens) for hit in base.match(query, 20)]
        assert keys == [(hit.n_shared, hit.n_tokens) for hit in index.match(query, 20)]


# -- the traps of marisa and of UTF-8 --


def test_a_sibling_with_the_same_lead_bytes_does_not_answer() -> None:
    """Ids whose characters begin with the same bytes: a probe that ended inside one would go astray."""
    base = generation(a=[7, 0x800, 1], b=[7, 0x801, 2], c=[7, 0x10000, 3], d=[7, 0x10001, 4])
    assert base.match(pack([7, 0x801, 9]), 1) == [Shared("b", 2, 3)]
    assert base.match(pack([7, 0x10001, 9]), 1) == [Shared("d", 2, 3)]
    assert {hit.n_shared for hit in base.match(pack([7, 0x802, 9]))} == {1}


@pytest.mark.parametrize("id_", ODD)
def test_every_id_is_a_token_like_any_other(id_: int) -> None:
    """NUL, surrogates, the byte order marks and the last one: stored, told apart and given back."""
    base = generation(a=[id_] * 130, b=[5, id_], c=[5, id_, id_])
    assert base.tokens("a") == pack([id_] * 130)
    assert base.match(pack([5, id_, 6])) == [Shared("b", 2, 2), Shared("c", 2, 3)]
    assert base.cover(pack([id_] * 129 + [9])) == 129


def test_surrogates_side_by_side_stay_two_tokens() -> None:
    """0xD83D 0xDE00 is one character in UTF-16 and two tokens here, unlike 0x1F600."""
    base = generation(pair=[0xD83D, 0xDE00], one=[0x1F600])
    assert base.match(pack([0xD83D, 0xDE00])) == [Shared("pair", 2, 2)]
    assert base.match(pack([0x1F600])) == [Shared("one", 1, 1)]


def test_sequences_end_at_the_first_id_that_is_none() -> None:
    """Media is -1: what comes before it is compared, and a sequence with it is not frozen."""
    assert is_freezable(pack([0, 0x10FFFF]))
    assert not is_freezable(pack([1, -1]))
    assert not is_freezable(pack([0x110000]))
    with pytest.raises(ValueError, match="codec can't decode"):
        generation(a=[1, -1, 2])
    long = [3] * CHUNK
    base = generation(a=[1, 2, 3], b=long * 3, c=[4] * (CHUNK - 2))
    assert base.cover(pack([1, 2, -1, 3])) == 2
    assert base.cover(pack([*long, 3, -1, *long])) == CHUNK + 1
    # What is left of a whole chunk must not be taken for the shorter one that ends there.
    assert base.cover(pack([4] * (CHUNK - 2) + [-1, 1])) == CHUNK - 2


def test_the_same_chunk_in_another_place_is_another_key() -> None:
    """A key has the hash of all that comes before it: equal chunks behind different beginnings are not mixed up."""
    same = [9] * CHUNK
    base = generation(a=[1] * CHUNK + same, b=[2] * CHUNK + same, c=same)
    assert base.match(pack([1] * CHUNK + same)) == [Shared("a", 2 * CHUNK, 2 * CHUNK)]
    assert base.match(pack([3] * CHUNK + same)) == []
    assert base.match(pack(same + same)) == [Shared("c", CHUNK, CHUNK)]


def test_a_collision_of_hashes_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two beginnings with the same hash and the same chunk behind them cannot be told apart: no generation."""

    class Same:
        def copy(self) -> Same:
            return self

        def update(self, _: bytes) -> None: ...

        def digest(self) -> bytes:
            return b"12345678"

    monkeypatch.setattr(disk_index, "xxh3_64", Same)
    with pytest.raises(ValueError, match="same hash"):
        generation(a=[1] * CHUNK + [5], b=[2] * CHUNK + [5])


def test_few_probes_however_long_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of 60,000 tokens takes at most 19 questions for whole chunks and 8 inside the last one."""

    class Counting:
        n_get = n_iter = 0

        def __init__(self, trie: marisa_trie.BinaryTrie) -> None:
            self.trie = trie

        def get(self, *args: object) -> object:
            self.n_get += 1
            return self.trie.get(*args)

        def iteritems(self, prefix: bytes) -> object:
            self.n_iter += 1
            return self.trie.iteritems(prefix)

    rng = random.Random(2)
    ids = [rng.randrange(131_072) for _ in range(60_000)]
    base = generation(a=ids)
    for n in (0, 1, 127, 128, 5_000, 59_999, 60_000):
        counting = Counting(base.trie)
        monkeypatch.setattr(base, "trie", counting)
        assert base.cover(pack([*ids[:n], 131_072, *ids[n + 1 :]])) == n
        assert counting.n_get <= 19
        assert counting.n_iter <= 8


def test_a_limit_visits_no_more_than_it_needs() -> None:
    """One match among 5,000 that share a system prompt looks at the way to the shortest, not at all of them."""

    class Counting(list[int]):
        n_read = 0

        def __getitem__(self, at):  # type: ignore[no-untyped-def]
            self.n_read += 1
            return super().__getitem__(at)

    rng = random.Random(3)
    sequences = {f"s{i}": [1, 2, 3, 10 + i] + [4] * rng.randrange(40) for i in range(5_000)}
    base = generation(**sequences)
    counting = Counting(base._shortest)
    base._shortest = counting  # type: ignore[assignment]
    hits = base.match(pack([1, 2, 3, 9]), 10)
    assert counting.n_read < 500
    assert [hit.n_tokens for hit in hits] == sorted(map(len, sequences.values()))[:10]


def test_an_empty_generation_answers() -> None:
    """Nothing, and one that has no tokens."""
    assert generation().match(pack([1])) == []
    base = generation(empty=[])
    assert base.match(pack([1])) == []
    assert base.tokens("empty") == b""
    assert base.longest_full_prefix(pack([1])) is None


def test_dropping_is_idempotent_and_unknown_holders_are_key_errors() -> None:
    """As in the radix tree."""
    base = generation(a=[1, 2])
    for holder in ("a", "a", "never there"):
        base.drop(holder)
        base.check()
    assert (len(base), base.gone, "a" in base) == (0, {"a"}, False)
    with pytest.raises(KeyError):
        base.tokens("a")


def spoiled(column: str, at: int, value: int) -> Callable[[DiskIndex], None]:
    def spoil(base: DiskIndex) -> None:
        getattr(base.columns, column)[at] = value

    return spoil


@pytest.mark.parametrize(
    ("invariant_name", "spoil"),
    [
        ("a row for each key", lambda base: base.columns.point.pop()),
        ("a point for each entry", lambda base: base.columns.end.pop()),
        ("dropped or there", lambda base: base.gone.add("a")),
        ("each entry is dropped or there", lambda base: base._entries.pop("a")),
        ("a point hangs on one before it", spoiled("above", 1, 1)),
        ("lengths grow", spoiled("n_tokens", 1, 0)),
        ("entries below a point", spoiled("past", 1, 99)),
        ("an entry is below its point", spoiled("end", 0, 3)),
        ("the length of an entry", lambda base: base._shortest.__setitem__(base._n_leaves, 9)),
        ("minima of minima", lambda base: base._shortest.__setitem__(1, 1)),
        ("what is not read again", lambda base: setattr(base, "tokens", lambda holder: b"")),
        (
            "a sequence is found",
            lambda base: spoiled("before", base.columns.key[3], base.columns.key[1])(base),
        ),
        ("a sequence ends at its point", lambda base: spoiled("key", 2, base.columns.key[1])(base)),
    ],
)
def test_check_names_the_broken_invariant(invariant_name: str, spoil: Callable[[DiskIndex], object]) -> None:
    """Each invariant that ``check`` knows is one that it can miss."""
    base = generation(a=[1, 2], b=[1, 2, 3, 4], c=[8] * 200)
    spoil(base)
    with pytest.raises(AssertionError, match=invariant_name):
        base.check()
