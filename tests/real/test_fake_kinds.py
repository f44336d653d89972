"""The fake's sliding-window and recurrent models against the real ones: what is reused, and where batches are cut."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.real.test_fake import Both, Client, compare, text
from tests.support import models
from tests.support.fake import FakeServer
from tests.support.real import RealServer

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]

CONTEXT = 8192
KINDS = {"swa": models.swa, "recurrent": models.recurrent}
BASE = text(1, 3000)


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=[("swa", 512), ("recurrent", 512), ("swa", 2048)]
)
async def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Both]:
    kind, batch = request.param
    room = tmp_path_factory.mktemp(kind)
    async with (
        FakeServer(room / "kv-fake", context=CONTEXT, batch=batch, ubatch=512, kind=kind) as fake,
        RealServer(KINDS[kind](room), room / "kv-real", context=CONTEXT, batch=batch, ubatch=512) as real,
    ):
        yield compare([Client(fake.url, room / "kv-fake"), Client(real.url, room / "kv-real")])


def parting(n: int, n_more: int = 9) -> list[int]:
    """``BASE`` up to ``n``, then something else."""
    return [*BASE[:n], *[10] * n_more]


async def fresh(client: Client, n: int, slot: int = 1) -> None:
    await client.json(f"/slots/{slot}?action=erase", {})
    assert await client.prefill(slot, BASE[:n]) == 0


@pytest.mark.parametrize("n", [40, 400, 513, 600, 2000])
async def test_reuse_of_a_live_slot_agrees(both: Both, n: int) -> None:
    """Going on, the same again, from one token less, and parting before the end."""

    async def scenario(client: Client) -> Any:
        told: dict[str, Any] = {}
        await fresh(client, n)
        told["goes on"] = await client.prefill(1, parting(n))
        await fresh(client, n)
        told["again"] = await client.prefill(1, BASE[:n])
        await fresh(client, n - 1)
        told["one less"] = await client.prefill(1, BASE[:n])
        for back in (2, 5, 30, 300):
            await fresh(client, n)
            told[f"{back} before"] = await client.prefill(1, parting(max(0, n - back)))
        return told

    await both(scenario)


async def test_going_far_back_agrees(both: Both) -> None:
    """Around the end of what is kept live, and of the checkpoints."""

    async def scenario(client: Client) -> Any:
        told: dict[str, Any] = {}
        for back in (511, 512, 517, 1100):
            await fresh(client, 2500)
            told[str(back)] = await client.prefill(1, parting(2500 - back))
        for n in (1000, 1700):
            await client.prefill(1, BASE[:n])
        await client.prefill(1, BASE[:2600])
        told["between chunks"] = await client.prefill(1, parting(1650))
        return told

    await both(scenario)


@pytest.mark.parametrize("n", [40, 600, 3000])
async def test_reuse_of_a_restored_slot_agrees(both: Both, n: int) -> None:
    """Files carry the checkpoints; of the sliding window only what the last token needs."""

    async def scenario(client: Client) -> Any:
        told: dict[str, Any] = {}
        await fresh(client, n)
        await client.json("/slots/1?action=save", {"filename": "s.kv"})
        for back in (0, 1, 5, 20, 600):
            await client.json("/slots/2?action=erase", {})
            await client.json("/slots/2?action=restore", {"filename": "s.kv"})
            part = max(0, n - back)
            told[f"{back} before"] = await client.prefill(2, parting(part))
            told[f"{back} before, then on"] = await client.prefill(2, [*parting(part), 11, 12])
        return told

    await both(scenario)


async def test_cuts_of_a_prefill_agree(both: Both) -> None:
    """The progress events show where batches were cut for checkpoints."""

    async def scenario(client: Client) -> Any:
        body = {"prompt": BASE[:2900], "n_predict": 0, "id_slot": 0, "stream": True, "return_progress": True}
        return await client.post("/completion", body)

    await both(scenario)


async def test_checkpoints_of_a_chat_agree(both: Both) -> None:
    """The chat route makes checkpoints before each user message; another text there goes back to it."""

    async def scenario(client: Client) -> Any:
        told = []
        words = ["S" * 800, "u" * 900, "a" * 700, "v" * 900]
        for change in (None, None, 3, 2, 1, 0):
            if change is not None:
                words[change] = "z" * (500 + change)
            roles = ("system", "user", "assistant", "user")
            messages = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
            body = {"messages": messages, "id_slot": 0, "max_tokens": 1}
            told.append((await client.json("/v1/chat/completions", body))["timings"]["cache_n"])
        return told

    await both(scenario)
