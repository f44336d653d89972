"""Token sequences as bytes."""

from __future__ import annotations

from itertools import takewhile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llamaslot.cache.ids import Finder, common, count, head, pack, unpack

INT32 = st.integers(-(2**31), 2**31 - 1)
# Few differences in long sequences, on every side of the chunk of 64 tokens that `common` compares at once.
LONG = st.builds(
    lambda n, changes: [changes.get(i, i % 7) for i in range(n)],
    st.integers(0, 700),
    st.dictionaries(st.integers(0, 700), st.integers(0, 2**24), max_size=2),
)


def naive(a: list[int], b: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def test_packs_as_little_endian_int32() -> None:
    """Four bytes per token, the lowest first, as in the header of a slot file."""
    assert pack([1, 256, -1]) == bytes([1, 0, 0, 0, 0, 1, 0, 0, 255, 255, 255, 255])


@settings(deadline=None)  # the machine may be busy
@given(st.lists(INT32, max_size=50))
def test_unpack_undoes_pack(ids: list[int]) -> None:
    """What was packed comes back, and counts as many tokens as it had."""
    assert unpack(pack(ids)) == ids
    assert count(pack(ids)) == len(ids)


@pytest.mark.parametrize("ids", [[2**31], [-(2**31) - 1], ["a"], [1.5], [None]])
def test_pack_refuses_what_is_no_token(ids: list[int]) -> None:
    """A number too large for an int32 or another type is a ValueError, for a client may have sent it."""
    with pytest.raises(ValueError, match="not a list of token ids"):
        pack(ids)


def test_unpack_refuses_half_a_token() -> None:
    """Bytes that do not end on a whole token are a ValueError."""
    with pytest.raises(ValueError, match="not whole tokens"):
        unpack(b"12345")


NEAR = st.sampled_from([0, 1, 2, 256, 257, 258, 2**24, 2**24 + 1, -1, 7])  # they share bytes at some places


@settings(deadline=None)  # the machine may be busy
@given(st.lists(INT32 | NEAR, max_size=80), st.sets(INT32 | NEAR, max_size=6))
@example([1, 256, 257, 0], {1, 256})
def test_finds_what_a_loop_finds(ids: list[int], wanted: set[int]) -> None:
    """``Finder`` finds the wanted ids, also among others with the same bytes at the same places."""
    assert Finder(wanted).find(pack(ids)) == [i for i, each in enumerate(ids) if each in wanted]


def test_head_is_the_first_tokens() -> None:
    """``head`` cuts after whole tokens and takes any count."""
    tokens = pack([1, 2, 3])
    assert [unpack(head(tokens, n)) for n in (-1, 0, 2, 3, 9)] == [[], [], [1, 2], [1, 2, 3], [1, 2, 3]]


@settings(deadline=None)  # the machine may be busy
@given(LONG, LONG, st.lists(INT32, max_size=3))
@example([1], [1 + 2**24], [])
@example([0] * 64, [0] * 63 + [2**31 - 1], [])
def test_common_is_the_longest_common_prefix(a: list[int], b: list[int], before: list[int]) -> None:
    """It equals the count made token by token, from the start and from a later token."""
    assert common(pack(a), pack(b)) == naive(a, b)
    assert common(pack(before + a), pack(b), len(before)) == naive(a, b)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 191, 192, 193, 5000])
def test_common_finds_a_difference_at_every_place(length: int) -> None:
    """A single different token is found wherever it stands, whichever of its bytes differs."""
    same = list(range(length))
    for place in {0, length // 2, length - 1} | set(range(min(length, 200))):
        for bit in (0, 9, 17, 30):
            other = [*same[:place], same[place] ^ (1 << bit), *same[place + 1 :]]
            assert common(pack(same), pack(other)) == place


def test_common_counts_whole_tokens() -> None:
    """Tokens that share their first bytes have nothing in common; nor has a torn one."""
    assert common(pack([1, 0x01020304]), pack([1, 0x05020304])) == 1
    assert common(pack([1, 2])[:-1], pack([1, 2])) == 1
    assert common(pack([1]), pack([1]), 5) == 0
