"""Counters, gauges and histograms, and their text for Prometheus (format 0.0.4).

prometheus_client does the same; importing it took 40 ms of a start and each change of a counter 1 us, for locks that
one event loop does not need.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Generic, Protocol, TypeVar

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_INF = float("inf")
_ESCAPED = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})

Labels = tuple[tuple[str, str], ...]
Sample = tuple[str, Labels, float]
"""Its name, or of a single measure the end of that; its labels, its value."""


class Measure(Protocol):
    """``created``: when it was made, in seconds since 1970; not told of a gauge."""

    created: float

    def samples(self) -> Iterator[Sample]: ...


class Counter:
    """Only grows."""

    def __init__(self) -> None:
        self.value, self.created = 0.0, time.time()

    def inc(self, by: float = 1.0) -> None:
        """Raises ValueError if ``by`` is negative."""
        if by < 0:
            raise ValueError(f"a counter only grows, not by {by}")
        self.value += by

    def samples(self) -> Iterator[Sample]:
        yield "_total", (), self.value


class Gauge:
    def __init__(self) -> None:
        self.value = self.created = 0.0

    def set(self, value: float) -> None:
        self.value = float(value)

    def samples(self) -> Iterator[Sample]:
        yield "", (), self.value


class Histogram:
    """How many of the observed seconds were at most each of ``SECONDS``."""

    def __init__(self) -> None:
        self.sum, self.created = 0.0, time.time()
        self._counts = [0] * (len(SECONDS) + 1)

    def observe(self, seconds: float) -> None:
        self.sum += seconds
        self._counts[bisect_left(SECONDS, seconds)] += 1

    def samples(self) -> Iterator[Sample]:
        for bound, n in zip((*SECONDS, _INF), accumulate(self._counts), strict=True):
            yield "_bucket", (("le", _number(bound)),), n
        yield "_count", (), sum(self._counts)
        yield "_sum", (), self.sum


M = TypeVar("M", bound=Measure)


class Family(Generic[M]):
    """The measures of one name, by the values of ``label_names``."""

    def __init__(self, make: type[M], name: str, text: str, label_names: Sequence[str]) -> None:
        self._make, self.name, self.text, self.label_names = make, name, text, tuple(label_names)
        self._measures: dict[tuple[str, ...], M] = {}

    def labels(self, *values: str) -> M:
        """The measure with these values, made by the first call."""
        if (measure := self._measures.get(values)) is None:
            assert len(values) == len(self.label_names), "a value for each label"
            measure = self._measures[values] = self._make()
        return measure

    def remove(self, *values: str) -> None:
        """Idempotent."""
        self._measures.pop(values, None)

    def samples(self) -> Iterator[Sample]:
        """Under their whole names."""
        for values, measure in self._measures.items():
            named = tuple(zip(self.label_names, values, strict=True))
            for end, more, value in measure.samples():
                yield f"{self.name}{end}", (*named, *more), value

    def lines(self) -> Iterator[str]:
        """Its text, line by line."""
        type_ = self._make.__name__.lower()
        yield from self._head("_total" if type_ == "counter" else "", type_)
        for sample in self.samples():
            yield _line(*sample)
        if type_ != "gauge" and self._measures:
            yield from self._head("_created", "gauge")
            for values, measure in self._measures.items():
                named = tuple(zip(self.label_names, values, strict=True))
                yield _line(f"{self.name}_created", named, measure.created)

    def _head(self, end: str, type_: str) -> Iterator[str]:
        yield f"# HELP {self.name}{end} {self.text}"
        yield f"# TYPE {self.name}{end} {type_}"


def _line(name: str, labels: Labels, value: float) -> str:
    told = ",".join(f'{label}="{its.translate(_ESCAPED)}"' for label, its in labels)
    return f"{name}{{{told}}} {_number(value)}" if told else f"{name} {_number(value)}"


def _number(value: float) -> str:
    return "+Inf" if value == _INF else repr(float(value))
