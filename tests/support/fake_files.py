"""Slot files of the fake llama-server: the real header, and a payload that only the fake understands.

Header, little-endian u32: magic, version 4, number of words, then -1, 1, n_tokens, the tokens, number of media keys.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

MAGIC, VERSION = 0x67677371, 4
EMPTY_BYTES = 48  # what the real server writes for an empty slot of four


@dataclass(frozen=True, slots=True)
class Saved:
    """What a slot file holds. ``origins``: the weights that computed it; the real server does not check them either."""

    tokens: bytes
    checkpoints: tuple[int, ...]
    origins: frozenset[str]


def encode(saved: Saved) -> bytes:
    """The bytes of the file, without padding to its size."""
    n_tokens = len(saved.tokens) // 4
    header = struct.pack("<IIIiiI", MAGIC, VERSION, n_tokens + 4, -1, 1, n_tokens) + saved.tokens
    if not n_tokens:
        return header.ljust(EMPTY_BYTES, b"\0")
    payload = json.dumps({"checkpoints": saved.checkpoints, "origins": sorted(saved.origins)}).encode()
    return header + struct.pack("<II", 0, len(payload)) + payload


def write(path: Path, saved: Saved, bytes_per_token: int) -> int:
    """Write in place, as the server does; returns the size. The KV itself is a hole in a sparse file."""
    data = encode(saved)
    size = max(len(data), EMPTY_BYTES + bytes_per_token * (len(saved.tokens) // 4))
    with path.open("wb") as file:
        file.write(data)
        file.truncate(size)
    return size


def truncate(path: Path, part: float = 0.5) -> None:
    """Leave what a full disk leaves: a header that claims all tokens, and only a part of the state."""
    os.truncate(path, int(path.stat().st_size * part))


def read(path: Path, bytes_per_token: int) -> Saved:
    """Read a slot file. Raises ``ValueError`` or ``OSError`` where the real server refuses the file: missing, foreign,
    truncated.
    """
    data = path.read_bytes()
    try:
        magic, version, n_words, minus_one, one, n_tokens = struct.unpack_from("<IIIiiI", data)
        if (magic, version, minus_one, one) != (MAGIC, VERSION, -1, 1) or n_words != n_tokens + 4:
            raise ValueError("foreign header")
        if not n_tokens:
            return Saved(b"", (), frozenset())
        end = 24 + 4 * n_tokens
        (length,) = struct.unpack_from("<I", data, end + 4)
        payload = json.loads(data[end + 8 : end + 8 + length])
    except (struct.error, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"broken slot file: {error}") from error
    if len(data) < EMPTY_BYTES + bytes_per_token * n_tokens:
        raise ValueError("truncated slot file")
    return Saved(data[24:end], tuple(payload["checkpoints"]), frozenset(payload["origins"]))
