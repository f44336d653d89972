"""Reads numbers, and reads and writes sizes such as ``2.1 GiB``, in powers of 1,024, and time spans: the same form in
configuration, log, pages and commands.
"""

from __future__ import annotations

import re

KIB, MIB, GIB, TIB = 1024, 1024**2, 1024**3, 1024**4

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": KIB,
    "MIB": MIB,
    "GIB": GIB,
    "TIB": TIB,
}


_SMALLEST = 10_000  # bytes; a size below it without a unit is a mistake


def number(value: object) -> object:
    """Return ``value``. Raises ValueError for True and False (``on``, ``yes`` in YAML), which Python would take as 1
    and 0.
    """
    if isinstance(value, bool):
        raise ValueError(f"should be a number, not {'on' if value else 'off'}")
    return value


def parse_size(value: object) -> int:
    """Return the number of bytes that ``64MiB``, ``1.5 GB`` (here 1000**3) or a plain integer means. Raises ValueError
    that says what is expected: a unit is, for an integer from 1 to 9,999.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return _with_unit(value)
    found = (
        re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]i?B|B)?", value.strip(), re.I)
        if isinstance(value, str)
        else None
    )
    if found is None or (found[2] is None and "." in found[1]):
        raise ValueError(f"should be a size such as 64MiB or 200GiB, or a number of bytes; not {value!r}")
    return int(float(found[1]) * _UNITS[found[2].upper()]) if found[2] else _with_unit(int(found[1]))


def _with_unit(value: int) -> int:
    """Return a number of bytes that was written without a unit. Raises ValueError if the unit was surely forgotten."""
    if 0 < value < _SMALLEST:
        raise ValueError(f"should have a unit: {value}GiB or {value}MiB; {value} alone is bytes ({value}B)")
    return value


def readable_size(size_bytes: float) -> str:
    """Return a number of bytes as text, such as ``2.1 GiB``, ``366 GiB`` or ``512 B``. ``http/static/words.js`` writes
    sizes in the same way.
    """
    for unit, factor in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size_bytes >= factor:
            size = size_bytes / factor
            return f"{size:.1f} {unit}" if size < 100 else f"{size:.0f} {unit}"
    return f"{size_bytes:.0f} B"


def readable_seconds(value: float) -> str:
    """Return a time span as text: ``4 ms``, ``0.62 s``, ``71 s``, ``12 min``, ``3.4 h``."""
    if value < 0.1:
        return f"{value * 1000:.0f} ms"
    if value < 10:
        return f"{value:.2g} s" if value < 1 else f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
