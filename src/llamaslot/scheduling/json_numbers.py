"""Reads learned numbers from JSON, and skips invalid ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def within(value: float, limits: tuple[float, float]) -> float:
    return min(max(value, limits[0]), limits[1])


def is_number(value: Any) -> bool:
    """True if ``value`` is a finite int or float. A bool is not a number here."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def rows(data: object, key: str, width: int) -> Iterable[list[Any]]:
    """Yield each list in ``data[key]`` that consists of ``width`` finite numbers. All other entries are skipped."""
    rows = data.get(key) if isinstance(data, Mapping) else None
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, list) and len(row) == width and all(map(is_number, row)):
            yield row


def positive(data: object, keys: tuple[str, ...]) -> list[float] | None:
    """Return the values of all ``keys`` in ``data``; None if any of these values is missing, not finite, or not above
    zero.
    """
    values: list[Any] = [data.get(key) for key in keys] if isinstance(data, Mapping) else []
    numbers = [float(value) for value in values if is_number(value) and value > 0]
    return numbers if len(numbers) == len(keys) else None
