"""Conversations kept as extents and put together again, on all kinds of memory of the real llama.cpp."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import models
from tests.support.cutting import Chain, Conversation, Cutter
from tests.support.figures import Figure
from tests.support.real import RealServer
from tests.support.users import words

pytestmark = pytest.mark.real
KINDS: list[Callable[[Path], Path]] = [
    models.dense,
    models.swa,
    models.recurrent,
    models.hybrid,
    models.mrope,
]


@pytest.mark.parametrize("kind", KINDS)
async def test_cuts_of_two_conversations_are_reused_and_say_what_a_cold_one_says(
    kind: Callable[[Path], Path], tmp_path: Path, figure: Figure
) -> None:
    """One of three turns, and another that parts from it after the first: each save adds its own tokens only."""
    rng, extents = random.Random(2), tmp_path / "extents"
    extents.mkdir()
    async with RealServer(
        kind(tmp_path.parent / "models"), tmp_path / "landing", slots=3, context=4096
    ) as server:
        system = {"role": "system", "content": words(rng, 700)}
        first = Conversation(server, 1, [system], Chain(extents))
        await first.turn(words(rng, 300))
        other = first.branch(2, 3)
        for _ in range(2):
            await first.turn(words(rng, 300))
            await other.turn(words(rng, 300))
        cutter = Cutter(server, rng)
        cuts = []
        for chain in (first.chain, other.chain):
            cuts += [await cutter.cut(chain, n) for n in rng.sample(chain.stops(), 2)]
            cuts.append(await cutter.cut(chain, chain.stops()[-1]))
    figure([(cut.n_tokens, cut.n_reused) for cut in cuts])
    assert first.chain.n_different == 0
    for cut in cuts:
        assert cut.text == cut.cold_text
        assert cut.n_reused >= cut.n_tokens - 1
