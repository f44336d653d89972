"""The ``openai`` Python client, unchanged, against llamaslot and the real llama.cpp."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import openai
import pytest

from tests.support import models
from tests.support.stack import Stack
from tests.support.users import rendered, symbols

pytestmark = pytest.mark.real

QUESTION: Any = [{"role": "user", "content": "What is the capital of France? " + "Think about it. " * 40}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather at a place",
        "parameters": {
            "type": "object",
            "properties": {"place": {"enum": ["Paris", "Rome"]}, "celsius": {"type": "boolean"}},
            "required": ["place", "celsius"],
        },
    },
}
SCHEMA: Any = {
    "type": "json_schema",
    "json_schema": {
        "name": "capital",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}, "is_capital": {"type": "boolean"}},
            "required": ["city", "is_capital"],
            "additionalProperties": False,
        },
    },
}


@asynccontextmanager
async def client_of(tmp_path: Path, **server: Any) -> AsyncIterator[tuple[openai.AsyncOpenAI, Stack]]:
    """A client as a user makes one; without its own retries, which would hide failures."""
    async with (
        Stack(models.dense(tmp_path), tmp_path, **server) as stack,
        openai.AsyncOpenAI(base_url=stack.url + "/v1", api_key="unused", max_retries=0) as client,
    ):
        yield client, stack


async def test_an_answer_in_one_piece_and_as_a_stream_are_the_same(tmp_path: Path) -> None:
    """Content, finish reason and usage agree; the second one reuses the first one's prompt."""
    async with client_of(tmp_path) as (client, _):
        whole = await client.chat.completions.create(
            model="any", messages=QUESTION, max_tokens=30, temperature=0
        )
        text, finish, usage = "", None, None
        async for chunk in await client.chat.completions.create(
            model="any",
            messages=QUESTION,
            max_tokens=30,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        ):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                finish = choice.finish_reason or finish
    assert whole.usage is not None
    assert usage is not None
    assert text == whole.choices[0].message.content
    assert len(text) == 30
    assert finish == whole.choices[0].finish_reason == "length"
    assert usage.prompt_tokens == whole.usage.prompt_tokens == len(symbols(rendered(QUESTION)))
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1


async def test_the_streaming_helper_collects_a_whole_message(tmp_path: Path) -> None:
    """``client.chat.completions.stream``, which checks each event against its own types."""
    async with (
        client_of(tmp_path) as (client, _),
        client.chat.completions.stream(
            model="any", messages=QUESTION, max_tokens=20, temperature=0
        ) as stream,
    ):
        text = "".join([event.delta async for event in stream if event.type == "content.delta"])
    assert len(text) == 20


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_call_comes_with_its_arguments(tmp_path: Path, stream: bool) -> None:
    """A call that has been begun, and ``tool_choice`` required: the grammar makes even random weights finish it."""
    async with client_of(tmp_path) as (client, _):
        request: Any = {
            "model": "any",
            "messages": [*QUESTION, {"role": "assistant", "content": "<tool_call>\n"}],
            "tools": [WEATHER],
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "max_tokens": 300,
        }
        name, arguments = "", ""  # of the first call; random weights go on with others
        if stream:
            async for chunk in await client.chat.completions.create(**request, stream=True):
                for choice in chunk.choices:
                    for piece in choice.delta.tool_calls or ():
                        assert piece.function is not None
                        if piece.index == 0:
                            name += piece.function.name or ""
                            arguments += piece.function.arguments or ""
        else:
            calls = (await client.chat.completions.create(**request)).choices[0].message.tool_calls
            assert calls
            assert calls[0].type == "function"
            name, arguments = calls[0].function.name, calls[0].function.arguments
    assert name == "weather"
    values = json.loads(arguments)
    assert values["place"] in ("Paris", "Rome")
    assert isinstance(values["celsius"], bool)


async def test_a_tool_result_goes_back_and_the_conversation_before_it_is_reused(tmp_path: Path) -> None:
    """The second request of a tool round finds all that the first one computed but for what the template rewrites."""
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Rome"}'}}
    messages: Any = [
        *QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    async with client_of(tmp_path) as (client, _):
        first = await client.chat.completions.create(
            model="any", messages=QUESTION, tools=[WEATHER], max_tokens=5
        )
        second = await client.chat.completions.create(
            model="any", messages=messages, tools=[WEATHER], max_tokens=5
        )
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert cached >= first.usage.prompt_tokens - 1


async def test_a_schema_shapes_the_answer(tmp_path: Path) -> None:
    """``response_format`` with a JSON schema."""
    async with client_of(tmp_path) as (client, _):
        shaped = await client.chat.completions.create(
            model="any",
            messages=QUESTION,
            response_format=SCHEMA,
            max_tokens=200,
            extra_body={"reasoning_format": "none"},  # else random weights think for ever
        )
    values = json.loads(shaped.choices[0].message.content or "")
    assert values["city"] in ("Paris", "Rome")
    assert isinstance(values["is_capital"], bool)


async def test_several_choices_and_several_prompts(tmp_path: Path) -> None:
    """``n`` and a list of prompts, with the client's other endpoint for completions too."""
    async with client_of(tmp_path) as (client, _):
        chat = await client.chat.completions.create(model="any", messages=QUESTION, n=3, max_tokens=5)
        text = await client.completions.create(
            model="any", prompt=["one " * 50, "two " * 50, "three " * 50], max_tokens=5
        )
        streamed = [
            chunk.choices[0].text
            async for chunk in await client.completions.create(
                model="any", prompt="one " * 50, max_tokens=5, stream=True
            )
            if chunk.choices
        ]
    assert [choice.index for choice in chat.choices] == [0, 1, 2]
    assert [choice.index for choice in text.choices] == [0, 1, 2]
    assert len("".join(streamed)) == 5


async def test_models_and_responses_pass_through(tmp_path: Path) -> None:
    """What needs no slot passes through, what needs one takes its turn."""
    async with client_of(tmp_path) as (client, _):
        listed = [model async for model in client.models.list()]
        response = await client.responses.create(model="any", input="Hello " * 30, max_output_tokens=5)
    assert len(listed) == 1
    assert len(response.output_text) == 5


async def test_errors_are_the_clients_own(tmp_path: Path) -> None:
    """What is wrong with a request is raised as the class that the client has for its status, with a message."""
    async with client_of(tmp_path, context=512) as (client, stack):
        with pytest.raises(openai.BadRequestError) as no_messages:
            await client.post("/chat/completions", body={"model": "any"}, cast_to=object)
        with pytest.raises(openai.BadRequestError) as wrong_type:
            await client.chat.completions.create(model="any", messages=cast(Any, "hello"))
        with pytest.raises(openai.BadRequestError) as too_long:
            await client.completions.create(model="any", prompt="a" * 600)
        with pytest.raises(openai.BadRequestError) as too_long_stream:
            await client.completions.create(model="any", prompt="a" * 600, stream=True)
        with pytest.raises(openai.BadRequestError) as too_many:
            await client.completions.create(model="any", prompt="a", n=9)
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.get("/nothing", cast_to=object)
        with pytest.raises(openai.PermissionDeniedError):
            await openai.AsyncOpenAI(base_url=stack.url, api_key="unused", max_retries=0).post(
                "/slots/0?action=erase", body={}, cast_to=object
            )
        await stack.server.stop()
        with pytest.raises(openai.InternalServerError) as down:
            await client.chat.completions.create(model="any", messages=QUESTION)
        await stack.server.start()
        await stack.llamaslot.healthy()
        again = await client.chat.completions.create(
            model="any", messages=[{"role": "user", "content": "Hello"}], max_tokens=5
        )
    for error in (no_messages, wrong_type, too_long, too_long_stream, too_many, unknown, down):
        assert isinstance(error.value.body, dict), error.value
        assert error.value.body["message"], error.value
        assert error.value.body["type"], error.value
    assert too_long.value.type == too_long_stream.value.type == "exceed_context_size_error"
    assert down.value.status_code == 503
    assert len(again.choices[0].message.content or "") == 5
