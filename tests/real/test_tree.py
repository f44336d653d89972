"""Each row once, through llamaslot on the real llama.cpp with its four kinds of memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import models
from tests.support.figures import Figure
from tests.support.growing import grow, place_of
from tests.support.users import words

pytestmark = pytest.mark.real
KINDS: list[Callable[[Path], Path]] = [models.dense, models.swa, models.recurrent, models.hybrid]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_conversation_is_on_disk_once(
    kind: Callable[[Path], Path], tmp_path: Path, figure: Figure
) -> None:
    """Each turn adds its own rows; edited, it goes on from there; the answers are those of an empty slot."""
    async with place_of(kind, tmp_path, context=4096) as place:
        growth, messages = await grow(place, 5, 400)
        figure(growth)
        kept = growth.whole + growth.stored.state_bytes
        assert growth.stored.n_bytes <= 1.1 * kept + 50_000
        assert growth.added <= (1.1 * kept + 50_000 if not growth.stored.state_bytes else growth.saved / 2)
        edited = [*messages[:5], {"role": "user", "content": words(place.rng, 60)}]
        reply = await place.ask(edited)
        figure(f"edited at {reply.n_prompt - 90}: {reply.n_reused} reused")
        assert reply.n_reused >= reply.n_prompt - 90 - 512
        assert await place.n_other_answers(3) == 0
        assert (await place.stored(place.stack.server.save_dir)).n_snapshots >= 1
