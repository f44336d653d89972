"""What moves in prompts: told where, and made to stand still by rules."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.support.answers import Answer
from tests.support.inprocess import CHAT, NATIVE, Served, letters, of_kind, served

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
SYSTEM, QUESTION, LATER = letters(1, 1500), letters(2, 1500), letters(3, 1500)
FAKE: dict[str, Any] = {"slots": 3, "context": 16384}
RULE = {"name": "day", "pattern": r"\AIt is \w+day\.", "replace": "It is a day."}

Dialogue = list[tuple[str, str]]


def turns(*texts: str) -> Dialogue:
    return [("user" if n % 2 == 0 else "assistant", text) for n, text in enumerate(texts)]


def body(path: str, system: str, said: Dialogue, **more: Any) -> dict[str, Any]:
    """The same conversation in the words of any route."""
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in said]
    match path:
        case "/v1/messages":
            blocks = [{"type": "text", "text": system}]
            return {"model": "any", "system": blocks, "messages": messages, "max_tokens": 4, **more}
        case "/v1/responses":
            parts = {"user": "input_text", "assistant": "output_text"}
            messages = [
                {"type": "message", "role": role, "content": [{"type": parts[role], "text": text}]}
                for role, text in said
            ]
            return {"instructions": system, "input": messages, "max_output_tokens": 4, **more}
        case _:
            messages = [{"role": "system", "content": system}, *messages]
            return {"messages": messages, "max_tokens": 4, "temperature": 0, **more}


async def decision(it: Served, answer: Answer) -> dict[str, Any]:
    """Of this request, once everything that is looked at beside it is through."""
    await it.until(lambda: not any("diverges" in task.get_name() for task in asyncio.all_tasks()))
    decisions = (await it.get("/llamaslot/journal")).json["decisions"]
    return next(made for made in decisions if made["id"] == answer.headers["x-request-id"])


async def diverged(it: Served, one: dict[str, Any], two: dict[str, Any], path: str = CHAT) -> Any:
    """Why the second of two requests was slow."""
    for sent in (one, two):
        answer = await it.post(path, sent)
        assert answer.status == 200, answer.raw
    return (await decision(it, answer))["diverged"]


# -- rules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
async def test_what_a_rule_makes_stand_still_is_found_again(tmp_path: Path, path: str) -> None:
    """llama-server gets the body as it was changed; header, journal, metric and status name the rule."""
    async with served(
        tmp_path, {"rewrite": [RULE, {**RULE, "name": "idle", "pattern": "never"}]}, **FAKE
    ) as it:
        await it.post(path, body(path, f"It is Monday.{SYSTEM}", turns(QUESTION)))
        answer = await it.post(path, body(path, f"It is Tuesday.{SYSTEM}", turns(QUESTION, "yes", "more")))
        made = await decision(it, answer)
        status = (await it.get("/llamaslot/status")).json["rewrite"]
        assert await it.count('requests_rewritten_total{rule="day"}') == 2
        seen = [request for request in it.fake.requests if request.path == path]
    assert all("It is a day." in str(request.body) for request in seen)
    assert int(answer.headers["x-llamaslot-reused-tokens"]) > 3000
    assert answer.headers["x-llamaslot-rewrote"] == "day"
    assert (made["rewrote"], made["diverged"]) == (["day"], None)
    ready, *ours = status
    assert ready == {"name": "claude-code-attribution", "n_fired": 0, "n_given_up": 0}
    assert ours == [
        {"name": "day", "n_fired": 2, "n_given_up": 0},
        {"name": "idle", "n_fired": 0, "n_given_up": 0},
    ]


COUNTING = {
    CHAT: f"{CHAT}/input_tokens",
    MESSAGES: f"{MESSAGES}/count_tokens",
    RESPONSES: f"{RESPONSES}/input_tokens",
}


@pytest.mark.parametrize("path", COUNTING)
async def test_what_is_counted_is_what_is_computed(tmp_path: Path, path: str) -> None:
    """A question how long a prompt is gets the body as the completion would get it; one that needs no change goes
    through as it is, and so does what is no body."""
    plain = body(path, "Be brief.", turns("Hi."))
    async with served(tmp_path, {"rewrite": [RULE]}, **FAKE) as it:
        counted = await it.post(COUNTING[path], body(path, "It is Monday.", turns("Hi.")))
        untouched = await it.post(COUNTING[path], plain)
        await it.post(COUNTING[path], [1, 2])
        seen = [request for request in it.fake.requests if request.path == COUNTING[path]]
    assert "It is a day." in str(seen[0].body)
    assert counted.headers["x-llamaslot-rewrote"] == "day"
    assert [request.body for request in seen[1:]] == [plain, [1, 2]]
    assert "x-llamaslot-rewrote" not in untouched.headers


async def test_a_body_that_is_passed_on_is_rewritten_too(tmp_path: Path) -> None:
    """One with a document, whose tokens are not known."""
    document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}}
    sent = body(MESSAGES, "It is Monday.", [])
    sent["messages"] = [{"role": "user", "content": [document, {"type": "text", "text": "What?"}]}]
    async with served(tmp_path, {"rewrite": [RULE]}, **FAKE) as it:
        answer = await it.post(MESSAGES, sent)
        (seen,) = (request for request in it.fake.requests if request.path == MESSAGES)
    assert answer.headers["x-llamaslot-rewrote"] == "day"
    assert "It is a day." in str(seen.body)


async def test_what_is_computed_ahead_is_rewritten_too(tmp_path: Path) -> None:
    """Else no request would begin like it."""
    file = body(CHAT, f"It is Sunday.{SYSTEM}", turns("x"))
    (tmp_path / "agent.json").write_text(json.dumps(file))
    settings = {"rewrite": [RULE], "prewarm": ["agent.json"], "store": {"idle_save_s": 0.05}}
    async with served(tmp_path, settings, **FAKE) as it:
        await it.until(it.files)
        await it.at_rest()
        answer = await it.post(CHAT, body(CHAT, f"It is Monday.{SYSTEM}", turns(QUESTION)))
    assert int(answer.headers["x-llamaslot-reused-tokens"]) > 1500


async def test_answers_and_what_no_rule_matches_are_untouched(tmp_path: Path) -> None:
    """No header then; an error tells what it is an error to."""
    async with served(tmp_path, {"rewrite": [RULE]}, **FAKE) as it:
        plain = await it.post(CHAT, body(CHAT, "Be brief.", turns("It is Monday.")))
        refused = await it.post(CHAT, body(CHAT, "It is Monday." + "x" * 20_000, turns("Hi.")))
    assert "x-llamaslot-rewrote" not in plain.headers
    assert (refused.status, refused.headers["x-llamaslot-rewrote"]) == (400, "day")


async def test_a_rule_that_takes_too_long_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And the request is served as it came."""
    rule = {"name": "endless", "pattern": "(a+)+$", "replace": ""}
    async with served(tmp_path, {"rewrite": [rule]}, **FAKE) as it:
        for _ in range(2):
            assert (await it.post(CHAT, body(CHAT, "a" * 3000 + "b", turns("Hi.")))).status == 200
        told = (await it.get("/llamaslot/status")).json["rewrite"][-1]
    assert told == {"name": "endless", "n_fired": 0, "n_given_up": 2}
    assert caplog.text.count("rewrite: rule endless took more than 50 ms") == 1


# -- where prompts part --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
async def test_a_header_that_moves_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    """Where it is and what it costs, in the journal, the log and a metric; the text only where that is allowed."""
    caplog.set_level(logging.INFO)
    async with served(tmp_path, **FAKE) as it:
        one, two = (body(path, f"It is {day}. {SYSTEM}", turns(QUESTION)) for day in ("Monday", "Tuesday"))
        found = await diverged(it, one, two, path)
        assert await it.count('cache_misses_total{where="system"}') == 1
    assert (found["why"], found["where"], found["holder"]) == ("changed", "system", "slot 0")
    assert found["message"] == (0 if path == CHAT else None)
    assert found["at"] < 100
    assert 2900 < found["n_lost"] < 3100
    assert f" tokens) at token {found['at']}, in system" in caplog.text
    assert "text" not in found
    assert "Tuesday" not in caplog.text


async def test_the_text_is_told_where_that_is_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both sides of the place, and no more than 80 characters."""
    caplog.set_level(logging.INFO)
    async with served(tmp_path, {"log": {"prompts": True}}, **FAKE) as it:
        one, two = (body(CHAT, f"It is {day}. {SYSTEM}", turns(QUESTION)) for day in ("Monday", "Tuesday"))
        text = (await diverged(it, one, two))["text"]
    assert text["before"].endswith("It is ")
    assert text["now"].startswith("Tuesday. ")
    assert text["earlier"].startswith("Monday. ")
    assert all(len(its) <= 80 for its in text.values())
    assert "now 'Tuesday. " in caplog.text


async def test_conversations_that_only_begin_alike_are_not_told(tmp_path: Path) -> None:
    """Two users with the same system prompt, and one with another."""
    async with served(tmp_path, **FAKE) as it:
        one, two, other = (
            body(CHAT, system, turns(text))
            for system, text in ((SYSTEM, QUESTION), (SYSTEM, LATER), (letters(4, 1500), LATER + QUESTION))
        )
        assert await diverged(it, one, two) is None
        assert await diverged(it, two, other) is None


@pytest.mark.parametrize("isolation", ["per_user", "shared"])
async def test_no_user_is_told_of_anothers_prompt(tmp_path: Path, isolation: str) -> None:
    """Where users are isolated, theirs is compared with their own only, in slots as on disk."""
    async with served(tmp_path, {"cache": {"isolation": isolation}}, **{**FAKE, "slots": 1}) as it:
        for day, user in (("Monday", "ada"), ("Friday", "bob"), ("Tuesday", "eve"), ("Sunday", "ada")):
            sent = body(CHAT, f"It is {day}. {SYSTEM}", turns(QUESTION))
            answer = await it.send("POST", CHAT, body=sent, headers={"x-llamaslot-user": user})
            found = (await decision(it, answer))["diverged"]
            await it.saved()
            assert (found is None) == (day == "Monday" or (isolation == "per_user" and day != "Sunday"))


async def test_an_old_message_that_is_left_out_is_told(tmp_path: Path) -> None:
    """An agent keeps its context small: from there on everything moves."""
    async with served(tmp_path, **FAKE) as it:
        one = body(CHAT, SYSTEM, turns("Hello.", letters(5, 1000), QUESTION, "yes", LATER))
        two = body(CHAT, SYSTEM, turns("Hello.", "(left out)", QUESTION, "yes", LATER, "yes", "more"))
        found = await diverged(it, one, two)
    assert (found["why"], found["where"]) == ("changed", "message")
    assert (found["message"], found["role"]) == (2, "assistant")
    assert found["n_lost"] > 3000


async def test_going_back_is_told_as_such(tmp_path: Path) -> None:
    """A user has edited an earlier message: that is counted as no fault."""
    async with served(tmp_path, **FAKE) as it:
        begin = ("Hello.", letters(5, 200))
        one, two = (
            body(CHAT, SYSTEM, turns(*begin, *rest))
            for rest in ((QUESTION, "yes", LATER), (letters(6, 1500),))
        )
        found = await diverged(it, one, two)
        metrics = await it.metrics()
    assert (found["why"], found["message"], found["role"], found["n_lost"]) == ("went back", 3, "user", 0)
    assert not any("cache_misses_total" in name for name in metrics)


async def test_tools_in_another_order_are_told(tmp_path: Path) -> None:
    """They stand in front of all messages."""
    tools = [
        {
            "type": "function",
            "function": {"name": f"tool_{n}", "description": letters(n, 300), "parameters": {}},
        }
        for n in range(10, 16)
    ]
    async with served(tmp_path, **FAKE) as it:
        one, two = (
            body(CHAT, SYSTEM, turns(QUESTION), tools=its) for its in (tools, [*tools[3:], *tools[:3]])
        )
        found = await diverged(it, one, two)
    assert (found["why"], found["where"], found["message"]) == ("changed", "tools", None)


async def test_a_snapshot_that_parts_is_found_too(tmp_path: Path) -> None:
    """What was in a slot yesterday; and a plain prompt has no messages."""
    async with served(tmp_path, **{**FAKE, "slots": 1}) as it:
        for prompt in (f"It is Monday. {SYSTEM}{QUESTION}", LATER, f"It is Tuesday. {SYSTEM}{QUESTION}"):
            answer = await it.ask(prompt, path=NATIVE)
            await it.saved()
        found = (await decision(it, answer))["diverged"]
    assert (found["where"], found["at"]) == ("prompt", 6)
    assert found["holder"].startswith("snapshot ls-")


@pytest.mark.parametrize("kind", ["recurrent"])
async def test_what_lies_behind_a_checkpoint_is_told(tmp_path: Path, kind: str) -> None:
    """A model that cannot go back loses more than what has changed."""
    async with served(tmp_path, **{**FAKE, "slots": 1}, **of_kind(kind, tmp_path)) as it:
        one = body(CHAT, SYSTEM, turns("Hello.", QUESTION + LATER, "Go on."))
        two = body(CHAT, SYSTEM, turns("Hello.", QUESTION + LATER[:-100], "Go on."))
        found = await diverged(it, one, two)
    assert (found["why"], found["message"]) == ("checkpoint", 2)
    assert found["n_lost"] > 1024
