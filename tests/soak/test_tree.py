"""Each row once, in full size: what conversations weigh on disk, and what a restore reads."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from llamaslot.backend.health import Health
from tests.support import models
from tests.support.figures import Figure
from tests.support.fleet import backend_of, real_fleet
from tests.support.growing import Messages, grow, place_of
from tests.support.inprocess import CHAT
from tests.support.jobs import ids
from tests.support.users import rendered, words

pytestmark = [pytest.mark.soak, pytest.mark.real, pytest.mark.timeout(3600)]
KINDS: list[Callable[[Path], Path]] = [models.dense, models.swa, models.recurrent, models.hybrid]


@pytest.mark.parametrize("kind", KINDS)
async def test_twenty_turns_of_a_thousand_tokens(
    kind: Callable[[Path], Path], tmp_path: Path, figure: Figure
) -> None:
    """On disk once; edited on disk only it is reused up to there, on other kinds to the state before."""
    async with place_of(kind, tmp_path, context=22_000, seed=11) as place:
        growth, messages = await grow(place, 20, 1000)
        figure(growth)
        kept = growth.whole + growth.stored.state_bytes
        assert growth.stored.n_bytes <= 1.05 * kept + 100_000
        assert growth.added <= (1.1 * kept if not growth.stored.state_bytes else growth.saved / 1.5)
        for part in (0.3, 0.6, 0.9):
            at = int(len(messages) * part) // 2 * 2
            edited = [*messages[:at], {"role": "user", "content": words(place.rng, 60)}]
            n_common = len(ids(rendered(messages[:at]))) - len(ids(rendered([])))
            before = await place.figure("snapshot_restored_bytes_total")
            reply = await place.ask(edited)
            read = await place.figure("snapshot_restored_bytes_total") - before
            figure(
                f"edited at {part:.0%}: {reply.n_reused} of {n_common} common tokens reused, {read:.0f} bytes read"
            )
            assert reply.n_reused >= n_common - (8 if not growth.stored.state_bytes else 512)
            await place.forget()
        n_other = await place.n_other_answers(10)
        figure(f"{n_other} of 10 answers are not those of an empty slot")
        assert n_other == 0


@pytest.mark.parametrize("kind", KINDS[1:3])
async def test_after_long_answers_no_state_is_written_in_vain(
    kind: Callable[[Path], Path], tmp_path: Path, figure: Figure
) -> None:
    """The state at the end of an answer of 600 tokens stays. After one of 16 it goes at the next turn: the end of the
    prompt is as good. Without the headers, which weigh more than a tiny recurrent model's states.
    """
    async with place_of(kind, tmp_path, context=22_000, seed=14) as place:
        growth, _ = await grow(place, 20, 1000, 600)
        headers = 4 * growth.n_tokens * 21 / 2
        kept = growth.whole + growth.stored.state_bytes
        figure(f"{growth}; without headers {(growth.added - headers) / kept:.3f}")
        assert growth.added - headers <= 1.1 * kept


@pytest.mark.parametrize("kind", KINDS)
async def test_twenty_conversations_on_one_system_prompt(
    kind: Callable[[Path], Path], tmp_path: Path, figure: Figure
) -> None:
    """Its rows are on disk once; a new one finds them after a restart of everything, and reads no more than them."""
    async with place_of(kind, tmp_path, context=12_000, seed=12) as place:
        system = {"role": "system", "content": words(place.rng, 10_000)}
        for _ in range(20):
            await place.ask([system, {"role": "user", "content": words(place.rng, 300)}])
        await place.forget()
        stored = await place.stored(place.stack.server.save_dir)
        layout = await place.layout(300)
        per_token = layout.shape.bytes_per_token + 16
        distinct = (10_000 + 20 * 330) * per_token
        figure(
            f"{stored}; {stored.n_bytes / (distinct + stored.state_bytes):.3f} of the distinct rows ({distinct}) and "
            "the kept states"
        )
        await place.stack.llamaslot.stop()
        await place.stack.server.restart()
        await place.stack.llamaslot.start()
        new: Messages = [system, {"role": "user", "content": words(place.rng, 300)}]
        reply = await place.ask(new)
        read = await place.figure("snapshot_restored_bytes_total")
        figure(
            f"a new one: {reply.n_reused} of 10,016 tokens reused, {read:.0f} bytes read = {read / per_token:.0f} rows"
        )
        assert reply.n_reused >= 0.99 * 10_000
        headers = (
            stored.n_snapshots * 10_400 * 4
        )  # the tokens of each: more than a tiny recurrent model's states
        assert stored.n_bytes <= 1.1 * (distinct + stored.state_bytes) + headers + 100_000


@pytest.mark.parametrize("kind", KINDS)
async def test_a_new_conversation_on_a_second_server(
    kind: Callable[[Path], Path], tmp_path: Path, figure: Figure
) -> None:
    """Three others on its system prompt were served by another server, which is gone; none of them ended with it."""
    rng, model = random.Random(13), kind(tmp_path)
    system = {"role": "system", "content": words(rng, 10_000)}

    def begin() -> dict[str, object]:
        question = {"role": "user", "content": words(rng, 300)}
        return {"messages": [system, question], "max_tokens": 16, "temperature": 0}

    settings = {"store": {"idle_save_s": 0}}
    async with real_fleet(tmp_path, [model] * 2, settings, slots=1, context=12_000) as it:
        await it.servers["gpu1"].stop()
        await it.until(lambda: it.named("gpu1").health is Health.DOWN)
        for _ in range(3):
            answer = await it.post(CHAT, begin())
            assert answer.status == 200, answer.raw
            assert backend_of(answer) == "gpu0"
        await it.rest()
        await it.servers["gpu1"].start()
        await it.all_up()
        await it.servers["gpu0"].kill()
        before = await it.n_computed()
        new = await it.post(CHAT, begin())
        assert new.status == 200, new.raw
        assert backend_of(new) == "gpu1"
        n_prompt = new.timings["cache_n"] + new.timings["prompt_n"]
        n_reused = n_prompt - (await it.n_computed() - before)
        figure(f"{n_reused:.0f} of 10,016 tokens reused")
        assert n_reused >= 0.99 * 10_000
