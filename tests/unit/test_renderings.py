"""Predicted renderings: what is predicted is what the template writes, and whatever may be wrong is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
import pytest

from llamaslot.tokens.renderings import Renderings, Shape, shape_of
from llamaslot.tokens.tokenizer import Tokenizer
from tests.unit.test_tokenizer import Server, turns

TEXTS = ("tea", "the answer is 42", "Why so, Ada?", "a b c")


def shape(text: str, **fields: Any) -> Shape:
    body = {"messages": [{"role": "user", "content": text}], **fields}
    found = shape_of(body, orjson.dumps(body), "")
    assert found is not None
    return found


def chatml(text: str) -> str:
    return f"<|user|>{text}<|end|><|assistant|>"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def taught(clock: Clock | None = None, template: Callable[[str], str] = chatml) -> Renderings:
    renderings = Renderings(clock or Clock())
    for text in TEXTS:
        assert renderings.predicted(shape(text)) is None
        renderings.learn(shape(text), template(text))
    return renderings


def test_predicts_what_the_template_wrote_around_four_texts() -> None:
    """The fifth text stands between the same beginning and end."""
    assert taught().predicted(shape("five")) == chatml("five")


def test_the_same_text_again_proves_nothing() -> None:
    """A template may treat just this text in a special way."""
    renderings = Renderings(Clock())
    for _ in range(8):
        renderings.learn(shape("tea"), chatml("tea"))
    assert renderings.predicted(shape("five")) is None


def test_another_body_is_another_shape() -> None:
    """Tools, earlier messages and whatever else a template may show."""
    renderings = taught()
    assert renderings.predicted(shape("five", tools=[])) is None
    assert renderings.predicted(shape("five", max_tokens=7, seed=3, temperature=0.5)) == chatml("five")


@pytest.mark.parametrize(
    "text", ["", " five", "five\n", "<b>", "[INST] x", "a/nothink", "{{x}}", "a|b", "a\r\nb", "`x`"]
)
def test_only_plain_text_is_predicted(text: str) -> None:
    """Templates look for markup, and drop spaces at the ends."""
    body = {"messages": [{"role": "user", "content": text}]}
    assert shape_of(body, orjson.dumps(body), "") is None


@pytest.mark.parametrize(
    "body", [{}, {"messages": []}, {"messages": ["x"]}, {"messages": [{"content": ["x"]}]}]
)
def test_a_body_of_another_form_has_no_shape(body: dict[str, Any]) -> None:
    """llama-server is asked what it makes of it."""
    assert shape_of(body, orjson.dumps(body), "") is None


def test_a_long_body_has_no_shape() -> None:
    """Its shape would cost more than it saves."""
    body = {"messages": [{"role": "system", "content": "x" * 9_000}, {"role": "user", "content": "tea"}]}
    assert shape_of(body, orjson.dumps(body), "") is None


def test_the_template_is_asked_again_after_ten_seconds() -> None:
    """By one request: the others of a burst do not wait for it. A new date in the answer is learned anew."""
    clock = Clock()
    renderings = taught(clock)
    clock.now += 11.0
    assert renderings.predicted(shape("five")) is None
    assert renderings.predicted(shape("six")) == chatml("six")
    renderings.learn(shape("five"), "Tuesday " + chatml("five"))
    assert renderings.predicted(shape("six")) is None


def test_a_text_that_stands_twice_is_not_predicted() -> None:
    """Which of the two is the message is not clear."""
    renderings = Renderings(Clock())
    for text in TEXTS:
        renderings.learn(shape(text), f"{text}: {text}")
    assert renderings.predicted(shape("five")) is None


def test_a_shape_that_was_wrong_once_is_not_predicted_again() -> None:
    """However often it is right afterwards."""
    renderings = taught()
    renderings.was_wrong(shape("five"))
    for text in TEXTS:
        renderings.learn(shape(text), chatml(text))
    assert renderings.predicted(shape("five")) is None


async def test_a_count_that_differs_ends_the_predictions_and_not_the_tokenizer() -> None:
    """llama-server counts other tokens than in the predicted text: its template is asked from then on."""
    server = Server()
    prompts = Tokenizer(server)

    async def tokens(text: str) -> Any:
        body = turns(text)
        prompt = await prompts.chat(body, raw=orjson.dumps(body))
        assert prompt.tokens == server.tokens(str(prompt.text))
        return prompt

    for text in TEXTS:
        await tokens(text)
    n_asked = len(server.bodies)
    prompt = await tokens("five")
    assert len(server.bodies) == n_asked
    assert prompts.confirm(prompt, prompt.n_tokens + 1)
    assert not prompts.has_miscounted
    await tokens("six")
    assert len(server.bodies) == n_asked + 1
