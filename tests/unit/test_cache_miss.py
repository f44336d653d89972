"""Whether two prompts that part are the same conversation with a difference in it, and what is lost by that."""

from __future__ import annotations

import random

import pytest

from bench.virtual import VirtualLoop
from llamaslot.backend import cache_miss
from llamaslot.backend.cache_miss import LOST_MIN, Parting, alike, parting
from llamaslot.cache.ids import pack
from llamaslot.cache.namespaces import Namespace
from llamaslot.scheduling.request import Request
from llamaslot.store import WithTokens
from tests.support.house import House
from tests.support.stub import StubServer


def some(seed: int, n: int) -> list[int]:
    return random.Random(seed).choices(range(50_000), k=n)


HEAD, SYSTEM, MINE, YOURS = some(1, 20), some(2, 3000), some(3, 5000), some(4, 5000)


def of(ids: list[int], other: list[int], n_best: int = 0, n_system: int = 0) -> Parting | None:
    return parting(pack(ids), pack(other), n_best, n_system)


def test_a_moving_header_is_found() -> None:
    """The same conversation, a turn later: all that stands behind the header is lost."""
    before, now = [*HEAD, 7, 8, *SYSTEM, *MINE], [*HEAD, 9, *SYSTEM, *MINE, *some(5, 100)]
    assert of(now, before) == Parting(20, 8022, 8000)


def test_what_another_holder_has_is_not_lost() -> None:
    """Another conversation has today's date: only what is behind its part was computed again."""
    before, now = [*HEAD, 7, *SYSTEM, *MINE], [*HEAD, 9, *SYSTEM, *MINE]
    assert of(now, before, n_best=3021) == Parting(20, 8021, 5000)
    assert of(now, before, n_best=7500) is None


def test_a_new_conversation_with_a_moved_header_has_lost_the_system_part() -> None:
    """Nothing behind that is alike, and need not be."""
    before, now = [*HEAD, 7, *SYSTEM, *MINE], [*HEAD, 9, *SYSTEM, *YOURS]
    assert of(now, before, n_system=3021) == Parting(20, 8021, 3000)


@pytest.mark.parametrize("n_system", [0, 3020])
def test_conversations_that_only_begin_alike_have_lost_nothing(n_system: int) -> None:
    """Not even where both have read the same file."""
    file = some(6, 2000)
    assert of([*HEAD, *SYSTEM, *YOURS], [*HEAD, *SYSTEM, *MINE], 3020, n_system) is None
    assert of([*HEAD, *SYSTEM, *YOURS, *file], [*HEAD, *SYSTEM, *MINE, *file], 3020, n_system) is None


def test_an_old_message_that_is_left_out_is_found() -> None:
    """What comes behind it moves forward."""
    old = some(7, 1500)
    assert of([*SYSTEM, *MINE], [*SYSTEM, *old, *MINE], 3000, 2990) == Parting(3000, 9500, 5000)


def test_tools_in_another_order_are_found() -> None:
    """Each of them stands there, somewhere."""
    tools = [some(n, 400) for n in range(10, 20)]
    before = [*HEAD, *(i for tool in tools for i in tool), *YOURS]
    now = [*HEAD, *(i for tool in (*tools[5:], *tools[:5]) for i in tool), *MINE]
    found = of(now, before, n_system=4020)
    assert found is not None
    assert (found.at, found.n_lost) == (20, 4000)


def test_many_small_differences_are_looked_past() -> None:
    """A stamp in each message: all of them were sent before."""
    before = [i for n in range(100) for i in (60_000 + n, *MINE[n * 50 : n * 50 + 50])]
    now = [i for n in range(100) for i in (70_000 + n, *MINE[n * 50 : n * 50 + 50])]
    assert of(now, before) == Parting(0, 5100, 5000)


@pytest.mark.parametrize("n", [LOST_MIN - 1, LOST_MIN])
def test_little_is_not_worth_a_word(n: int) -> None:
    """Less than a second of most machines."""
    assert (of([*HEAD, 7, *MINE[:n]], [*HEAD, 9, *MINE[:n]]) is None) == (n < LOST_MIN)


def test_pieces_lie_between_whole_tokens() -> None:
    """The bytes of one sequence may stand across the tokens of another."""
    ids = [0x01020304] * 40
    shifted = [0x04010203] * 200
    assert alike(pack([5, *ids]), pack([6, *shifted]), 0) == []


def test_pieces_are_really_there() -> None:
    """Each stands in the other behind the common part; they do not overlap, and come in their order."""
    rng = random.Random(8)
    blocks = [some(n, rng.randrange(10, 200)) for n in range(30, 50)]
    for _ in range(50):
        one, two = ([i for block in rng.sample(blocks, 15) for i in block] for _ in range(2))
        packed = pack(two)
        runs = alike(pack(one), packed, 0)
        assert all(pack(one[begin:end]) in packed for begin, end in runs)
        flat = [at for run in runs for at in run]
        assert flat == sorted(flat)


def test_many_newer_contexts_of_others_do_not_hide_ones_own() -> None:
    """The turn before shares nothing when its header has moved: it is found among the last of its own space."""
    house = House(VirtualLoop(), StubServer(1))
    table, mine = house.leases.table, Namespace("key:anna")
    assert table is not None

    def snapshot(id_: str, ids: list[int], namespace: Namespace) -> WithTokens:
        return WithTokens.of(
            pack(ids), id=id_, fingerprint="model", created_at=0.0, source="test", checkpoints=(), size_bytes=1,
            namespace=namespace.text,
        )  # fmt: skip

    tokens = [7, *some(2, LOST_MIN)]
    table.add_snapshot(snapshot("mine", tokens, mine))
    for i in range(cache_miss._N_SNAPSHOTS):
        table.add_snapshot(snapshot(f"of bert {i}", [8, i, *YOURS[:LOST_MIN]], Namespace("key:bert")))

    async def found() -> list[cache_miss.Holder]:
        with await house.dispatcher.lease(Request("next", pack([9, *tokens[1:]]), namespace=mine)) as lease:
            return await cache_miss.holders(lease, [])

    assert [holder.name for holder in house.loop.run_until_complete(found())] == ["snapshot mine"]
    house.close()
