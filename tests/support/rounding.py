"""Answers at temperature 0 compared with those of an idle server that computes each prompt cold.

Batches of other sizes round differently. A context is made of other batches if an answer was decoded into it, or other
requests were computed beside it. So a right answer may differ from the cold one where two tokens are equally likely.
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
    """Answers compared with those of an idle server that computes each prompt cold.

    An answer counts as rounded if it differs first at a token that the idle server finds as likely as its own, within
    ``ROUNDING``. With a wrong context the first different token is an arbitrary one.
    """

    n_all: int
    rounded: tuple[float, ...]  # how much less likely each of those is
    differ: tuple[str, ...]

    @property
    def are_right(self) -> bool:
        """True if no answer differs, and few are rounded."""
        return not self.differ and len(self.rounded) <= self.n_all / 3

    def __str__(self) -> str:
        n_same = self.n_all - len(self.rounded) - len(self.differ)
        return (
            f"{n_same} of {self.n_all} answers equal those of an idle server, {len(self.rounded)} but for rounding "
            f"(at most {max(self.rounded, default=0.0):.4f}), others: {self.differ or 'none'}"
        )


async def answers_of(asked: Iterable[tuple[dict[str, Any], Reply]], idle: Client) -> Answers:
    """Compare the replies in ``asked`` with the answers of ``idle``. ``asked`` has bodies, each with its reply; they
    ask for a chat completion in one piece. Raises AssertionError if a reply is an error.
    """
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
    """True if ``text`` is an idle server's ``answer``, apart from rounding."""
    return parting_gap(text, answer) <= ROUNDING


def parting_gap(text: str, answer: dict[str, Any]) -> float:
    """By how much, in ln, an idle server finds the first different token of ``text`` less likely than its own: 0 if
    ``text`` does not differ, infinity if the token is none of its likeliest 20. ``answer`` was requested with
    ``LIKELY_CHAT`` or ``LIKELY_NATIVE``.
    """
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
