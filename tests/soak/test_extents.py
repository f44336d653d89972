"""Two hundred random cuts and splices of conversations, restored by the real llama.cpp and held against cold runs."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import models
from tests.support.cutting import Chain, Conversation, Cut, Cutter
from tests.support.figures import Figure
from tests.support.real import RealServer
from tests.support.users import words

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
CASES: dict[str, tuple[Callable[[Path], Path], tuple[str, ...], int]] = {
    "dense": (models.dense, (), 50),
    "dense, unified KV": (models.dense, ("--kv-unified",), 25),
    "M-RoPE": (models.mrope, (), 25),
    "window": (models.swa, (), 50),
    "recurrent": (models.recurrent, (), 25),
    "hybrid": (models.hybrid, (), 25),
}


@pytest.mark.parametrize("case", CASES)
async def test_random_cuts(case: str, tmp_path: Path, figure: Figure) -> None:
    """Three conversations that part from each other at random messages, in three slots; then cuts at random tokens.

    Rows are equal from save to save. Each cut is reused to its end (but for one token, with a window), and the answer
    is that of a cold run. Where it is not, the cause is rounding, which depends on the batch: the same prompt, computed
    in two steps by llama-server alone, differs as much.
    """
    kind, flags, n_cuts = CASES[case]
    rng, extents = random.Random(case), tmp_path / "extents"
    extents.mkdir()
    model = kind(tmp_path.parent / "models")
    async with RealServer(model, tmp_path / "landing", slots=5, context=6144, extra=flags) as server:
        first = Conversation(
            server, 2, [{"role": "system", "content": words(rng, rng.randrange(300, 1500))}], Chain(extents)
        )
        conversations = [first]
        for _ in range(3):
            await first.turn(words(rng, rng.randrange(50, 600)), rng.randrange(5, 60))
        conversations += [first.branch(slot, 1 + 2 * rng.randrange(1, 3)) for slot in (3, 4)]
        for _ in range(3):
            for conversation in conversations:
                await conversation.turn(words(rng, rng.randrange(50, 600)), rng.randrange(5, 60))
        cutter, cuts = Cutter(server, rng), list[Cut]()
        for _ in range(n_cuts):
            chain = rng.choice(conversations).chain
            cuts.append(await cutter.cut(chain, rng.choice(chain.stops())))
    others = [cut.rounding for cut in cuts if cut.rounding is not None]
    n_different = [conversation.chain.n_different for conversation in conversations]
    n_short = max(cut.n_tokens - cut.n_reused for cut in cuts)
    figure(
        f"{len(cuts)} cuts, {n_short} token short at most, tokens whose rows differ: {n_different}, "
        f"{len(others)} other texts, "
        f"log-probabilities (cut, two steps) by {[tuple(f'{by:.5f}' for by in other) for other in others]}"
    )
    assert n_different[0] == 0
    assert n_short <= (1 if kind is models.swa else 0)
    assert len(others) <= len(cuts) // 10
    assert all(by_cut <= max(0.05, 3 * by_steps) for by_cut, by_steps in others)
