"""Lists of token ids in JSON, read and written in pieces."""

from __future__ import annotations

import random

import orjson
import pytest

from llamaslot.cache.ids import pack
from llamaslot.llama.token_lists import TokenList, packed
from tests.support.turns import with_turns

IDS = [random.Random(1).randrange(150_000) for _ in range(30_000)]


def answer(ids: list[int]) -> bytes:
    return orjson.dumps({"tokens": ids})


@pytest.mark.parametrize("n", [0, 1, 2, 9_000, 9_400, 30_000])
async def test_all_tokens_of_an_answer_are_read(n: int) -> None:
    """Short or long, also where a piece ends with the list."""
    assert await packed(answer(IDS[:n])) == pack(IDS[:n])


@pytest.mark.parametrize("n_last", range(1, 12))
async def test_a_piece_may_end_anywhere(n_last: int) -> None:
    """The last id of a piece has some digits more each time."""
    ids = [10**n_last % 2**31 if i % 5_000 == 0 else 7 for i in range(40_000)]
    assert await packed(answer(ids)) == pack(ids)


async def test_other_tasks_run_between_the_pieces_of_a_long_answer() -> None:
    """Else 60,000 tokens would hold up all streams for 3 ms."""
    _, n_turns = await with_turns(packed(answer(IDS)))
    assert n_turns > 4


@pytest.mark.parametrize(
    "said",
    [
        b'{"ids":[1]}',
        b'{"tokens":[1.5]}',
        b'{"tokens":["a"]}',
        b'{"tokens":[' + b'{"id":1},' * 20_000 + b'{"id":1}]}',
        b'{"tokens":[' + b"1," * 50_000 + b"]}",
    ],
    ids=["no tokens", "no integers", "texts", "objects", "no JSON"],
)
async def test_an_answer_of_another_form_is_refused(said: bytes) -> None:
    """As llamaslot would refuse it if it read all at once."""
    with pytest.raises((KeyError, ValueError, TypeError)):
        await packed(said)


async def test_fields_behind_the_tokens_are_no_tokens() -> None:
    """A long answer with more than its list is read at once."""
    assert await packed(answer(IDS)[:-1] + b',"n":30000}') == pack(IDS)


async def test_a_longer_part_is_written_behind_the_last() -> None:
    """So is the same part again; a shorter or another one is written anew."""
    tokens = TokenList()
    for n in (0, 1, 256, 5_000, 5_000, 30_000, 700, 800):
        assert orjson.loads(await tokens.written(pack(IDS[:n]))) == IDS[:n]
    assert orjson.loads(await tokens.written(pack(IDS[5:900]))) == IDS[5:900]


async def test_other_tasks_run_between_the_pieces_of_a_long_list() -> None:
    """Else the first part of 60,000 tokens would hold up all streams and first tokens for 3 ms or more."""
    written, n_turns = await with_turns(TokenList().written(pack(IDS)))
    assert orjson.loads(written) == IDS
    assert n_turns > 4


async def test_what_was_written_is_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt in six parts, most would be written six times."""
    sizes, real = list[int](), orjson.dumps

    def dumps(ids: list[int]) -> bytes:
        sizes.append(len(ids))
        return real(ids)

    monkeypatch.setattr(orjson, "dumps", dumps)
    tokens = TokenList()
    for n in (10_000, 20_000, 30_000):
        await tokens.written(pack(IDS[:n]))
    assert sum(sizes) == 30_000
