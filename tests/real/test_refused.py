"""What llama-server refuses costs nothing: no slot is saved, emptied or computed in, and the answer is its own."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support import models
from tests.support.figures import Figure
from tests.support.real import RealServer
from tests.support.stack import Stack
from tests.support.users import words

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]

CHAT, TEXT, NATIVE, INFILL = "/v1/chat/completions", "/v1/completions", "/completion", "/infill"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
N_SLOTS, N_PROMPT, N_HELD, MOST = 3, 6000, 1500, 64
#: From there on it is computed by llamaslot, as it is for 1 s on larger models.
SETTINGS = {"prefill": {"chunk_threshold_s": 0.1}, "store": {"idle_save_s": 3600}}

BROKEN = "root ::= ("
#: Its grammar is one that llama-server cannot parse: more repetitions than it takes.
WIDE = {"type": "object", "properties": {"a": {"type": "string", "minLength": 5000}}, "required": ["a"]}
NOWHERE = {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}
FORM = {"type": "json_schema", "json_schema": {"schema": WIDE}}

#: The route, and what is wrong.
FAULTS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"temperature": "hot"}),
    (CHAT, {"grammar": BROKEN}),
    (CHAT, {"max_tokens": "many"}),
    (CHAT, {"max_tokens": 2**31}),
    (CHAT, {"seed": "any"}),
    (CHAT, {"stop": [5]}),
    (CHAT, {"n": 0}),
    (CHAT, {"n": 2, "grammar": BROKEN}),
    (CHAT, {"n": N_SLOTS + 1}),
    (CHAT, {"samplers": [1]}),
    (CHAT, {"cache_prompt": "yes"}),
    (CHAT, {"lora": "x"}),
    (CHAT, {"logprobs": "x"}),
    (CHAT, {"top_logprobs": 3}),
    (CHAT, {"tools": "x"}),
    (CHAT, {"tool_choice": "bogus"}),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "parameters": WIDE}}]}),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "parameters": NOWHERE}}]}),
    (CHAT, {"response_format": FORM}),
    (CHAT, {"response_format": {"type": "bogus"}}),
    (CHAT, {"json_schema": {"type": "nope"}}),
    (CHAT, {"reasoning_format": "x"}),
    (TEXT, {"temperature": "hot"}),
    (TEXT, {"grammar": BROKEN}),
    (TEXT, {"logprobs": "x"}),
    (TEXT, {"prompt": [*([65] * N_PROMPT), 99_999]}),
    (NATIVE, {"n_predict": -5}),
    (NATIVE, {"mirostat": "x"}),
    (NATIVE, {"grammar": BROKEN}),
    (NATIVE, {"grammar": 'root ::= "a"', "grammar_lazy": True, "grammar_triggers": []}),
    (NATIVE, {"prompt": [-1, *([66] * N_PROMPT)]}),
    (RESPONSES, {"temperature": "hot"}),
    (RESPONSES, {"max_output_tokens": "many"}),
    (RESPONSES, {"grammar": BROKEN}),
    (RESPONSES, {"tools": [{"type": "function", "name": "f", "parameters": WIDE}]}),
    (RESPONSES, {"tools": [{"type": "function", "parameters": WIDE}]}),
    (MESSAGES, {"temperature": "hot"}),
    (MESSAGES, {"top_k": "x"}),
    (MESSAGES, {"tools": [{"name": "f", "input_schema": WIDE}]}),
    (INFILL, {"temperature": "hot"}),
    (INFILL, {"grammar": BROKEN}),
    (INFILL, {"input_extra": "x"}),
]


def bodies(rng: random.Random) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each with a long prompt that begins like no other; every second one asks for a stream."""
    for number, (path, fault) in enumerate(FAULTS):
        text = words(rng, N_PROMPT)
        good: dict[str, dict[str, Any]] = {
            CHAT: {"messages": [{"role": "user", "content": text}], "max_tokens": 4},
            TEXT: {"prompt": text, "max_tokens": 4},
            NATIVE: {"prompt": text, "n_predict": 4},
            INFILL: {"input_prefix": text, "input_suffix": "end", "n_predict": 4},
            RESPONSES: {"input": text, "max_output_tokens": 4},
            MESSAGES: {"messages": [{"role": "user", "content": text}], "max_tokens": 4},
        }
        yield path, {**good[path], "stream": number % 2 == 1, **fault}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def dense(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """What a test's ``fill`` puts into its slots is all that it knows of them."""
    directory = tmp_path_factory.mktemp("refused")
    async with started(models.infill(directory), directory) as stack:
        yield stack


def started(model: Path, directory: Path) -> Stack:
    return Stack(model, directory, slots=N_SLOTS, context=8192, settings=SETTINGS)


async def n_saves(stack: Stack) -> float:
    return (await stack.own_metrics())["llamaslot_snapshot_saves_total"]


async def post(url: str, path: str, body: dict[str, Any]) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.post(url + path, json=body) as response:
        return response.status, await response.text()


async def fill(stack: Stack, rng: random.Random) -> list[dict[str, Any]]:
    """A conversation in each slot, none of them on disk: what the requests that put it there were."""
    asked = []
    for _ in range(N_SLOTS):
        body = {"prompt": words(rng, N_HELD), "n_predict": 3, "temperature": 0}
        assert (await post(stack.url, NATIVE, body))[0] == 200
        asked.append(body)
    return asked


async def held(server: RealServer) -> list[int]:
    """The tokens in each slot, as llama-server says."""
    return [slot["n_prompt_tokens"] for slot in await server.slots()]


@pytest.mark.parametrize("kind", ["dense", "recurrent"])
async def test_what_is_refused_is_not_computed(
    tmp_path: Path, dense: Stack, figure: Figure, kind: str
) -> None:
    """On all routes, streaming or not: status and text are llama-server's own, and the slots keep what they hold."""
    rng = random.Random(5)
    async with AsyncExitStack() as stacks:
        stack = dense
        if kind == "recurrent":
            stack = await stacks.enter_async_context(started(models.recurrent(tmp_path), tmp_path))
        await post(
            stack.url, INFILL, {"input_prefix": "a", "input_suffix": "b", "n_predict": 1}
        )  # learns its layout
        asked = await fill(stack, rng)
        held_before, own_before = await held(stack.server), await stack.own_metrics()
        worst, wrong, n_bodies = 0.0, [], 0
        for path, body in bodies(rng):
            if path == INFILL and kind != "dense":
                continue
            n_bodies += 1
            direct = await post(stack.server.url, path, body)
            before = await stack.server.metrics()
            ours = await post(stack.url, path, body)
            after = await stack.server.metrics()
            n_computed = after["llamacpp:prompt_tokens_total"] - before["llamacpp:prompt_tokens_total"]
            worst = max(worst, n_computed)
            fault = {
                name: value for name, value in body.items() if name not in ("messages", "prompt", "input")
            }
            if direct[0] < 400 or ours != direct or n_computed > MOST:
                wrong.append(
                    f"{path} {json.dumps(fault)[:200]}: {n_computed} {direct[0]} {direct[1][:200]} {ours}"
                )
        own = await stack.own_metrics()
        assert not wrong, "\n".join(wrong)
        assert await held(stack.server) == held_before
        steps = ["llamaslot_snapshot_saves_total", "llamaslot_snapshot_restores_total"]
        assert [own[step] for step in steps] == [own_before[step] for step in steps]
        for body in asked:
            answer = json.loads(
                (await post(stack.url, NATIVE, {**body, "prompt": body["prompt"] + " more"}))[1]
            )
            assert answer["timings"]["cache_n"] >= N_HELD - 8
        figure(f"{kind}: {n_bodies} bodies that are refused: computed at most {worst:.0f} tokens each")


#: What clients send, and llama-server takes, reads or passes over.
GOOD: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"logprobs": True, "top_logprobs": 2, "logit_bias": {}, "presence_penalty": -1.5, "seed": -1}),
    (
        CHAT,
        {"reasoning_effort": "low", "verbosity": "low", "modalities": ["text"], "audio": None, "stop": None},
    ),
    (
        CHAT,
        {
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "store": False,
            "metadata": {"a": "b"},
        },
    ),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]}),
    (CHAT, {"response_format": {"type": "json_object"}, "max_completion_tokens": 3, "n": 2}),
    (
        CHAT,
        {
            "chat_template_kwargs": {"enable_thinking": False},
            "samplers": ["top_k", "temperature"],
            "mirostat": 0,
        },
    ),
    (TEXT, {"logprobs": 2, "echo": False, "best_of": 1, "suffix": None, "logit_bias": {"65": -100}}),
    (
        NATIVE,
        {"n_predict": -1, "t_max_predict_ms": 1, "n_indent": 0, "dry_sequence_breakers": ["x"], "n_probs": 2},
    ),
    (
        NATIVE,
        {"grammar": 'root ::= "a"', "response_fields": ["content"], "top_k": 40.0, "cache_prompt": True},
    ),
    (NATIVE, {"prompt": [*([65] * N_HELD), 200], "json_schema": {"type": "object"}, "n_keep": 5}),
    (
        RESPONSES,
        {
            "text": {"format": {"type": "text"}},
            "reasoning": {"effort": "low"},
            "include": [],
            "truncation": "x",
        },
    ),
    (
        MESSAGES,
        {"thinking": {"type": "adaptive"}, "context_management": {"edits": []}, "stop_sequences": ["x"]},
    ),
]


async def test_what_is_taken_is_not_held_up(tmp_path: Path) -> None:
    """Of nothing that llama-server takes it is believed that it does not, and all of it is served."""
    rng = random.Random(8)
    settings = {"prefill": {"chunk_threshold_s": 0}, "store": {"idle_save_s": 3600}}
    async with Stack(
        models.dense(tmp_path), tmp_path, slots=N_SLOTS, context=4096, settings=settings
    ) as stack:
        for path, fields in GOOD:
            text = words(rng, 300)
            good: dict[str, dict[str, Any]] = {
                CHAT: {"messages": [{"role": "user", "content": text}], "max_tokens": 4},
                TEXT: {"prompt": text, "max_tokens": 4},
                NATIVE: {"prompt": text, "n_predict": 4},
                RESPONSES: {"input": text, "max_output_tokens": 4},
                MESSAGES: {"messages": [{"role": "user", "content": text}], "max_tokens": 4},
            }
            status, answer = await post(stack.url, path, {**good[path], **fields})
            assert status == 200, (path, fields, answer)
        assert (await stack.own_metrics())["llamaslot_completions_refused_total"] == 0
        assert "dry run" not in stack.llamaslot.log


CUT = '{"a": '


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
async def test_what_reached_no_slot_discredits_none(dense: Stack, path: str) -> None:
    """llama-server answers some mistakes of clients with 500, before any slot: then no slot is saved or given up."""
    stack, rng = dense, random.Random(path)
    await fill(stack, rng)
    before, n_before = (await stack.status())["backends"][0]["slots"], await n_saves(stack)
    question = {"role": "user", "content": words(rng, N_HELD)}
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": CUT}
    result = {"type": "function_call_output", "call_id": "c", "output": "x"}
    bad: dict[str, Any] = {
        RESPONSES: {"input": [question, call, result]},
        MESSAGES: {"messages": [question, {"content": "no role"}], "max_tokens": 4},
    }
    direct = await post(stack.server.url, path, bad[path])
    assert direct[0] == 500
    assert await post(stack.url, path, bad[path]) == direct
    after = (await stack.status())["backends"][0]["slots"]
    assert [(slot["state"], slot["n_tokens"]) for slot in after] == [("HOT", N_HELD)] * N_SLOTS
    assert [slot["n_tokens"] for slot in before] == [N_HELD] * N_SLOTS
    assert await n_saves(stack) == n_before


async def test_of_a_request_with_several_answers_nothing_is_lost(dense: Stack) -> None:
    """``n`` > 1 of a short prompt takes the slots of others, and gives them back as they were when it is refused."""
    stack, rng = dense, random.Random(7)
    await fill(stack, rng)
    n_before = await n_saves(stack)
    body = {"prompt": "short", "n": 2, "n_predict": 4, "grammar": BROKEN}
    direct = await post(stack.server.url, NATIVE, body)
    assert direct[0] == 400
    assert await post(stack.url, NATIVE, body) == direct
    after = (await stack.status())["backends"][0]["slots"]
    assert [(slot["state"], slot["n_tokens"]) for slot in after] == [("HOT", N_HELD)] * N_SLOTS
    assert await n_saves(stack) == n_before
