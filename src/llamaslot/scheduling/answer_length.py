"""Predicts the length of answers, and the time that a running answer will still take."""

from __future__ import annotations

import math
from typing import Any

from llamaslot.scheduling.json_numbers import positive, within


class AnswerLength:
    """Predicts the remaining seconds of an answer that llama-server is decoding: the tokens that it lacks to the usual
    length, but at least ``LEAST`` of the usual length, and at least half of the tokens that it has more than usual.

    Lengths of answers vary widely, and an answer longer than all earlier ones may never stop. So the longer an answer
    has outlived the usual length, the longer it is expected to go on.
    """

    GAIN = 0.1
    LEAST = 0.25  # of the usual length always remains
    LENGTHS = 1.0, 1e7  # tokens
    SPEEDS = 1e-2, 1e5  # tokens/s

    def __init__(self, n_tokens: float = 300.0, tokens_per_s: float = 30.0) -> None:
        self.n_tokens, self.tokens_per_s = n_tokens, tokens_per_s
        self.n_samples = 0

    def __repr__(self) -> str:
        return f"<AnswerLength {self.n_tokens:.0f} tok at {self.tokens_per_s:.1f} tok/s>"

    def observe(self, n_tokens: int, seconds: float) -> None:
        """Record an answer of ``n_tokens`` that was decoded in ``seconds``. An answer of less than 8 tokens does not
        change the learned speed. An answer without tokens is ignored.
        """
        if n_tokens <= 0 or not 0 <= seconds < math.inf:
            return
        self.n_samples += 1
        gain = max(self.GAIN, 1 / (self.n_samples + 1))
        self.n_tokens += gain * (min(n_tokens, 5 * self.n_tokens) - self.n_tokens)
        if n_tokens >= 8 and seconds > 1e-4 * n_tokens:
            clip = max(math.log(3), math.log(100) / self.n_samples)
            off = min(max(math.log(n_tokens / seconds / self.tokens_per_s), -clip), clip)
            self.tokens_per_s = within(self.tokens_per_s * math.exp(gain * off), self.SPEEDS)

    def seconds_left(self, running_s: float, max_tokens: int | None = None) -> float:
        """Return the expected seconds until the end of an answer that has been decoded for ``running_s`` seconds.
        ``max_tokens`` is the limit of the answer's length; None is no limit.
        """
        n_done = max(running_s, 0.0) * self.tokens_per_s
        n_left = max(self.n_tokens - n_done, self.n_tokens * self.LEAST, (n_done - self.n_tokens) / 2)
        if max_tokens is not None:
            n_left = min(n_left, max(max_tokens - n_done, 0.0))
        return n_left / self.tokens_per_s

    def to_json(self) -> dict[str, Any]:
        return {"n_tokens": self.n_tokens, "tokens_per_s": self.tokens_per_s, "n_samples": self.n_samples}

    @classmethod
    def from_json(cls, data: object) -> AnswerLength:
        """Return the object that ``to_json`` has written as ``data``, or a new one if ``data`` is anything else."""
        length = cls()
        values = positive(data, ("n_tokens", "tokens_per_s", "n_samples"))
        if values is not None:
            length.n_tokens = within(values[0], cls.LENGTHS)
            length.tokens_per_s = within(values[1], cls.SPEEDS)
            length.n_samples = int(values[2])
        return length
