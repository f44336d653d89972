"""Rates learned from one backend: how long prefill, save, restore and answers take, and how large slot files are.

Pure: durations come in as arguments, estimates go out. Each estimate is finite, never negative, and grows with the
size of the work. llama-server also works for other requests while a sample is taken, so a sample ten times as long as
usual must not change an estimate much. Estimates decide where a request runs. They never change its answer.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median_low
from typing import Any

from msgspec import Struct, field

from llamaslot.cache.reuse import Predictions
from llamaslot.scheduling.answer_length import AnswerLength
from llamaslot.scheduling.json_numbers import positive, rows, within
from llamaslot.sizes import readable_size

_GUESSED_BYTES_PER_TOKEN = 100_000
_CLOSE = 1.03  # a difference of 3 % rarely changes a decision
_DEEP = 10_000  # tokens; the slope is visible at this depth
# ``request_s`` is at most this part of the longest prefill. Placement computes a prompt ahead whose prefill takes 20
# times ``request_s``, so always one that takes four times as long as the longest before.
_LONGEST_SHARE = 5


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
    # A fit takes 0.05 ms. Once a doubling of depth has ``KEPT`` samples, only each 8th sample leads to a new fit.
    FITTED_EACH = 8

    def __init__(self) -> None:
        self._samples: dict[int, deque[_Sample]] = {}
        self._n_observed = 0
        self._fitted: tuple[float, float] | None = self.PRIOR_S, 0.0
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
            self._fitted = self._line()
        return self._fitted

    def _line(self) -> tuple[float, float]:
        """Return ``a`` and ``b`` fitted to the samples, both at least 0."""
        w0 = w1 = w2 = y0 = y1 = 0.0
        for samples in self._samples.values():
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
        if len(self._samples) == 1 or spread <= 1e-9 * w0 * w2:
            return y0 / w0, 0.0  # all at about one depth: noise would look like a slope
        a, b = (w2 * y0 - w1 * y1) / spread, (w0 * y1 - w1 * y0) / spread
        if b < 0:
            return y0 / w0, 0.0
        return (a, b) if a >= 0 else (0.0, y1 / w2)

    def to_json(self) -> dict[str, Any]:
        """Return the samples as JSON, oldest first."""
        kept = sorted((s for samples in self._samples.values() for s in samples), key=lambda s: s.serial)
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


class TransferRate:
    """The seconds that a save or a restore takes: latency + bytes / rate.

    Each sample changes latency and rate by its ratio to the estimate, each in proportion to its part of the estimated
    seconds: a file of 2 GB tells nothing about the latency, a file of 100 kB nothing about the disk. The ratio is
    averaged as a logarithm, and clipped at three times. Otherwise one save that waited for a batch of other requests
    (0.3 to 0.8 s instead of 5 ms) would change the estimate too much.
    """

    GAIN = 0.2
    CLIP = math.log(3)
    SPEEDS = 1e4, 1e12  # bytes/s
    LATENCIES = 1e-5, 60.0

    def __init__(self, latency_s: float = 0.005, bytes_per_s: float = 1e9) -> None:
        self.latency_s, self.bytes_per_s = latency_s, bytes_per_s
        self.n_samples = 0

    def __repr__(self) -> str:
        return f"<TransferRate {self.latency_s * 1000:.1f} ms + {readable_size(self.bytes_per_s)}/s>"

    def observe(self, size_bytes: int, seconds: float) -> None:
        """Record that ``size_bytes`` were written or read in ``seconds``. Samples of 0 bytes or 0 seconds are
        ignored.
        """
        if size_bytes <= 0 or not 1e-6 < seconds < math.inf:
            return
        self.n_samples += 1
        gain = max(self.GAIN, 1 / (self.n_samples + 1))
        clip = max(self.CLIP, math.log(100) / self.n_samples)  # the prior may be far from the truth
        expected = self.seconds(size_bytes)
        off = min(max(math.log(seconds / expected), -clip), clip)
        moved = size_bytes / self.bytes_per_s / expected  # the share of the time that is not latency
        self.bytes_per_s = within(self.bytes_per_s * math.exp(-gain * moved * off), self.SPEEDS)
        self.latency_s = within(self.latency_s * math.exp(gain * (1 - moved) * off), self.LATENCIES)

    def seconds(self, size_bytes: int) -> float:
        """Return the seconds for ``size_bytes``; for 0 bytes the latency alone."""
        return self.latency_s + max(size_bytes, 0) / self.bytes_per_s

    def to_json(self) -> dict[str, Any]:
        return {"latency_s": self.latency_s, "bytes_per_s": self.bytes_per_s, "n_samples": self.n_samples}

    @classmethod
    def from_json(cls, data: object) -> TransferRate:
        """Return the object that ``to_json`` has written as ``data``, or a new one if ``data`` is anything else."""
        rate = cls()
        values = positive(data, ("latency_s", "bytes_per_s", "n_samples"))
        if values is not None:
            rate.latency_s = within(values[0], cls.LATENCIES)
            rate.bytes_per_s = within(values[1], cls.SPEEDS)
            rate.n_samples = int(values[2])
        return rate


class SnapshotSize:
    """The size of a slot file in bytes: constant + bytes per token * tokens, learned from existing files.

    The line is fitted by least squares, so it goes through points that lie on a line (dense models). Then it is raised
    until no known file lies above it (checkpoints and attention windows make the sizes of other models irregular).
    """

    KEPT = 32

    def __init__(self) -> None:
        self._points: deque[tuple[int, int]] = deque(maxlen=self.KEPT)
        self._line: tuple[float, float] | None = None  # constant and bytes per token

    def __repr__(self) -> str:
        if not self._points:
            return "<SnapshotSize unknown>"
        constant, per_token = self._fit()
        return f"<SnapshotSize {readable_size(constant)} + {per_token:.0f} B/tok>"

    def observe(self, n_tokens: int, size_bytes: int) -> None:
        """Record that a file of ``n_tokens`` tokens has ``size_bytes``. An empty file is ignored."""
        if n_tokens <= 0 or size_bytes <= 0:
            return
        if (n_tokens, size_bytes) in self._points:
            self._points.remove((n_tokens, size_bytes))
        self._points.append((n_tokens, size_bytes))
        self._line = None

    def observe_each(self, files: Sequence[tuple[int, int]]) -> None:
        """Call ``observe`` for each of the last ``KEPT`` different pairs (tokens, bytes) in ``files``."""
        last = dict[tuple[int, int], None]()
        for file in reversed(files):
            if len(last) == self.KEPT:
                break
            last[file] = None
        for n_tokens, size_bytes in reversed(last):
            self.observe(n_tokens, size_bytes)

    def bytes(self, n_tokens: int) -> int | None:
        """Return an upper bound in bytes for the size of a slot file of ``n_tokens``; None before the first file is
        known.

        If all known files have the same number of tokens, the constant is unknown. Then the size is taken as
        proportional to the tokens, plus 5 %.
        """
        if not self._points:
            return None
        constant, per_token = self._fit()
        return max(round(constant + per_token * max(n_tokens, 0)), 1)

    def _fit(self) -> tuple[float, float]:
        if self._line is None:
            self._line = self._lifted()
        return self._line

    def _lifted(self) -> tuple[float, float]:
        points = self._points
        k, sx, sy = len(points), sum(n for n, _ in points), sum(size for _, size in points)
        sxx, sxy = sum(n * n for n, _ in points), sum(n * size for n, size in points)
        if k * sxx == sx * sx:  # all have the same number of tokens
            return 0.0, max(size for _, size in points) * 1.05 / points[0][0]
        per_token = max((k * sxy - sx * sy) / (k * sxx - sx * sx), 0.0)
        if sy < per_token * sx:  # the constant would be negative
            per_token = sxy / sxx
        return max(size - per_token * n for n, size in points), per_token

    def to_json(self) -> dict[str, Any]:
        return {"files": [list(point) for point in self._points]}

    @classmethod
    def from_json(cls, data: object) -> SnapshotSize:
        """Return the object that ``to_json`` has written as ``data``. Invalid files are skipped."""
        size = cls()
        for row in rows(data, "files", 2):
            size.observe(int(row[0]), int(row[1]))
        return size


class Delay:
    """The seconds that an operation takes, whatever its size."""

    GAIN = 0.2
    LIMITS = 1e-4, 10.0

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __repr__(self) -> str:
        return f"<Delay {self.seconds * 1000:.0f} ms>"

    def observe(self, seconds: float) -> None:
        """Record one sample. It counts as at most three times the estimate, and as at least a third of it."""
        if 0 <= seconds < math.inf:
            clipped = min(max(seconds, self.seconds / 3), self.seconds * 3)
            self.seconds = within(self.seconds + self.GAIN * (clipped - self.seconds), self.LIMITS)

    def to_json(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def take_over(self, data: object) -> None:
        """Use the estimate that ``to_json`` has written as ``data``. Anything else in ``data`` changes nothing."""
        values = positive(data, ("seconds",))
        if values is not None:
            self.seconds = within(values[0], self.LIMITS)


class Rates(Struct):
    """All rates learned from one backend with one model.

    ``interruption``: the seconds lost when a prefill is stopped and resumed later. llama-server finishes the running
    batch before the slot is idle; between two chunks it gets the request again with all its tokens. ``save_delay``:
    the seconds that a request waits for a save of its slot, without the save itself. It waits for a running batch of
    other requests, for the calls of llama-server, and for file operations (20 ms beside three answers of a small
    model, where the save took 3 ms). Restores are samples of it too. ``request``: the seconds that one more request
    costs an idle llama-server, without its computation.
    """

    prefill: PrefillRate = field(default_factory=PrefillRate)
    save: TransferRate = field(default_factory=TransferRate)
    restore: TransferRate = field(default_factory=TransferRate)
    size: SnapshotSize = field(default_factory=SnapshotSize)
    answer: AnswerLength = field(default_factory=AnswerLength)
    predictions: Predictions = field(default_factory=Predictions)
    interruption: Delay = field(default_factory=lambda: Delay(0.1))
    save_delay: Delay = field(default_factory=lambda: Delay(0.005))
    request: Delay = field(default_factory=lambda: Delay(0.01))
    model: str = ""  # fingerprint of the model that the rates belong to

    def forget(self) -> None:
        """Reset all rates to their initial values. The object stays the same, so all references to it see the
        change.
        """
        self.take_over(Rates())

    def take_over(self, other: Rates) -> None:
        for name in self.__struct_fields__:
            setattr(self, name, getattr(other, name))

    def figures(self) -> tuple[float, ...]:
        """Return the learned speeds and sizes as plain numbers. Results computed with an older tuple may still be used
        while ``are_close`` is true for both tuples.
        """
        prefill, save, restore = self.prefill, self.save, self.restore
        return (
            prefill.per_token_s(0), prefill.per_token_s(_DEEP), save.latency_s, save.bytes_per_s, restore.latency_s,
            restore.bytes_per_s, self.size_bytes(0), self.size_bytes(_DEEP), self.save_delay.seconds,
        )  # fmt: skip

    @property
    def request_s(self) -> float:
        """The seconds that one more request costs, for comparison with the seconds of a prefill.

        It is limited to a part of the longest prefill seen. For a prompt many times as long as any before, the
        estimate of the prefill is too short (25 us per token in probes of 50 tokens, 110 to 250 us in a prompt of
        3,000). With the limit such a prompt is computed ahead, and its prefill is a sample for a better estimate.
        """
        if not self.prefill.known:
            return self.request.seconds
        return min(self.request.seconds, self.prefill.seconds(0, self.prefill.longest) / _LONGEST_SHARE)

    def size_bytes(self, n_tokens: int) -> int:
        """Return the expected size in bytes of a slot file of ``n_tokens``. Before the first file is known, this is
        the size for a model of about 8B parameters.
        """
        known = self.size.bytes(n_tokens)
        return known if known is not None else n_tokens * _GUESSED_BYTES_PER_TOKEN

    def save_s(self, n_tokens: int) -> float:
        return self.save.seconds(self.size_bytes(n_tokens))

    def restore_s(self, n_tokens: int) -> float:
        return self.restore.seconds(self.size_bytes(n_tokens))

    def to_json(self) -> dict[str, Any]:
        return {
            "prefill": self.prefill.to_json(),
            "save": self.save.to_json(),
            "restore": self.restore.to_json(),
            "size": self.size.to_json(),
            "answer": self.answer.to_json(),
            "predictions": self.predictions.to_json(),
            "interruption": self.interruption.to_json(),
            "save_delay": self.save_delay.to_json(),
            "request": self.request.to_json(),
            "model": self.model,
        }

    @classmethod
    def from_json(cls, data: object) -> Rates:
        """Return the object that ``to_json`` has written as ``data``. Invalid parts get their initial values."""
        parts = data if isinstance(data, Mapping) else {}
        rates = cls(
            prefill=PrefillRate.from_json(parts.get("prefill")),
            save=TransferRate.from_json(parts.get("save")),
            restore=TransferRate.from_json(parts.get("restore")),
            size=SnapshotSize.from_json(parts.get("size")),
            answer=AnswerLength.from_json(parts.get("answer")),
            predictions=Predictions.from_json(parts.get("predictions")),
            model=str(parts.get("model", "")),
        )
        rates.interruption.take_over(parts.get("interruption"))
        rates.save_delay.take_over(parts.get("save_delay"))
        rates.request.take_over(parts.get("request"))
        return rates


def are_close(figures: tuple[float, ...], others: tuple[float, ...]) -> bool:
    """True if each of ``figures`` differs by at most 3 % from the one at the same place in ``others``."""
    if len(figures) != len(others):
        return False
    return all(a <= b * _CLOSE and b <= a * _CLOSE for a, b in zip(figures, others, strict=True))
