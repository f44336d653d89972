"""Decompresses request bodies in small steps.

aiohttp (3.14) could do it, but never ends with some corrupt bodies, and also decompresses bodies that are not read.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final

from llamaslot.errors import BadRequest, Unpackable

_PIECE_BYTES: Final = 1 << 18  # a millisecond of work
_GZIP, _ZLIB, _RAW = 31, 15, -15  # ``wbits`` of zlib


class Unpacking:
    """One body with a ``Content-Encoding`` (https://www.rfc-editor.org/rfc/rfc9110#section-8.4.1)."""

    def __init__(self, packing: str) -> None:
        """Raises Unpackable unless the encoding is identity, gzip or deflate."""
        self._packing = packing.strip().lower()
        if self._packing not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise Unpackable(
                f"a body with Content-Encoding {packing!r} cannot be read here: send it as gzip, or plain"
            )
        self._is_plain = self._packing in ("", "identity")
        self._stream: zlib._Decompress | None = None
        self._is_over = False

    def feed(self, packed: bytes) -> Iterator[bytes]:
        """Decompress the next bytes of the body, in pieces. Raises BadRequest if they are corrupt."""
        if self._is_plain:
            yield packed
            return
        is_full = False
        while packed or is_full:
            stream = self._begun(packed)
            try:
                piece = stream.decompress(packed, _PIECE_BYTES)
            except zlib.error as error:
                raise self._broken() from error
            is_full, packed = len(piece) == _PIECE_BYTES, stream.unconsumed_tail
            if piece:
                yield piece
            if stream.eof:
                is_full, packed = False, stream.unused_data
                # gzip may have further members; after deflate there is nothing.
                self._stream, self._is_over = None, self._packing == "deflate"

    def end(self) -> None:
        """The body is over. Raises BadRequest if it is incomplete."""
        if self._stream is not None:
            raise self._broken()

    def _begun(self, packed: bytes) -> zlib._Decompress:
        if self._is_over:
            raise self._broken()
        if self._stream is None:
            # Some clients send deflate without zlib's header, which begins with an 8.
            wbits = _GZIP if self._packing != "deflate" else _ZLIB if packed[0] & 15 == 8 else _RAW
            self._stream = zlib.decompressobj(wbits)
        return self._stream

    def _broken(self) -> BadRequest:
        return BadRequest(f"the body cannot be read: it is not whole as {self._packing}")
