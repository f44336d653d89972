"""Several llama-servers that llamaslot starts when a request comes for their model, with the real llama.cpp."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from tests.support import models
from tests.support.figures import Figure
from tests.support.inprocess import letters
from tests.support.leftovers import nothing_left
from tests.support.supervised import CHAT, Supervised, tagged

__all__ = ["nothing_left"]
REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.real

ASKING = (
    *("/health", "/v1/models", "/llamaslot/status", "/llamaslot/metrics", "/llamaslot/journal"),
    *("/props", "/slots", "/metrics", "/props?model=m1", "/slots?model=m2"),
)


ONE = [{"role": "user", "content": letters(1, 300)}]


def serving(directory: Path, *, settings: Any = None, **limits: Any) -> Supervised:
    """Models m1 and m2 with two slots each."""
    backends = [
        {
            "name": f"gpu{seed}",
            "managed": {
                "model": str(models.dense(directory, seed)),
                "slots": 2,
                "context": 16384,
                "args": ["-t", "1", "--alias", f"m{seed}"],
            },
        }
        for seed in (1, 2)
    ]
    return Supervised.serving(directory, backends, managed=limits, **(settings or {}))


async def states(it: Supervised) -> dict[str, str]:
    _, told = await it.get("/v1/models")
    return {model["id"]: model["status"]["value"] for model in told["data"]}


async def test_two_models_share_one_place_and_keep_their_conversations(
    tmp_path: Path, figure: Figure
) -> None:
    """Users of both alternate; each finds its context on disk after its model was unloaded, by the server's count."""
    n_prompt = n_computed = 0

    async def turn(messages: list[dict[str, str]], model: str, *, is_counted: bool) -> None:
        nonlocal n_prompt, n_computed
        answer = await it.chat(messages, model=model)
        if is_counted:
            n_prompt += answer["usage"]["prompt_tokens"]
            n_computed += answer["timings"]["prompt_n"]
        said = answer["choices"][0]["message"]["content"]
        messages += [
            {"role": "assistant", "content": said},
            {"role": "user", "content": letters(len(messages), 40)},
        ]

    async with serving(tmp_path, max_loaded=1) as it:
        assert len(it.offspring) == 0
        talks = {
            (model, user): [{"role": "user", "content": letters(10 * int(model[1]) + user, 6000)}]
            for model in ("m1", "m2")
            for user in (0, 1)
        }
        for i in range(2):
            for model in ("m1", "m2"):
                await asyncio.gather(*(turn(talks[model, user], model, is_counted=i > 0) for user in (0, 1)))
                assert len(it.offspring) == 1
                assert [name for name, state in (await states(it)).items() if state == "loaded"] == [model]
    assert tagged(it.tag) == []
    figure(
        f"{n_computed} of {n_prompt} prompt tokens computed after a swap, reused {1 - n_computed / n_prompt:.4f}"
    )
    assert n_computed <= 0.02 * n_prompt


async def test_the_shipped_configuration_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is, but for the port, the directories and the model: the demo of the README."""
    monkeypatch.setenv("LLAMASLOT_SMOLLM2", str(models.dense(tmp_path)))
    shipped = yaml.safe_load((REPOSITORY / "config.yaml").read_text())
    (backend,) = shipped.pop("backends")
    rest = {key: value for key, value in shipped.items() if key not in ("listen", "store")}
    async with Supervised.serving(tmp_path, [backend], **rest) as it:
        answer = await it.chat(ONE)
        assert answer["usage"]["completion_tokens"] == 8
    assert tagged(it.tag) == []


async def test_without_limits_both_run_from_the_start(tmp_path: Path) -> None:
    """And each serves its own model, at once."""
    async with serving(tmp_path) as it:
        async with asyncio.timeout(30):
            while await states(it) != {"m1": "loaded", "m2": "loaded"}:  # noqa: ASYNC110 - of another process
                await asyncio.sleep(0.05)
        told = await asyncio.gather(*(it.chat(ONE, model=model) for model in ("m1", "m2")))
        assert [answer["model"] for answer in told] == ["m1", "m2"]
        assert len(it.offspring) == 2
    assert tagged(it.tag) == []


async def test_users_of_both_at_once_are_all_served(tmp_path: Path) -> None:
    """Each request waits for its model, whichever is loaded; none fails."""

    async def user(i: int) -> None:
        messages = [{"role": "user", "content": letters(i, 400)}]
        for turn in range(2):
            answer = await it.chat(messages, model=f"m{1 + (i + turn) % 2}")
            assert answer["choices"][0]["message"]["content"]

    async with serving(tmp_path, max_loaded=1) as it:
        await asyncio.gather(*map(user, range(4)))
        assert len(it.offspring) == 1


async def test_a_stream_is_told_that_its_model_is_loading(tmp_path: Path) -> None:
    """At its first loading, and when it comes back."""
    async with serving(tmp_path, max_loaded=1, settings={"stream": {"keepalive_s": 0.05}}) as it:
        for model in ("m1", "m2", "m1"):
            body = {"messages": ONE, "max_tokens": 2, "model": model, "stream": True}
            async with aiohttp.request("POST", it.url + CHAT, json=body) as answer:
                said = await answer.text()
            assert said.startswith(": loading the model\n")
            assert said.endswith("data: [DONE]\n\n")
        _, told = await it.get("/llamaslot/status")
        assert [backend["outage"] for backend in told["backends"]] == [None, None]  # to be loaded is none


async def test_a_model_that_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    """Its requests are answered 503 with how it ended, and another model is served as before."""
    it = serving(tmp_path, max_loaded=1)
    broken = models.dense(tmp_path, 2)
    broken.unlink()
    broken.write_bytes(b"GGUF, but no model")
    async with it:
        ask = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        async with aiohttp.request("POST", it.url + CHAT, json={**ask, "model": "m2"}) as answer:
            assert answer.status == 503
            assert "gpu2: its llama-server ended with exit code 1 while it was loading" in await answer.text()
        await it.chat(ONE, model="m1")
        async with aiohttp.request("POST", it.url + CHAT, json={**ask, "model": "m3"}) as answer:
            assert answer.status == 404
            assert "m1, m2" in await answer.text()


async def test_asking_loads_nothing(tmp_path: Path) -> None:
    """Neither before a model was ever loaded nor after it was unloaded for being idle; the server is healthy."""
    async with serving(tmp_path, max_loaded=2, idle_unload_s=1) as it:
        for name in ("m1", None):
            for path in ASKING:
                status, _ = await it.get(path)
                assert status in (200, 503), path
                assert not it.offspring, path
            assert await states(it) == {"m1": "unloaded", "m2": "unloaded"}
            assert (await it.get("/health"))[0] == 200
            if name is not None:
                long = [{"role": "user", "content": letters(1, 3000)}]  # a short one may not be worth a save
                await it.chat(long, model=name)
                async with asyncio.timeout(20):
                    while it.offspring:  # noqa: ASYNC110 - another process ends it
                        await asyncio.sleep(0.1)
    assert list((tmp_path / "meta" / "kv").glob("ls-*.kv"))
