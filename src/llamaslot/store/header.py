"""Reads the token list from the header of a slot file of llama-server, without reading the state after it.

Layout, all little-endian 32-bit words (``llama_state_seq_save_file`` and ``server_tokens::serialize`` of llama.cpp):

    magic 0x67677371 | version | n_words | n_words words | KV state, checkpoints

The words of a current server are ``-1, 1, n_tokens, tokens..., n_media, first token of each media chunk..., media
chunks``; older builds wrote the bare tokens. A media token is -1 in the list. A file has no length and no checksum of
its own: a full disk leaves a truncated file whose header claims all tokens. So the size that the server reported
(``n_written``) must be stored beside it and compared.
"""

from __future__ import annotations

import asyncio
import os
import struct
from pathlib import Path

from msgspec import Struct

from llamaslot.errors import SnapshotInvalid

MAGIC = 0x67677371  # "qsgg" as it lies in the file
VERSIONS = range(2, 5)  # the header is the same in these versions; a server restores only its own version
# 64 MiB of ids: far above any context; limits what a damaged count makes us read.
MAX_TOKENS = 1 << 24

_START = struct.Struct("<III")  # magic, version, n_words
_PACKED = struct.Struct("<iII")  # -1, version of the list, n_tokens
TOKENS_AT = _START.size + _PACKED.size  # where they begin in the packed form
_LIST_VERSION = 1
_WORD = 4
_NULL = b"\xff\xff\xff\xff"  # LLAMA_TOKEN_NULL, -1


class SlotFile(Struct, frozen=True):
    """The header of a slot file.

    ``tokens``: little-endian int32 bytes, up to the first media token; ``n_tokens`` counts all tokens.
    ``size_bytes``: the actual size of the whole file.
    """

    tokens: bytes
    n_tokens: int
    has_media: bool
    size_bytes: int


async def read_slot_file(path: Path) -> SlotFile:
    """Read the header of the slot file ``path``: at most 12 + 4 * (n_tokens + 4) bytes.

    Raises SnapshotInvalid, with the reason in one line, for a file that is missing, unreadable (``__cause__`` is the
    OSError), too short, or not a slot file of a known version. Canceling is safe.
    """
    # One call of a thread that opens, reads and closes: aiofiles took 1.7 times as long, and a reader cancelled in
    # between left the file open.
    return await asyncio.to_thread(read_slot_file_now, path)


def read_slot_file_now(path: Path) -> SlotFile:
    """As ``read_slot_file``. Blocking."""
    try:
        with open(path, "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            start = file.read(_START.size + _PACKED.size)
            n_words = _n_words(path.name, start, size_bytes)
            n_tokens, is_packed = _n_tokens(path.name, start, n_words)
            if is_packed:
                body = file.read((n_tokens + 1) * _WORD)
            else:
                body = start[_START.size : _START.size + n_words * _WORD]
                body += file.read(n_words * _WORD - len(body))
    except OSError as error:
        raise SnapshotInvalid(f"{path.name}: cannot be read: {error.strerror or error}") from error
    if len(body) < (n_tokens + is_packed) * _WORD:
        raise SnapshotInvalid(f"{path.name}: cut short in its header of {n_tokens} tokens")
    tokens, n_media = body[: n_tokens * _WORD], 0
    if is_packed:
        n_media = int.from_bytes(body[n_tokens * _WORD :], "little")
        if n_media == 0 and n_words != n_tokens + 4:
            raise SnapshotInvalid(
                f"{path.name}: {n_words} words do not fit its {n_tokens} tokens without media"
            )
    text = _before_media(tokens)
    return SlotFile(
        tokens=text,
        n_tokens=n_tokens,
        has_media=n_media > 0 or len(text) < len(tokens),
        size_bytes=size_bytes,
    )


def slot_file_head(tokens: bytes) -> bytes:
    """The header of a slot file that holds ``tokens``, little-endian int32 bytes, as a current server writes it."""
    n_tokens = len(tokens) // _WORD
    start = _START.pack(MAGIC, VERSIONS[-1], n_tokens + 4) + _PACKED.pack(-1, _LIST_VERSION, n_tokens)
    return start + tokens + bytes(_WORD)


def _n_words(name: str, start: bytes, size_bytes: int) -> int:
    """The length of the packed list in words, checked against the size of the file."""
    if len(start) < _START.size:
        raise SnapshotInvalid(f"{name}: {size_bytes} bytes are too few for a slot file")
    magic, version, n_words = _START.unpack_from(start)
    if magic != MAGIC:
        raise SnapshotInvalid(f"{name}: no slot file: it begins with {magic:#010x}, not with {MAGIC:#010x}")
    if version not in VERSIONS:
        known = f"{VERSIONS.start} to {VERSIONS.stop - 1}"
        raise SnapshotInvalid(f"{name}: slot file of version {version}; llamaslot knows {known}")
    if _START.size + n_words * _WORD > size_bytes:
        raise SnapshotInvalid(f"{name}: claims {n_words} words of header, but has {size_bytes} bytes in all")
    return int(n_words)


def _n_tokens(name: str, start: bytes, n_words: int) -> tuple[int, bool]:
    """The number of tokens that follow, and whether they are in the packed form."""
    is_packed = n_words > 0 and start.startswith(_NULL, _START.size)
    n_tokens = n_words
    if is_packed:
        if n_words < 4:
            raise SnapshotInvalid(f"{name}: a token list of {n_words} words is too short")
        _, list_version, n_tokens = _PACKED.unpack_from(start, _START.size)
        if list_version != _LIST_VERSION:
            raise SnapshotInvalid(
                f"{name}: token list of version {list_version}; llamaslot knows {_LIST_VERSION}"
            )
        if n_tokens + 4 > n_words:
            raise SnapshotInvalid(f"{name}: claims {n_tokens} tokens in {n_words} words")
    if n_tokens > MAX_TOKENS:
        raise SnapshotInvalid(f"{name}: claims {n_tokens} tokens, more than {MAX_TOKENS}")
    return n_tokens, is_packed


def _before_media(tokens: bytes) -> bytes:
    """The tokens before the first -1. ``find`` is as fast as memchr; a hit that is not on a whole token is skipped."""
    at = tokens.find(_NULL)
    while at >= 0 and at % _WORD:
        at = tokens.find(_NULL, at + 1)
    return tokens if at < 0 else tokens[:at]
