"""Dry runs: whether llama-server takes a request, asked once for each kind, and only where there is a doubt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from llamaslot.cache.ids import pack
from llamaslot.formats import FORMATS
from llamaslot.llama.client import LlamaServer
from llamaslot.llama.dry_run import DryRun, DryRuns, Verdict

N_CTX, SLOT = 1000, 2
LONG = {"error": {"type": "exceed_context_size_error"}}
HEAVY = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
TEXT = {"messages": [{"role": "user", "content": "hello"}]}


@dataclass
class Server(LlamaServer):
    """Refuses these fields; ``quirks``: what it does otherwise than the real one."""

    wrong: Mapping[str, Any] = field(default_factory=dict)
    quirks: tuple[str, ...] = ()
    tokens_per_character: float = 0.5
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    n_tokenized: int = 0

    def __post_init__(self) -> None:
        super().__init__("http://127.0.0.1:1")

    async def ask(
        self, path: str, body: Mapping[str, Any], timeout_s: float | None = None
    ) -> tuple[int, Any]:
        self.asked.append((path, dict(body)))
        if "loads" in self.quirks:
            return 503, {"error": {"type": "unavailable_error"}}
        if body.get("samplers") == [0] and "any samplers" not in self.quirks:
            return 400, {"error": {"message": "fields" if self._is_wrong(body) else "samplers"}}
        if "no empty prompt" in self.quirks or self._is_wrong(body):
            return 400, {"error": {"type": "invalid_request_error"}}
        return 200, {}

    async def refusal(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        self.asked.append((path, dict(body)))
        if self._is_wrong(body):
            return 400, {"error": {"type": "invalid_request_error"}}
        is_bad_id = any(i >= 259 for i in body.get("prompt", ()))
        if is_bad_id:
            return 400, {"error": {"type": "invalid_request_error"}}
        return (200, None) if "cuts" in self.quirks else (400, LONG)

    def _is_wrong(self, body: Mapping[str, Any]) -> bool:
        return any(name in body and repr(body[name]) == repr(value) for name, value in self.wrong.items())

    async def tokenize(self, content: str, *, add_special: bool, parse_special: bool = True) -> bytes:
        self.n_tokenized += 1
        return pack([1] * int(len(content) * self.tokens_per_character))


def of(fields: Mapping[str, Any], kind: Any = "native-completion", **more: Any) -> DryRun:
    chat = {**TEXT, **fields} if kind == "chat" else None
    body = chat or {"prompt": "hello", **fields}
    return FORMATS[kind].dry_run(body, chat, tokens=more.get("tokens"), n=more.get("n", 1))


async def verdict(runs: DryRuns, run: DryRun, lora: str = "", worth_s: float = 10.0) -> Verdict:
    return await runs.ask(run, SLOT, n_ctx=N_CTX, lora=lora, worth_s=worth_s)


SURE: list[dict[str, Any]] = [
    {},
    {
        "temperature": 0.7,
        "top_p": 1,
        "seed": 7,
        "n_predict": 100,
        "stop": ["a"],
        "stream": True,
        "model": "m",
    },
    {
        "stop": "a",
        "cache_prompt": False,
        "stream_options": {"include_usage": True},
        "n": 1,
        "user": "u",
        "top_k": None,
    },
]


@pytest.mark.parametrize("fields", SURE)
@pytest.mark.parametrize("kind", ["chat", "native-completion", "openai-completion", "infill"])
async def test_what_every_build_takes_is_not_asked_about(kind: str, fields: dict[str, Any]) -> None:
    server = Server()
    assert await verdict(DryRuns(server), of(fields, kind)) is Verdict.TAKEN
    assert not server.asked


DOUBTFUL: list[dict[str, Any]] = [
    {"temperature": "hot"},
    {"max_tokens": 2**31},
    {"n_predict": -5},
    {"seed": True},
    {"grammar": "root ::= ("},
    {"stop": [5]},
    {"stream": "yes"},
    {"n": 0},
    {"lora": "x"},
    {"cache_prompt": 1},
]


@pytest.mark.parametrize("fields", DOUBTFUL)
async def test_what_is_refused_is_found_out_with_an_empty_prompt(fields: dict[str, Any]) -> None:
    """In the slot that is leased, whatever the body says of slots; and each time anew."""
    server = Server(wrong=fields)
    runs = DryRuns(server)
    for _ in range(2):
        assert await verdict(runs, of({**fields, "id_slot": 0})) is Verdict.REFUSED
    (path, body), *others = server.asked
    assert (path, body["prompt"], body["id_slot"]) == ("/completion", [[]], SLOT)
    assert len(others) == 2  # one of them without any field: dry runs are of use there


async def test_what_was_taken_is_not_asked_about_again() -> None:
    """Values matter: another grammar is another question, another seed is none."""
    server = Server()
    runs = DryRuns(server)
    for grammar, seed in (("a", 1), ("a", 2), ("b", 1), ("b", 3), ("a", 4)):
        assert await verdict(runs, of({"grammar": grammar, "seed": seed})) is Verdict.TAKEN
    assert [body["grammar"] for _, body in server.asked] == ["a", "b"]
    runs.forget()
    await verdict(runs, of({"grammar": "a"}))
    assert len(server.asked) == 3


async def test_several_answers_are_not_asked_for() -> None:
    """They would take the slots of others."""
    server = Server()
    await verdict(DryRuns(server), of({"n": 3, "n_cmpl": 2, "grammar": "a"}, n=3))
    assert not {"n", "n_cmpl"} & set(server.asked[0][1])


async def test_a_slot_keeps_the_scales_that_it_was_filled_with() -> None:
    """With other ones llama-server would empty it."""
    server = Server()
    runs = DryRuns(server)
    await verdict(runs, of({"lora": [{"id": 1, "scale": 2}]}), lora='[{"id":0,"scale":1.0}]')
    await verdict(runs, of({"lora": [{"id": 1, "scale": 3}]}))
    assert server.asked[0][1]["lora"] == [{"id": 0, "scale": 1.0}]
    assert "lora" not in server.asked[1][1]


async def test_a_build_that_takes_no_empty_prompt_is_not_asked_any_more() -> None:
    server = Server(quirks=("no empty prompt",))
    runs = DryRuns(server)
    assert await verdict(runs, of({"grammar": "a"})) is Verdict.TAKEN
    assert await verdict(runs, of({"grammar": "b"})) is Verdict.TAKEN
    assert len(server.asked) == 2


# -- without a slot ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [*SURE, {"grammar": "a"}, {"logit_bias": [[1, 2]]}])
async def test_fields_that_can_be_read_are_asked_about_once(fields: dict[str, Any]) -> None:
    """And not at all where there is no doubt. The question takes no slot: its last field is wrong."""
    server = Server()
    runs = DryRuns(server)
    for _ in range(3):
        assert not await runs.is_unreadable(of(fields))
    assert len(server.asked) == (0 if fields in SURE else 2)
    assert all(body["samplers"] == [0] for _, body in server.asked)


@pytest.mark.parametrize("fields", DOUBTFUL)
async def test_fields_that_can_not_be_read_are_found_out_without_a_slot(fields: dict[str, Any]) -> None:
    server = Server(wrong=fields)
    runs = DryRuns(server)
    for _ in range(2):
        assert await runs.is_unreadable(of(fields))
    assert not any("id_slot" in body for _, body in server.asked)


async def test_a_whole_body_is_looked_at_on_its_own_route() -> None:
    server = Server(wrong={"input_extra": "x"})
    runs = DryRuns(server)
    assert await runs.is_malformed("/infill", {"input_prefix": "a", "input_extra": "x"})
    assert not await runs.is_malformed("/infill", {"input_prefix": "a"})
    assert [path for path, _ in server.asked] == ["/completion", "/infill", "/infill"]


async def test_a_build_that_takes_any_samplers_is_not_asked_so_again() -> None:
    """It has answered an empty prompt."""
    server = Server(quirks=("any samplers",))
    runs = DryRuns(server)
    for grammar in ("a", "b"):
        assert not await runs.is_unreadable(of({"grammar": grammar}))
    assert len(server.asked) == 1


# -- what only the chat route knows ------------------------------------------------------------------------------------


async def test_the_grammar_of_a_chat_is_tried_with_a_prompt_that_is_too_long() -> None:
    """Of the chat's own fields, and of no message of it."""
    server = Server(wrong={"tools": [HEAVY]})
    runs = DryRuns(server)
    run = of({"tools": [HEAVY], "temperature": 1}, "chat")
    assert await verdict(runs, run) is Verdict.REFUSED
    path, body = server.asked[0]
    assert path == "/v1/chat/completions"
    assert (body["tools"], body["id_slot"]) == ([HEAVY], SLOT)
    assert len(body["messages"]) == 1
    assert len(body["messages"][0]["content"]) >= 2 * N_CTX
    server.wrong = {}
    assert await verdict(runs, run) is Verdict.TAKEN
    n = len(server.asked)
    assert await verdict(runs, of({"tools": [HEAVY], "temperature": 0.5}, "chat")) is Verdict.TAKEN
    assert (len(server.asked), server.n_tokenized) == (n, 1)  # of such tools it is known


@pytest.mark.parametrize("per_character", [0.5, 0.2, 0.1])
async def test_the_long_prompt_is_as_long_as_it_must_be(per_character: float) -> None:
    """Whatever the vocabulary makes of it."""
    server = Server(tokens_per_character=per_character)
    await verdict(DryRuns(server), of({"tools": [HEAVY]}, "chat"))
    assert len(server.asked[0][1]["messages"][0]["content"]) * per_character >= N_CTX


async def test_what_can_not_be_made_too_long_is_not_tried() -> None:
    server = Server(tokens_per_character=0.0001)
    assert await verdict(DryRuns(server), of({"tools": [HEAVY]}, "chat")) is Verdict.TAKEN
    assert not server.asked


async def test_little_is_not_worth_a_long_prompt() -> None:
    """What may cost more than it saves is left; the fields are looked at all the same."""
    server = Server()
    await verdict(DryRuns(server), of({"tools": [HEAVY], "grammar": "a"}, "chat"), worth_s=0.001)
    assert [path for path, _ in server.asked] == ["/completion"]
    assert "tools" not in server.asked[0][1]


async def test_a_build_that_computes_what_is_too_long_is_found_out_once() -> None:
    """It cuts the prompt and begins: then nobody knows what the slot holds, and it is not asked so again."""
    server = Server(quirks=("cuts",))
    runs = DryRuns(server)
    assert await verdict(runs, of({"tools": [HEAVY]}, "chat")) is Verdict.RUNS
    assert await verdict(runs, of({"tools": [HEAVY], "grammar": "b"}, "chat")) is Verdict.TAKEN
    assert len(server.asked) == 1


@pytest.mark.parametrize("kind", ["messages", "responses"])
async def test_agents_are_asked_about_as_the_chats_that_they_become(kind: Any) -> None:
    """Of /v1/messages only what llama-server keeps."""
    server = Server()
    chat = {**TEXT, "tools": [HEAVY]}
    body = {
        "temperature": "hot",
        "stop_sequences": [5],
        "tools": [{"name": "f"}],
        "grammar": "x",
        "max_tokens": 5,
    }
    given = chat if kind == "messages" else {**chat, "temperature": "hot"}
    await verdict(DryRuns(server), FORMATS[kind].dry_run(body, given, tokens=None, n=1))
    path, sent = server.asked[0]
    assert (path, sent["tools"], sent["temperature"]) == ("/v1/chat/completions", [HEAVY], "hot")
    if kind == "messages":
        assert (sent["stop"], sent["max_tokens"]) == ([5], 5)
        assert "grammar" not in sent


async def test_while_it_loads_nothing_is_learned() -> None:
    """Neither of the request nor of the build."""
    server = Server(quirks=("loads",), wrong={"grammar": "b"})
    runs = DryRuns(server)
    assert not await runs.is_unreadable(of({"grammar": "a"}))
    assert await verdict(runs, of({"grammar": "a"})) is Verdict.UNSURE
    server.quirks = ()
    assert await runs.is_unreadable(of({"grammar": "b"}))
    assert not await runs.is_unreadable(of({"grammar": "a"}))
    assert await verdict(runs, of({"grammar": "b"})) is Verdict.REFUSED


# -- ids ---------------------------------------------------------------------------------------------------------------


async def test_ids_outside_of_the_vocabulary_are_found_out() -> None:
    """With the highest and the lowest of a prompt; those between two that were taken are known."""
    server = Server()
    runs = DryRuns(server)
    assert await verdict(runs, of({}, tokens=pack([5, 200, 7]))) is Verdict.TAKEN
    assert await verdict(runs, of({}, tokens=pack([3, 199]))) is Verdict.TAKEN
    assert len(server.asked) == 1
    assert await verdict(runs, of({}, tokens=pack([5, 300]))) is Verdict.REFUSED
    assert len(server.asked[1][1]["prompt"]) >= N_CTX
