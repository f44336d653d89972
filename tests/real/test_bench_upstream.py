"""The benchmark's stand-in for llama-server: what it answers has the shape of the real one's answers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from bench.proxy.targets import Target
from tests.support import models
from tests.support.real import RealServer

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]

CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "some words " * 8}], "max_tokens": 3, "temperature": 0, "id_slot": 1
}  # fmt: skip
NATIVE = {"prompt": list(range(40, 90)), "n_predict": 0, "id_slot": 1, "cache_prompt": True}
USAGE = {"stream_options": {"include_usage": True}}
PROGRESS = {"stream": True, "return_progress": True}
ASSEMBLED = (
    USAGE | PROGRESS | {"timings_per_token": True, "echo": True}
)  # what llamaslot asks for instead of JSON

#: What is asked, in this order: method, path, body.
QUESTIONS: dict[str, tuple[str, str, Any]] = {
    "health": ("GET", "/health", None),
    "props": ("GET", "/props", None),
    "models": ("GET", "/v1/models", None),
    "lora": ("GET", "/lora-adapters", None),
    "slots, empty": ("GET", "/slots", None),
    "template": ("POST", "/apply-template", CHAT),
    "tokens": ("POST", "/tokenize", {"content": "<|im_start|>user\nhi", "add_special": True, "parse_special": True}),
    "chat": ("POST", "/v1/chat/completions", CHAT),
    "chat, streamed": ("POST", "/v1/chat/completions", CHAT | {"stream": True}),
    "chat, with usage": ("POST", "/v1/chat/completions", CHAT | USAGE | {"stream": True}),
    "chat, with progress": ("POST", "/v1/chat/completions", CHAT | PROGRESS),
    "chat, to be assembled": ("POST", "/v1/chat/completions", CHAT | ASSEMBLED),
    "prefill": ("POST", "/completion", NATIVE | PROGRESS),
    "prefill, whole": ("POST", "/completion", NATIVE),
    "likely tokens": ("POST", "/completion", NATIVE | {"n_predict": 1, "n_probs": 2, "cache_prompt": False}),
    "slots": ("GET", "/slots", None),
    "save": ("POST", "/slots/1?action=save", {"filename": "saved"}),
    "erase": ("POST", "/slots/1?action=erase", {}),
    "restore": ("POST", "/slots/1?action=restore", {"filename": "saved"}),
    "restore what is not there": ("POST", "/slots/1?action=restore", {"filename": "nothing"}),
    "unknown": ("GET", "/nothing", None),
}  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def answers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, tuple[Any, Any]]]:
    """Of the real one and of the stand-in, to every question."""
    tmp = tmp_path_factory.mktemp("upstream")
    stand_in = Target("direct", tmp / "bench", n_slots=2)
    (tmp / "bench").mkdir()
    async with RealServer(models.dense(tmp), tmp / "real", slots=2, context=1024) as real:
        try:
            stand_in.start()
            urls = real.url, f"http://127.0.0.1:{stand_in.port}"
            asked = [
                {name: await ask(url, *question) for name, question in QUESTIONS.items()} for url in urls
            ]
        finally:
            stand_in.stop()
    yield {name: (asked[0][name], asked[1][name]) for name in QUESTIONS}


async def ask(url: str, method: str, path: str, body: Any) -> tuple[int, str, Any]:
    """Status, framing, and the JSON, or a list of it for a stream."""
    async with aiohttp.request(method, url + path, json=body) as answer:
        framing, raw = answer.headers.get("Transfer-Encoding", "length"), await answer.read()
        if not answer.headers["Content-Type"].startswith("text/event-stream"):
            return answer.status, framing, json.loads(raw)
        events = [part.removeprefix(b"data: ") for part in raw.split(b"\n\n") if part.strip()]
        return (
            answer.status,
            framing,
            [json.loads(part) if part != b"[DONE]" else "[DONE]" for part in events],
        )


def missing(real: Any, mine: Any, where: str = "") -> list[str]:
    """Where the stand-in says what the real one does not, or in another form. What it leaves out is its own business:
    llamaslot in front of it would fail."""
    if isinstance(mine, dict) and isinstance(real, dict):
        strange = [f"{where}/{name}" for name in mine.keys() - real.keys()]
        return strange + [
            line
            for key in mine.keys() & real.keys()
            for line in missing(real[key], mine[key], f"{where}/{key}")
        ]
    if isinstance(mine, list) and isinstance(real, list):
        if bool(mine) != bool(real):
            return [f"{where}: {len(mine)} instead of {len(real)}"]
        return [line for a, b in zip(real, mine, strict=False) for line in missing(a, b, f"{where}[]")]
    kinds = [
        float if isinstance(value, int) and not isinstance(value, bool) else type(value)
        for value in (real, mine)
    ]
    return [] if kinds[0] is kinds[1] else [f"{where}: {mine!r} instead of {real!r}"]


@pytest.mark.parametrize("name", QUESTIONS)
async def test_answers_in_the_shape_of_the_real_one(answers: dict[str, tuple[Any, Any]], name: str) -> None:
    """Status, framing, names and types; of a stream also the order of what its events carry."""
    (status, framing, real), (its_status, its_framing, mine) = answers[name]
    assert (its_status, its_framing) == (status, framing)
    assert missing(real, mine) == []
    if isinstance(mine, list) and "data" not in name and framing == "chunked":
        assert kinds(mine) == kinds(real)


def kinds(events: list[Any]) -> list[str]:
    """What each event is, those of the same kind once."""
    found = list[str]()
    for event in events:
        kind = event if isinstance(event, str) else _kind(event)
        if kind not in found[-1:]:
            found.append(kind)
    return found


def _kind(event: dict[str, Any]) -> str:
    choice = (event.get("choices") or [{}])[0]
    delta = choice.get("delta") or {}
    parts = {"progress": event.get("prompt_progress"), "role": delta.get("role"), "text": delta.get("content"),
             "end": choice.get("finish_reason") or event.get("stop"), "usage": event.get("usage"),
             "timings": event.get("timings")}  # fmt: skip
    return " ".join(name for name, value in parts.items() if value)
