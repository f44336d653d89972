"""On the real llama.cpp: our tokens are the tokens that a completion uses, one by one."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from llamaslot.cache.ids import head, unpack
from llamaslot.errors import BadRequest, PromptNotTokenizable, UpstreamError
from llamaslot.llama.client import LlamaServer
from llamaslot.store.slot_file import read_slot_file
from llamaslot.tokens.tokenizer import NoPrompt, Prompt, Tokenizer
from tests.support import models
from tests.support.real import RealServer
from tests.support.vocabularies import sentencepiece

pytestmark = pytest.mark.real

PROSE = "def the(self, x):  # in the ring and on the other\n    return self == x or  the.than()  \n" * 8
MARKUP = '<div class="x">1 < 2</div> [INST] [0] </s> <|end|>  the <|im_start|> x <|im_end|>\n  ü漢🎉'
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": f"look_{i}",
            "description": PROSE[:300],
            "parameters": {"type": "object", "properties": {"where": {"type": "string"}}},
        },
    }
    for i in range(3)
]


class Real:
    """One real server with one slot, its client, and prompts made with it."""

    def __init__(self, server: RealServer, api: LlamaServer) -> None:
        self.server, self.api, self.prompts = server, api, Tokenizer(api)

    async def agrees(self, path: str, body: dict[str, Any], prompt: Prompt) -> bool:
        """Run the body in slot 0: the server counts as many tokens, and the saved slot begins with just these."""
        answer = await self.server.post(path, body | {"id_slot": 0, "n_predict": 2, "max_tokens": 2})
        timings = (answer[-1] if isinstance(answer, list) else answer)["timings"]
        await self.server.post("/slots/0?action=save", {"filename": "x"})
        saved = await read_slot_file(self.server.save_dir / "x")
        assert unpack(head(saved.tokens, prompt.n_tokens)) == unpack(prompt.tokens)
        return self.prompts.confirm(prompt, timings["cache_n"] + timings["prompt_n"])


@asynccontextmanager
async def real(model: Path, directory: Path, *extra: str) -> AsyncIterator[Real]:
    async with RealServer(model, directory / "kv", slots=1, context=32_768, extra=extra) as server:
        api = LlamaServer(server.url)
        try:
            yield Real(server, api)
        finally:
            await api.close()


def messages(rng: random.Random, n: int, *, tools: bool) -> list[dict[str, Any]]:
    """A conversation of so many turns with awkward contents, with calls of tools and reasoning if wanted."""

    def text() -> str:
        begin = rng.randrange(400)
        edges = ["", " ", "  ", "\n", MARKUP]
        return rng.choice(edges) + PROSE[begin : begin + rng.randrange(10, 300)] + rng.choice(edges)

    made: list[dict[str, Any]] = [{"role": "system", "content": text()}]
    for _ in range(n):
        made.append({"role": "user", "content": text()})
        if tools and rng.random() < 0.5:
            call = {
                "id": "1",
                "type": "function",
                "function": {"name": "look_1", "arguments": '{"where": "up"}'},
            }
            made.append(
                {"role": "assistant", "content": "", "reasoning_content": text(), "tool_calls": [call]}
            )
            made.append({"role": "tool", "tool_call_id": "1", "content": text()})
        made.append({"role": "assistant", "content": text()})
    return made


async def converse(real: Real, *, tools: bool) -> list[Prompt]:
    """Prompts of two conversations, turn by turn, each with the tokens of its text in one piece, as the server says."""
    rng = random.Random(7)
    made: list[Prompt] = []
    for _ in range(2):
        conversation = messages(rng, 5, tools=tools)
        for end, message in enumerate(conversation):
            if message["role"] in ("user", "tool"):
                body: dict[str, Any] = {"messages": conversation[: end + 1]}
                if tools:
                    body |= {"tools": TOOLS, "chat_template_kwargs": {"keep_reasoning": rng.random() < 0.5}}
                prompt = await real.prompts.chat(body)
                assert prompt.tokens == await real.api.tokenize(str(prompt.text), add_special=True)
                made.append(prompt)
                real.prompts.check()
        assert await real.agrees("/v1/chat/completions", body, prompt)
    return made


async def test_chats_have_the_tokens_that_the_server_uses(tmp_path: Path) -> None:
    """Turn by turn with tools, tool results, reasoning and special tokens in the contents; most of it in pieces."""
    async with real(models.dense(tmp_path), tmp_path) as server:
        made = await converse(server, tools=True)
        assert sum(not prompt.whole for prompt in made) > len(made) / 2
        # What else of the body the rendering depends on: a schema is part of the prompt for some templates.
        body = {
            "messages": [{"role": "user", "content": PROSE}],
            "response_format": {"type": "json_object", "schema": {"type": "object"}},
        }
        assert await server.agrees("/v1/chat/completions", body, await server.prompts.chat(body))


@pytest.mark.parametrize("name", ["plain", "phi-3"])
async def test_chats_of_a_sentencepiece_model_are_cut_too(name: str, tmp_path: Path) -> None:
    """BOS in front, a space put before each piece of text, and (phi-3) spaces stripped after special tokens."""
    async with real(sentencepiece(tmp_path, name=name), tmp_path) as server:
        stripped = await server.api.tokenize("<|end|>   x", add_special=False)
        assert (stripped == await server.api.tokenize("<|end|>x", add_special=False)) == (name == "phi-3")
        made = await converse(server, tools=False)
        assert sum(not prompt.whole for prompt in made) > len(made) / 2


async def test_a_model_that_appends_a_token_is_never_cut(tmp_path: Path) -> None:
    """EOS behind whatever is tokenized: the first cut is tried out and found wrong."""
    async with real(sentencepiece(tmp_path, adds_eos=True), tmp_path) as server:
        assert all(prompt.whole for prompt in await converse(server, tools=False))


@pytest.mark.parametrize(
    "prompt",
    [
        "a",
        "x <|user|> y",
        [5, 6, 7],
        ["the", 5, " the"],
        [5, "the"],
        [5, "x", True, 2.7],
        [2**32 + 5, 6],
        {"prompt_string": "the x"},
        {"prompt_string": ["the", "x"]},
    ],
)
async def test_completion_prompts_have_the_tokens_that_the_server_uses(
    prompt: Any, completions: Real
) -> None:
    """Strings, ids and both mixed, on a model with BOS."""
    (made,) = await completions.prompts.completion(prompt)
    assert await completions.agrees("/completion", {"prompt": prompt}, made)


async def test_lists_of_prompts_have_the_tokens_that_the_server_uses(completions: Real) -> None:
    """Each of them, in the order in which they are answered."""
    prompts = ["the x", [5, 6], ["x", 5, "x"], {"prompt_string": "y"}]
    made = await completions.prompts.completion(prompts)
    answers = await completions.server.post("/completion", {"prompt": prompts, "n_predict": 1, "id_slot": 0})
    counted = [answer["timings"]["cache_n"] + answer["timings"]["prompt_n"] for answer in answers]
    assert counted == [prompt.n_tokens for prompt in made]


@pytest.mark.parametrize(
    "prompt", [3, True, [], [None], [1, 2.0], [1.5, "x"], [True, 1], [[["x"]]], [1, "x", [2]]]
)
async def test_what_we_refuse_the_server_refuses(prompt: Any, completions: Real) -> None:
    """With the same status."""
    with pytest.raises(BadRequest):
        await completions.prompts.completion(prompt)
    with pytest.raises(Exception, match="400"):
        await completions.server.post("/completion", {"prompt": prompt, "n_predict": 1})


async def test_boundaries_lie_where_the_next_turn_parts(tmp_path: Path) -> None:
    """The end of the system part with the tools, and of the last user message: one byte is one token here."""
    conversation = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "answer"},
        {"role": "user", "content": "last"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "1", "content": "x-ray"},
    ]
    body = {"messages": conversation, "tools": TOOLS}
    async with real(models.dense(tmp_path), tmp_path) as server:
        prompt = await server.prompts.chat(body)
        text = str(prompt.text)
        n_system, (system, user) = await server.prompts.boundaries(body, prompt)
        assert n_system == system
        ends = [text.index("first"), text.index("last") + len("last<|im_end|>\n<|im_start|>assistant\n")]
        expected = [await server.api.tokenize(text[:end], add_special=True) for end in ends]
        assert [head(prompt.tokens, system), head(prompt.tokens, user)] == expected
        following = await server.prompts.chat(
            body | {"messages": [*conversation, {"role": "assistant", "content": "so"}, conversation[1]]}
        )
        assert following.tokens.startswith(head(prompt.tokens, user))
        assert not following.tokens.startswith(head(prompt.tokens, user + 1))


async def test_a_body_that_the_server_refuses_gets_its_own_answer(tmp_path: Path) -> None:
    """From /apply-template: the status and the body of llama-server."""
    async with real(models.dense(tmp_path), tmp_path) as server:
        with pytest.raises(UpstreamError, match="content") as refused:
            await server.prompts.chat({"messages": [{"role": "user"}]})
        assert refused.value.status == 400


@pytest.fixture
async def completions(tmp_path: Path) -> AsyncIterator[Real]:
    """A model with BOS."""
    async with real(sentencepiece(tmp_path), tmp_path) as server:
        yield server


ELEMENTS: list[Any] = [
    1,
    -1,
    1.5,
    1e300,
    "a",
    "",
    True,
    False,
    None,
    [],
    [1],
    ["a"],
    [True],
    {},
    {"prompt_string": 1},
]


async def test_what_is_no_prompt_to_llamaslot_is_none_to_the_server(tmp_path: Path) -> None:
    """So it may be asked for its words without a slot: it never begins anything."""
    pairs = [list(pair) for pair in itertools.product(ELEMENTS, repeat=2)]
    nested = [[element] for element in [*ELEMENTS, *pairs]]
    triples = [[*pair, last] for pair in pairs for last in (1, "a")]
    n_refused = 0
    async with real(models.dense(tmp_path), tmp_path) as it:
        for prompt in [*ELEMENTS, *nested, *pairs, *triples]:
            try:
                await it.prompts.completion(prompt)
            except NoPrompt:
                n_refused += 1
                status, _ = await it.api.ask("/completion", {"prompt": prompt, "n_predict": 1})
                assert status >= 400, prompt
            except (UpstreamError, PromptNotTokenizable):
                pass  # sent with a slot
    assert n_refused > 200
