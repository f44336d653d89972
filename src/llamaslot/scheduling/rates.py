"""Rates learned from one backend: how long prefill, save, restore and answers take, and how large slot files are.

Pure: durations come in as arguments, estimates go out. Each estimate is finite, never negative, and grows with the
size of the work. llama-server also works for other requests while a sample is taken, so a sample ten times as long as
usual must not change an estimate much. Estimates decide where a request runs. They never change its answer.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct, field

from llamaslot.cache.reuse import ReturnedAnswers
from llamaslot.scheduling.json_numbers import positive, rows, within
from llamaslot.scheduling.prefill_rate import PrefillRate
from llamaslot.sizes import readable_size

_GUESSED_BYTES_PER_TOKEN = 100_000
_CLOSE = 1.03  # a difference of 3 % rarely changes a decision
_DEEP = 10_000  # tokens; the slope is visible at this depth
# ``request_s`` is at most this part of the longest prefill. Placement computes a prompt ahead whose prefill takes 20
# times ``request_s``, so always one that takes four times as long as the longest before.
_LONGEST_SHARE = 5


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
    returned: ReturnedAnswers = field(default_factory=ReturnedAnswers)
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
            "returned": self.returned.to_json(),
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
            returned=ReturnedAnswers.from_json(parts.get("returned")),
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
