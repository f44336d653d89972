"""Answers of llama-server: typed ones, and ``Response``, whose body is still coming and is taken piece by piece, as
fast as its reader takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from msgspec import Struct
from multidict import CIMultiDict, CIMultiDictProxy


@dataclass(frozen=True, slots=True)
class Props:
    """The parts of ``GET /props`` that llamaslot needs.

    ``n_ctx``: the context of one slot, in tokens. ``n_slots`` is None if this is not a llama-server with one model.
    ``max_models``: for a router, how many models it has loaded at a time, 0 for any number; None if it is no router.
    """

    n_slots: int | None
    n_ctx: int
    model_path: str
    boot_id: str  # media_marker: random for each process of llama-server, so it reveals a restart
    template: str = ""  # hash of the chat template
    modalities: Mapping[str, bool] | None = None  # supported media; None if the build does not report it
    max_models: int | None = None
    is_sleeping: bool = False  # its model is unloaded (--sleep-idle-seconds), and its slots are empty
    # Whether the connection on which this came is still open: then the process is still the same.
    is_connected: Callable[[], bool] = field(default=lambda: False, compare=False)


class SlotInfo(Struct, frozen=True):
    """One entry of ``GET /slots``. ``n_tokens`` is None until the slot has run a task, 0 after it was cleared."""

    id: int
    is_processing: bool
    n_tokens: int | None
    id_task: int | None


class SlotAction(Struct, frozen=True):
    """The answer to a save or restore: tokens, bytes, and the server's own time in seconds."""

    n_tokens: int
    n_bytes: int
    seconds: float


class Progress(Struct, frozen=True):
    """One ``prompt_progress`` event: of ``total`` tokens ``cache`` were reused and ``processed`` are present now."""

    total: int
    cache: int
    processed: int
    seconds: float


# -- a body that is still coming -----------------------------------------------------------------------------------

BROKEN_OFF = "llama-server closed the connection in the middle of the answer"

#: While its reader is busy, so much of an answer is held, and what was read last (up to the kernel's window).
RELAYED_BYTES = 1 << 14

#: Takes a piece of an answer; False if the next one must wait.
Take = Callable[[bytes], bool]


class Response(Protocol):
    """An answer whose headers have come, and whose body is read with ``pass_to``."""

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
    """The next part of the body; empty at its end. Raises as ``pass_to`` does."""
    pieces: list[bytes] = []

    def take(piece: bytes) -> bool:
        pieces.append(piece)
        return False

    await response.pass_to(take)
    return pieces[0] if pieces else b""


async def whole(response: Response) -> bytes:
    """The rest of the body, to its end. Raises as ``pass_to`` does."""
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
    """The length of the body in bytes; None if the headers do not tell it."""
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isascii() and length.isdigit() else None
