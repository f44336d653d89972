"""Two real llama-servers of one model behind one address: what must not be shared between requests, what llama-server
computes in a slot of its choice, and media. Each works on any of them as with one."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.real.test_media import BLUE, RED, said, seen
from tests.support import models
from tests.support.answers import Answer
from tests.support.fleet import RealFleet, backend_of, real_fleet
from tests.support.inprocess import CHAT, NATIVE
from tests.support.rounding import LIKELY_NATIVE, is_right
from tests.support.users import words

pytestmark = pytest.mark.real

N = 1500
# Every prompt is long: on a busy machine 1,500 tokens may be sooner computed again than kept.
LONG = {"prefill": {"chunk_threshold_s": 0}, "store": {"idle_save_s": 3600}}


def text(seed: int) -> str:
    return words(random.Random(seed), N)


async def computed(it: RealFleet, path: str, body: dict[str, Any], **headers: str) -> int:
    """Ask once. Returns the prompt tokens that both servers have computed for it."""
    before = await it.n_computed()
    answer = await it.post(path, body, **headers)
    assert answer.status == 200, answer.raw
    return int(await it.n_computed() - before)


@contextlib.asynccontextmanager
async def only(it: RealFleet, name: str) -> AsyncIterator[None]:
    """A context manager in which requests go to one of the two servers; what the other holds is saved."""
    (other,) = {"gpu0", "gpu1"} - {name}
    assert (await it.post(f"/llamaslot/drain?backend={other}", None)).status == 200
    try:
        yield
    finally:
        assert (await it.post(f"/llamaslot/undrain?backend={other}", None)).status == 200


async def test_isolated_users_find_their_own_on_both_and_nothing_of_others(tmp_path: Path) -> None:
    """With one slot on each server, from disk: whichever server has computed and saved it."""
    settings = LONG | {"cache": {"isolation": "per_user"}}
    async with real_fleet(tmp_path, [models.dense(tmp_path)] * 2, settings, slots=1, context=4096) as it:

        async def asks(user: str, question: str) -> int:
            body = {"prompt": text(1) + question, "n_predict": 4, "temperature": 0}
            return await computed(it, NATIVE, body, **{"x-llamaslot-user": user})

        async with only(it, "gpu0"):
            cold = {user: await asks(user, "well?") for user in ("anna", "bert")}
        async with only(it, "gpu1"):
            cold |= {user: await asks(user, "well?") for user in ("carl", "dora")}
            again = {user: await asks(user, "well? and now?") for user in ("anna", "carl")}
        async with only(it, "gpu0"):
            again |= {user: await asks(user, "well? and now?") for user in ("bert", "dora")}
        assert all(n >= N for n in cold.values()), cold
        assert all(n < 0.1 * N for n in again.values()), again


async def test_lora_scales_are_kept_apart_on_both(tmp_path: Path) -> None:
    """Each answer is that of a server that holds nothing; with the same scales it goes on, on the other server too."""
    scales: list[dict[str, Any]] = [{}, {"lora": [{"id": 0, "scale": 0.25}]}, {"lora": []}]
    bodies = [{"prompt": text(1), "n_predict": 12, "temperature": 0, **more} for more in scales]
    extra = ["--lora", str(models.lora(tmp_path))]
    pair = [models.dense(tmp_path)] * 2
    async with real_fleet(tmp_path, pair, LONG, slots=1, context=4096, extra=extra) as it:
        direct = []
        for body in bodies:
            cold = {**body, **LIKELY_NATIVE, "cache_prompt": False}
            direct.append(await it.servers["gpu0"].post(NATIVE, cold))
        async with only(it, "gpu0"):
            for body, right in zip(bodies, direct, strict=True):
                answer = await it.post(NATIVE, body)
                assert is_right(answer.json["content"], right), body.get("lora")
        async with only(it, "gpu1"):
            for body, right in [*zip(bodies, direct, strict=True)] * 2:
                before = await it.n_computed()
                answer = await it.post(NATIVE, body)
                assert is_right(answer.json["content"], right), body.get("lora")
                assert await it.n_computed() - before < 0.1 * N, body.get("lora")


@pytest.mark.parametrize("path", [CHAT, NATIVE, "/v1/messages"])
async def test_images_are_seen_on_both(tmp_path: Path, path: str) -> None:
    """Each answer is the server's own. What a client puts for an image into a plain prompt is told by /props, and is
    random for each llama-server. The text before an image is found on the other server."""
    flags = ("--mmproj", str(models.eyes(tmp_path)))
    pair = [models.dense(tmp_path)] * 2

    def first(marker: str) -> dict[str, Any]:
        """A prompt that begins with the image: no text before it tells a slot."""
        return {"prompt": {"prompt_string": marker + "?", "multimodal_data": [RED]}, "n_predict": 4}

    async with real_fleet(tmp_path, pair, LONG, slots=2, context=4096, extra=flags) as it:
        async with aiohttp.request("GET", it.servers["gpu0"].url + "/props") as props:
            own = (await props.json())["media_marker"]
        told = (await it.get("/props")).json["media_marker"]
        direct = [
            await it.servers["gpu0"].post(
                path, seen(path, own, image) | {"temperature": 0, "cache_prompt": False}
            )
            for image in (RED, BLUE)
        ]
        for name in ("gpu0", "gpu1", "gpu0"):
            async with only(it, name):
                for image, right in zip((RED, BLUE), direct, strict=True):
                    answer = await it.post(path, seen(path, told, image) | {"temperature": 0})
                    assert answer.status == 200, answer.raw
                    assert backend_of(answer) == name
                    assert said(path, answer.json) == said(path, right)
                assert (await it.post(NATIVE, first(told))).status == 200
        assert 'reason="template"' not in str(await it.metrics())


async def test_turns_on_both_cost_no_context(tmp_path: Path) -> None:
    """Four users fill both servers. Then requests come for which llama-server chooses the slot, two at a time."""
    document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}}

    def in_turn(seed: int) -> dict[str, Any]:
        content = [document, {"type": "text", "text": words(random.Random(seed), 300)}]
        return {"messages": [{"role": "user", "content": content}], "max_tokens": 4}

    async with real_fleet(tmp_path, [models.dense(tmp_path)] * 2, LONG, slots=2, context=4096) as it:
        talks = [text(seed) for seed in range(4)]

        async def turns() -> list[Answer]:
            answers = await asyncio.gather(*(it.ask(talk) for talk in talks))
            assert all(answer.status == 200 for answer in answers)
            return answers

        assert {backend_of(answer) for answer in await turns()} == {"gpu0", "gpu1"}
        for number in range(3):
            pair = [it.post("/v1/messages", in_turn(100 + 2 * number + i)) for i in (0, 1)]
            served = await asyncio.gather(*pair)
            assert [answer.status for answer in served] == [200, 200], [answer.raw for answer in served]
        talks = [talk + " and now?" for talk in talks]
        before = await it.n_computed()
        await turns()
        assert await it.n_computed() - before < 0.1 * N * len(talks)
