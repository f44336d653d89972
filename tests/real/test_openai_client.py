"""The ``openai`` Python client, unchanged, against llamaslot and the real llama.cpp."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import pytest_asyncio

from tests.support import models
from tests.support.sdk import N_SLOTS, PLACE, Imported, at_rest, at_work, sdk_stack
from tests.support.stack import Stack
from tests.support.users import rendered, symbols

if TYPE_CHECKING:
    import openai
else:
    openai = Imported("openai")

pytestmark = [
    pytest.mark.real,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.xdist_group("clients"),  # imported once
]

QUESTION: Any = [{"role": "user", "content": "What is the capital of France? " + "Think about it. " * 40}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather at a place",
        "parameters": PLACE,
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


def asking(text: str) -> Any:
    return [{"role": "user", "content": text}]


@dataclass(slots=True)
class Open:
    """The client, as a user makes one but for its own retries, which would hide failures."""

    client: openai.AsyncOpenAI
    stack: Stack


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stacked(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Open]:
    async with (
        sdk_stack(tmp_path_factory.mktemp("openai")) as stack,
        openai.AsyncOpenAI(base_url=stack.url + "/v1", api_key="unused", max_retries=0) as client,
    ):
        yield Open(client, stack)


@pytest.fixture(scope="module")
def client(stacked: Open) -> openai.AsyncOpenAI:
    return stacked.client


async def test_an_answer_in_one_piece_and_as_a_stream_are_the_same(client: openai.AsyncOpenAI) -> None:
    """Content, finish reason and usage agree; the second one reuses the first one's prompt."""
    whole = await client.chat.completions.create(model="any", messages=QUESTION, max_tokens=30, temperature=0)
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


async def test_the_streaming_helper_collects_a_whole_message(client: openai.AsyncOpenAI) -> None:
    """``client.chat.completions.stream``, which checks each event against its own types."""
    async with client.chat.completions.stream(
        model="any", messages=QUESTION, max_tokens=20, temperature=0
    ) as stream:
        text = "".join([event.delta async for event in stream if event.type == "content.delta"])
    assert len(text) == 20


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_call_comes_with_its_arguments(client: openai.AsyncOpenAI, stream: bool) -> None:
    """A call that has been begun, and ``tool_choice`` required: the grammar makes even random weights finish it."""
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


async def test_a_tool_result_goes_back_and_the_conversation_before_it_is_reused(
    client: openai.AsyncOpenAI,
) -> None:
    """The second request of a tool round finds all that the first one computed but for what the template rewrites."""
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Rome"}'}}
    messages: Any = [
        *QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
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


async def test_a_schema_shapes_the_answer(client: openai.AsyncOpenAI) -> None:
    """``response_format`` with a JSON schema."""
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


async def test_several_choices_and_several_prompts(client: openai.AsyncOpenAI) -> None:
    """``n`` and a list of prompts, with the client's other endpoint for completions too."""
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


async def test_models_are_listed(client: openai.AsyncOpenAI) -> None:
    """The one that llama-server has; it is found by its name, too."""
    listed = [model async for model in client.models.list()]
    assert len(listed) == 1


@pytest.mark.parametrize("spoken", ["Hello " * 30, [{"role": "user", "content": "Hello " * 30}]])
async def test_a_response_is_the_same_in_one_piece_and_as_a_stream(
    client: openai.AsyncOpenAI, spoken: Any
) -> None:
    """The last event has the whole response. (The client's helper wants an ``output_index``, which no event has.)"""
    request: Any = {"model": "any", "input": spoken, "instructions": "Be brief.", "temperature": 0}
    whole = await client.responses.create(**request, max_output_tokens=5)
    stream = await client.responses.create(**request, max_output_tokens=5, stream=True)
    events: list[Any] = [event async for event in stream]
    names = [event.type for event in events]
    assert names[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert names[-1] == "response.completed"
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    final = events[-1].response
    assert text == final.output_text == whole.output_text
    assert len(text) == 5
    assert whole.usage is not None
    assert final.usage.input_tokens == whole.usage.input_tokens
    assert final.usage.input_tokens_details.cached_tokens >= whole.usage.input_tokens - 2


async def test_a_function_call_of_a_response_goes_back_with_its_output(client: openai.AsyncOpenAI) -> None:
    """A whole tool round on the other route; what was before it is reused."""
    tool = {"type": "function", **WEATHER["function"]}
    asked: Any = [{"role": "user", "content": "The weather? " * 20}]
    round_: Any = [
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"place": "Rome"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
    ]
    request: Any = {"model": "any", "tools": [tool], "max_output_tokens": 5}
    first = await client.responses.create(**request, input=asked)
    second = await client.responses.create(**request, input=asked + round_)
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens - 2


async def test_input_tokens_of_a_response_are_counted_as_they_are_used(client: openai.AsyncOpenAI) -> None:
    """The client has a method for that."""
    counted = await client.responses.input_tokens.count(model="any", input="How many? " * 9)
    used = await client.responses.create(model="any", input="How many? " * 9, max_output_tokens=1)
    assert used.usage is not None
    assert counted.input_tokens == used.usage.input_tokens


async def test_clients_that_leave_in_the_middle_give_their_slots_back(stacked: Open) -> None:
    """As many as there are slots; the next ones are served, each in one of them."""

    async def leave(n: int) -> None:
        request: Any = {"model": "any", "messages": asking(f"Story {n}?"), "max_tokens": 4000}
        async with await stacked.client.chat.completions.create(**request, stream=True) as stream:
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    break

    await asyncio.gather(*(leave(n) for n in range(N_SLOTS)))
    answers = await asyncio.gather(
        *(
            stacked.client.chat.completions.create(model="any", messages=asking(f"Next {n}?"), max_tokens=5)
            for n in range(N_SLOTS)
        )
    )
    assert [len(answer.choices[0].message.content or "") for answer in answers] == [5] * N_SLOTS
    await at_rest(stacked.stack)


@pytest.mark.parametrize(("route", "stream"), [("chat", True), ("responses", False)])
async def test_a_client_that_leaves_before_the_first_token_gives_its_slot_back(
    stacked: Open, route: str, stream: bool
) -> None:
    """While its prompt is computed; who comes next is served."""
    messages, client = asking(f"{route} {stream}? " + "A long story. " * 500), stacked.client

    async def read() -> None:
        answer: Any
        if route == "chat":
            answer = await client.chat.completions.create(model="any", messages=messages, stream=stream)
        else:
            answer = await client.responses.create(model="any", input=messages, stream=stream)
        async for _ in answer:  # a response is announced before its first token
            pass

    async with asyncio.TaskGroup() as group:
        leaver = group.create_task(read())
        await at_work(stacked.stack)
        leaver.cancel()
    assert leaver.cancelled()
    answer = await client.chat.completions.create(model="any", messages=asking("Next?"), max_tokens=5)
    assert len(answer.choices[0].message.content or "") == 5
    await at_rest(stacked.stack)


async def test_errors_are_the_clients_own(tmp_path: Path) -> None:
    """What is wrong with a request is raised as the class that the client has for its status, with a message."""
    async with (
        Stack(models.dense(tmp_path), tmp_path, context=512) as stack,
        openai.AsyncOpenAI(base_url=stack.url + "/v1", api_key="unused", max_retries=0) as client,
    ):
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
