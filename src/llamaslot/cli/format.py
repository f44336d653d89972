"""Formats tables, durations and counts for a terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], to_the_right: Collection[str] = ()
) -> list[str]:
    """Return a heading line and one line per row. Each column is as wide as its widest cell; two blanks separate
    columns. Columns named in ``to_the_right`` are right-aligned.
    """
    widths = [max(len(row[i]) for row in (headings, *rows)) for i in range(len(headings))]
    lines = []
    for row in (headings, *rows):
        cells = [
            cell.rjust(width) if heading in to_the_right else cell.ljust(width)
            for heading, cell, width in zip(headings, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def span(seconds: float) -> str:
    """Return a time span as text: ``40 s``, ``12 min``, ``5 h``, ``3 d``, rounded down; ``now`` below a second."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return "now"


def several(n: int, one: str, many: str) -> str:
    """Return a number and what it counts, such as ``1 key`` or ``60,211 keys``."""
    return f"{n:,} {one if n == 1 else many}"
