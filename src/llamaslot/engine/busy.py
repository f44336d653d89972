"""A slot that is at work: what it will hold, and when it is expected back."""

from __future__ import annotations

from dataclasses import dataclass

from llamaslot.core.answers import AnswerLength
from llamaslot.core.spaces import Space

DRAIN_S = 0.4  # what it usually takes until the server has noticed that a client has gone


@dataclass(slots=True)
class Busy:
    """``ready_at``: when its steps are through and an answer begins, if any, of ``max_tokens`` at most if that
    is known. ``will_hold`` is computed in ``space``."""

    ready_at: float
    has_answer: bool
    will_hold: bytes
    space: Space
    max_tokens: int | None = None
    is_at_work: bool = False  # it drains, and the server was seen to work in it

    def wait_s(self, now: float, answers: AnswerLength, *, is_draining: bool) -> float:
        wait_s = max(self.ready_at - now, DRAIN_S if is_draining else 0.0)
        if self.has_answer:
            wait_s += answers.seconds_left(max(now - self.ready_at, 0.0), self.max_tokens)
        return wait_s
