"""An answer of llama-server, event by event."""

from __future__ import annotations

from typing import Any, cast

import pytest

from llamaslot.formats import FORMATS
from llamaslot.formats.base import ErrorEvents
from llamaslot.http.stream_reader import Reading
from llamaslot.llama.answers import Response, Take
from llamaslot.llama.sse import event_of
from llamaslot.scheduling.plan import PrefillStats

USAGE = {"cache_read_input_tokens": 9, "input_tokens": 1}
START = event_of({"type": "message_start", "message": {"usage": USAGE}}, b"event: message_start\n")
DELTA = b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"a"}}\n\n'
STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
MADE_UP = b"event: message_start\ndata: {}\n\n"
PROGRESS = {"total": 10, "cache": 4, "processed": 8, "time_ms": 3}


class Upstream:
    """As much of a response as Reading needs: chunks, one after the other."""

    def __init__(self, *chunks: bytes) -> None:
        self._chunks = list(chunks)

    async def pass_to(self, take: Take) -> bool:
        while self._chunks:
            if not take(self._chunks.pop(0)):
                return True
        return False


def reading(*chunks: bytes, kind: str = "chat", earlier: PrefillStats | None = None, **more: Any) -> Reading:
    upstream = cast(Response, Upstream(*chunks))
    return Reading(upstream, FORMATS[kind], earlier, ErrorEvents(""), **more)


async def passed(it: Reading) -> bytes:
    events = b""
    while (some := await it.next()) is not None:
        events += b"".join(some)
    return events


async def test_a_message_that_begins_without_its_start_gets_one() -> None:
    """Where the first token is half a character llama-server leaves it out, and clients fail."""
    assert await passed(reading(DELTA, STOP, start=MADE_UP)) == MADE_UP + DELTA + STOP
    assert await passed(reading(START, DELTA, STOP, start=MADE_UP)) == START + DELTA + STOP


async def test_an_error_needs_no_start() -> None:
    """It is all that comes."""
    error = b'event: error\ndata: {"code":500,"message":"no"}\n\n'
    it = reading(error, start=MADE_UP)
    assert await passed(it) == error
    assert it.has_failed
    assert it.is_over


async def test_progress_is_for_those_who_have_asked_for_it() -> None:
    """It is noted in any case."""
    event = event_of({"choices": [{"index": 0, "delta": {"role": "assistant"}}], "prompt_progress": PROGRESS})
    it = reading(event)
    assert await passed(it) == b""
    assert (it.n_found, it.n_processed, it.has_token) == (4, 8, False)
    assert await passed(reading(event, wants_progress=True)) == event


async def test_text_that_comes_with_progress_is_passed_on() -> None:
    """What the template begins the answer with."""
    delta = {"choices": [{"index": 0, "delta": {"content": "<think>"}}]}
    assert await passed(reading(event_of({**delta, "prompt_progress": PROGRESS}))) == event_of(delta)


async def test_a_response_is_said_to_be_in_progress_once() -> None:
    """Also to who has not asked for progress; the others read it after each batch."""
    created = event_of({"type": "response.created"}, b"event: response.created\n")
    plain = event_of({"type": "response.in_progress"}, b"event: response.in_progress\n")
    told = event_of({"type": "response.in_progress", "prompt_progress": PROGRESS}, plain)
    assert await passed(reading(created, told, told)) == created + plain
    assert await passed(reading(created + told + told, wants_progress=True)) == created + told + told


async def test_each_of_several_responses_is_said_to_be_in_progress() -> None:
    """With ``n`` llama-server begins again for each."""
    created = event_of({"type": "response.created"}, b"event: response.created\n")
    plain = event_of({"type": "response.in_progress"}, b"event: response.in_progress\n")
    told = event_of({"type": "response.in_progress", "prompt_progress": PROGRESS}, plain)
    assert await passed(reading(created, told, told, created, told)) == (created + plain) * 2
    assert await passed(reading(created, created, told)) == created * 2 + plain


async def test_a_response_is_not_created_before_its_place_is_known() -> None:
    """The first event of progress tells whether it is asked for again elsewhere, where it is created once more."""
    it = reading(event_of({"type": "response.created"}, b"event: response.created\n"))
    assert await it.next() == []


@pytest.mark.parametrize(
    ("kind", "last"),
    [("chat", b"data: [DONE]\n\n"), ("openai-completion", b"data: [DONE]\n\n"), ("messages", STOP),
     ("native-completion", event_of({"content": "", "stop": True, "timings": {}})),
     ("responses", b'event: response.completed\ndata: {"type":"response.completed"}\n\n')],
)  # fmt: skip
async def test_the_last_event_is_known_in_every_format(kind: str, last: bytes) -> None:
    """The slot is given back before the client can read it."""
    it = reading(event_of({"content": "a"}), last, kind=kind)
    await it.next()
    assert not it.is_over
    await it.next()
    assert it.is_over


async def test_the_first_token_of_a_response_is_not_its_announcement() -> None:
    """``response.created`` comes before anything is computed."""
    it = reading(
        b'event: response.created\ndata: {"type":"response.created"}\n\n',
        b'event: response.output_item.added\ndata: {"type":"response.output_item.added"}\n\n',
    )
    await it.next()
    assert not it.has_token
    await it.next()
    assert it.has_token


async def test_usage_is_put_right_in_every_format() -> None:
    """Of ten tokens nine were there when llama-server was asked, four when the client asked."""
    earlier = PrefillStats(4, 9, 1.0)
    assert b'"cache_read_input_tokens":4,"input_tokens":6' in await passed(
        reading(START, kind="messages", earlier=earlier)
    )
    usage = {"input_tokens": 10, "input_tokens_details": {"cached_tokens": 9}}
    completed = event_of({"response": {"usage": usage}}, b"event: response.completed\n")
    it = reading(completed, kind="responses", earlier=earlier)
    told = await passed(it)
    assert told.startswith(b"event: response.completed\ndata: ")
    assert b'"cached_tokens":4' in told
    assert it.n_cached == 9, "what llama-server itself has found"


TOKEN = event_of({"choices": [{"index": 0, "delta": {"content": "a"}}]})
END = event_of({"choices": [], "timings": {"cache_n": 1, "prompt_n": 2}})


class Client:
    """Takes events at once, as long as it ``is_quick``."""

    def __init__(self, *, is_quick: bool = True) -> None:
        self.got, self.is_quick = b"", is_quick

    def put(self, data: bytes) -> bool:
        self.got += data if self.is_quick else b""
        return self.is_quick


async def relayed(it: Reading, client: Client) -> tuple[bytes, int]:
    """All that reaches the client, and how often the task was woken for it."""
    n_woken = 0
    while (events := await it.next(client.put)) is not None:
        n_woken += 1
        client.got += b"".join(events)
    return client.got, n_woken


async def test_tokens_wake_no_task() -> None:
    """After the first, until one comes that is looked at; several in one read are one write."""
    chunks = [TOKEN, TOKEN, TOKEN * 3, TOKEN, END, b"data: [DONE]\n\n"]
    it = reading(*chunks)
    assert await relayed(it, Client()) == (b"".join(chunks), 3)
    assert it.timings == {"cache_n": 1, "prompt_n": 2}
    assert it.is_over


@pytest.mark.parametrize("n", [1, 7, 64, 1000])
async def test_events_are_whole_however_they_are_cut(n: int) -> None:
    """The client gets the same bytes, and each time whole events."""
    stream = TOKEN * 40 + END + b"data: [DONE]\n\n"
    got: list[bytes] = []
    it = reading(*(stream[at : at + n] for at in range(0, len(stream), n)))

    def put(data: bytes) -> bool:
        got.append(data)
        return True

    while (events := await it.next(put)) is not None:
        got.extend(events)
    assert b"".join(got) == stream
    assert all(part.endswith(b"\n\n") for part in got)
    assert it.timings is not None


async def test_a_slow_client_is_waited_for() -> None:
    """It gets the events from the task, which waits."""
    it = reading(TOKEN, TOKEN, TOKEN, b"data: [DONE]\n\n")
    assert await relayed(it, Client(is_quick=False)) == (TOKEN * 3 + b"data: [DONE]\n\n", 4)


@pytest.mark.parametrize(
    "event",
    [b": ping\n\n", b": ping\n\n" + TOKEN, TOKEN + b": ping\n\n", b'data: {"error":{"message":"x"}}\n\n',
     event_of({"usage": {"prompt_tokens": 1}}), event_of({"prompt_progress": PROGRESS})],
)  # fmt: skip
async def test_what_is_noted_or_changed_is_looked_at(event: bytes) -> None:
    """As without a client that takes events at once."""
    plain = await passed(reading(TOKEN, event, TOKEN))
    assert (await relayed(reading(TOKEN, event, TOKEN), Client()))[0] == plain


async def test_a_response_continues_from_the_last_event() -> None:
    """Its error has the next number, though nothing has looked at the events in between."""
    created = event_of({"type": "response.created", "response": {"id": "r"}}, b"event: response.created\n")
    delta = [
        event_of(
            {"type": "response.output_text.delta", "sequence_number": n},
            b"event: response.output_text.delta\n",
        )
        for n in range(1, 6)
    ]
    errors = FORMATS["responses"].errors("")
    upstream = cast(Response, Upstream(created, delta[0], delta[1], delta[2] + delta[3] + delta[4]))
    client = Client()
    _, n_woken = await relayed(Reading(upstream, FORMATS["responses"], None, errors), client)
    assert n_woken == 2
    assert b'"sequence_number":6' in errors.event({"message": "no", "code": 500, "type": "server_error"})


async def test_an_assembled_answer_wakes_its_task_once() -> None:
    """At its end."""
    assembly = FORMATS["chat"].assembly({"stream": False})
    assert assembly is not None
    it = reading(TOKEN, TOKEN, TOKEN, END + b"data: [DONE]\n\n", assembly=assembly)
    assert await relayed(it, Client()) == (b"", 2)
    assert it.is_over
