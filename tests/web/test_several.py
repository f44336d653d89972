"""Requests that take several slots, or a slot of llama-server's own choice: nobody loses a context by them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.support.answers import Answer
from tests.support.inprocess import (
    CHAT,
    NATIVE,
    TEXT,
    Served,
    letters,
    line_with,
    right,
    served,
    spawn,
)

USERS = [letters(n, 700) for n in range(4)]
OWN_STEPS = {"prefill": {"chunk_threshold_s": 0}}
#: Of a document nobody knows what it is rendered to, but for llama-server.
OPAQUE: dict[str, dict[str, Any]] = {
    "/v1/messages": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": letters(50, 300)}, {"type": "document"}]}
        ],
        "max_tokens": 4,
    },
    "/v1/responses": {
        "input": [
            {
                "role": "user",
                "content": [{"type": "input_text", "text": letters(51, 300)}, {"type": "input_file"}],
            }
        ],
        "max_output_tokens": 4,
    },
}
INFILL = {"input_prefix": letters(52, 200), "input_suffix": "x", "n_predict": 4}


async def fill(it: Served) -> None:
    for text in USERS:
        assert (await it.ask(text)).status == 200


async def nobody_lost_anything(it: Served) -> None:
    """Each user goes on from all that he had, out of a slot or off the disk."""
    for text in USERS:
        answer = await it.ask(text + "more")
        assert answer.text == right(it.fake, text + "more")
        assert answer.timings["cache_n"] >= 700, (answer.source, answer.n_reused)


@pytest.mark.parametrize("path", OPAQUE)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_route_of_unknown_tokens_costs_no_context(tmp_path: Path, path: str, stream: bool) -> None:
    """Its bytes are the server's; its victim was saved first."""
    async with served(tmp_path, slots=4) as it:
        await fill(it)
        answer = await it.post(path, {**OPAQUE[path], "stream": stream})
        assert answer.status == 200
        assert answer.raw == bytes(it.fake.sent(path)[-1].answer)
        assert "x-request-id" in answer.headers
        await nobody_lost_anything(it)


async def test_it_is_counted_and_said_without_its_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once for all that are served so for the same reason."""
    async with served(tmp_path) as it:
        for path in (*OPAQUE, *OPAQUE):
            assert (await it.post(path, OPAQUE[path])).status == 200
        for kind in ("messages", "responses"):
            assert await it.count(f'completions_untokenized_total{{kind="{kind}",reason="shape"}}') == 2
    said = [line for line in caplog.messages if "does not know the tokens of a prompt" in line]
    assert len(said) == 1
    assert all(letters(seed, 300)[:10] not in caplog.text for seed in (50, 51))
    assert "input_file" not in caplog.text


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", ["messages", "responses"])
async def test_a_conversion_that_was_wrong_is_not_trusted_again(
    tmp_path: Path, kind: str, stream: bool
) -> None:
    """The server counts otherwise: bodies of that shape are served without their tokens, others go on as before."""
    path, limit = f"/v1/{kind}", "max_tokens" if kind == "messages" else "max_output_tokens"
    name, part = ("messages", "text") if kind == "messages" else ("input", "input_text")

    def asked(n: int, **more: Any) -> dict[str, Any]:
        content = [{"type": part, "text": letters(n, 300)}]
        return {name: [{"role": "user", "content": content}], limit: 4, "stream": stream, **more}

    async with served(tmp_path, slots=3) as it:
        it.fake.faults.miscount = 1
        assert (await it.post(path, asked(1))).status == 200
        it.fake.faults.miscount = 0
        for n in (2, 2):
            assert (await it.post(path, asked(n))).headers.get("x-llamaslot-reused-tokens", "0") == "0"
        assert await it.count(f'completions_untokenized_total{{kind="{kind}",reason="miscounted"}}') == 3
        await it.post(path, asked(3, temperature=0))
        told = (await it.post(path, asked(3, temperature=0))).told
        # Of a stream of responses what is expected: what was reused it tells at its end.
        n_reused = told.get("x-llamaslot-reused-tokens") or told["x-llamaslot-expected-tokens"]
        assert n_reused in ("317", "318")
        assert await it.count(f'completions_untokenized_total{{kind="{kind}",reason="miscounted"}}') == 3
        await it.fake.restart()
        await it.post(path, asked(4))
        assert await it.count(f'completions_untokenized_total{{kind="{kind}",reason="miscounted"}}') == 3


@pytest.mark.parametrize("path", OPAQUE)
async def test_it_does_so_while_others_are_at_work(tmp_path: Path, path: str) -> None:
    """Two users' answers run all the time, two others' contexts lie in the idle slots."""
    async with served(tmp_path, slots=4) as it:
        await fill(it)
        it.fake.pace.token_s = 0.001
        async with (
            it.asking(USERS[0] + "more", n=200, stream=True) as first,
            it.asking(USERS[1] + "more", n=200, stream=True) as second,
        ):
            await it.fake.wait_for(lambda f: sum(slot.is_processing for slot in f.slots) == 2)
            answers = await asyncio.gather(*(it.post(path, OPAQUE[path]) for _ in range(3)))
            assert {answer.status for answer in answers} == {200}
            assert (await first).text == right(it.fake, USERS[0] + "more", 200)
            assert (await second).text == right(it.fake, USERS[1] + "more", 200)
        await nobody_lost_anything(it)


@pytest.mark.parametrize("path", [*OPAQUE, "three answers", "three prompts"])
@pytest.mark.parametrize("stream", [True, False])
async def test_who_reads_the_end_and_hangs_up_leaves_nothing_at_work(
    tmp_path: Path, path: str, stream: bool
) -> None:
    """When the client knows the end, every slot is given back, and those that were not touched keep what they held."""
    text = letters(60, 300)
    bodies: dict[str, dict[str, Any]] = {
        "three answers": {"prompt": text, "n_cmpl": 3},
        "three prompts": {"prompt": [text, text + "x", "y"]},
    }
    body = {**(OPAQUE.get(path) or bodies[path]), "stream": stream, "n_predict": 4}
    async with served(tmp_path, slots=4) as it:
        await fill(it)
        assert (await it.post(path if path in OPAQUE else NATIVE, body)).status == 200
        slots = it.backend.leases.table.slots if it.backend.leases.table else []
        assert all(slot.is_idle for slot in slots), slots
        n_kept = sum(slot.content.n_tokens >= 700 for slot in slots)
        assert n_kept >= (1 if path == "three answers" else 3), slots
        assert await it.count("clients_left_total") == 0


@pytest.mark.parametrize(
    ("path", "last"),
    [("/v1/messages", '"message_stop"'), ("/infill", '"stop":true'), (CHAT, "[DONE]")],
)
async def test_who_hangs_up_at_the_last_event_leaves_nothing_at_work(
    tmp_path: Path, path: str, last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some clients do not wait for the end of the stream: every slot is given back by then, none is doubted."""
    messages = [{"role": "user", "content": letters(60, 300)}]
    chat = {"messages": messages, "n": 3, "max_tokens": 4}
    body = {**OPAQUE, "/infill": INFILL, CHAT: chat}[path]
    async with served(tmp_path, slots=4) as it:
        await fill(it)
        abandoned: list[Any] = []
        monkeypatch.setattr(it.backend.abandoned_slots, "add_slot", lambda *slot: abandoned.append(slot))
        async with it.session.post(it.url + path, json={**body, "stream": True}) as stream:
            await line_with(stream, last)
        await it.at_rest()
        assert abandoned == []


async def test_a_pinned_route_runs_in_its_leased_slot(tmp_path: Path) -> None:
    """And says which."""
    async with served(tmp_path, slots=4) as it:
        await fill(it)
        for path, body in (("/infill", INFILL), ("/v1/responses", OPAQUE["/v1/responses"])):
            answer = await it.post(path, {**body, "id_slot": 77})
            seen = it.fake.sent(path)[-1]
            assert seen.slot == answer.slot
            assert seen.landed == [answer.slot]


@pytest.mark.parametrize(
    ("path", "stream", "settings"),
    [  # each two of them
        (CHAT, True, {}),
        (CHAT, False, OWN_STEPS),
        (TEXT, True, OWN_STEPS),
        (TEXT, False, {}),
        (NATIVE, True, {}),
        (NATIVE, False, OWN_STEPS),
    ],
)
async def test_three_answers_to_one_prompt(tmp_path: Path, path: str, stream: bool, settings: Any) -> None:
    """``n`` = 3 takes the lowest idle slots as well: they are saved first, and given back."""
    async with served(tmp_path, settings, slots=4) as it:
        await fill(it)
        text = letters(60, 400)
        asked = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
        body = {**asked, "n": 3, "max_tokens": 5, "stream": stream}
        answer = await it.post(path, body)
        assert answer.status == 200
        assert n_answers(answer) == 3
        await nobody_lost_anything(it)


def n_answers(answer: Answer) -> int:
    """How many different answers its events or choices are about."""
    parts = answer.events or (answer.json if isinstance(answer.json, list) else [answer.json])
    found = set()
    for part in parts:
        found |= {choice["index"] for choice in part.get("choices", [part]) if "index" in choice}
    return len(found)


@pytest.mark.parametrize(
    ("path", "stream", "settings"),
    [  # each two of them
        (TEXT, True, {}),
        (TEXT, False, OWN_STEPS),
        (NATIVE, True, OWN_STEPS),
        (NATIVE, False, {}),
    ],
)
async def test_three_prompts_in_one_request(tmp_path: Path, path: str, stream: bool, settings: Any) -> None:
    """They run one after another in one slot, and nobody else's is touched."""
    async with served(tmp_path, settings, slots=4) as it:
        await fill(it)
        prompts = [letters(n, 300) for n in (70, 71, 72)]
        answer = await it.ask(prompts, path=path, stream=stream)
        assert answer.status == 200
        assert n_answers(answer) == 3
        again = [await it.ask(prompt + "more") for prompt in prompts]
        assert [one.text for one in again] == [right(it.fake, prompt + "more") for prompt in prompts]
        await nobody_lost_anything(it)


async def test_several_of_them_at_once(tmp_path: Path) -> None:
    """They take turns; everybody is served, also who comes in between."""
    async with served(tmp_path, slots=3) as it:
        text = letters(80, 300)
        asked = [
            spawn(it.ask(text, n_cmpl=3)),
            spawn(it.post("/v1/messages", OPAQUE["/v1/messages"])),
            spawn(it.ask([letters(81, 200), letters(82, 200)])),
            spawn(it.ask(letters(83, 200))),
            spawn(it.ask(text, n_cmpl=2, stream=True)),
            spawn(it.post("/infill", INFILL)),
            spawn(it.ask(letters(84, 200), stream=True)),
        ]
        answers = await asyncio.gather(*asked)
    assert {answer.status for answer in answers} == {200}
    assert answers[3].text == right(it.fake, letters(83, 200))


async def test_as_many_answers_as_slots(tmp_path: Path) -> None:
    """All of them are waited for, then taken."""
    async with served(tmp_path, slots=3) as it, it.busy(2), it.asking(letters(1, 200), n_cmpl=3) as asked:
        await it.until(lambda: it.backend.leases.is_gate_shut)
        it.fake.go()
        answer = await asked
    assert [part["index"] for part in answer.json] == [0, 1, 2]


async def test_a_failure_of_one_that_takes_several_gives_all_back(tmp_path: Path) -> None:
    """llama-server's error is passed on."""
    async with served(tmp_path, slots=3) as it:
        await it.ask(USERS[0])
        it.fake.faults.fail_stream("no")
        assert (await it.ask(letters(1, 200), n_cmpl=3)).status == 500
        it.fake.faults.fail("/v1/messages", 400, "bad")
        assert (await it.post("/v1/messages", OPAQUE["/v1/messages"])).status == 400
        await it.at_rest()
        again = await it.ask(USERS[0] + "more")
        assert again.text == right(it.fake, USERS[0] + "more")
        assert again.timings["cache_n"] == 700


@pytest.mark.parametrize(
    ("path", "body"),
    [(NATIVE, {"prompt": "hi", "n_cmpl": 2, "n_predict": 2}), ("/v1/messages", OPAQUE["/v1/messages"])],
)
async def test_a_restart_while_waiting_for_its_turn(tmp_path: Path, path: str, body: Any) -> None:
    """It is placed again on the new process."""
    async with served(tmp_path, slots=2) as it, it.busy():
        asked = spawn(it.post(path, body))
        await it.until(lambda: it.backend.leases.is_gate_shut)
        await it.fake.restart()
        assert (await asked).status == 200


async def test_a_restart_that_is_noticed_before_a_request_is_sent(tmp_path: Path) -> None:
    """The leased slot is one of a process that is gone: nothing is sent, and the job is placed again."""
    async with served(tmp_path, slots=2) as it, it.busy():
        asked = [spawn(it.ask("hi", n_cmpl=2)), spawn(it.post("/v1/messages", OPAQUE["/v1/messages"]))]
        await it.until(lambda: it.backend.leases.is_gate_shut)
        assert it.backend.session is not None
        it.backend.lost(it.backend.session.table)
        it.fake.go()
        assert [(await one).status for one in asked] == [200, 200]
