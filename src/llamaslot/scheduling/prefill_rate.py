"""The speed of prefill, learned from one backend: how long tokens take at which depth. Pure, as ``rates``, which has
the other rates.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median_low
from typing import Any

from msgspec import Struct

from llamaslot.scheduling.json_numbers import rows


class PrefillRate:
    """The seconds that a token takes at a depth, as a line ``a + b * depth``. The depth of a token is its position in
    the prompt. Attention reads all earlier tokens, so the time grows with the depth.

    One rate for all depths would be wrong by up to 7 times (4,700 tokens/s at a depth of 1,200, 640 over the first
    12,000). For tokens ``[start, end)`` each token takes ``a + b * (start + end) / 2``. ``a`` and ``b`` are fitted by
    least squares of the relative error. Of each doubling of depth the latest samples are kept, so that many short
    follow-ups do not displace the one deep prefill that shows ``b``.
    """

    PRIOR_S = 1 / 1000  # per token, before the first sample
    MIN_TOKENS = 32  # a shorter prefill is as slow as decode, and tells nothing about a long one
    KEPT = 12  # samples for each doubling of depth
    # Each call of llama-server has a cost of its own: in pieces of 82 tokens a token took 1.9 times as long as in whole
    # batches at the same depth. What a whole prompt takes is known from samples of at least so many tokens only.
    LONG = 256
    # A fit takes 0.05 ms. Once a doubling of depth has ``KEPT`` samples, only each 8th sample leads to a new fit.
    FITTED_EACH = 8

    def __init__(self) -> None:
        self._samples: dict[int, deque[_Sample]] = {}
        self._long: dict[int, deque[_Sample]] = {}
        self._n_observed = 0
        self._fitted: tuple[float, float] | None = self.PRIOR_S, 0.0
        self._fitted_long: tuple[float, float] | None = None
        self.longest = 0  # tokens of the longest prompt in a sample

    def __repr__(self) -> str:
        if not self.known:
            return "<PrefillRate unknown>"
        a, b = self._fit()
        return f"<PrefillRate {a * 1e6:.1f} us/tok + {b * 1e9:.2f} us/tok per 1000 depth>"

    @property
    def known(self) -> bool:
        """True once a prefill has been observed."""
        return bool(self._samples)

    def observe(self, start: int, end: int, seconds: float) -> None:
        """Record that tokens ``[start, end)`` were computed in ``seconds`` without a pause.

        Samples of less than ``MIN_TOKENS`` tokens are ignored, and samples of almost no time (llama-server's event
        came late).
        """
        n = end - start
        if start < 0 or n < self.MIN_TOKENS or end >= 2**31 or not 1e-7 * n < seconds < 1e6:
            return
        self._n_observed += 1
        self.longest = max(self.longest, end)
        sample = _Sample(start, end, seconds, self._n_observed)
        bucket = (start + end).bit_length()
        samples = self._samples.setdefault(bucket, deque(maxlen=self.KEPT))
        if len(samples) < self.KEPT or self._n_observed % self.FITTED_EACH == 0:
            self._fitted = None
        samples.append(sample)
        if n >= self.LONG:
            self._long.setdefault(bucket, deque(maxlen=self.KEPT)).append(sample)
            self._fitted_long = None

    def long_seconds(self, start: int, end: int) -> float:
        """Return the seconds that computing tokens ``[start, end)`` takes as part of a long prompt: by samples of at
        least ``LONG`` tokens, or by all if there is none.
        """
        if not self._long:
            return self.seconds(start, end)
        if self._fitted_long is None:
            self._fitted_long = self._line(self._long)
        a, b = self._fitted_long
        return max(end - start, 0) * (a + b * (start + end) / 2)

    @property
    def long_samples(self) -> list[tuple[int, int, float]]:
        """The samples that ``long_seconds`` is computed from: first token, end, seconds."""
        every = (self._long or self._samples).values()
        return [(sample.start, sample.end, sample.seconds) for samples in every for sample in samples]

    def seconds(self, start: int, end: int) -> float:
        """Return the seconds that computing tokens ``[start, end)`` takes; 0 for an empty range."""
        if end <= start:
            return 0.0
        a, b = self._fit()
        return a * (end - start) + b * (end - start) * (start + end) / 2

    def per_token_s(self, depth: int) -> float:
        """Return the seconds for one token at ``depth``."""
        a, b = self._fit()
        return a + b * depth

    def reached(self, start: int, seconds: float) -> int:
        """Return the token that a prefill which begins at token ``start`` reaches after ``seconds``: the inverse of
        the method ``seconds``.
        """
        a, b = self._fit()
        if b * seconds < 1e-9 * a * a:  # a negligible slope: its square root would be noise
            return start + int(seconds / a)
        depth = math.sqrt((a + b * start) ** 2 + 2 * b * seconds) - a
        return int(depth / b)

    def _fit(self) -> tuple[float, float]:
        if self._fitted is None:
            self._fitted = self._line(self._samples)
        return self._fitted

    def _line(self, by_depth: Mapping[int, deque[_Sample]]) -> tuple[float, float]:
        """Return ``a`` and ``b`` fitted to the samples of each doubling of depth, both at least 0."""
        w0 = w1 = w2 = y0 = y1 = 0.0
        for samples in by_depth.values():
            usual = median_low(sample.per_token_s for sample in samples)
            for sample in samples:
                x, y = sample.depth, sample.per_token_s
                # Across one doubling of depth the true rate differs by two at most, so more than twice the median is
                # a stall. Such samples are dropped, not clipped: one in ten clipped at twice would still make the
                # estimate 10 % too slow.
                if not usual / 2 <= y <= usual * 2:
                    continue
                fresh = max(0.99 ** (self._n_observed - sample.serial), 0.1)
                weight = min(sample.end - sample.start, 512) * fresh / usual**2
                w0 += weight
                w1 += weight * x
                w2 += weight * x * x
                y0 += weight * y
                y1 += weight * x * y
        spread = w0 * w2 - w1 * w1
        if len(by_depth) == 1 or spread <= 1e-9 * w0 * w2:
            return y0 / w0, 0.0  # all at about one depth: noise would look like a slope
        a, b = (w2 * y0 - w1 * y1) / spread, (w0 * y1 - w1 * y0) / spread
        if b < 0:
            return y0 / w0, 0.0
        return (a, b) if a >= 0 else (0.0, y1 / w2)

    def to_json(self) -> dict[str, Any]:
        """Return the samples as JSON, oldest first."""
        every = {
            s.serial: s for by_depth in (self._samples, self._long) for its in by_depth.values() for s in its
        }
        kept = sorted(every.values(), key=lambda s: s.serial)
        return {"samples": [[s.start, s.end, s.seconds, s.serial] for s in kept]}

    @classmethod
    def from_json(cls, data: object) -> PrefillRate:
        """Return the object that ``to_json`` has written as ``data``. Invalid samples are skipped."""
        rate = cls()
        for row in rows(data, "samples", 4):
            rate._n_observed = max(int(row[3]) - 1, rate._n_observed)  # preserves the age of the samples
            rate.observe(int(row[0]), int(row[1]), float(row[2]))
        return rate


class _Sample(Struct, frozen=True):
    start: int
    end: int
    seconds: float
    serial: int

    @property
    def depth(self) -> float:
        return (self.start + self.end) / 2

    @property
    def per_token_s(self) -> float:
        return self.seconds / (self.end - self.start)
