"""One client API more is one file more, and the rest of llamaslot knows formats by what they answer only."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llamaslot.errors import PromptNotTokenizable
from llamaslot.formats import FORMATS
from llamaslot.formats.base import LAST_EVENTS, ErrorEvents, Format, PromptKind
from llamaslot.llama import routes
from llamaslot.llama.routes import ROUTES, Route
from llamaslot.llama.sse import event_of
from tests.support import fake_complete
from tests.support.fake_agents import Responses
from tests.support.inprocess import letters, served
from tests.support.source import MODULES, SOURCE, SOURCE_GROUP, parsed

PATH = "/v1/questions"


class Questions(Format):
    """A question, and who is asked; answered as ``/v1/responses`` is."""

    name = "questions"
    prompt_kind = PromptKind.CONVERTED
    system_key = "persona"
    last_events = (b"event: response.completed", *LAST_EVENTS)
    usage_key = "response"
    usage_details_key = "input_tokens_details"

    def chat_body(self, body: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(body.get("question"), str):
            raise PromptNotTokenizable("a question that is no text")
        return chat_of(body)

    def errors(self, id_: str) -> ErrorEvents:
        return OwnEvents(id_)


class OwnEvents(ErrorEvents):
    """Its clients read other errors."""

    is_translated = True

    def event(self, error: Mapping[str, Any]) -> bytes:
        return event_of({"failure": error["message"]})


def chat_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """What the fake llama-server makes of a body too."""
    asked = [
        {"role": "system", "content": body["persona"]},
        {"role": "user", "content": str(body["question"])},
    ]
    kept = ("id_slot", "cache_prompt", "return_progress", "max_tokens")
    return {"messages": asked, **{name: body[name] for name in kept if name in body}}


@pytest.fixture
def _questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line in the registry, a line for its route, and a llama-server that has that."""
    monkeypatch.setitem(FORMATS, "questions", Questions())
    route = Route("POST", PATH, "completion", "questions")
    monkeypatch.setitem(routes._EXACT, ("POST", PATH), route)
    monkeypatch.setitem(fake_complete.COMPLETIONS, PATH, Responses)
    monkeypatch.setattr(fake_complete, "responses_to_chat", chat_of)


@pytest.mark.usefixtures("_questions")
async def test_a_seventh_format_is_served_by_its_own_file_alone(tmp_path: Path) -> None:
    """Its tokens are known before llama-server sees it, and what they share with a slot is found again."""
    body: dict[str, Any] = {"persona": "A poet.", "question": letters(1, 600), "max_tokens": 4}
    async with served(tmp_path, slots=3) as it:
        n_tokens = len(it.fake.model.tokenize(it.fake.model.render(chat_of(body))))
        first = await it.post(PATH, body)
        assert (first.status, first.told["x-llamaslot-prompt-tokens"]) == (200, str(n_tokens))
        await it.ask(letters(2, 500))
        again = await it.post(PATH, {**body, "question": body["question"] + "?"})
        assert (again.slot, again.source) == (first.slot, "resident")
        assert again.n_reused is not None
        assert again.n_reused >= 600
        await it.post(PATH, {**body, "question": 7})
        assert await it.count('completions_untokenized_total{kind="questions",reason="shape"}') == 1


@pytest.mark.usefixtures("_questions")
async def test_its_errors_are_in_its_own_words(tmp_path: Path) -> None:
    """In a stream that has begun."""
    async with served(tmp_path, slots=1) as it:
        it.fake.faults.fail_stream("no such luck", after_tokens=2)
        answer = await it.post(PATH, {"persona": "", "question": "Why?", "max_tokens": 9, "stream": True})
        assert answer.events[-1].keys() == {"failure"}


def test_each_route_names_a_format_that_there_is() -> None:
    """A name that nobody has would be an error at the first request."""
    assert {route.format for route in ROUTES} - {None} == FORMATS.keys()
    assert [name for name, each in FORMATS.items() if name != each.name] == []


@cache
def compared(module: Path) -> frozenset[str]:
    """The texts that something is compared with, is looked up by, or matched against."""
    return frozenset(_compared(parsed(module)))


def _compared(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        elif isinstance(node, ast.Dict):
            parts = [key for key in node.keys if key is not None]
        for part in parts:
            for inner in ast.walk(part):
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                    yield inner.value


#: Fields of bodies that are named as formats are: of a chat, and in the description of llamaslot's own pages.
FIELDS = {
    "messages": {
        "bench/target.py",
        "config/values.py",
        "llama/dry_run.py",
        "tokens/media.py",
        "tokens/tokenizer.py",
        "tokens/boundaries.py",
    },
    "responses": {"http/openapi.py"},
}
OUTSIDE = [file for file in MODULES if file.relative_to(SOURCE).parts[0] != "formats"]


@SOURCE_GROUP
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_no_module_outside_asks_for_the_name_of_a_format(name: str) -> None:
    """What differs between formats is asked of the format."""
    found = {str(file.relative_to(SOURCE)) for file in OUTSIDE if name in compared(file)}
    assert found - FIELDS.get(name, set()) == set()
