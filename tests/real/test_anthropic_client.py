"""The ``anthropic`` Python client, unchanged, against llamaslot and the real llama.cpp."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import pytest
import pytest_asyncio

from tests.support.sdk import N_CTX, N_SLOTS, PLACE, Imported, at_rest, at_work, sdk_stack
from tests.support.stack import Stack

if TYPE_CHECKING:
    import anthropic
else:
    anthropic = Imported("anthropic")

pytestmark = [
    pytest.mark.real,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.xdist_group("clients"),  # imported once
]

SYSTEM: Any = [{"type": "text", "text": "Be brief. " * 20, "cache_control": {"type": "ephemeral"}}]
WEATHER: Any = {"name": "weather", "description": "The weather at a place", "input_schema": PLACE}
BEGUN: Any = {"role": "assistant", "content": "<tool_call>\n"}  # random weights would never begin one


def asking(text: str, **more: Any) -> dict[str, Any]:
    """A request that is answered the same way each time."""
    turn = {"role": "user", "content": f"{text} " + "Think about it. " * 20}
    firm = {"temperature": 0}  # no parameter of this client any more
    return {
        "model": "any",
        "max_tokens": 20,
        "system": SYSTEM,
        "messages": [turn],
        "extra_body": firm,
        **more,
    }


@dataclass(slots=True)
class Claude:
    """The client, as a user makes one but for its own retries, which would hide failures."""

    client: anthropic.AsyncAnthropic
    stack: Stack

    async def create(self, **request: Any) -> anthropic.types.Message:
        return cast(anthropic.types.Message, await self.client.messages.create(**request))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def claude(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Claude]:
    async with (
        sdk_stack(tmp_path_factory.mktemp("anthropic")) as stack,
        anthropic.AsyncAnthropic(base_url=stack.url, api_key="unused", max_retries=0) as client,
    ):
        yield Claude(client, stack)


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


async def test_an_answer_in_one_piece_and_as_a_stream_are_the_same(claude: Claude) -> None:
    """Text, stop reason and usage agree; the second one reuses the first one's prompt."""
    request = asking("What is the capital of France?")
    whole = await claude.create(**request)
    async with claude.client.messages.stream(**request) as stream:
        pieces = [piece async for piece in stream.text_stream]
        streamed = await stream.get_final_message()
    assert len(pieces) > 1
    assert "".join(pieces) == text_of(streamed) == text_of(whole)
    assert len(text_of(whole)) == 20
    assert streamed.stop_reason == whole.stop_reason == "max_tokens"
    assert streamed.usage.output_tokens == whole.usage.output_tokens == 20
    n_prompt = whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    assert streamed.usage.input_tokens + (streamed.usage.cache_read_input_tokens or 0) == n_prompt
    assert (streamed.usage.cache_read_input_tokens or 0) >= n_prompt - 2


async def test_raw_events_come_in_their_order(claude: Claude) -> None:
    """What applications that do without the helper rely on."""
    events = await claude.client.messages.create(**asking("Raw?", max_tokens=3), stream=True)
    names = [event.type async for event in events]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[2:-3]) == {"content_block_delta"}


@pytest.mark.parametrize("tools", [[], [WEATHER]])
async def test_tokens_are_counted_as_they_are_used(claude: Claude, tools: Any) -> None:
    """``count_tokens`` and the usage of the answer agree."""
    request = asking("How many?", tools=tools)
    counted = await claude.client.messages.count_tokens(
        **{name: request[name] for name in ("model", "system", "messages", "tools")}
    )
    usage = (await claude.create(**request)).usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
async def test_a_tool_is_used_with_its_input(claude: Claude, choice: Any, stream: bool) -> None:
    """A call that has been begun, and a choice that demands one: the grammar makes even random weights finish it."""
    request = asking("Weather?", tools=[WEATHER], tool_choice=choice, max_tokens=120)
    request["messages"] = [*request["messages"], BEGUN]
    if stream:
        async with claude.client.messages.stream(**request) as events:
            message: anthropic.types.Message = await events.get_final_message()
    else:
        message = await claude.create(**request)
    used = next(block for block in message.content if block.type == "tool_use")
    assert used.name == "weather"
    values = cast(dict[str, Any], used.input)
    assert values["place"] in ("Paris", "Rome")
    assert isinstance(values["celsius"], bool)


async def test_a_tool_result_goes_back_and_what_was_before_it_is_reused(claude: Claude) -> None:
    """A whole tool round, with text beside the call, a result in blocks, and one that is an error."""
    request = asking("A tool round?", tools=[WEATHER])
    first = await claude.create(**request)
    calls = [
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "a", "name": "weather", "input": {"place": "Rome", "celsius": True}},
        {"type": "tool_use", "id": "b", "name": "weather", "input": {"place": "Paris", "celsius": True}},
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "sunny"}]},
        {"type": "tool_result", "tool_use_id": "b", "content": "no such place", "is_error": True},
        {"type": "text", "text": "And now?"},
    ]
    turns = [{"role": "assistant", "content": calls}, {"role": "user", "content": results}]
    second = await claude.create(**{**request, "messages": [*request["messages"], *turns]})
    n_first = first.usage.input_tokens + (first.usage.cache_read_input_tokens or 0)
    assert (second.usage.cache_read_input_tokens or 0) >= n_first - 2
    assert text_of(second)


async def test_thinking_may_be_asked_for(claude: Claude) -> None:
    """As Claude Code does; what a model thinks that has no reasoning is its text."""
    request = asking("Think?", max_tokens=2000, thinking={"type": "enabled", "budget_tokens": 1024})
    message = await claude.create(**request, stop_sequences=["a", "e", "i", "o", "u"])
    assert message.stop_reason == "end_turn"  # so llama-server calls it


async def test_models_are_listed(claude: Claude) -> None:
    """The same list that OpenAI's client reads."""
    assert len([model async for model in claude.client.models.list()]) == 1


async def test_errors_are_the_clients_own(claude: Claude) -> None:
    """What is wrong with a request is raised as the class that the client has for its status, with a message."""
    client, long = claude.client, [{"role": "user", "content": "a" * N_CTX}]
    with pytest.raises(anthropic.BadRequestError) as too_long:
        await claude.create(**asking("", messages=long))
    with pytest.raises(anthropic.BadRequestError) as too_long_stream:
        await claude.create(**asking("", messages=long), stream=True)
    with pytest.raises(anthropic.BadRequestError) as wrong_type:
        await claude.create(**asking("", extra_body={"max_tokens": "many"}))
    with pytest.raises(anthropic.BadRequestError) as no_json:
        await client.post("/v1/messages", content=b"{", cast_to=object)
    with pytest.raises(anthropic.NotFoundError) as unknown:
        await client.get("/v1/nothing", cast_to=object)
    with pytest.raises(anthropic.PermissionDeniedError) as forbidden:
        await client.post("/slots/0?action=erase", body={}, cast_to=object)
    with pytest.raises(anthropic.InternalServerError) as no_messages:  # llama-server's own status for this
        await client.post("/v1/messages", body={"max_tokens": 1}, cast_to=object)
    for error in (too_long, too_long_stream, wrong_type, no_json, unknown, forbidden, no_messages):
        assert isinstance(error.value.body, dict), error.value
        assert error.value.body["error"]["message"], error.value
    assert cast(Any, too_long.value.body)["error"]["type"] == "exceed_context_size_error"
    assert text_of(await claude.create(**asking("And after that?")))


async def test_clients_that_leave_in_the_middle_give_their_slots_back(claude: Claude) -> None:
    """As many as there are slots; the next ones are served, each in one of them."""
    async with asyncio.TaskGroup() as leaving:
        for n in range(N_SLOTS):
            leaving.create_task(leave_in_the_middle(claude, f"Story {n}?"))
    answers = await asyncio.gather(*(claude.create(**asking(f"Next {n}?")) for n in range(N_SLOTS)))
    assert [len(text_of(answer)) for answer in answers] == [20] * N_SLOTS
    await at_rest(claude.stack)


async def leave_in_the_middle(claude: Claude, text: str) -> None:
    async with claude.client.messages.stream(**asking(text, max_tokens=4000)) as stream:
        async for _ in stream.text_stream:
            break


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_before_the_first_token_gives_its_slot_back(
    claude: Claude, stream: bool
) -> None:
    """While its prompt is computed; who comes next is served."""
    request = asking(f"{stream}? " + "A long story. " * 500)
    async with asyncio.TaskGroup() as group:
        leaver = group.create_task(claude.client.messages.create(**request, stream=stream))
        await at_work(claude.stack)
        leaver.cancel()
    assert leaver.cancelled()
    assert len(text_of(await claude.create(**asking("Next?")))) == 20
    await at_rest(claude.stack)
