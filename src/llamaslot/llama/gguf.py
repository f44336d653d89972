"""Reads the attention type of a model from its GGUF header:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llamaslot.cache.reuse import CacheKind

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_KEYS = 10_000


@dataclass(frozen=True, slots=True)
class Architecture:
    """``window``: tokens of the sliding window, 0 if there is none."""

    name: str
    cache_kind: CacheKind
    window: int = 0


async def architecture(path: Path) -> Architecture | None:
    """None if the file cannot be read or is no GGUF of version 2 or 3."""
    return await asyncio.to_thread(_read, path)


def _read(path: Path) -> Architecture | None:
    try:
        with path.open("rb") as file:
            return _parse(file)
    except (OSError, struct.error, KeyError, UnicodeDecodeError, ValueError):
        return None


def _parse(file: BinaryIO) -> Architecture | None:
    if file.read(4) != _MAGIC:
        return None
    version, _, n_keys = struct.unpack("<IQQ", file.read(20))
    if version not in (2, 3) or n_keys > _MAX_KEYS:
        return None
    name, window, is_recurrent = "", 0, False
    for _ in range(n_keys):
        key = _string(file)
        value = _value(file, struct.unpack("<I", file.read(4))[0])
        if key == "general.architecture":
            name = str(value)
        elif key.endswith(".attention.sliding_window") and isinstance(value, int):
            window = value
        elif ".ssm." in key or ".wkv." in key or key.endswith(".shortconv.l_cache"):
            is_recurrent = True
    cache_kind = CacheKind.RECURRENT if is_recurrent else CacheKind.SWA if window else CacheKind.DENSE
    return Architecture(name, cache_kind, window) if name else None


def _string(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > 1 << 24:
        raise ValueError("a string of more than 16 MiB")
    data = file.read(length)
    if len(data) < length:
        raise ValueError("the file ends inside a string")
    return data.decode()


def _value(file: BinaryIO, kind: int) -> object:
    """A value; None for an array, which is skipped."""
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        item, length = struct.unpack("<IQ", file.read(12))
        if item in (_STRING, _ARRAY):
            for _ in range(length):
                _value(file, item)
        else:
            file.seek(_SIZES[item] * length, 1)
        return None
    return struct.unpack("<" + _FORMATS[kind], file.read(_SIZES[kind]))[0]
