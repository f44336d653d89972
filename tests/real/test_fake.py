"""The fake llama-server against the real one: the same requests, and what comes back must agree.

Everything is compared as it is, numbers of tokens and words of errors included, but for what differs from run to run
(``VOLATILE``: there only the type counts) and a few dictionaries whose contents do not matter here (``OPAQUE``).
"""

from __future__ import annotations

import difflib
import json
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support import models
from tests.support.fake import FakeServer
from tests.support.fake_model import SPECIALS
from tests.support.real import RealServer

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]

CONTEXT = 4096
Both = Callable[[Callable[["Client"], Awaitable[Any]]], Awaitable[None]]

OPAQUE = {
    "generation_settings",
    "params",
    "top_logprobs",
    "modalities",
    "ui_settings",
    "chat_template_caps",
    "meta",
}
VOLATILE = {
    *(
        "id",
        "created",
        "created_at",
        "completed_at",
        "model",
        "content",
        "text",
        "tokens",
        "delta",
        "token",
        "bytes",
    ),
    *("logprob", "prompt_ms", "prompt_per_token_ms", "prompt_per_second", "time_ms", "save_ms", "restore_ms"),
    *(
        "predicted_ms",
        "predicted_per_token_ms",
        "predicted_per_second",
        "id_task",
        "item_id",
        "n_written",
        "n_read",
    ),
}


def normal(value: Any, key: str = "") -> Any:
    """``value`` with everything volatile replaced by the name of its type."""
    if key in OPAQUE:
        return type(value).__name__
    if isinstance(value, dict):
        return {name: normal(item, name) for name, item in sorted(value.items())}
    if isinstance(value, list):
        return [normal(item) for item in value] if key not in ("tokens", "bytes") else f"{len(value)} {key}"
    if key in VOLATILE and value is not None:
        return "number" if isinstance(value, int | float) else type(value).__name__
    return value


@dataclass
class Client:
    """One of the two servers, asked raw."""

    url: str
    save_dir: Path

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Status, content type and what came: a list of events (name, data) for a stream, else JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
        async with aiohttp.request(method, self.url + path, data=data) as answer:
            raw = await answer.read()
        kind = answer.headers.get("Content-Type", "")
        if kind == "text/event-stream":
            return answer.status, kind, events(raw)
        return answer.status, kind, normal(json.loads(raw)) if "json" in kind else raw.decode()

    async def post(self, path: str, body: Any) -> Any:
        return await self.ask("POST", path, body)

    async def json(self, path: str, body: Any) -> Any:
        async with aiohttp.request("POST", self.url + path, json=body) as answer:
            return await answer.json()

    async def prefill(self, slot: int, ids: list[int], **more: Any) -> Any:
        body = {"prompt": ids, "n_predict": 0, "id_slot": slot, "cache_prompt": True, **more}
        return (await self.json("/completion", body))["timings"]["cache_n"]

    async def held(self) -> list[int | None]:
        """n_prompt_tokens of each slot, as GET /slots tells."""
        async with aiohttp.request("GET", self.url + "/slots") as answer:
            return [slot.get("n_prompt_tokens") for slot in await answer.json()]


def events(raw: bytes) -> list[Any]:
    found = []
    for block in raw.decode().split("\n\n"):
        lines = [line.split(": ", 1) for line in block.splitlines()]
        named = dict(line for line in lines if len(line) == 2)
        if "data" in named:
            data = named["data"]
            found.append((named.get("event"), data if data == "[DONE]" else normal(json.loads(data))))
    return found


def text(seed: int, n: int) -> list[int]:
    """``n`` printable tokens, others for each seed."""
    return [0x21 + (seed * 31 + i * i * 7 + i) % 90 for i in range(n)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def servers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[list[Client]]:
    room = tmp_path_factory.mktemp("fake")
    model = models.dense(room)
    async with (
        FakeServer(room / "kv-fake", context=CONTEXT, batch=512, ubatch=512) as fake,
        RealServer(model, room / "kv-real", context=CONTEXT, batch=512, ubatch=512) as real,
    ):
        yield [Client(fake.url, room / "kv-fake"), Client(real.url, room / "kv-real")]


@pytest.fixture
def both(servers: list[Client]) -> Both:
    return compare(servers)


def compare(clients: list[Client]) -> Both:
    """Runs a scenario against the fake and the real server, from empty slots, and compares what it returns."""

    async def run(scenario: Callable[[Client], Awaitable[Any]]) -> None:
        told = []
        for client in clients:
            for slot in range(4):
                await client.post(f"/slots/{slot}?action=erase", {})
            told.append(json.dumps(await scenario(client), indent=1).splitlines())
        difference = list(difflib.unified_diff(told[1], told[0], "real", "fake", lineterm="", n=3))
        assert not difference, "\n".join(difference)

    return run


CHAT = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
PREFILL = {"prompt": text(1, 1300), "n_predict": 0, "id_slot": 1, "cache_prompt": True}
REQUESTS: dict[str, tuple[str, Any]] = {
    "completion": ("/completion", {"prompt": text(1, 50), "n_predict": 3, "id_slot": 1}),
    "completion stream": (
        "/completion",
        {"prompt": text(1, 50), "n_predict": 3, "id_slot": 1, "stream": True},
    ),
    "completions alias": ("/completions", {"prompt": text(1, 50), "n_predict": 3, "id_slot": 1}),
    "prefill": ("/completion", PREFILL),
    "prefill with progress": ("/completion", {**PREFILL, "stream": True, "return_progress": True}),
    "progress without stream": ("/completion", {**PREFILL, "return_progress": True}),
    "timings per token": (
        "/completion",
        {**PREFILL, "n_predict": 3, "stream": True, "timings_per_token": True},
    ),
    "probabilities": ("/completion", {"prompt": text(1, 50), "n_predict": 1, "n_probs": 8, "temperature": 0}),
    "return tokens": ("/completion", {"prompt": text(1, 50), "n_predict": 3, "return_tokens": True}),
    "mixed prompt": ("/completion", {"prompt": [65, "bc<|im_end|>", 66], "n_predict": 2, "id_slot": 1}),
    "array": ("/completion", {"prompt": ["One", "Three"], "n_predict": 2, "id_slot": 2}),
    "array stream": (
        "/v1/completions",
        {"prompt": ["One", "Three"], "max_tokens": 2, "id_slot": 2, "stream": True},
    ),
    "array stream progress": (
        "/completion",
        {"prompt": ["One", "Three"], "n_predict": 2, "id_slot": 2, "stream": True, "return_progress": True},
    ),
    "text": ("/v1/completions", {"prompt": "Hello", "max_tokens": 3, "id_slot": 1}),
    "text stream": ("/v1/completions", {"prompt": "Hello", "max_tokens": 3, "id_slot": 1, "stream": True}),
    "text progress": (
        "/v1/completions",
        {"prompt": "Hello", "max_tokens": 3, "id_slot": 1, "stream": True, "return_progress": True},
    ),
    "text n": ("/v1/completions", {"prompt": "Hello", "max_tokens": 3, "id_slot": 1, "n": 2}),
    "chat": ("/v1/chat/completions", {**CHAT, "max_tokens": 3, "id_slot": 1}),
    "chat max_completion_tokens": ("/chat/completions", {**CHAT, "max_completion_tokens": 0, "id_slot": 1}),
    "chat wrapped slot": ("/v1/chat/completions", {**CHAT, "max_tokens": 1, "id_slot": 6}),
    "chat stream": ("/v1/chat/completions", {**CHAT, "max_tokens": 3, "id_slot": 1, "stream": True}),
    "chat usage": (
        "/v1/chat/completions",
        {**CHAT, "max_tokens": 3, "id_slot": 1, "stream": True, "stream_options": {"include_usage": True}},
    ),
    "chat progress": (
        "/v1/chat/completions",
        {
            **CHAT,
            "max_tokens": 3,
            "id_slot": 1,
            "stream": True,
            "return_progress": True,
            "timings_per_token": True,
        },
    ),
    "chat n": ("/v1/chat/completions", {**CHAT, "max_tokens": 3, "id_slot": 1, "n": 2}),
    "messages": ("/v1/messages", {"messages": CHAT["messages"][1:], "max_tokens": 3}),
    "messages stream": ("/v1/messages", {"messages": CHAT["messages"][1:], "max_tokens": 3, "stream": True}),
    "responses": ("/v1/responses", {"input": "Hello!", "max_output_tokens": 3}),
    "responses stream": ("/v1/responses", {"input": "Hello!", "max_output_tokens": 3, "stream": True}),
    "too long": ("/completion", {"prompt": text(1, CONTEXT), "n_predict": 1, "id_slot": 1}),
    "too long stream": (
        "/completion",
        {"prompt": text(1, CONTEXT), "n_predict": 1, "id_slot": 1, "stream": True},
    ),
    "context runs full": ("/completion", {"prompt": text(1, CONTEXT - 2), "n_predict": 5, "id_slot": 1}),
    "context just fits": ("/completion", {"prompt": text(1, CONTEXT - 1), "n_predict": 0, "id_slot": 1}),
    "empty prompt": ("/completion", {"prompt": "", "n_predict": 2, "id_slot": 1}),
    "empty list": ("/completion", {"prompt": [], "n_predict": 2}),
    "list of no ids": ("/completion", {"prompt": [[]], "n_predict": 2, "id_slot": 1}),
    "samplers of a wrong type": ("/completion", {"prompt": [[]], "samplers": [0]}),
    "prompt of a wrong type": ("/completion", {"prompt": {"a": 1}}),
    "no prompt": ("/completion", {"n_predict": 2}),
    "invalid token": ("/completion", {"prompt": [models.N_VOCAB], "n_predict": 2}),
    "n too large": ("/v1/chat/completions", {**CHAT, "n": 5}),
    "n is no number": ("/v1/chat/completions", {**CHAT, "n": "2"}),
    "stream is no boolean": ("/v1/chat/completions", {**CHAT, "stream": "yes"}),
    "n_predict too small": ("/completion", {"prompt": "x", "n_predict": -2}),
    "no messages": ("/v1/chat/completions", {}),
    "messages is a string": ("/v1/chat/completions", {"messages": "hi"}),
    "no content": ("/v1/chat/completions", {"messages": [{"role": "user"}]}),
    "no role": ("/v1/chat/completions", {"messages": [{"content": "x"}]}),
    "tokenize": (
        "/tokenize",
        {"content": "<|im_start|>hi é<|im_end|>", "add_special": True, "parse_special": True},
    ),
    "tokenize pieces": ("/tokenize", {"content": "hi", "with_pieces": True}),
    "tokenize nothing": ("/tokenize", {}),
    "tokenize literally": ("/tokenize", {"content": "<|im_start|>", "parse_special": False}),
    "detokenize": ("/detokenize", {"tokens": [256, 104, 105]}),
    "erase": ("/slots/1?action=erase", {}),
    "erase wraps": ("/slots/9?action=erase", {}),
    "unknown action": ("/slots/1?action=boil", {}),
    "unknown slot": ("/slots/x?action=save", {"filename": "x.kv"}),
    "save without name": ("/slots/1?action=save", {}),
    "save outside": ("/slots/1?action=save", {"filename": "../x.kv"}),
    "restore missing": ("/slots/1?action=restore", {"filename": "missing.kv"}),
    "change props": ("/props", {}),
    "embeddings": ("/v1/embeddings", {"input": "x"}),
    "unknown route": ("/nope", {}),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_answers_agree(both: Both, name: str) -> None:
    """Each request is answered alike, twice: on an empty slot and on what the first one left."""
    path, body = REQUESTS[name]

    async def scenario(client: Client) -> Any:
        first = await client.post(path, body)
        return first, await client.post(path, body), await client.held()

    await both(scenario)


TEMPLATES: dict[str, Any] = {
    "user": {"messages": [{"role": "user", "content": "Hi <b> é"}]},
    "system": CHAT,
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
        ]
    },
    "tools": {**CHAT, "tools": TOOLS},
    "no tools": {**CHAT, "tools": TOOLS, "tool_choice": "none"},
    "open answer": {"messages": [*CHAT["messages"], {"role": "assistant", "content": "Well"}]},
    "reasoning": {
        "messages": [
            *CHAT["messages"],
            {"role": "assistant", "content": "Old", "reasoning_content": "dropped"},
            {"role": "user", "content": "More"},
        ]
    },
    "reasoning kept": {
        "chat_template_kwargs": {"keep_reasoning": True},
        "messages": [
            *CHAT["messages"],
            {"role": "assistant", "content": "Old", "reasoning_content": "kept"},
            {"role": "user", "content": "More"},
        ],
    },
    "tool call": {
        "tools": TOOLS,
        "messages": [
            *CHAT["messages"],
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "42"},
            {"role": "tool", "tool_call_id": "2", "content": "43"},
        ],
    },
    "open answer with reasoning": {
        "messages": [*CHAT["messages"], {"role": "assistant", "content": "Well", "reasoning_content": "So"}]
    },
    "rich tool": {
        **CHAT,
        "tools": [
            {
                "type": "function",
                "function": {
                    "strict": True,
                    "description": "é",
                    "name": "g",
                    "parameters": {
                        "type": "object",
                        "properties": {"z": {"type": "string", "enum": ["b", "a"]}},
                    },
                },
            }
        ],
    },
    "no generation prompt": {**CHAT, "add_generation_prompt": False},
    "nothing": {"messages": []},
}


@pytest.mark.parametrize("name", TEMPLATES)
async def test_templates_agree(both: Both, name: str) -> None:
    """Each chat body renders to the same text."""

    async def scenario(client: Client) -> Any:
        return await client.post("/apply-template", TEMPLATES[name])

    await both(scenario)


async def test_what_the_server_tells_of_itself_agrees(both: Both) -> None:
    """/props, /v1/models, /slots and /health have the same fields, and the same numbers where it matters."""

    async def scenario(client: Client) -> Any:
        await client.prefill(0, text(1, 40))
        _, _, props = await client.ask("GET", "/props")
        _, _, told = await client.ask("GET", "/v1/models")
        kept = {
            name: props[name] for name in ("total_slots", "endpoint_slots", "endpoint_metrics", "eos_token")
        }
        kept["n_ctx"] = props["default_generation_settings"]["n_ctx"]
        slots = await client.ask("GET", "/slots")
        health = await client.ask("GET", "/health")
        return sorted(props), kept, sorted(told), sorted(told["data"][0]), slots[2][0], health

    await both(scenario)


async def test_counters_agree(both: Both) -> None:
    """/metrics has the counters of the real one, by the same names, and counts prompt tokens alike."""

    async def scenario(client: Client) -> Any:
        async def counters() -> dict[str, float]:
            async with aiohttp.request("GET", client.url + "/metrics") as answer:
                assert answer.headers["Process-Start-Time-Unix"].isdigit()
                lines = (await answer.text()).splitlines()
            pairs = [line.split() for line in lines if line and not line.startswith("#")]
            return {name: float(value) for name, value in pairs}

        before = await counters()
        await client.prefill(0, text(1, 700))
        await client.json("/completion", {"prompt": text(1, 900), "n_predict": 5, "id_slot": 0})
        await client.json("/v1/chat/completions", {**CHAT, "n": 2, "max_tokens": 4})
        after = await counters()
        names = (
            "prompt_tokens_total",
            "prompt_tokens_cached_total",
            "tokens_predicted_total",
            "requests_deferred",
        )
        return [after[f"llamacpp:{name}"] - before[f"llamacpp:{name}"] for name in names]

    await both(scenario)


async def test_reuse_agrees(both: Both) -> None:
    """The longest common prefix is reused, at least one token computed, and cache_prompt false throws it away."""

    async def scenario(client: Client) -> Any:
        base = text(1, 800)
        told = [
            await client.prefill(0, base),
            await client.prefill(0, base),
            await client.prefill(0, base[:500]),
        ]
        told += [await client.prefill(0, [*base[:300], *text(2, 90)]), await client.prefill(0, text(3, 10))]
        told.append(await client.prefill(0, text(3, 10), cache_prompt=False))
        return told, await client.held()

    await both(scenario)


async def test_unpinned_choice_agrees(both: Both) -> None:
    """Without id_slot: the idle slot with the longest common prefix over a tenth, else the least recently used."""

    async def scenario(client: Client) -> Any:
        landed = []
        for slot in (2, 0, 3, 1):
            await client.prefill(slot, text(slot, 400))
        for ids in (text(2, 410), text(9, 30), [*text(0, 39), *text(8, 361)], [*text(0, 50), *text(7, 100)]):
            answer = await client.json("/completion", {"prompt": ids, "n_predict": 2})
            landed.append((answer["id_slot"], answer["timings"]["cache_n"]))
        return landed, await client.held()

    await both(scenario)


async def test_several_answers_agree(both: Both) -> None:
    """n > 1 takes the lowest idle slots and clears them at the end; the pinned slot keeps its conversation."""

    async def scenario(client: Client) -> Any:
        for slot in range(4):
            await client.prefill(slot, text(slot, 100))
        await client.json("/v1/chat/completions", {**CHAT, "n": 3, "max_tokens": 4, "id_slot": 3})
        return await client.held()

    await both(scenario)


async def test_more_prompts_than_slots_agree(both: Both) -> None:
    """An unpinned array longer than the number of slots is worked off, each prompt once."""

    async def scenario(client: Client) -> Any:
        body = {"prompt": [text(i, 60 + i) for i in range(6)], "n_predict": 2}
        answers = await client.json("/completion", body)
        return [(answer["index"], answer["tokens_evaluated"]) for answer in answers]

    await both(scenario)


async def test_slot_files_agree(both: Both) -> None:
    """Save, erase and restore tell the same numbers, and the file's header holds the slot's tokens, answer included."""

    async def scenario(client: Client) -> Any:
        prompt = text(1, 200)
        answer = await client.json(
            "/completion", {"prompt": prompt, "n_predict": 4, "id_slot": 0, "return_tokens": True}
        )
        told = [await client.post("/slots/0?action=save", {"filename": "a.kv"})]
        raw = (client.save_dir / "a.kv").read_bytes()
        magic, version, n_words, first, one, n_tokens = struct.unpack_from("<IIIiiI", raw)
        tokens = list(struct.unpack_from(f"<{n_tokens}i", raw, 24))
        assert tokens == [*prompt, *answer["tokens"][:3]]
        told.append(
            (magic, version, n_words, first, one, n_tokens, struct.unpack_from("<I", raw, 24 + 4 * n_tokens))
        )
        n_written = (await client.json("/slots/0?action=save", {"filename": "b.kv"}))["n_written"]
        assert n_written == len(raw)
        told.append(await client.post("/slots/0?action=erase", {}))
        told.append(await client.post("/slots/2?action=restore", {"filename": "a.kv"}))
        told.append(await client.held())
        told.append(await client.prefill(2, [*prompt, 1, 2]))
        told.append(await client.post("/slots/3?action=save", {"filename": "empty.kv"}))
        told.append((client.save_dir / "empty.kv").stat().st_size)
        told.append(await client.post("/slots/3?action=restore", {"filename": "empty.kv"}))
        return told

    await both(scenario)


async def test_bad_slot_files_agree(both: Both) -> None:
    """A truncated, foreign or missing file is one and the same 400, and leaves the slot empty."""

    async def scenario(client: Client) -> Any:
        await client.prefill(0, text(1, 200))
        await client.post("/slots/0?action=save", {"filename": "good.kv"})
        good = (client.save_dir / "good.kv").read_bytes()
        told = []
        for name, data in (
            ("cut.kv", good[: len(good) // 2]),
            ("head.kv", good[:15]),
            ("foreign.kv", b"x" * 5000),
        ):
            (client.save_dir / name).write_bytes(data)
            await client.prefill(1, text(2, 50))
            told.append(await client.post("/slots/1?action=restore", {"filename": name}))
            told.append(await client.held())
        return told

    await both(scenario)


async def test_failed_saves_agree(both: Both) -> None:
    """A full disk, and a name that cannot be written: 500, and the slot keeps what it holds."""

    async def scenario(client: Client) -> Any:
        await client.prefill(0, text(1, 200))
        (client.save_dir / "full.kv").symlink_to("/dev/full")
        (client.save_dir / "folder.kv").mkdir()
        told = [await client.post("/slots/0?action=save", {"filename": n}) for n in ("full.kv", "folder.kv")]
        return told, await client.held()

    await both(scenario)


async def test_tokens_of_a_chat_agree(both: Both) -> None:
    """Template and tokenizer together give exactly the tokens that the completion uses, and that a save writes."""

    async def scenario(client: Client) -> Any:
        prompt = (await client.json("/apply-template", CHAT))["prompt"]
        asked = {"content": prompt, "add_special": True, "parse_special": True}
        ids = (await client.json("/tokenize", asked))["tokens"]
        answer = await client.json("/v1/chat/completions", {**CHAT, "max_tokens": 1, "id_slot": 0})
        assert answer["usage"]["prompt_tokens"] == len(ids)
        await client.post("/slots/0?action=save", {"filename": "chat.kv"})
        raw = (client.save_dir / "chat.kv").read_bytes()
        assert list(struct.unpack_from(f"<{len(ids)}i", raw, 24)) == ids
        return ids

    await both(scenario)


async def test_the_special_tokens_are_those_of_the_generated_model() -> None:
    """The fake's tokenizer has the ids of the generated GGUF."""
    names = {
        "<|im_start|>": models.IM_START,
        "<|im_end|>": models.IM_END,
        "<|endoftext|>": models.END_OF_TEXT,
    }
    assert names == SPECIALS
