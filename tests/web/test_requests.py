"""What clients send, well-formed or not."""

from __future__ import annotations

import asyncio
import gc
import gzip
import itertools
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llamaslot.fleet.failover import Attempts
from llamaslot.http.client_stream import Downstream
from llamaslot.http.in_flight import InFlight
from llamaslot.tokens.tokenizer import NoPrompt
from tests.support.answers import without_progress
from tests.support.inprocess import CHAT, NATIVE, TEXT, Served, letters, right, served

USER = {"role": "user", "content": "hello"}
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("path", [CHAT, TEXT, NATIVE, "/v1/responses", "/infill"])
async def test_what_is_no_json_object_is_refused(tmp_path: Path, path: str) -> None:
    """400 of the OpenAI shape, in the words of llama-server; no slot is taken for it."""
    async with served(tmp_path) as it:
        for data in (b"", b"{", b'{"stream": true,}', b"\xff", b"[1, 2]", b'"text"'):
            n_before = len(it.fake.sent(path))
            answer = await it.send("POST", path, data=data, headers=JSON)
            assert [seen.slot for seen in it.fake.sent(path)[n_before:]] == [None], data
            direct = await it.send("POST", path, data=data, headers=JSON, to=it.fake.url)
            assert answer.status == direct.status == 400, data
            assert answer.json == direct.json
            assert answer.headers["Content-Type"].startswith("application/json")
            assert answer.error["type"] == "invalid_request_error"
            assert answer.error["code"] == 400


REFUSED: list[tuple[str, Any]] = [
    (CHAT, {}),
    (CHAT, {"messages": "hello"}),
    (CHAT, {"messages": [{"content": "no role"}]}),
    (CHAT, {"messages": [{"role": "user"}]}),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}),
    (CHAT, {"messages": [USER], "max_tokens": "many"}),
    (CHAT, {"messages": [USER], "stream": "yes"}),
    (CHAT, {"messages": [USER], "temperature": "hot"}),
    (CHAT, {"messages": [USER], "n": 3}),
    (CHAT, {"messages": [USER], "n": 0}),
    (CHAT, {"messages": [USER], "n": "two"}),
    (TEXT, {"prompt": "x", "n": 3, "stream": True}),
    (NATIVE, {"prompt": "x", "n_cmpl": 99}),
    (NATIVE, {"prompt": [999_999]}),
    (NATIVE, {"prompt": letters(1, 600)}),
    (TEXT, {"prompt": letters(1, 512), "stream": True}),
    (CHAT, {"messages": [{"role": "user", "content": letters(1, 500)}]}),
    (NATIVE, {"prompt": ["short", letters(1, 600)]}),
    ("/v1/nothing", {"a": 1}),
    ("/v1/embeddings", {"input": "x"}),
]


async def test_what_llama_server_refuses_is_refused_in_its_words(tmp_path: Path) -> None:
    """Status, type and body are what the server says when it is asked directly; both slots stay as they were."""
    async with served(tmp_path, context=512) as it:
        it.fake.faults.fail("save", times=100)  # nothing comes back from disk
        kept = [(await it.ask(letters(n, 300))).slot for n in (11, 12)]
        held = [it.fake.slots[slot].tokens for slot in kept]
        answers = []
        for path, body in REFUSED:
            answers.append(await it.post(path, body))
            assert [it.fake.slots[slot].tokens for slot in kept] == held, body
        again = [await it.ask(letters(n, 300) + "more") for n in (11, 12)]
        assert [one.n_reused for one in again] == [300, 300]
        for (path, body), answer in zip(REFUSED, answers, strict=True):
            direct = await it.post(
                path, body, to=it.fake.url
            )  # may take a slot for a prompt before the one refused
            assert answer.status == direct.status >= 400, body
            assert answer.json == direct.json
            assert answer.headers["Content-Type"] == direct.headers["Content-Type"]


async def test_prompts_of_the_wrong_type_are_refused(tmp_path: Path) -> None:
    """Before a slot is taken."""
    bodies: list[tuple[Any, str]] = [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "must not be empty"),
        ({"prompt": [[], {}]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
    ]
    async with served(tmp_path) as it:
        for (body, said), path in itertools.product(bodies, (TEXT, NATIVE)):
            answer = await it.post(path, body)
            assert answer.status == 400, body
            assert said in answer.error["message"]


@pytest.mark.parametrize("call", [{"path": "/"}, [{"path": "/"}]], ids=["known", "unknown"])
async def test_messages_have_one_answer_whatever_is_asked(tmp_path: Path, call: Any) -> None:
    """As the server reads them, also where their tokens are not known: with a slot, as all that it answers."""
    use = {"type": "tool_use", "id": "t1", "name": "read", "input": call}
    messages = [USER, {"role": "assistant", "content": [use]}, USER]
    async with served(tmp_path) as it:
        session = it.backend.session
        for n in (3, 2**32):
            answer = await it.post(
                "/v1/messages", {"messages": messages, "max_tokens": 2, "n": n, "n_cmpl": n}
            )
            assert answer.status == 200
        assert it.backend.session is session


@pytest.mark.parametrize("prompt", ["", ["x", ""]])
async def test_an_empty_prompt_has_one_answer(tmp_path: Path, prompt: Any) -> None:
    """With two llama-server would never end, nor give their slots back."""
    async with served(tmp_path) as it:
        answer = await it.post(NATIVE, {"prompt": prompt, "n_predict": 2, "n_cmpl": 2})
        assert (answer.status, "an empty 'prompt' has only one answer" in answer.error["message"]) == (
            400,
            True,
        )
        assert (await it.post(NATIVE, {"prompt": "", "n_predict": 2})).status == 200


async def test_what_llama_server_accepts_against_expectation_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It ran in a slot that nobody had leased: llama-server is met again, to see what the slots hold."""

    async def refuse(*_: Any) -> Any:
        raise NoPrompt("no prompt")

    async with served(tmp_path) as it:
        assert (await it.ask(letters(1, 300))).status == 200
        session = it.backend.session
        with monkeypatch.context() as patch:
            patch.setattr("llamaslot.http.parse._plain", refuse)
            answer = await it.post(NATIVE, {"prompt": letters(2, 300), "stream": True, "n_predict": 500})
        assert (answer.status, answer.error["message"]) == (400, "no prompt")
        assert (await it.ask(letters(1, 300))).status == 200
        assert it.backend.session is not session
    assert "that llamaslot takes for invalid" in caplog.text


async def test_a_body_that_is_too_large_is_refused(tmp_path: Path) -> None:
    """413, whether its length was announced or not; one that just fits is served."""

    async def pieces() -> Any:
        for _ in range(30):
            yield b" " * 100

    paths = (CHAT, TEXT, NATIVE, "/v1/responses", "/v1/messages")
    async with served(tmp_path, {"listen": {"max_body": "2000B"}}) as it:
        for path, is_chunked in itertools.product(paths, (True, False)):
            data = pieces() if is_chunked else b" " * 3000
            async with it.session.post(it.url + path, data=data, headers=JSON) as response:
                assert response.status == 413, (path, is_chunked)
                error = (await response.json())["error"]
            assert "2000 bytes" in error["message"]
            assert error["type"] == "invalid_request_error"
        assert (await it.ask(letters(1, 1900))).status == 200


async def test_a_large_body_is_served(tmp_path: Path) -> None:
    """aiohttp's own limit of 1 MiB is not ours."""
    async with served(tmp_path) as it:
        body = {"prompt": letters(1, 100), "n_predict": 4, "ignored": "x" * (3 << 20)}
        answer = await it.post(NATIVE, body)
    assert answer.text == right(it.fake, letters(1, 100))


async def test_a_compressed_body_is_unpacked(tmp_path: Path) -> None:
    """For completions and for what passes through; the server gets it plain, and is not told otherwise."""
    headers = {**JSON, "Content-Encoding": "gzip"}
    async with served(tmp_path) as it:
        packed = gzip.compress(b'{"prompt": "hello there", "n_predict": 4}')
        answer = await it.send("POST", NATIVE, data=packed, headers=headers)
        tokens = await it.send("POST", "/tokenize", data=gzip.compress(b'{"content": "hi"}'), headers=headers)
    assert answer.text == right(it.fake, "hello there")
    assert tokens.json == {"tokens": [104, 105]}


async def test_the_clients_choice_of_a_slot_is_ignored(tmp_path: Path) -> None:
    """The follow-up runs where its context is; every request to the server names the leased slot."""
    async with served(tmp_path) as it:
        first = await it.ask(letters(1, 300))
        for wish in (0, 1, -1, 77, "1"):
            answer = await it.ask(letters(1, 300) + "more", id_slot=wish)
            assert answer.slot == first.slot
            assert answer.n_reused >= 300
        assert {seen.slot for seen in it.fake.sent(NATIVE)[-5:]} == {first.slot}


@pytest.mark.parametrize("chunk_threshold_s", [0, 3600])
async def test_nothing_cached_is_used_where_the_client_forbids_it(
    tmp_path: Path, chunk_threshold_s: float
) -> None:
    """``cache_prompt`` false: everything is computed, in the slot whose loss costs least."""
    async with served(tmp_path, {"prefill": {"chunk_threshold_s": chunk_threshold_s}}) as it:
        kept = await it.ask(letters(1, 1000))
        answer = await it.ask(letters(1, 1000), cache_prompt=False)
        assert answer.timings["cache_n"] == 0
        assert answer.timings["prompt_n"] == 1000
        assert answer.slot != kept.slot
        assert answer.text == kept.text
        again = await it.ask(letters(1, 1000) + "more")
    assert again.n_reused == 1000


async def test_a_context_with_other_lora_scales_is_nobodys_afterwards(tmp_path: Path) -> None:
    """Computed from nothing, and emptied before the next one uses the slot."""
    async with served(tmp_path, slots=1) as it:
        await it.ask(letters(1, 300))
        scaled = await it.ask(letters(1, 300), lora=[{"id": 0, "scale": 0.5}])
        plain = await it.ask(letters(1, 300) + "more")
        assert plain.timings["cache_n"] in (0, 300)  # 300 from what was saved before
        assert [seen.action for seen in it.fake.requests if seen.action][-3:].count("erase") >= 1
    assert scaled.timings["cache_n"] == 0
    assert plain.source in ("cold", "snapshot")


async def test_a_conversation_id_is_not_passed_on(tmp_path: Path) -> None:
    """Nor is anything of the client's connection, nor its key; its other headers are."""
    async with served(tmp_path) as it:
        ours = {"Authorization": "Bearer client", "X-Api-Key": "client", "Api-Key": "client"}
        ours |= {"X-Llamaslot-User": "client", "X-Conversation-Id": "client"}
        headers = {"X-Other": "kept", "Cookie": "a=kept", **ours}
        for path, body in ((NATIVE, {"prompt": "x", "n_predict": 1}), ("/tokenize", {"content": "x"}),
                           ("/v1/messages", {"messages": [USER], "max_tokens": 1})):  # fmt: skip
            await it.send("POST", path, body=body, headers=headers)
            seen = it.fake.sent(path)[-1].headers
            assert not seen.keys() & ours.keys()
            assert "client" not in str(seen)
            assert (seen["X-Other"], seen["Cookie"]) == ("kept", "a=kept")


async def test_the_configured_key_takes_the_place_of_the_clients(tmp_path: Path) -> None:
    """Clients need not know llama-server's key."""
    settings = {"backend": {"api_key": "secret"}}
    async with served(tmp_path, settings, api_key="secret") as it:
        for headers in ({}, {"Authorization": "Bearer client"}):
            answer = await it.send("POST", NATIVE, body={"prompt": "hi", "n_predict": 4}, headers=headers)
            assert answer.text == right(it.fake, "hi")
            assert (await it.send("GET", "/v1/models", headers=headers)).status == 200
        assert {seen.headers.get("Authorization") for seen in it.fake.sent(NATIVE)} == {"Bearer secret"}


async def test_a_wrong_key_is_said_clearly(tmp_path: Path) -> None:
    """llamaslot stands aside and says why; the client gets what llama-server answers."""
    async with served(tmp_path, api_key="secret") as it:
        answer = await it.ask("hi")
        status = (await it.get("/llamaslot/status")).json
    assert answer.status == 401
    assert "Invalid API Key" in answer.error["message"]
    assert "api_key" in status["backends"][0]["assist"]["remedy"]


async def many_turns(it: Served, n: int) -> None:
    """A conversation that grows by its own answers."""
    text = letters(1, 200)
    for _ in range(n):
        answer = await it.ask(text)
        assert answer.text == right(it.fake, text)
        text += answer.text + " and?"


async def test_no_request_fails_because_a_connection_was_kept(tmp_path: Path) -> None:
    """The server closes connections right after a slow answer, without a word."""
    async with served(tmp_path) as it:
        it.fake.faults.close_after_slow_s = 0.0
        await many_turns(it, 15)


async def test_a_prompt_that_is_counted_otherwise_is_still_answered(tmp_path: Path) -> None:
    """The server's count is the truth; it is said once, and prompts are tokenized whole from then on."""
    async with served(tmp_path) as it:
        it.fake.faults.miscount = 2
        for _ in range(3):
            assert (await it.ask(letters(1, 200))).status == 200
        assert it.pool.context is not None
        assert it.pool.context.tokenizer.has_miscounted


async def test_a_client_may_ask_for_leave_to_send_a_large_body(tmp_path: Path) -> None:
    """``Expect: 100-continue``, as curl does from 1 MiB on; llama-server is not asked for leave again."""
    async with served(tmp_path) as it:
        body = {"prompt": "hello", "n_predict": 4}
        async with it.session.post(it.url + NATIVE, json=body, expect100=True) as response:
            assert (await response.json())["content"] == right(it.fake, "hello")
        assert "Expect" not in it.fake.sent(NATIVE)[-1].headers


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
async def test_a_field_of_another_route_changes_nothing(tmp_path: Path, path: str) -> None:
    """llama-server does not look at it, whether the client streams or not."""
    async with served(tmp_path) as it:
        body = {"messages": [USER], "input": "hello", "prompt": "x", "max_tokens": 4, "max_output_tokens": 4}
        assert (await it.post(path, {**body, "stream": True})).status == 200
        assert (await it.post(path, body)).status == 200


async def test_one_connection_serves_many_requests(tmp_path: Path) -> None:
    """Answers of every kind end where they say that they end: what comes next on the connection is not disturbed."""
    asked: list[tuple[str, Any, int]] = [
        (NATIVE, {"prompt": "one", "n_predict": 4}, 200),
        (NATIVE, {"prompt": "two", "n_predict": 4, "stream": True}, 200),
        (CHAT, {}, 400),
        (NATIVE, {"prompt": 5}, 400),
        ("/slots/0?action=erase", {}, 403),
        ("/tokenize", {"content": "x"}, 200),
        ("/v1/messages", {"messages": [USER], "max_tokens": 2, "stream": True}, 200),
        ("/infill", {"input_prefix": "x", "input_suffix": "", "n_predict": 2}, 200),
        ("/nothing", {}, 404),
    ]
    async with served(tmp_path) as it:
        n_connections = 0

        async def count(*_: Any) -> None:
            nonlocal n_connections
            n_connections += 1

        trace = aiohttp.TraceConfig()
        trace.on_connection_create_end.append(count)
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=1), trace_configs=[trace]
        ) as client:
            for path, body, status in [*asked, *reversed(asked)]:
                async with client.post(it.url + path, json=body) as response:
                    assert response.status == status
                    await response.read()
    assert n_connections == 1


async def test_a_client_that_speaks_http_1_0_reads_to_the_end(tmp_path: Path) -> None:
    """No chunks; the end of the connection is the end of the stream."""
    async with served(tmp_path) as it:
        body = b'{"prompt": "hello", "n_predict": 4, "stream": true}'
        reader, writer = await asyncio.open_connection("127.0.0.1", it.config.listen.port)
        writer.write(b"POST /completion HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        raw = await reader.read()
        writer.close()
        await writer.wait_closed()
        head, _, rest = raw.partition(b"\r\n\r\n")
        assert b"chunked" not in head.lower()
        assert rest == without_progress(bytes(it.fake.sent(NATIVE)[-1].answer))
        assert rest.count(b"data: ") == 5


async def test_what_a_request_took_is_free_when_it_has_ended(tmp_path: Path) -> None:
    """Nothing of it waits for the garbage collector, which comes late to what has lived for seconds."""

    def left() -> list[object]:
        return [one for one in gc.get_objects() if isinstance(one, InFlight | Attempts | Downstream)]

    async with served(tmp_path) as it:
        gc.collect()
        gc.disable()
        try:
            for n, stream in enumerate((True, False)):
                await it.ask(letters(n, 400), stream=stream)
            assert left()
            await it.until(lambda: not left())
        finally:
            gc.enable()
