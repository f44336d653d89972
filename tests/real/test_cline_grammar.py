"""docs/cline.gbnf holds on the real llama.cpp: whatever a model would like to say, the answer is a final message."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import models
from tests.support.real import RealServer

pytestmark = pytest.mark.real

GRAMMAR = Path(__file__).parents[2] / "docs" / "cline.gbnf"
THOUGHT = r"<\|channel\|>analysis<\|message\|>(?:[^<]|<+[^<|])*"
ANSWER = r"<\|channel\|>final<\|message\|>(?:[^<]|<+[^<|]|<+\|[^cemrs])*"
ENDED_IN_THOUGHT = re.compile(THOUGHT + r"(?:<|<\|\w*|<\|end\|>.*)?", re.DOTALL)
ENDED_IN_ANSWER = re.compile(f"(?:{THOUGHT}<\\|end\\|><\\|start\\|>assistant)?{ANSWER}(?:<+\\|?)?", re.DOTALL)
LIKED: list[list[int]] = [
    [ord(character), bias] for character, bias in (("<", 6), ("|", 6), ("c", 3), ("e", 2))
]


@pytest.fixture
def server(tmp_path: Path) -> RealServer:
    """Not started yet; the model is dense."""
    return RealServer(models.dense(tmp_path), tmp_path / "kv", slots=1, context=1024)


async def test_every_answer_is_in_the_final_channel(server: RealServer) -> None:
    """A model that loves to begin messages can neither open a third channel nor leave the final one."""
    ways = set()
    async with server:
        for seed in range(40):
            body = {"prompt": "<|start|>assistant", "n_predict": 150, "seed": seed, "temperature": 1.5}
            first = [ord("a" if seed % 2 else "f"), 8]  # of analysis, of final
            body |= {"grammar": GRAMMAR.read_text(), "logit_bias": [*LIKED, first]}
            body |= {"top_k": 0, "top_p": 1, "min_p": 0}
            text = (await server.post("/completion", body))["content"]
            is_answer = ENDED_IN_ANSWER.fullmatch(text)
            assert is_answer or ENDED_IN_THOUGHT.fullmatch(text), text
            ways.add((text.startswith("<|channel|>analysis"), bool(is_answer)))
    assert {(False, True), (True, False)} <= ways


async def test_without_it_the_model_says_what_it_likes(server: RealServer) -> None:
    """The same model, unconstrained, does not keep to any channel: the check above can fail."""
    async with server:
        body = {"prompt": "<|start|>assistant", "n_predict": 50, "seed": 1, "logit_bias": LIKED}
        text = (await server.post("/completion", body))["content"]
    assert not ENDED_IN_ANSWER.fullmatch(text)
    assert not ENDED_IN_THOUGHT.fullmatch(text)
