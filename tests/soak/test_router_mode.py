"""llama-server's router mode, the real one: swaps keep every conversation, and asking wakes nothing. A minute."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.fake_router import FakeRouter
from tests.support.figures import Figure
from tests.support.fleet import A, B
from tests.support.inprocess import letters
from tests.support.real_router import RealRouter
from tests.support.supervised import CHAT, Supervised

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

Messages = list[dict[str, str]]
ASKING = (
    *("/health", "/v1/models", "/llamaslot/status", "/llamaslot/metrics", "/llamaslot/journal"),
    *(
        "/metrics",
        "/slots",
        "/props",
        "/metrics?model=m1",
        "/slots?model=m1",
        "/props?model=m2",
        "/lora-adapters",
    ),
)


@contextlib.asynccontextmanager
async def behind(router: RealRouter, directory: Path, **settings: Any) -> AsyncIterator[Supervised]:
    """llamaslot in front of it."""
    backends = [{"name": "box", "url": router.url, "slot_save_path": str(router.save_dir)}]
    async with Supervised.serving(directory, backends, **settings) as it:
        async with asyncio.timeout(30):
            while len((await it.get("/v1/models"))[1]["data"]) < 2:  # noqa: ASYNC110 - of another process
                await asyncio.sleep(0.05)
        yield it


async def swapped(url: str, rounds: int = 3) -> tuple[int, int]:
    """Two users of each of two models take turns. Returns the tokens of all follow-ups, and those computed."""
    n_prompt = n_computed = 0
    talks: dict[tuple[str, int], Messages] = {
        (model, user): [{"role": "user", "content": letters(10 * int(model[1]) + user, 5000)}]
        for model in ("m1", "m2")
        for user in (0, 1)
    }
    for i in range(rounds):
        for (model, _), messages in talks.items():
            body = {"model": model, "messages": messages, "max_tokens": 8, "temperature": 0}
            async with aiohttp.request("POST", url + CHAT, json=body) as answer:
                assert answer.status == 200, await answer.text()
                told = await answer.json()
            if i:
                n_prompt += told["usage"]["prompt_tokens"]
                n_computed += told["timings"]["prompt_n"]
            said = told["choices"][0]["message"]["content"]
            messages += [
                {"role": "assistant", "content": said},
                {"role": "user", "content": letters(i, 40)},
            ]
    return n_prompt, n_computed


async def test_follow_ups_find_their_contexts_after_a_swap(tmp_path: Path, figure: Figure) -> None:
    """Out of the files; llama-server alone computes everything again. No idle save is due."""
    async with RealRouter(tmp_path) as router:
        alone = await swapped(router.url, 2)
        async with behind(
            router, tmp_path, store={"idle_save_s": 3600, "meta_dir": str(tmp_path / "meta")}
        ) as it:
            n_prompt, n_computed = await swapped(it.url)
        assert "Traceback" not in it.output
        assert it.output.count("has unloaded this model") >= 5
    figure(
        f"{n_computed} of {n_prompt} prompt tokens computed after swaps, reused {1 - n_computed / n_prompt:.4f};"
        f" llama-server alone {1 - alone[1] / alone[0]:.4f}"
    )
    assert n_computed <= 0.02 * n_prompt
    assert alone[1] >= 0.9 * alone[0]


async def test_asking_wakes_nothing(tmp_path: Path, figure: Figure) -> None:
    """Neither a model that is not loaded nor one that sleeps after two seconds, however often it is asked."""
    async with RealRouter(tmp_path, max_models=2, extra=("--sleep-idle-seconds", "2")) as router:
        async with behind(router, tmp_path) as it:
            await it.chat([{"role": "user", "content": letters(1, 600)}], model="m1")
            await router.until(m1="sleeping", m2="unloaded")
            saved = list(router.save_dir.glob("ls-*.kv"))
            assert len(saved) == 1, "saved before it fell asleep"
            n_asked = 0
            async with asyncio.timeout(60):
                for _ in range(60):
                    for path in ASKING:
                        status, told = await it.get(path)
                        assert status in (200, 503), (path, told)
                        n_asked += 1
                    await asyncio.sleep(0.2)
            assert await router.states() == {"m1": "sleeping", "m2": "unloaded"}
            messages = [{"role": "user", "content": letters(1, 600)}]
            told = await it.chat([*messages, {"role": "assistant", "content": "x"}, *messages], model="m1")
            assert told["timings"]["cache_n"] >= 600
        spawned = router.log.count("spawning server instance with name")
        figure(f"{n_asked} questions within 12 s and a sleep of 2 s: {spawned} model loaded, by its request")
        assert spawned == 1


async def test_swaps_by_others_are_followed(tmp_path: Path) -> None:
    """And the router's end and return."""
    async with (
        RealRouter(tmp_path) as router,
        behind(router, tmp_path, store={"idle_save_s": 0.1, "meta_dir": str(tmp_path / "meta")}) as it,
    ):
        messages = [{"role": "user", "content": letters(2, 3000)}]

        async def follow_up() -> int:
            told = await it.chat([*messages, {"role": "assistant", "content": "x"}, *messages], model="m1")
            return int(told["timings"]["cache_n"])

        await it.chat(messages, model="m1")
        await saved(router, 1)
        status, told = await router.post(CHAT, {"model": "m2", "messages": messages, "max_tokens": 1})
        assert status == 200, told
        assert await follow_up() >= 3000
        await router.stop()
        await router.start()
        async with asyncio.timeout(30):
            while (await it.get("/health"))[0] != 200:  # noqa: ASYNC110 - of another process
                await asyncio.sleep(0.05)
        assert await follow_up() >= 3000


async def saved(router: RealRouter, n: int) -> None:
    async with asyncio.timeout(30):
        while len(list(router.save_dir.glob("ls-*.kv"))) < n:  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.05)


async def test_the_fake_has_its_shape(tmp_path: Path) -> None:
    """The same questions to both, in the same states of their models."""

    async def shape(get: Callable[[str], Awaitable[tuple[int, Any]]], path: str) -> Any:
        status, told = await get(path)
        if status != 200:
            return status, told["error"]["message"]
        if path.startswith("/props?"):
            return status, told["is_sleeping"], "total_slots" in told, bool(told["media_marker"])
        if path.startswith("/props"):
            return status, told["role"], told["max_instances"], "total_slots" in told
        if path.startswith("/slots"):
            return status, len(told), {"id", "is_processing", "n_ctx"} <= told[0].keys()
        if path == "/models":
            first = told["data"][0]
            return (
                status,
                first["status"]["value"],
                {"id", "aliases", "status"} <= first.keys(),
                first.get("meta"),
            )
        return status

    async with RealRouter(tmp_path) as real, FakeRouter(tmp_path / "f", {"m1": A, "m2": B}, slots=2) as fake:

        async def fake_get(path: str) -> tuple[int, Any]:
            async with aiohttp.request("GET", fake.url + path) as answer:
                return answer.status, await answer.json(content_type=None)

        async def both(path: str) -> tuple[Any, Any]:
            return await shape(real.get, path), await shape(fake_get, path)

        for path in (
            *(
                "/health",
                "/props",
                "/models",
                "/slots?model=m1&autoload=false",
                "/slots",
                "/slots?model=none",
            ),
            *(
                "/props?model=m1&autoload=true",
                "/slots?model=m1&autoload=false",
                "/props?model=m1&autoload=false",
            ),
        ):
            of_real, of_fake = await both(path)
            assert of_real == of_fake, path
        for url in (real.url, fake.url):
            async with aiohttp.request("GET", url + "/models/sse") as events:
                for step, state in (("/models/unload", "unloaded"), ("/slots/0?action=erase", None)):
                    async with aiohttp.request("POST", url + step, json={"model": "m1"}) as answer:
                        assert answer.status == 200
                    if state is not None:
                        event = await events.content.readuntil(b"\n\n")
                        while f'"{state}"'.encode() not in event:
                            event = await events.content.readuntil(b"\n\n")
                        assert event.startswith(b"data: {")
        (of_real, of_fake) = await both("/models")
        assert of_real[1] == of_fake[1] == "loaded"
        assert of_real[3].keys() >= {"n_vocab", "n_embd", "n_params", "size"} <= of_fake[3].keys()
