"""On the real llama.cpp: requests to /v1/messages and /v1/responses have the tokens of the chat bodies made of them."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import aiohttp
import orjson
import pytest
import pytest_asyncio

from llamaslot.cache.ids import head, unpack
from llamaslot.errors import PromptNotTokenizable
from llamaslot.formats import messages, responses
from llamaslot.llama.client import LlamaServer
from llamaslot.store.slot_file import read_slot_file
from llamaslot.tokens import media
from llamaslot.tokens.tokenizer import Prompt, Tokenizer
from tests.support import models
from tests.support.real import RealServer

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]

# A template that shows what the one of the models does not: how arguments are written, effort, thinking switched off.
OPEN = models.CHAT_TEMPLATE
for shown, instead in (
    (
        "{%- if call.arguments is string %}{{- call.arguments }}{%- else %}{{- call.arguments | tojson }}{%- endif %}",
        "{{- call.arguments.strip() }}",
    ),
    (
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}",
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
        "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
        "{{- '[' + (reasoning_effort | default('no effort') | string) + ']' }}",
    ),
):
    assert shown in OPEN
    OPEN = OPEN.replace(shown, instead)

TEXT = "def the(self, x):  # in the ring\n    return self == x  \n\n<|im_end|> <|im_start|> ü漢🎉\n" * 3
INPUT = {
    "path": '/tmp/ü\n\t"x"\\\x01\x7f\u2028',
    "b": [1.5, 0.1, 1e15, 1e22, 1e-7, 1e15 + 0.3, 9007199254740993.0, -0.0, 2**63, -(2**63)],
    "a": {"z": None, "y": True, "x": []},
}
SCHEMA = {
    "type": "object",
    "properties": {"path": {"type": "string"}, "a": {"type": "number", "minimum": 0.5}},
}

# -- bodies of /v1/messages ------------------------------------------------------------------------------------------

HI = {"role": "user", "content": "hi there"}
HEADER = "x-anthropic-billing-header: cc_version=2.1.101.e51; cc_entrypoint=cli; cch=a5145;"
USE: dict[str, Any] = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": INPUT}
RESULT: dict[str, Any] = {"type": "tool_result", "tool_use_id": "toolu_1", "content": TEXT}
THINKING = {"type": "thinking", "thinking": TEXT, "signature": "x"}
TOOLS: list[dict[str, Any]] = [
    {"name": "look", "description": TEXT, "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}},
    {"name": "bare"},
    {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
]


def text(content: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": content, **fields}


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def claude_code() -> dict[str, Any]:
    """A body as Claude Code sends it, shorter: three blocks of system, tools, a reminder, calls, results, thinking."""
    cached = {"cache_control": {"type": "ephemeral"}}
    reminder = text(f"<system-reminder>\n{TEXT}\n</system-reminder>\n")
    turns = [
        user(reminder, text("Mend the build.")),
        assistant(THINKING, text("I look."), USE, {**USE, "id": "toolu_2", "input": {"path": "Makefile"}}),
        user(RESULT, {**RESULT, "tool_use_id": "toolu_2", "is_error": True}, reminder),
        assistant({**USE, "id": "toolu_3"}),
        user(
            {
                **RESULT,
                "tool_use_id": "toolu_3",
                "content": [text(TEXT), text("."), {"type": "tool_reference"}],
            }
        ),
    ]
    tools = [
        {**TOOLS[0], "name": f"Tool{i}", "input_schema": {**SCHEMA, "required": ["path"]}} for i in range(6)
    ]
    return {
        "model": "claude-opus-4-5",
        "system": [
            text(HEADER),
            text("You are Claude Code.", **cached),
            text(TEXT * 6, **cached),
        ],
        "messages": turns,
        "tools": [*tools, TOOLS[2]],
        "metadata": {"user_id": "user_1_account__session_2"},
        "thinking": {"type": "enabled", "budget_tokens": 31_999},
        "temperature": 1,
        "context_management": {"edits": []},
    }


MESSAGES: dict[str, dict[str, Any]] = {
    "plain": {"messages": [HI]},
    "a system string": {"system": TEXT, "messages": [HI]},
    "an empty system": {"system": "", "messages": [HI]},
    "no blocks of system": {"system": [], "messages": [HI]},
    "a null system": {"system": None, "messages": [HI]},
    "system blocks": {
        "system": [text("Be "), text("kind.", cache_control={"type": "ephemeral"})],
        "messages": [HI],
    },
    "a stamped string": {"system": HEADER + "You are Claude Code.", "messages": [HI]},
    "a stamped block": {"system": [text(HEADER), text("You")], "messages": [HI]},
    "a stamp further back": {"system": [text("You"), text(HEADER + HEADER)], "messages": [HI]},
    "a stamp within a text": {"system": "You " + HEADER, "messages": [HI]},
    "a longer stamp": {"system": HEADER.replace("a5145", "a51456"), "messages": [HI]},
    "a stamp with no end": {"system": HEADER[:-1], "messages": [HI]},
    "a stamp of five bytes": {"system": HEADER.replace("a5145", "üüa"), "messages": [HI]},
    "a stamp of five characters": {"system": HEADER.replace("a5145", "üüabc"), "messages": [HI]},
    "several turns": {"messages": [HI, {"role": "assistant", "content": TEXT}, user(text(TEXT), text("b"))]},
    "two messages of the user": {"messages": [HI, HI]},
    "a system message among them": {"messages": [HI, {"role": "system", "content": "s"}, HI]},
    "an answer begun": {"messages": [HI, {"role": "assistant", "content": "Well"}]},
    "an answer begun in blocks": {"messages": [HI, assistant(THINKING, text("Well"))]},
    "messages without content": {"messages": [HI, {"role": "assistant"}, user(), assistant(), HI]},
    "no messages": {"messages": []},
    "thinking in the past": {"messages": [HI, assistant(THINKING, text("ok")), HI]},
    "thinking before a result": {
        "messages": [
            HI,
            assistant(THINKING, {"type": "redacted_thinking", "data": "x"}, THINKING, USE),
            user(RESULT),
        ]
    },
    "thinking only": {"messages": [HI, assistant(THINKING), HI]},
    "tool use": {"tools": TOOLS, "messages": [HI, assistant(text("ok"), USE), user(RESULT)]},
    "tool use without words": {"tools": TOOLS, "messages": [HI, assistant(USE), user(RESULT)]},
    "tool use without input": {"messages": [HI, assistant({**USE, "input": None}), user(RESULT)]},
    "several results and words": {
        "tools": TOOLS,
        "messages": [
            HI,
            assistant(text("ok"), USE, {**USE, "id": "toolu_2"}),
            user(RESULT, {**RESULT, "tool_use_id": "toolu_2", "is_error": True}, text("go"), text("on")),
        ],
    },
    "results in blocks": {
        "messages": [
            HI,
            assistant(USE),
            user({**RESULT, "content": [text("a"), {"type": "tool_reference"}, text(TEXT)]}),
        ]
    },
    "results that are empty": {
        "messages": [
            HI,
            assistant(USE, USE),
            user({**RESULT, "content": []}, {"type": "tool_result", "tool_use_id": "x"}),
        ]
    },
    "tools": {"tools": TOOLS, "messages": [HI]},
    "no tools": {"tools": [], "messages": [HI]},
    "any tool": {"tools": TOOLS, "tool_choice": {"type": "any"}, "messages": [HI]},
    "a certain tool": {"tools": TOOLS, "tool_choice": {"type": "tool", "name": "look"}, "messages": [HI]},
    "tools as it likes": {
        "tools": TOOLS,
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "messages": [HI],
    },
    "tools but none": {"tools": TOOLS, "tool_choice": {"type": "none"}, "messages": [HI]},
    "thinking enabled": {"thinking": {"type": "enabled", "budget_tokens": 2000}, "messages": [HI]},
    "thinking disabled": {"thinking": {"type": "disabled"}, "messages": [HI]},
    "thinking adaptive": {
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "high"},
        "messages": [HI],
    },
    "arguments of the template": {
        "chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "low", "keep_reasoning": True},
        "messages": [HI, assistant(THINKING, text("ok")), HI],
    },
    "fields that are dropped": {
        "response_format": {"type": "json_object"},
        "reasoning_effort": "low",
        "add_generation_prompt": False,
        "stop_sequences": ["x"],
        "messages": [HI],
    },
    "as of Claude Code": claude_code(),
}

# -- bodies of /v1/responses -----------------------------------------------------------------------------------------

ASKED = {"role": "user", "content": "hi there"}
CALL: dict[str, Any] = {
    "type": "function_call",
    "id": "fc_1",
    "call_id": "call_1",
    "name": "look",
    "arguments": '{"b": 1,  "a":[1.50, 1e15]}',
    "status": "completed",
}
OUTPUT: dict[str, Any] = {"type": "function_call_output", "call_id": "call_1", "output": TEXT}
REASONING: dict[str, Any] = {
    "type": "reasoning",
    "id": "rs_1",
    "summary": [{"type": "summary_text", "text": "s"}],
    "content": [{"type": "reasoning_text", "text": TEXT}, {"type": "reasoning_text", "text": "and more"}],
}
FUNCTION: dict[str, Any] = {"type": "function", "name": "look", "description": TEXT, "parameters": SCHEMA}


def said(*parts: str, **fields: Any) -> dict[str, Any]:
    content = [{"type": "output_text", "text": part, "annotations": [], "logprobs": []} for part in parts]
    return {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "status": "completed",
        "content": content,
    } | fields


def written(*parts: str) -> list[dict[str, Any]]:
    return [{"type": "input_text", "text": part} for part in parts]


RESPONSES: dict[str, dict[str, Any]] = {
    "a string": {"input": TEXT},
    "an empty string": {"input": ""},
    "instructions": {"instructions": TEXT, "input": "hi"},
    "empty instructions": {"instructions": "", "input": "hi"},
    "null instructions": {"instructions": None, "input": "hi"},
    "no items": {"input": []},
    "instructions and roles": {
        "instructions": "A",
        "input": [{"role": "developer", "content": "D"}, {"role": "system", "content": written("S")}, ASKED],
    },
    "parts": {"input": [{"type": "message", "role": "user", "id": "m", "content": written("a", TEXT)}]},
    "several turns": {
        "input": [ASKED, said("ok"), ASKED, said("a", "b"), said("c"), said(content="d"), ASKED]
    },
    "an answer without content": {"input": [ASKED, said(content=None), ASKED]},
    "an answer begun": {"input": [ASKED, said("Well")]},
    "a call": {"tools": [FUNCTION], "input": [ASKED, CALL, OUTPUT]},
    "calls with words": {
        "tools": [FUNCTION],
        "input": [
            ASKED,
            *(REASONING, said("ok"), CALL, {**CALL, "call_id": "call_2"}),
            *(OUTPUT, {**OUTPUT, "call_id": "call_2", "output": written("p", "q")}),
        ],
    },
    "a call before the words": {"input": [ASKED, CALL, said("ok"), REASONING, OUTPUT]},
    "reasoning in the past": {"input": [ASKED, REASONING, said("ok"), ASKED]},
    "reasoning only": {"input": [ASKED, REASONING, ASKED]},
    "reasoning kept": {
        "chat_template_kwargs": {"keep_reasoning": True},
        "input": [ASKED, REASONING, said("ok"), ASKED],
    },
    "tools": {"tools": [FUNCTION, {"type": "web_search"}, {"type": "custom", "name": "x"}], "input": "hi"},
    "tools of no use": {"tools": [{"type": "web_search"}], "input": "hi"},
    "no tools": {"tools": [], "input": "hi"},
    "a tool required": {"tools": [{**FUNCTION, "strict": False}], "tool_choice": "required", "input": "hi"},
    "no tool": {"tools": [FUNCTION], "tool_choice": "none", "input": "hi"},
    "a certain tool": {
        "tools": [FUNCTION],
        "tool_choice": {"type": "function", "name": "look"},
        "input": "hi",
    },
    "effort": {"reasoning": {"effort": "low", "summary": "auto"}, "input": "hi"},
    "no effort": {"reasoning": {"effort": "none"}, "input": "hi"},
    "null effort": {"reasoning": {"effort": None}, "reasoning_effort": "high", "input": "hi"},
    "effort of a chat": {"reasoning": None, "reasoning_effort": "high", "input": "hi"},
    "text.format": {
        "text": {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}},
        "input": "hi",
    },
    "response_format": {"response_format": {"type": "json_object", "schema": SCHEMA}, "input": "hi"},
    "no header of an answer": {"add_generation_prompt": False, "input": "hi"},
    "fields of no use": {
        "previous_response_id": None,
        "messages": [{"role": "user", "content": "other"}],
        "conversation": "c",
        "prompt": {"id": "p"},
        "truncation": "auto",
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "input": "hi",
    },
}

# -- the tests -------------------------------------------------------------------------------------------------------


class Real:
    """A real server with one slot, its client, and prompts made with it."""

    def __init__(self, server: RealServer, api: LlamaServer) -> None:
        self.server, self.api, self.prompts = server, api, Tokenizer(api)

    async def messages(self, body: Mapping[str, Any]) -> Prompt:
        """The prompt of a body of /v1/messages, which the server is seen to use."""
        prompt = await self.prompts.chat(messages.chat_body(body))
        counted = await self.server.post("/v1/messages/count_tokens", body)
        assert counted == {"input_tokens": prompt.n_tokens}
        await self._prefill(prompt)
        usage = (await self.server.post("/v1/messages", {**body, "max_tokens": 1}))["usage"]
        assert (usage["cache_read_input_tokens"], usage["input_tokens"]) == (prompt.n_tokens - 1, 1)
        return await self._held(prompt)

    async def responses(self, body: Mapping[str, Any]) -> Prompt:
        """The prompt of a body of /v1/responses, which the server is seen to use."""
        prompt = await self.prompts.chat(responses.chat_body(body))
        counted = await self.server.post("/v1/responses/input_tokens", body)
        assert counted["input_tokens"] == prompt.n_tokens
        await self._prefill(prompt)
        usage = (await self.server.post("/v1/responses", {**body, "max_output_tokens": 1}))["usage"]
        assert usage["input_tokens_details"]["cached_tokens"] == prompt.n_tokens - 1
        assert usage["input_tokens"] == prompt.n_tokens
        return await self._held(prompt)

    async def _prefill(self, prompt: Prompt) -> None:
        """All but the last token, which the server computes in any case."""
        async for _ in self.api.prefill(0, head(prompt.tokens, prompt.n_tokens - 1)):
            pass

    async def _held(self, prompt: Prompt) -> Prompt:
        """The slot holds just these tokens: an answer of one token is sampled, but not put into it."""
        await self.api.save(0, "x")
        saved = await read_slot_file(self.server.save_dir / "x")
        assert unpack(saved.tokens) == unpack(prompt.tokens)
        return prompt


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=["the models' template", "an open template"]
)
async def real(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Real]:
    directory = tmp_path_factory.mktemp("models")
    template = directory / "open.jinja"
    template.write_text(models.CHAT_TEMPLATE if request.param == "the models' template" else OPEN)
    extra = ("--chat-template-file", str(template))
    async with RealServer(
        models.dense(directory), directory / "kv", slots=1, context=16_384, extra=extra
    ) as server:
        api = LlamaServer(server.url)
        try:
            yield Real(server, api)
        finally:
            await api.close()


@pytest.mark.parametrize("name", MESSAGES)
async def test_messages_have_the_tokens_of_their_chat(name: str, real: Real) -> None:
    """As counted, as reused, and as found in the slot afterwards."""
    await real.messages(MESSAGES[name])


@pytest.mark.parametrize("name", RESPONSES)
async def test_responses_have_the_tokens_of_their_chat(name: str, real: Real) -> None:
    """As counted, as reused, and as found in the slot afterwards."""
    await real.responses(RESPONSES[name])


async def test_the_stamp_of_a_request_is_no_part_of_its_prompt(real: Real) -> None:
    """Claude Code gives each another: the prompt that is there already is used all the same."""
    body = {"system": [text(HEADER), text("You are Claude Code.")], "messages": [HI]}
    first = await real.messages(body)
    body["system"] = [text(HEADER.replace("a5145", "0b1c2")), text("You are Claude Code.")]
    assert (await real.messages(body)).tokens == first.tokens


def some_messages(rng: random.Random) -> dict[str, Any]:
    """A conversation put together at random from all kinds of blocks, in orders that nobody would send too."""

    def some(*blocks: Any) -> list[Any]:
        return [rng.choice(blocks) for _ in range(rng.randrange(4))]

    texts = [text(""), text(" a\n"), text(TEXT[: rng.randrange(80)], cache_control={"type": "ephemeral"})]
    results = [RESULT, {**RESULT, "content": texts}, {**RESULT, "content": ""}]
    turns = [
        {"role": role, "content": rng.choice([TEXT[: rng.randrange(80)], some(*texts, *own)])}
        for role in rng.choices(["user", "assistant"], k=rng.randrange(6))
        for own in [[THINKING, USE, {**USE, "input": {}}] if role == "assistant" else results]
    ]
    system = rng.choice([None, "", TEXT[:50], texts, [text(HEADER), *texts]])
    tools = rng.choice([None, [], TOOLS, TOOLS[:1]])
    return {"system": system, "messages": [*turns, HI], "tools": tools}


def some_items(rng: random.Random) -> dict[str, Any]:
    """The same of items."""
    kinds = [
        *(
            ASKED,
            {"role": "developer", "content": written("", "a\n")},
            said(""),
            said("a", "b"),
            said(content="c"),
        ),
        *(CALL, REASONING, OUTPUT, {**OUTPUT, "output": written("p", "")}, said(content=[])),
    ]
    items = rng.choices(kinds, k=rng.randrange(8))
    fields: dict[str, Any] = rng.choice([{}, {"instructions": TEXT[:50]}, {"tools": [FUNCTION]}])
    return {"input": [*items, ASKED], **fields}


@pytest.mark.parametrize("seed", range(20))
async def test_bodies_of_any_shape_have_the_tokens_of_their_chat(seed: int, real: Real) -> None:
    """One of each kind for each seed."""
    await real.messages(some_messages(random.Random(seed)))
    await real.responses(some_items(random.Random(seed)))


@pytest.mark.parametrize(
    "name", ["cache_prompt", "return_progress", "lora", "n", "n_predict", "seed", "min_p", "ignore_eos"]
)
async def test_messages_drop_and_responses_keep_what_is_for_llama_server(name: str, real: Real) -> None:
    """Seen by an ill-typed value: 400 from who looks at it. So what llamaslot reads of it is in the chat body."""
    status, _ = await ask(real, "/v1/messages", {"messages": [HI], "max_tokens": 1, name: "x"})
    assert status == 200
    assert name not in messages.chat_body({"messages": [HI], name: "x"})
    status, error = await ask(real, "/v1/responses", {"input": "hi", "max_output_tokens": 1, name: "x"})
    assert status == 400
    assert name in error["error"]["message"]
    assert responses.chat_body({"input": "hi", name: "x"})[name] == "x"


INPUT_IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,aGk="}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}


@pytest.mark.parametrize(
    ("path", "convert", "body"),
    [
        ("/v1/messages", messages.chat_body, {"messages": [user(IMAGE)]}),
        ("/v1/messages", messages.chat_body, {"messages": [user({**RESULT, "content": [IMAGE]})]}),
        ("/v1/responses", responses.chat_body, {"input": [{"role": "user", "content": [INPUT_IMAGE]}]}),
        (
            "/v1/chat/completions",
            dict,
            {"messages": [user({"type": "image_url", "image_url": {"url": "x"}})]},
        ),
    ],
)
async def test_an_image_is_one_there_too(
    path: str, convert: Callable[[Mapping[str, Any]], Any], body: dict[str, Any], real: Real
) -> None:
    """A server without a model for it refuses it, before it looks at what the image is."""
    assert media.kinds(convert(body)) == {"image_url"}
    assert media.up_to_medium(convert(body))["messages"][-1]["content"][-1]["text"] == media.PLACE
    status, error = await ask(real, path, body)
    assert status == 500
    assert "image input is not supported" in error["error"]["message"]


@pytest.mark.parametrize(
    ("path", "convert", "body", "status"),
    [
        ("/v1/messages", messages.chat_body, {"system": "x"}, 500),
        ("/v1/messages", messages.chat_body, {"messages": [{"role": "user"}]}, 400),
        ("/v1/responses", responses.chat_body, {"instructions": "x"}, 400),
        ("/v1/responses", responses.chat_body, {"input": "hi", "tools": None}, 400),
        ("/v1/responses", responses.chat_body, {"input": "hi", "previous_response_id": "resp_1"}, 400),
        ("/v1/responses", responses.chat_body, {"input": [{"role": "assistant", "content": "ok"}]}, 400),
        ("/v1/responses", responses.chat_body, {"input": [{"type": "item_reference", "id": "x"}]}, 400),
        ("/v1/responses", responses.chat_body, {"input": [{**REASONING, "content": []}]}, 400),
        (
            "/v1/responses",
            responses.chat_body,
            {"input": [said(content=[{"type": "refusal", "refusal": "no"}])]},
            400,
        ),
    ],
)
async def test_what_is_refused_here_llama_server_refuses(
    path: str, convert: Callable[[Mapping[str, Any]], Any], body: dict[str, Any], status: int, real: Real
) -> None:
    """Errors of /v1/messages have the form of OpenAI's too. (Documents and unknown blocks it leaves out.)"""
    with pytest.raises(PromptNotTokenizable):
        convert(body)
    answered, error = await ask(real, path, body)
    assert answered == status
    assert set(error) == {"error"}
    assert error["error"]["code"] == status


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [HI, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [HI], "chat_template_kwargs": {"enable_thinking": "x"}},
        {"messages": [user({"type": "text"})]},
    ],
)
async def test_what_the_template_refuses_the_request_is_refused_for(body: dict[str, Any], real: Real) -> None:
    """/apply-template answers the chat body with the status and the words of the request itself."""
    answers = [
        await ask(real, path, asked)
        for path, asked in (("/v1/messages", body), ("/apply-template", messages.chat_body(body)))
    ]
    assert answers[0] == answers[1]
    assert answers[0][0] in (400, 500)


async def ask(real: Real, path: str, body: Any) -> tuple[int, Any]:
    """Status and JSON; any status is an answer."""
    async with aiohttp.request("POST", real.server.url + path, data=orjson.dumps(body)) as answer:
        return answer.status, await answer.json()
