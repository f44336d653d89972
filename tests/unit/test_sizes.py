"""Sizes: the same units wherever people write or read them."""

from __future__ import annotations

import ast
import re

import pytest

from llamaslot.sizes import parse_size, readable_size
from tests.support.source import MODULES, SOURCE, SOURCE_GROUP, parsed

pytestmark = SOURCE_GROUP


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        (0, 0),
        (10_000, 10_000),
        ("10000", 10_000),
        ("512B", 512),
        ("64MiB", 64 * 1024**2),
        ("200 GiB", 200 * 1024**3),
        ("1.5kB", 1500),
        ("2TB", 2 * 10**12),
        ("3gib", 3 * 1024**3),
    ],
)
def test_sizes(text: object, size_bytes: int) -> None:
    """Units of 1024 and of 1000, or a plain number of bytes."""
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", [7, "7", 9_999])
def test_a_forgotten_unit_is_a_fault(text: object) -> None:
    """Nobody means so few bytes."""
    with pytest.raises(ValueError, match=f"{text}GiB or {text}MiB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["64M", "-1MiB", "1.5", "MiB", "", None, True, 1.5])
def test_sizes_that_are_none(text: object) -> None:
    """What could be meant in two ways is a fault, and says what would be right."""
    with pytest.raises(ValueError, match="64MiB or 200GiB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0 B", "1023 B", "1.0 KiB", "12.5 MiB", "99.9 GiB", "200 GiB", "1.5 TiB"])
def test_what_is_written_can_be_read_back(text: str) -> None:
    """A size of a message is one that the configuration takes."""
    assert readable_size(parse_size(text)) == text


def test_no_other_units_are_shown() -> None:
    """No module and no page formats bytes by itself: 150 GB in the log would not be ``quota: 150GiB``."""
    found = [
        (module.name, part.value)
        for module in MODULES
        if module != SOURCE / "sizes.py"
        for text in ast.walk(parsed(module))
        if isinstance(text, ast.JoinedStr)
        for part in text.values
        if isinstance(part, ast.Constant) and re.match(r" ?[kKMGT]i?B\b", str(part.value))
    ]
    assert found == []
    words = (SOURCE / "http/static/words.js").read_text()
    assert re.findall(r"'([kKMGT]i?B)', (2 \*\* \d+)", words) == [
        ("TiB", "2 ** 40"),
        ("GiB", "2 ** 30"),
        ("MiB", "2 ** 20"),
        ("KiB", "2 ** 10"),
    ]
