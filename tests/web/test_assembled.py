"""Answers in one piece, asked for as a stream, so that it is noticed when a client leaves: nothing shows of that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.answers import Answer, untimed
from tests.support.fake_model import FakeModel
from tests.support.inprocess import CHAT, NATIVE, TEXT, Served, letters, right, served, spawn

ROUTES = [CHAT, TEXT, NATIVE]
ONE, TWO = letters(1, 300), letters(2, 300)
OWN_STEPS = {"prefill": {"chunk_threshold_s": 0}}


def asked(path: str, text: Any = ONE, n: int = 8, **more: Any) -> dict[str, Any]:
    what = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
    limit = {"n_predict": n} if path == NATIVE else {"max_tokens": n}
    return {**what, **limit, "temperature": 0, **more}


def prompt(it: Served, path: str, text: str = ONE) -> str:
    return it.fake.model.render(asked(CHAT, text)) if path == CHAT else text


async def directly(it: Served, path: str, body: dict[str, Any], answer: Answer) -> Answer:
    """What the server says to the same body when it is asked in one piece, computes everything, in the same slot."""
    return await it.post(path, {**body, "id_slot": answer.slot, "cache_prompt": False}, to=it.fake.url)


def is_streamed(it: Served, path: str) -> list[bool]:
    """Of each request for an answer of a client."""
    bodies = [seen.body for seen in it.fake.sent(path) if "n_probs" not in seen.body]
    return [bool(body.get("stream")) for body in bodies if body.get("n_predict") != 0]


# -- whole -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, asked(CHAT, n=3, model="mine")),
        (CHAT, {**asked(CHAT), "max_tokens": None}),
        (CHAT, asked(CHAT, n_cmpl=2)),
        (TEXT, asked(TEXT, stop=["~~", "^^"])),
        (TEXT, asked(TEXT, [ONE, TWO])),
        (NATIVE, asked(NATIVE, [*b"some tokens"])),
        (NATIVE, asked(NATIVE, [ONE, TWO])),
        (NATIVE, asked(NATIVE, n_cmpl=2)),
        (NATIVE, asked(NATIVE, n=-1)),
    ],
)
@pytest.mark.parametrize("settings", [{}, OWN_STEPS], ids=["at once", "in steps"])
async def test_it_has_every_field_that_the_server_gives(
    tmp_path: Path, path: str, body: dict[str, Any], settings: Any
) -> None:
    """One answer, several, and several prompts; cut off, or at an end of its own."""
    async with served(tmp_path, settings, slots=3) as it:
        answer = await it.post(path, body)
        assert is_streamed(it, path)[-1]
        direct = await directly(it, path, body, answer)
    assert answer.status == 200
    assert untimed(answer.json) == untimed(direct.json)
    assert answer.headers["Content-Type"] == direct.headers["Content-Type"]


async def test_nothing_is_assembled_where_a_stream_has_the_reasoning_elsewhere(tmp_path: Path) -> None:
    """``--reasoning-format deepseek-legacy``: builds of 2025 put it into the text of a stream (chat.cpp,
    ``reasoning_in_content``).
    """
    async with served(tmp_path, model=FakeModel(reasoning_format="deepseek-legacy")) as it:
        assert (await it.post(CHAT, asked(CHAT))).status == 200
        assert is_streamed(it, CHAT) == [False]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("n_tokens", [1, 2, 3])
async def test_an_answer_that_ends_by_itself_has_its_end(tmp_path: Path, path: str, n_tokens: int) -> None:
    """At an end token, the first one too, and at a stop word: nothing has to be asked for again."""
    async with served(tmp_path, answer_tokens=n_tokens - 1) as it:
        body = asked(path, n=-1)
        answer = await it.post(path, body)
        assert is_streamed(it, path) == [True]
        assert untimed(answer.json) == untimed((await directly(it, path, body, answer)).json)
        assert answer.text == right(it.fake, prompt(it, path), n_tokens - 1)


# -- leaving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("n_answers", [1, 3])
async def test_a_client_that_leaves_in_the_middle_frees_its_slots(
    tmp_path: Path, path: str, n_answers: int
) -> None:
    """With the next token; llama-server's own look for clients that have left, which takes a second, is not needed."""
    async with served(tmp_path, slots=3, gone_s=3600) as it:
        it.fake.pace.token_s = 0.002
        leaver = spawn(it.post(path, asked(path, n=5000, n_cmpl=n_answers)))
        await it.fake.wait_for(lambda f: any(slot.task and len(slot.task.generated) > 3 for slot in f.slots))
        leaver.cancel()
        await it.fake.wait_for(lambda f: not any(slot.is_processing for slot in f.slots))
        await it.at_rest()
        again = await it.post(path, asked(path))
        assert again.text == right(it.fake, prompt(it, path), 8)
        assert await it.count("clients_left_total") == 1
    if n_answers == 1:
        assert again.n_reused >= 299


@pytest.mark.parametrize("path", ROUTES)
async def test_a_client_that_leaves_while_its_prompt_is_computed_frees_its_slot(
    tmp_path: Path, path: str
) -> None:
    """Within a batch, also where llama-server computes all of it in one go."""
    async with served(tmp_path, slots=1, batch=50, gone_s=3600) as it:
        it.fake.hold()
        leaver = spawn(it.post(path, asked(path)))
        await it.fake.wait_for(lambda f: f.slots[0].is_processing)
        await it.fake.step(2)
        leaver.cancel()
        await it.until(lambda: it.pool.metrics.clients_left._value.get() == 1)
        it.fake.pace.step_s = 0.005
        it.fake.go()
        await it.fake.wait_for(lambda f: not f.slots[0].is_processing)
        assert it.fake.slots[0].n_tokens <= 200
        await it.at_rest()
        again = await it.post(path, asked(path))
        assert again.text == right(it.fake, prompt(it, path), 8)
        assert again.n_reused >= 100


# -- failing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(("after_tokens", "settings"), [(0, {}), (1, OWN_STEPS), (4, {}), (4, OWN_STEPS)])
async def test_an_error_in_the_stream_is_a_status(
    tmp_path: Path, path: str, after_tokens: int, settings: Any
) -> None:
    """The server's own, with its own words, as if it had been asked for one piece."""
    async with served(tmp_path, settings, slots=1) as it:
        await it.post(path, asked(path))  # so that the next prompt has no step of its own
        it.fake.faults.fail_stream("failed to decode", after_tokens=after_tokens)
        answer = await it.post(path, asked(path))
        assert is_streamed(it, path)[-1]
        assert answer.status == 500
        assert answer.headers["Content-Type"].startswith("application/json")
        assert answer.json == {"error": {"code": 500, "message": "failed to decode", "type": "server_error"}}
        assert answer.headers["x-request-id"]
        again = await it.post(path, asked(path))
        assert again.text == right(it.fake, prompt(it, path), 8)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("after_tokens", [1, 4])
async def test_what_a_slot_holds_after_an_error_is_not_believed(
    tmp_path: Path, stream: bool, after_tokens: int
) -> None:
    """It is emptied before the next one uses it."""
    async with served(tmp_path, slots=1) as it:
        await it.ask(ONE)
        it.fake.faults.fail_stream("failed to decode", after_tokens=after_tokens)
        assert it.fake.sent(action="erase")
        failed = await it.ask(ONE + "more", n=8, stream=stream)
        assert failed.error["message"] == "failed to decode"
        n_erased = len(it.fake.sent(action="erase"))
        answer = await it.ask(ONE + "more")
        assert len(it.fake.sent(action="erase")) == n_erased + 1
    assert answer.text == right(it.fake, ONE + "more")
    assert answer.timings["cache_n"] == 0


# -- in doubt ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("settings", [{}, OWN_STEPS], ids=["at once", "in steps"])
async def test_an_end_that_a_stream_holds_back_is_asked_for_again(
    tmp_path: Path, path: str, settings: Any
) -> None:
    """The last letter might have become a stop word: in one piece, in the same slot, which has the prompt already."""
    async with served(tmp_path, settings) as it:
        whole = right(it.fake, prompt(it, path), 8)
        body = asked(path, stop=[whole[-1] + "~~"])
        answer = await it.post(path, body)
        assert is_streamed(it, path) == [True, False]
        first, second = it.fake.sent(path)[-2:]
        assert first.landed == second.landed == [answer.slot]
        assert second.tasks[0].n_computed == 1
        direct = await directly(it, path, body, answer)
    assert answer.text == direct.text == whole
    assert answer.status == 200


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("settings", [{}, OWN_STEPS], ids=["at once", "in steps"])
async def test_an_answer_that_was_asked_for_twice_tells_its_work_once(
    tmp_path: Path, path: str, settings: Any
) -> None:
    """What the first request has computed is not what was there before: numbers as from a server asked directly."""
    async with served(tmp_path, settings) as it:
        body = asked(path, stop=[right(it.fake, prompt(it, path), 8)[-1] + "~~"])
        answer = await it.post(path, body)
        direct = await directly(it, path, body, answer)
        assert await it.count('reused_tokens_total{source="cold"}') == 0
    assert untimed(answer.json) == untimed(direct.json)


@pytest.mark.parametrize("path", [CHAT, NATIVE])
@pytest.mark.parametrize("settings", [{}, OWN_STEPS], ids=["at once", "in steps"])
async def test_several_answers_in_doubt_are_asked_for_again(tmp_path: Path, path: str, settings: Any) -> None:
    """They take slots of llama-server's choice once more, and nobody waits for anybody."""
    async with served(tmp_path, settings, slots=3) as it:
        body = asked(path, n_cmpl=2, stop=[right(it.fake, prompt(it, path), 8)[-1] + "~~"])
        beside = spawn(it.ask(TWO))
        answer = await it.post(path, body)
        assert (await beside).text == right(it.fake, TWO)
        assert is_streamed(it, path)[-1] is False
        direct = await directly(it, path, body, answer)
    assert untimed(answer.json) == untimed(direct.json)


async def test_a_text_that_is_nothing_once_it_is_parsed_is_asked_for_again(tmp_path: Path) -> None:
    """A chat's answer then has the raw text, which no event has."""
    async with served(tmp_path) as it:
        body = asked(CHAT, stop=[right(it.fake, prompt(it, CHAT), 2)])
        answer = await it.post(CHAT, body)
        assert is_streamed(it, CHAT) == [True, False]
        direct = await directly(it, CHAT, body, answer)
    assert (answer.text, answer.json["choices"]) == ("", direct.json["choices"])


@pytest.mark.parametrize("path", ROUTES)
async def test_a_stream_that_is_not_understood_is_asked_for_once(tmp_path: Path, path: str) -> None:
    """A version of llama-server that says more than any before: from then on it is asked for answers in one piece."""
    async with served(tmp_path) as it:
        it.fake.faults.novelty = True
        for _ in range(3):
            assert (await it.post(path, asked(path))).text == right(it.fake, prompt(it, path), 8)
        assert is_streamed(it, path) == [True, False, False, False]
        it.fake.faults.novelty = False
        await it.fake.restart()
        assert (await it.post(path, asked(path))).status == 200
        assert is_streamed(it, path)[-1]


@pytest.mark.parametrize("path", ROUTES)
async def test_a_stream_that_is_not_understood_reaches_who_streams(tmp_path: Path, path: str) -> None:
    """Nothing in it need be understood to be passed on."""
    async with served(tmp_path) as it:
        it.fake.faults.novelty = True
        answer = await it.post(path, asked(path, stream=True))
        assert all(event["novelty"] == 1 for event in answer.events)
        assert answer.text == right(it.fake, prompt(it, path), 8)


@pytest.mark.parametrize("path", ROUTES)
async def test_a_client_that_leaves_during_the_second_request_frees_its_slot(
    tmp_path: Path, path: str
) -> None:
    """There llama-server has to notice it by itself."""
    async with served(tmp_path, slots=1) as it:
        it.fake.faults.novelty = True
        it.fake.pace.token_s = 0.002
        leaver = spawn(it.post(path, asked(path, n=30)))
        await it.fake.wait_for(lambda f: len(f.sent(path)) >= 2 and not f.sent(path)[-1].body.get("stream"))
        await it.fake.wait_for(lambda f: f.slots[0].is_processing)
        leaver.cancel()
        await it.fake.wait_for(lambda f: f.sent(path)[-1].client_left or not f.slots[0].is_processing)
        await it.at_rest()
        it.fake.pace.token_s = 0.0
        assert (await it.post(path, asked(path))).text == right(it.fake, prompt(it, path), 8)
