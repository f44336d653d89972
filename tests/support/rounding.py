"""Answers at temperature 0 against those of an idle server that computes each prompt cold.

Batches of another size round differently, and a context is made of other batches where an answer was decoded into it,
or others were computed beside it. So a right answer may part from the cold one, where two tokens are as likely.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tests.support.users import Client, Reply, common, content_of

# In ln of a probability. Seen: a token's own moved by up to 0.046 when llama-server alone computed the same prompt in
# other batches (dense and SWA; recurrent not at all). Of wrong contexts few answer so nearly right.
ROUNDING = 0.1
#: What asks for the likeliest tokens beside each one of an answer: in chats, and in llama-server's own completions.
LIKELY_CHAT: dict[str, Any] = {"logprobs": True, "top_logprobs": 20}
LIKELY_NATIVE: dict[str, Any] = {"n_probs": 20}


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers against those of an idle server asked cold.

    An answer that parts from the idle server's at a token which that one finds as likely as its own, but for
    ``ROUNDING``, counts as rounded; where a wrong context has answered, it is an arbitrary token.
    """

    n_all: int
    rounded: tuple[float, ...]  # how much less likely each of those is
    differ: tuple[str, ...]

    @property
    def are_right(self) -> bool:
        """None differs, and rounding is the exception."""
        return not self.differ and len(self.rounded) <= self.n_all / 3

    def __str__(self) -> str:
        n_same = self.n_all - len(self.rounded) - len(self.differ)
        return (
            f"{n_same} of {self.n_all} answers equal those of an idle server, {len(self.rounded)} but for rounding "
            f"(at most {max(self.rounded, default=0.0):.4f}), others: {self.differ or 'none'}"
        )


async def answers_of(asked: Iterable[tuple[dict[str, Any], Reply]], idle: Client) -> Answers:
    """``asked``: bodies that ask ``idle`` for a chat completion in one piece, computed cold, each with the reply to
    judge. AssertionError where a reply is an error."""
    n_all, rounded, differ = 0, [], []
    for body, reply in asked:
        assert not reply.error, reply.error
        answer = await idle.post("/v1/chat/completions", body | LIKELY_CHAT)
        gap = parting_gap(reply.text, answer)
        if gap > ROUNDING:
            differ.append(f"{n_all}: {reply.text!r}, idle {content_of(answer)!r} (less likely by {gap:.2f})")
        elif gap:
            rounded.append(gap)
        n_all += 1
    return Answers(n_all, tuple(rounded), tuple(differ))


def is_right(text: str, answer: dict[str, Any]) -> bool:
    """Whether ``text`` is an idle server's ``answer``, but for rounding."""
    return parting_gap(text, answer) <= ROUNDING


def parting_gap(text: str, answer: dict[str, Any]) -> float:
    """By how much an idle server finds the token less likely (in ln) with which ``text`` parts from its own answer: 0
    if it does not, infinity if the token is none of its likeliest 20. ``answer`` was asked for with ``LIKELY_CHAT`` or
    ``LIKELY_NATIVE``."""
    if "completion_probabilities" in answer:
        tokens = answer["completion_probabilities"]
    else:
        tokens = answer["choices"][0]["logprobs"]["content"]
    expected = "".join(token["token"] for token in tokens)
    if text.strip() == expected.strip():
        return 0.0
    # One token is one letter, and chat answers leave out a space that they begin with.
    n_common = common(text := text.rjust(len(expected)), expected)
    if n_common == min(len(text), len(expected)):
        return math.inf
    likely = {other["token"]: other["logprob"] for other in tokens[n_common]["top_logprobs"]}
    return float(tokens[n_common]["logprob"] - likely.get(text[n_common], -math.inf))
