"""What must not be shared, on the real server: users who are isolated, and LoRA scales. Counted by llama-server."""

from __future__ import annotations

import random
from itertools import combinations
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support import models
from tests.support.figures import Figure
from tests.support.real import RealServer
from tests.support.rounding import LIKELY_NATIVE, is_right
from tests.support.stack import Stack
from tests.support.users import words

pytestmark = pytest.mark.real

N = 3000  # tokens of what the users have in common
# Every prompt is long: on a busy machine 1,500 tokens may be sooner computed again than kept; on an idle one of a
# recurrent model they are computed too soon for a stop at a checkpoint.
PER_USER = {
    "cache": {"isolation": "per_user"},
    "store": {"idle_save_s": 3600},
    "prefill": {"chunk_threshold_s": 0},
}


class Desk:
    """Asks as one user or another, and reads off the server how many prompt tokens it has computed for that."""

    def __init__(self, stack: Stack, session: aiohttp.ClientSession) -> None:
        self.stack, self.session = stack, session

    async def ask(self, user: str, body: dict[str, Any], path: str = "/v1/chat/completions") -> int:
        before = await self._computed()
        headers = {"x-llamaslot-user": user}
        async with self.session.post(self.stack.url + path, json=body, headers=headers) as response:
            text = await response.text()
            assert response.status == 200, text
        return await self._computed() - before

    async def _computed(self) -> int:
        return int((await self.stack.server.metrics())["llamacpp:prompt_tokens_total"])


def chat(seed: int, question: str = "well?", **more: Any) -> dict[str, Any]:
    system = {"role": "system", "content": words(random.Random(seed), N)}
    return {
        "messages": [system, {"role": "user", "content": question}],
        "max_tokens": 4,
        "temperature": 0,
        **more,
    }


def messages(seed: int, question: str, *more: dict[str, Any]) -> dict[str, Any]:
    content = [{"type": "text", "text": question}, *more]
    system = words(random.Random(seed), N)
    return {"max_tokens": 4, "system": system, "messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize("kind", [models.dense, models.swa, models.recurrent], ids=lambda kind: kind.__name__)
async def test_what_another_user_has_just_sent_is_computed_whole_and_ones_own_is_not(
    tmp_path: Path, kind: Any, figure: Figure
) -> None:
    """Resident and on disk, on all routes: with two slots the third user's request drives the first one's out."""
    found: dict[str, int] = {}
    # So slow a model that to compute 3,000 tokens again costs more than to stop, however busy the machine is.
    model = kind(tmp_path, width=256) if kind is models.recurrent else kind(tmp_path)
    async with (
        Stack(model, tmp_path, slots=2, context=8192, settings=PER_USER) as stack,
        aiohttp.ClientSession() as session,
    ):
        desk = Desk(stack, session)
        found["anna, cold"] = await desk.ask("anna", chat(1))
        found["bert, resident"] = await desk.ask("bert", chat(1))
        found["anna, again"] = await desk.ask("anna", chat(1, "and now?"))
        found["carl, on disk"] = await desk.ask("carl", chat(1))
        found["carl, again"] = await desk.ask("carl", chat(1, "and now?"))
        found["bert, again"] = await desk.ask("bert", chat(1, "and now?"))
        found["anna, from disk"] = await desk.ask("anna", chat(1, "so?"))
        found["dora, messages"] = await desk.ask("dora", messages(2, "well?"), "/v1/messages")
        found["emil, messages"] = await desk.ask("emil", messages(2, "well?"), "/v1/messages")
        found["emil, unreadable"] = await desk.ask(
            "emil", messages(2, "hm?", {"type": "riddle"}), "/v1/messages"
        )
        found["fred, unreadable"] = await desk.ask(
            "fred", messages(2, "hm?", {"type": "riddle"}), "/v1/messages"
        )
        found["dora, again"] = await desk.ask("dora", messages(2, "and now?"), "/v1/messages")
    figure(f"prompt tokens computed, of {N} in common: {found}")
    whole = (
        "anna, cold",
        "bert, resident",
        "carl, on disk",
        "dora, messages",
        "emil, messages",
        "fred, unreadable",
    )
    for what in whole:
        assert found[what] >= N, what
    for what in ("anna, again", "carl, again", "bert, again", "anna, from disk", "dora, again"):
        assert found[what] < 0.1 * N, what


async def test_answers_with_lora_scales_are_those_of_a_server_that_holds_nothing(tmp_path: Path) -> None:
    """Whatever was computed before in the slots, and with which scales: long prompts that are computed ahead too."""
    scaled = [{"id": 0, "scale": 0.25}]
    settings = {"prefill": {"chunk_threshold_s": 0.05}}
    texts = [words(random.Random(seed), 1500) for seed in (1, 2)]
    variants: list[dict[str, Any]] = [{}, {"lora": scaled}, {"lora": [{"id": 0, "scale": 0}]}, {"lora": []}]
    bodies = [
        {"prompt": text, "n_predict": 12, "temperature": 0, **more} for text in texts for more in variants
    ]
    extra = ["--lora", str(models.lora(tmp_path))]
    async with (
        Stack(
            models.dense(tmp_path), tmp_path, slots=1, context=8192, settings=settings, extra=extra
        ) as stack,
        aiohttp.ClientSession() as session,
    ):
        direct = {}
        for i, body in enumerate(bodies):
            await stack.server.post("/slots/0?action=erase", {})
            cold = {**body, **LIKELY_NATIVE, "cache_prompt": False}
            direct[i] = await stack.server.post("/completion", cold)
        for one, other in combinations(direct.values(), 2):
            is_same = one["content"] == other["content"]
            assert is_same or not is_right(one["content"], other), "they differ by more than rounding"
        assert len({answer["content"] for answer in direct.values()}) >= 2 * 3, "the scales make a difference"
        for i in random.Random(3).choices(range(len(bodies)), k=20):
            async with session.post(stack.url + "/completion", json=bodies[i]) as response:
                answer = await response.json()
            assert is_right(answer["content"], direct[i]), bodies[i].get("lora")
        async with session.post(stack.url + "/completion", json=bodies[1]) as response:
            await response.read()
        async with session.post(stack.url + "/completion", json=bodies[1]) as response:
            again = await response.json()
        assert again["timings"]["cache_n"] > 1000, "with the same scales it goes on from there"


@pytest.mark.parametrize(
    ("lora", "is_reused"), [({}, True), ({"lora": []}, True), ({"lora": [{"id": 0, "scale": 1}]}, False)]
)
async def test_only_a_request_that_sets_other_scales_empties_a_restored_slot(
    tmp_path: Path, lora: dict[str, Any], is_reused: bool
) -> None:
    """By llama-server itself. So no request without scales needs to know which ones a slot had before its restore."""
    directory = tmp_path / "kv"
    directory.mkdir()
    extra = ["--lora", str(models.lora(tmp_path))]
    async with RealServer(models.dense(tmp_path), directory, slots=1, context=4096, extra=extra) as server:
        wanted, other = (
            {"prompt": words(random.Random(seed), 1000), "n_predict": 1, "id_slot": 0} for seed in (1, 2)
        )
        await server.post("/completion", wanted | lora)
        await server.post("/slots/0?action=save", {"filename": "wanted"})
        await server.post("/completion", other | {"lora": [{"id": 0, "scale": 0.25}]})
        await server.post("/slots/0?action=erase", {})
        await server.post("/slots/0?action=restore", {"filename": "wanted"})
        answer = await server.post("/completion", wanted | lora)
        assert (answer["timings"]["cache_n"] > 900) == is_reused
