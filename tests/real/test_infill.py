"""The tokens of /infill against the real llama.cpp: its count, and the header of the slot's file."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from llamaslot.cache.ids import count, head
from llamaslot.formats.infill import Infill, Layout, learn
from llamaslot.llama.client import LlamaServer
from llamaslot.store import read_slot_file
from tests.support import models, vocabularies
from tests.support.inprocess import fronted
from tests.support.real import RealServer

pytestmark = pytest.mark.real

WORDS = ["the ", "self", " x", "\n    ", "().", "é", "<|user|>", "<s>", " and", "th", "ing", "="]
LETTERS = ["a", "b", "\n", " ", "é", "<|im_start|>", "\x02"]
N_CTX = 2048


def drawn(rng: random.Random, *lengths: int) -> str:
    return "".join(rng.choices([*LETTERS, *WORDS], k=rng.choice(lengths)))


def body(rng: random.Random) -> dict[str, Any]:
    """Anything that editors send: with chunks of other files, and a line begun; longer than the limits, too."""
    asked: dict[str, Any] = {
        "input_prefix": drawn(rng, 0, 5, 300, 900),
        "input_suffix": drawn(rng, 0, 5, 300),
    }
    if rng.random() < 0.5:
        asked["prompt"] = rng.choice([drawn(rng, 0, 3, 90), None, 5, ["a"]])
    if rng.random() < 0.2:
        asked["input_prefix"] = [drawn(rng, 4), 65, drawn(rng, 2)]
    if rng.random() < 0.6:
        names = [{"filename": drawn(rng, 3)} if rng.random() < 0.5 else {} for _ in range(rng.choice([1, 3]))]
        asked["input_extra"] = [{"text": drawn(rng, 0, 10, 600), **name} for name in names]
    return asked


@pytest.mark.parametrize(
    ("marks", "batch", "n_predict"),
    [(models.INFILL, 512, -1), (models.INFILL_FILES, 303, -1), (models.INFILL_FILES, 512, 300)],
)
async def test_its_tokens_are_known(
    tmp_path: Path, marks: tuple[str, ...], batch: int, n_predict: int
) -> None:
    """The slot's file begins with just these; of a prompt that is too long the server counts as many."""
    model = models.infill(tmp_path, marks)
    flags = ("--predict", str(n_predict))
    async with RealServer(model, tmp_path / "kv", context=N_CTX, batch=batch, extra=flags) as real:
        layout = await learned(real)
        assert (layout.quarter, layout.room) == (batch // 4, N_CTX - batch - 2 * n_predict)
        await hold_against(real, layout, tmp_path / "kv")


async def learned(real: RealServer) -> Layout:
    api = LlamaServer(real.url)
    try:
        return await learn(api, 0, N_CTX)
    finally:
        await api.close()


async def hold_against(real: RealServer, layout: Layout, saves: Path) -> None:
    rng, api, n_refused = random.Random(1), LlamaServer(real.url), 0
    infill = Infill(api, layout)
    try:
        for _ in range(30):
            asked = body(rng)
            tokens = await infill.tokens(asked)
            status, answer = await api.ask("/infill", {**asked, "n_predict": 1, "id_slot": 1})
            if status == 200:
                assert answer["tokens_evaluated"] == count(tokens)
                await api.save(1, "it")
                assert head((await read_slot_file(saves / "it")).tokens, count(tokens)) == tokens
            else:
                n_refused += 1
                assert answer["error"]["n_prompt_tokens"] == count(tokens)
        assert n_refused < 10
    finally:
        await api.close()


@pytest.mark.parametrize(("name", "adds_eos"), [("plain", False), ("plain", True), ("phi-3", False)])
async def test_its_tokens_are_known_of_words(tmp_path: Path, name: str, adds_eos: bool) -> None:
    """With BOS, a space in front of each piece, and special tokens that swallow those behind them."""
    model = vocabularies.sentencepiece(tmp_path, name=name, adds_eos=adds_eos, infill=models.INFILL_FILES)
    async with RealServer(model, tmp_path / "kv", context=N_CTX, batch=512) as real:
        await hold_against(real, await learned(real), tmp_path / "kv")


async def test_it_is_found_again_through_llamaslot(tmp_path: Path) -> None:
    """The next key: all but what comes behind the cursor is there, and the answer is the server's own."""
    code = drawn(random.Random(2), 500)
    model = models.infill(tmp_path, models.INFILL_FILES)
    ours: dict[str, Any] = {"input_extra": [{"text": "x = 1\n" * 50, "filename": "x.py"}], "n_predict": 4}
    first = {**ours, "input_prefix": code[:300], "input_suffix": code[300:], "temperature": 0}
    second = {**first, "input_prefix": code[:310], "input_suffix": code[310:]}
    async with (  # one slot: an empty second one would cost as little, so small is the prompt and so fast the model
        RealServer(model, tmp_path / "kv", slots=1, context=N_CTX, batch=512) as real,
        fronted(tmp_path, real.url, real.save_dir) as it,
    ):
        direct = [await it.post("/infill", one, to=real.url) for one in (first, second)]
        one, two = [await it.post("/infill", one) for one in (first, second)]
        streamed = await it.post("/infill", {**second, "stream": True})
        for ours_, theirs in zip((one, two), direct, strict=True):
            alike = {name: value for name, value in theirs.json.items() if name not in ("timings", "id_slot")}
            assert {name: ours_.json[name] for name in alike} == alike
            assert ours_.json.keys() == theirs.json.keys()
        assert streamed.text == two.text == direct[1].text
        assert two.n_reused is not None
        assert two.n_reused > 600
        assert two.timings["cache_n"] == two.n_reused
        assert await it.count('completions_untokenized_total{kind="infill",reason="miscounted"}') == 0


def test_a_suffix_that_comes_first() -> None:
    """``--spm-infill``, which the wheel does not have."""
    marks = {"bos": b"aaaa", "repository": b"", "file": b""}
    layout = Layout(b"pppp", b"ssss", b"mmmm", **marks, is_suffix_first=True, quarter=9, room=1)
    put = Infill(None, layout)._put  # type: ignore[arg-type]
    assert put(b"0000eeee", b"xxxx", b"yyyy", b"zzzz") == b"eeeeaaaassssyyyyppppxxxxzzzzmmmm"
