"""/infill: how a server puts the parts together is found out from its answers, and held against them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any

import pytest

from llamaslot.cache.ids import pack, unpack
from llamaslot.errors import PromptNotTokenizable, Reason
from llamaslot.formats.infill import Infill, learn

MARKS = {"<P>": 1, "<S>": 2, "<M>": 3}
TEXTS = {id_: text for text, id_ in MARKS.items()}
N_CTX, QUARTER, ROOM = 2048, 100, 1200
SNIPPET = "\n\n--- snippet ---\n\n"
BODY = {
    "input_prefix": "def <P>" + "x" * 400,
    "input_suffix": "return" + "y" * 200,
    "prompt": "  if",
    "input_extra": [{"text": "import os", "filename": "a.py"}, {"text": "z" * 1500}],
}


class Server:
    """A token for each character. ``order``: of prefix, suffix and what was begun, which belongs to the prefix."""

    def __init__(self, order: str) -> None:
        self.order = order

    async def tokenize(self, content: str, *, add_special: bool, parse_special: bool = True) -> bytes:
        return pack(self.ids(content, parse_special=parse_special))

    @staticmethod
    def ids(text: str, *, parse_special: bool = False) -> list[int]:
        parts = re.split("(<[PSM]>)", text) if parse_special else [text]
        return [
            id_ for part in parts for id_ in ([MARKS[part]] if part in MARKS else [ord(c) + 10 for c in part])
        ]

    async def detokenize(self, tokens: bytes) -> str:
        return "".join(TEXTS.get(id_) or chr(id_ - 10) for id_ in unpack(tokens))

    def prompt(self, body: Mapping[str, Any]) -> list[int]:
        begun = self.ids(body.get("prompt", ""), parse_special=True)
        extra = [id_ for chunk in body.get("input_extra", ()) for id_ in self.ids(SNIPPET + chunk["text"])]
        parts = {
            "prefix": [MARKS["<P>"], *self.ids(body["input_prefix"])[-3 * QUARTER :]],
            "begun": begun,
            "suffix": [MARKS["<S>"], *self.ids(body["input_suffix"])[: max(0, QUARTER - 2 - len(begun))]],
        }
        return [*extra[-ROOM:], *(id_ for name in self.order.split() for id_ in parts[name]), MARKS["<M>"]]

    async def ask(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        ids = self.prompt(body)
        if len(ids) >= N_CTX:
            return 400, {"error": {"n_prompt_tokens": len(ids)}}
        return 200, {"prompt": await self.detokenize(pack(ids)), "tokens_evaluated": len(ids)}

    async def refusal(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        return await self.ask(path, body)


@pytest.mark.parametrize("order", ["prefix begun suffix", "suffix prefix begun"])
async def test_the_order_is_that_of_the_server(order: str) -> None:
    """``--spm-infill`` puts the suffix first; both have as many tokens, so their text decides. Limits are its own."""
    server = Server(order)
    layout = await learn(server, 0, N_CTX)
    assert (layout.is_suffix_first, layout.quarter, layout.room) == (
        order.startswith("suffix"),
        QUARTER,
        ROOM,
    )
    assert unpack(await Infill(server, layout).tokens(BODY)) == server.prompt(BODY)


async def test_chunks_that_several_ask_for_at_once_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else more and more would seem to be remembered, and in the end nothing could be."""
    server = Server("prefix begun suffix")
    infill = Infill(server, await learn(server, 0, N_CTX))
    plain = Server.tokenize

    async def slow(self: Server, content: str, *, add_special: bool, parse_special: bool = True) -> bytes:
        await asyncio.sleep(0)
        return await plain(self, content, add_special=add_special, parse_special=parse_special)

    monkeypatch.setattr(Server, "tokenize", slow)
    await asyncio.gather(*(infill.tokens(BODY) for _ in range(3)))
    assert infill._n_bytes == sum(len(text) + len(tokens) for (_, text), tokens in infill._known.items())


@pytest.mark.parametrize(
    "order", ["begun prefix suffix", "prefix suffix begun", "prefix begun suffix suffix"]
)
async def test_an_order_that_is_not_known_is_said_to_be_so(order: str) -> None:
    """Whatever else is right about it: such bodies are served without their tokens."""
    with pytest.raises(PromptNotTokenizable) as caught:
        await learn(Server(order), 0, N_CTX)
    assert caught.value.reason is Reason.INFILL
