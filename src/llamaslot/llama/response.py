"""An answer of llama-server whose body is still coming: taken piece by piece, as fast as its reader takes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from multidict import CIMultiDict, CIMultiDictProxy

BROKEN_OFF = "llama-server closed the connection in the middle of the answer"

#: While its reader is busy, so much of an answer is held, and what was read last (up to the kernel's window).
RELAYED_BYTES = 1 << 14

#: Takes a piece of an answer; False if the next one must wait.
Take = Callable[[bytes], bool]


class Response(Protocol):
    """An answer of which the headers have come."""

    @property
    def status(self) -> int: ...
    @property
    def reason(self) -> str | None: ...
    @property
    def headers(self) -> CIMultiDict[str] | CIMultiDictProxy[str]: ...

    @property
    def has_ended(self) -> bool:
        """Whether all of the body has come and was passed on."""
        ...

    async def pass_to(self, take: Take) -> bool:
        """Call ``take`` with each piece of the body as it comes, until it returns False. Returns False at the end of
        the answer, else True.

        Raises BackendDown if the connection breaks, SlotWedged if nothing comes for too long, and what ``take`` raises.
        Canceling is safe: later pieces wait for the next call.
        """
        ...


async def next_piece(response: Response) -> bytes:
    """The received part of an answer; empty at its end. Raises as ``pass_to`` does."""
    pieces: list[bytes] = []

    def take(piece: bytes) -> bool:
        pieces.append(piece)
        return False

    await response.pass_to(take)
    return pieces[0] if pieces else b""


async def whole(response: Response) -> bytes:
    """The body to its end. Raises as ``pass_to`` does."""
    pieces: list[bytes] = []

    def take(piece: bytes) -> bool:
        pieces.append(piece)
        return True

    await response.pass_to(take)
    return b"".join(pieces)


def content_type_of(response: Response) -> str:
    """The content type as llama-server sent it, character set included."""
    return response.headers.get("Content-Type", "application/json")


def media_type_of(response: Response) -> str:
    """The content type without parameters, in lower case."""
    return response.headers.get("Content-Type", "").partition(";")[0].strip().lower()


def length_of(response: Response) -> int | None:
    """The length of the body, if the headers tell."""
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isascii() and length.isdigit() else None
