"""What ``Assembly`` makes of a stream is what the real llama.cpp answers without one, field by field."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import orjson
import pytest
import pytest_asyncio

from llamaslot.errors import UpstreamError
from llamaslot.formats import FORMATS
from llamaslot.formats.stream_to_json import Assembly, Doubt
from llamaslot.llama.sse import EventSplitter, data_of
from tests.support import models
from tests.support.real import RealServer

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]

PATHS: dict[str, str] = {
    "chat": "/v1/chat/completions",
    "openai-completion": "/v1/completions",
    "native-completion": "/completion",
}
# Calls are bare JSON, so that "{" begins one: that much random weights can be brought to say. And a request can have
# its answer begun by the template, as those of reasoning models do.
TEMPLATE = (
    models.CHAT_TEMPLATE.replace('\'<tool_call>\\n{"name": "\'', '\'{"name": "\'')
    .replace("'}\\n</tool_call>'", "'}'")
    .rstrip("\n")
    + "{%- if add_generation_prompt and begin %}{{- begin }}{%- endif %}\n"
)
HELLO: Any = [{"role": "user", "content": "Hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"place": {"enum": ["Paris", "Rome"]}, "celsius": {"type": "boolean"}},
            "required": ["place", "celsius"],
        },
    },
}
CALL: Any = {"messages": HELLO, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 400}
ENDING: Any = {"logit_bias": [[ord("{"), 10], [models.IM_END, 40]]}  # once it may
SCHEMA: Any = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
HALF: Any = {"logit_bias": [[0xC3, 100], [models.IM_END, 98]], "temperature": 1, "seed": 2, "max_tokens": 8}
NARROW = 'root ::= "äöü€😀"+'  # 2, 2, 2, 3 and 4 tokens
END: Any = {"logit_bias": [[models.IM_END, 1000]]}  # at once
SAMPLING: Any = {
    "temperature": 0.9, "seed": 42, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "top_n_sigma": 3, "typical_p": 0.95,
    "xtc_probability": 0.1, "xtc_threshold": 0.2, "dynatemp_range": 0.1, "dynatemp_exponent": 1.1, "min_keep": 1,
    "repeat_last_n": 32, "repeat_penalty": 1.1, "frequency_penalty": 0.1, "presence_penalty": 0.1,
    "dry_multiplier": 0.5, "dry_base": 1.8, "dry_allowed_length": 3, "dry_penalty_last_n": 50,
    "dry_sequence_breakers": ["\n"], "samplers": ["dry", "top_k", "top_p", "min_p", "temperature"], "n_keep": 1,
    "n_discard": 0, "n_cache_reuse": 0, "t_max_predict_ms": 100_000, "logit_bias": {"65": 1.5}, "ignore_eos": True,
    "lora": [], "sse_ping_interval": 20, "return_progress": True, "user": "me", "model": "any",
    "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "x", "prompt_cache_key": "y",
}  # fmt: skip
MIROSTAT: Any = {"temperature": 0.9, "seed": 1, "mirostat": 2, "mirostat_tau": 4, "mirostat_eta": 0.2}
ADAPTIVE: Any = {"temperature": 0.9, "seed": 1, "adaptive_target": 0.5, "adaptive_decay": 0.8}
OFF: Any = {
    "stream": False, "verbose": False, "echo": False, "logprobs": False, "n_probs": 0, "n_indent": 0, "tools": None,
    "return_tokens": False, "stream_options": None, "never_heard_of": None,
}  # fmt: skip

#: A name, what is asked beside a prompt of the format and max_tokens 12, and what the answer must show (in its JSON).
EACH: list[tuple[str, dict[str, Any], str]] = [
    ("plain", {}, ""),
    ("one token", {"max_tokens": 1}, '":1'),
    ("no token, which is one", {"max_tokens": 0}, '":1'),
    ("up to the context", {"max_tokens": -1}, '":10'),
    ("n_predict", {"max_tokens": None, "n_predict": 3}, '":3'),
    ("max_completion_tokens", {"max_tokens": None, "max_completion_tokens": 4}, '":4'),
    ("stop word", {"grammar": 'root ::= "abcdefgh"', "stop": ["ef", "xx"]}, "abcd"),
    ("stop word at once", {"grammar": 'root ::= "abcdefgh"', "stop": "a"}, "stop"),
    ("stop word that does not come", {"stop": ["hello"]}, ""),
    ("stop word in a character", {"grammar": 'root ::= "äöü€😀"+', "stop": ["€"], "max_tokens": 30}, "äöü"),
    ("what begins a stop word goes on", {"grammar": 'root ::= "abcabcabx"', "stop": ["abcabd"]}, "abcabcabx"),
    ("end", {"grammar": 'root ::= "abc"'}, '"abc"'),
    ("end at once", END, '""'),
    ("without reuse", {"cache_prompt": False}, ""),
    ("several", {"n": 2}, ""),
    ("several by the native name", {"n_cmpl": 3, "temperature": 1, "seed": 5}, ""),
    ("one of several", {"n": 1}, ""),
    ("characters of many bytes", {"grammar": NARROW, "max_tokens": 13}, '"äöü€😀"'),
    ("more of them", {"grammar": 'root ::= "äöü€😀"{3}', "max_tokens": 32}, '"äöü€😀äöü€😀äöü"'),
    ("bytes that are no text", {"logit_bias": [[0x82, 100], [0xFF, 99]], "max_tokens": 5}, "�"),
    ("lines", {"grammar": 'root ::= "a\\n  b\\nc\\n" "d"*', "max_tokens": 20}, "a\\n  b\\nc\\nddd"),
    ("json schema", {"json_schema": SCHEMA, "max_tokens": 60}, "yes"),
    ("sampling", SAMPLING, ""),
    ("mirostat", MIROSTAT, ""),
    ("adaptive", ADAPTIVE, ""),
    ("timings per token", {"timings_per_token": True}, ""),
    ("switches off", OFF, ""),
]
CHAT: list[tuple[str, dict[str, Any], str]] = [
    ("json object", {"response_format": {"type": "json_object"}, "max_tokens": 9}, "{"),
    (
        "response schema",
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}, "max_tokens": 60},
        "yes",
    ),
    ("tool call", {**CALL, "parallel_tool_calls": False}, '"finish_reason":"tool_calls"'),
    ("tool calls", {**CALL, **ENDING, "temperature": 1, "seed": 1}, '},{"type":"function"'),
    ("two answers with tool calls", {**CALL, **ENDING, "temperature": 1, "seed": 3, "n": 2}, "tool_calls"),
    ("tools without a call", {**CALL, "tool_choice": "none", "max_tokens": 9}, ""),
    (
        "tool call after reasoning",
        {**CALL, "chat_template_kwargs": {"begin": "<think>\n"}},
        "reasoning_content",
    ),
    (
        "reasoning",
        {"grammar": 'root ::= "<think>hm</think>ok"', "max_tokens": 40},
        '"reasoning_content":"hm"',
    ),
    (
        "reasoning in the text",
        {"grammar": 'root ::= "<think>hm</think>ok"', "reasoning_format": "none"},
        "<think>hm",
    ),
    (
        "reasoning apart",
        {"grammar": 'root ::= "<think>\\nhm"', "reasoning_format": "deepseek"},
        '"content":""',
    ),
    (
        "reasoning auto",
        {"grammar": 'root ::= "<think>a</think>"', "reasoning_format": "auto", "max_tokens": 40},
        '"a"',
    ),
    (
        "reasoning begun by the template",
        {
            "chat_template_kwargs": {"begin": "<think>\n"},
            "grammar": 'root ::= "hm</think>\\n\\nok"',
            "max_tokens": 40,
        },
        '"reasoning_content":"hm"',
    ),
    ("reasoning skipped by the template", {"chat_template_kwargs": {"begin": "<think>\n\n</think>\n\n"}}, ""),
    # Its text is told with the progress, before the first token.
    (
        "reasoning skipped, in the text",
        {"chat_template_kwargs": {"begin": "<think>\n\n</think>\n\n"}, "reasoning_format": "none"},
        '"<think>\\n\\n</think>',
    ),
    ("effort", {"reasoning_effort": "low"}, ""),
    ("an answer begun", {"messages": [*HELLO, {"role": "assistant", "content": "Well, "}]}, '"Well, '),
    (
        "an answer begun, said so",
        {
            "messages": [*HELLO, {"role": "assistant", "content": "Well, "}],
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
        '"Well, ',
    ),
    (
        "reasoning begun",
        {"messages": [*HELLO, {"role": "assistant", "content": "", "reasoning_content": "so"}]},
        '"reasoning_content":"so',
    ),
    (
        "a tool call begun",
        {**CALL, "messages": [*HELLO, {"role": "assistant", "content": "{"}], "parallel_tool_calls": False},
        "",
    ),
    ("text in parts", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, ""),
]
COMPLETION: list[tuple[str, dict[str, Any], str]] = [
    ("empty prompt", {"prompt": ""}, ""),
    ("ids", {"prompt": [72, 101, 108]}, ""),
    ("ids and text", {"prompt": [72, "ello", 33]}, ""),
    ("list of one", {"prompt": ["Hello"]}, ""),
    ("list of several", {"prompt": ["Hello", "World, and more", "x"], "max_tokens": 4}, ""),
    ("list of ids", {"prompt": [[72, 101], "World", [88, "yz"]], "max_tokens": 4}, ""),
    ("several of each", {"prompt": ["Hello", "World, and more"], "n": 2, "temperature": 1, "seed": 5}, ""),
]
NATIVE: list[tuple[str, dict[str, Any], str]] = [
    (
        "fields",
        {"response_fields": ["content", "generation_settings/stream", "nothing", "timings/predicted_n"]},
        "",
    ),
    ("fields of several", {"response_fields": ["index", "timings"], "prompt": ["a", "b"]}, ""),
    ("no fields", {"response_fields": []}, ""),
]


class Case(NamedTuple):
    kind: str
    body: dict[str, Any]
    shows: str


def cases() -> Iterator[Any]:
    for kind in PATHS:
        base: dict[str, Any] = {"temperature": 0, "id_slot": 0, "max_tokens": 12}
        base |= {"messages": HELLO} if kind == "chat" else {"prompt": "Hello"}
        own = CHAT if kind == "chat" else COMPLETION
        for name, more, shows in [*EACH, *own, *(NATIVE if kind == "native-completion" else ())]:
            body = {**base, **more}
            if kind != "chat":
                body.pop("tools", None)
            yield pytest.param(Case(kind, body, shows), id=f"{kind}: {name}")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RealServer]:
    directory = tmp_path_factory.mktemp("models")
    async with started(directory) as running:
        yield running


def started(directory: Path, draft: Path | None = None) -> RealServer:
    template = directory / "template.jinja"
    template.write_text(TEMPLATE)
    return RealServer(
        models.dense(directory),
        directory / "kv",
        context=1024,
        draft=draft,
        extra=("--chat-template-file", str(template)),
    )


async def ask(server: RealServer, kind: str, body: Any) -> tuple[int, bytes]:
    """Status and body; any status is an answer."""
    async with aiohttp.request("POST", server.url + PATHS[kind], json=body) as answer:
        return answer.status, await answer.read()


async def events(server: RealServer, kind: str, body: Any) -> list[Any]:
    """The events of a stream, None for ``[DONE]``."""
    status, payload = await ask(server, kind, body)
    assert status == 200, payload
    return [data_of(event) for event in EventSplitter().feed(payload)]


async def assembled(server: RealServer, kind: str, body: Any) -> Assembly:
    """Raises UpstreamError for an error event."""
    assembly = FORMATS[kind].assembly(body)
    assert assembly is not None
    for event in await events(server, kind, FORMATS[kind].streamed(body)):
        if event is not None:
            assembly.feed(event)
    return assembly


def comparable(value: Any) -> Any:
    """Without what differs from run to run: ids, and how long it took. That they are there is compared."""
    if isinstance(value, list):
        return [comparable(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        key: type(each).__name__
        if key in ("id", "created") or key.endswith(("_ms", "_per_second"))
        else comparable(each)
        for key, each in value.items()
    }


# -- exact -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", list(cases()))
async def test_the_assembled_answer_is_the_servers_own(server: RealServer, case: Case) -> None:
    """Every field of the JSON, for each thing that a body can ask and that ``can_assemble`` lets through."""
    kind, body, shows = case
    assert FORMATS[kind].can_assemble(body)
    await ask(server, kind, body)  # so that both find the same in the slots
    status, plain = await ask(server, kind, body)
    assert status == 200, plain
    assert shows in plain.decode()
    assembly = await assembled(server, kind, body)
    assert comparable(assembly.answer()) == comparable(orjson.loads(plain))
    assert assembly.doubt is None


# -- inexact -----------------------------------------------------------------------------------------------------

BEGINS_STOP: Any = {"grammar": 'root ::= "abcdefgh"', "stop": ["cdX"], "max_tokens": 4}
DOUBTED: list[tuple[str, dict[str, Any], Doubt]] = [
    ("chat", {"messages": HELLO, **BEGINS_STOP}, Doubt.HELD_BACK),
    ("chat", {"messages": HELLO, **BEGINS_STOP, "stop": ["abcdX"]}, Doubt.HELD_BACK),
    ("openai-completion", {"prompt": "Hello", **BEGINS_STOP}, Doubt.HELD_BACK),
    ("native-completion", {"prompt": "Hello", **BEGINS_STOP}, Doubt.HELD_BACK),
    ("openai-completion", {"prompt": "Hello", "grammar": NARROW, "max_tokens": 8}, Doubt.HELD_BACK),
    ("native-completion", {"prompt": "Hello", "grammar": NARROW, "max_tokens": 8}, Doubt.HELD_BACK),
    ("native-completion", {"prompt": ["x", "Hello"], "grammar": NARROW, "max_tokens": 8, "n": 2}, Doubt.HELD_BACK),
    # The end, after half a character.
    ("native-completion", {"prompt": "Hello", **HALF}, Doubt.HELD_BACK),
    ("chat", {"messages": HELLO, "grammar": 'root ::= "<think>\\n\\n</think>\\n"', "max_tokens": 40}, Doubt.UNPARSED),
    ("chat", {"messages": HELLO, "grammar": 'root ::= "  \\n"'}, Doubt.UNPARSED),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "body", "doubt"), DOUBTED)
async def test_an_answer_with_something_missing_is_doubted(
    server: RealServer, kind: str, body: dict[str, Any], doubt: Doubt
) -> None:
    """What the stream did not tell can be seen to be missing, and it does make a difference."""
    body = {"temperature": 0, "cache_prompt": False, **body}
    assert FORMATS[kind].can_assemble(body)
    status, plain = await ask(server, kind, body)
    assert status == 200
    assembly = await assembled(server, kind, body)
    assert assembly.doubt is doubt
    assert comparable(assembly.answer()) != comparable(orjson.loads(plain))


async def test_a_chat_that_ends_in_half_a_character_loses_just_that(server: RealServer) -> None:
    """The one difference that nothing tells: where the model ends its answer there, it is without the last U+FFFD."""
    n_halves = 0
    for seed in range(12):
        body = {"messages": HELLO, "cache_prompt": False, **HALF, "seed": seed}
        body["logit_bias"] = [[0xC3, 100], [ord("x"), 52], [models.IM_END, 99]]
        text = orjson.loads((await ask(server, "chat", body))[1])["choices"][0]["message"]["content"]
        assembly = await assembled(server, "chat", body)
        if assembly.doubt is None:
            said = assembly.answer()["choices"][0]["message"]["content"]
            assert said in (text, text.rstrip("\ufffd"))
            n_halves += said != text
    assert n_halves


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("chat", {"messages": HELLO, "grammar": 'root ::= "ab"', "logprobs": True, "top_logprobs": 1}),
    ("chat", {"messages": HELLO, "n_probs": 1}),
    ("chat", {"messages": HELLO, "tools": [WEATHER], "logprobs": True}),  # 400 with a stream only
    ("chat", {"messages": HELLO, "verbose": True}),
    ("chat", {"messages": HELLO, "stream_options": {"include_usage": 5}}),  # 400 without a stream only
    ("chat", {"messages": HELLO, "grammar": 'root ::= "a\n\n  bc\n" "d"*', "n_indent": 2, "max_tokens": 20}),
    ("openai-completion", {"prompt": "Hello", "logprobs": 2}),
    ("openai-completion", {"prompt": "Hello", "n_probs": 2}),
    ("native-completion", {"prompt": "Hello", "n_probs": 1, "grammar": 'root ::= "abcde"', "stop": ["cd"]}),
    ("native-completion", {"prompt": "Hello", "n_probs": 1, "post_sampling_probs": True}),
    ("native-completion", {"prompt": "Hello", "return_tokens": True, "grammar": NARROW}),
    (
        "native-completion",
        {"prompt": "Hello", "grammar": 'root ::= "a\n\n  bc\n" "d"*', "n_indent": 2, "max_tokens": 20},
    ),
]


@pytest.mark.parametrize(("kind", "body"), REFUSED)
async def test_what_is_refused_would_have_been_wrong(
    server: RealServer, kind: str, body: dict[str, Any]
) -> None:
    """Another answer, or an error that only one of the two gives."""
    body = {"temperature": 0, "cache_prompt": False, "max_tokens": 12, **body}
    assert not FORMATS[kind].can_assemble(body)
    status, plain = await ask(server, kind, body)
    if status == 400:
        assert (await ask(server, kind, FORMATS[kind].streamed(body)))[0] == 200
    elif (await ask(server, kind, FORMATS[kind].streamed(body)))[0] == 200:
        assembly = await assembled(server, kind, body)
        assert comparable(assembly.answer()) != comparable(orjson.loads(plain))


async def test_many_random_requests_are_exact_or_doubted(server: RealServer) -> None:
    """Random weights, stop words, bytes, tags, calls and lengths, all mixed: never an undoubted difference."""
    chance, n_exact = random.Random(7), 0
    for _ in range(140):
        kind = chance.choice(list(PATHS))
        body = random_body(chance, kind)
        assert FORMATS[kind].can_assemble(body)
        status, plain = await ask(server, kind, body)
        if status != 200:  # the parser of calls can make nothing of it
            with pytest.raises(UpstreamError) as told:
                await assembled(server, kind, body)
            assert (told.value.status, orjson.loads(told.value.payload)) == (status, orjson.loads(plain)), (
                body
            )
            continue
        assembly = await assembled(server, kind, body)
        if assembly.doubt is None:
            n_exact += 1
            assert slotless(assembly.answer()) == slotless(orjson.loads(plain)), body
    assert n_exact > 80


def random_body(chance: random.Random, kind: str) -> dict[str, Any]:
    body: dict[str, Any] = {"cache_prompt": False, "temperature": chance.choice([0, 1])}
    body |= {"seed": chance.randrange(1000), "max_tokens": chance.randrange(30)}
    if chance.random() < 0.4:
        body["stop"] = chance.sample(
            ["a", "<", "</", "ab", "\n\n", "hm<", "€", "😀x", "}}", '{"n', "QQ", "x y"], 2
        )
    if kind == "chat":
        body["messages"] = [{"role": "user", "content": chance.choice(["Hello", "Hi there"])}]
        body["reasoning_format"] = chance.choice(["none", "auto", "deepseek"])
        if chance.random() < 0.4:
            begin = chance.choice(
                ["<think>\n", "<think>\n\n</think>\n\n", "<thi", '{"name": "weather"', "{", "\n"]
            )
            body["chat_template_kwargs"] = {"begin": begin}
        if chance.random() < 0.2:
            begun = chance.choice(["Well, ", "<think>\n", "{", "", "<thi", "<think>a</think>b"])
            body["messages"].append({"role": "assistant", "content": begun})
    else:
        body["prompt"] = chance.choice(
            ["Hello", [1, 2], ["Hello", "World!!"], [[72, 105], "abc"], ["ab", 67]]
        )
    body[chance.choice(["n", "n_cmpl"])] = chance.choice([1, 1, 1, 2])
    if kind == "chat" and chance.random() < 0.4:
        bias = [[ord("{"), chance.choice([0, 3, 10])], [models.IM_END, chance.choice([0, 25])]]
        choice, length = chance.choice(["auto", "required"]), chance.choice([40, 100, 200])
        return {**body, "tools": [WEATHER], "tool_choice": choice, "max_tokens": length, "logit_bias": bias}
    way = chance.choice(["free", "bytes", "grammar", "grammar", "end"])
    if way == "bytes":
        body["logit_bias"] = [[chance.randrange(128, 256), 100] for _ in range(4)]
    elif way == "grammar":
        body["grammar"] = chance.choice([
            NARROW,
            'root ::= "<think>" [a-z \\n<]* "</think>" [a-z]+',
            'root ::= "<think>\\n" [ab]* "\\n</think>\\n\\n" [äöa€]*',
            "root ::= [ \\n]* [a-c]* [ \\n]*",
            "root ::= [a-z<>/{\\n ]+",
        ])  # fmt: skip
    elif way == "end":
        body["logit_bias"] = [
            [models.IM_END, chance.choice([30, 40, 50])],
            [ord(" "), chance.choice([0, 40])],
        ]
    return body


def slotless(value: Any) -> Any:
    """Several prompts take whatever slots are free."""
    value = comparable(value)
    for answer in value if isinstance(value, list) else [value]:
        answer.pop("id_slot", None)
    return value


async def test_with_a_draft_model_too_an_answer_is_exact_or_doubted(tmp_path: Path) -> None:
    """Several tokens come at once then; cut at each length, in the middle of characters and of a stop word."""
    doubts: set[Doubt | None] = set()
    n_drafted = 0
    async with started(tmp_path, models.draft(tmp_path)) as server:
        for kind in PATHS:
            prompt: Any = {"messages": HELLO} if kind == "chat" else {"prompt": "Hello"}
            for length in range(1, 24):
                body = {**prompt, "temperature": 0, "cache_prompt": False, "max_tokens": length}
                body |= {"grammar": 'root ::= ([!-~]{4} "€b"){9}', "stop": ["€bX"]}
                plain = orjson.loads((await ask(server, kind, body))[1])
                assembly = await assembled(server, kind, body)
                n_drafted += plain["timings"].get("draft_n_accepted", 0)
                doubts.add(assembly.doubt)
                if assembly.doubt is None:
                    assert slotless(assembly.answer()) == slotless(plain)
    assert doubts == {None, Doubt.HELD_BACK}
    assert n_drafted > 0


# -- errors ------------------------------------------------------------------------------------------------------


async def test_an_error_event_is_the_error_that_there_is_without_a_stream(server: RealServer) -> None:
    """Text that no parser of calls can make sense of: 200 and an error event with a stream, else 500."""
    body = {**CALL, "tool_choice": "auto", "temperature": 0, "max_tokens": 100}
    status, plain = await ask(server, "chat", body)
    assert status == 500
    with pytest.raises(UpstreamError) as told:
        await assembled(server, "chat", body)
    assert (told.value.status, orjson.loads(told.value.payload)) == (500, orjson.loads(plain))


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("chat", {"messages": HELLO, "n": 9}),
        ("chat", {"messages": HELLO, "temperature": "hot"}),
        ("chat", {"messages": HELLO, "tools": [WEATHER], "grammar": NARROW}),
        ("chat", {"messages": HELLO, "reasoning_format": None}),  # a null that is no absent field
        ("openai-completion", {"prompt": "x" * 3000}),
        ("native-completion", {"prompt": "x" * 3000}),
        ("native-completion", {"prompt": "x", "grammar": "nonsense"}),
        ("native-completion", {"prompt": "x", "response_fields": ["content"], "n": 9}),
    ],
)
async def test_what_the_server_refuses_it_refuses_alike(
    server: RealServer, kind: str, more: dict[str, Any]
) -> None:
    """The same status and the same body, as an ordinary answer, for the request with and without a stream."""
    body = {"max_tokens": 2, **more}
    assert FORMATS[kind].can_assemble(body)
    plain = await ask(server, kind, body)
    assert plain[0] == 400
    assert await ask(server, kind, FORMATS[kind].streamed(body)) == plain


# -- what the events are -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PATHS)
async def test_a_stream_begins_with_its_progress(server: RealServer, kind: str) -> None:
    """One event before anything is computed and one when all is, also for a prompt of which one token is computed."""
    body: dict[str, Any] = {"id_slot": 0, "max_tokens": 2}
    body |= {"messages": HELLO} if kind == "chat" else {"prompt": "Hello"}
    for _ in range(2):
        told = await events(server, kind, FORMATS[kind].streamed(body))
    n = told[0]["prompt_progress"]["total"]
    progress = [event["prompt_progress"] for event in told if event and "prompt_progress" in event]
    assert [(step["total"], step["cache"], step["processed"]) for step in progress] == [
        (n, n - 1, n - 1),
        (n, n - 1, n),
    ]
    assert all(step.keys() == {"total", "cache", "processed", "time_ms"} for step in progress)
    assert "prompt_progress" in told[1]
    assert "prompt_progress" not in told[2]


async def test_the_totals_of_a_chat_come_after_its_end(server: RealServer) -> None:
    """With ``include_usage`` an event of their own, without choices; it has the timings too."""
    told = await events(server, "chat", FORMATS["chat"].streamed({"messages": HELLO, "max_tokens": 2}))
    *_, end, totals, done = told
    assert end["choices"][0] == {"finish_reason": "length", "index": 0, "delta": {}}
    assert totals["choices"] == []
    assert totals["usage"]["completion_tokens"] == totals["timings"]["predicted_n"] == 2
    assert done is None
