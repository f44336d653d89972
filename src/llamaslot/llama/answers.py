"""Answers of llama-server: types for the short ones that are read whole, and ``Response``, whose body is read piece by
piece while it arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from msgspec import Struct
from multidict import CIMultiDict, CIMultiDictProxy

from llamaslot.errors import UpstreamError


@dataclass(frozen=True, slots=True)
class Props:
    """The parts of ``GET /props`` that llamaslot needs.

    ``n_ctx``: the size of one slot's context, in tokens. ``n_slots``: None if the answer is not from a llama-server
    with one model. ``max_models``: the most models that a router keeps loaded at a time, 0 for any number; None if the
    server is no router.
    """

    n_slots: int | None
    n_ctx: int
    model_path: str
    boot_id: str  # media_marker: random for each process of llama-server, so it reveals a restart
    template: str = ""  # hash of the chat template
    modalities: Mapping[str, bool] | None = None  # supported media; None if the build does not report it
    max_models: int | None = None
    is_sleeping: bool = False  # the server has unloaded its model (--sleep-idle-seconds): its slots are empty
    # Returns True while the connection on which the answer came is open: then the server's process is still the same.
    is_connected: Callable[[], bool] = field(default=lambda: False, compare=False)


class SlotInfo(Struct, frozen=True):
    """One entry of ``GET /slots``. ``n_tokens``: tokens in the slot; None until it has run a task, 0 after it was
    cleared. ``id_task``: the number of its present or last task.
    """

    id: int
    is_processing: bool
    n_tokens: int | None
    id_task: int | None


class SlotAction(Struct, frozen=True):
    """The answer to a save or restore: tokens and bytes of the file, and the seconds that it took the server."""

    n_tokens: int
    n_bytes: int
    seconds: float


class Progress(Struct, frozen=True):
    """One ``prompt_progress`` event. Of the prompt's ``total`` tokens, ``cache`` were reused; ``processed``, these
    included, are in the slot now, ``seconds`` after the start of the prefill.
    """

    total: int
    cache: int
    processed: int
    seconds: float


# -- a body that is still coming -----------------------------------------------------------------------------------

BROKEN_OFF = "llama-server closed the connection before the end of its answer"

#: If more bytes of a relayed answer than this wait for its reader, no more are read from the connection.
RELAYED_BYTES = 1 << 14

#: Receives a piece of an answer. Returns False if the next piece must wait.
Take = Callable[[bytes], bool]


class Response(Protocol):
    """An answer whose headers have arrived. Its body is read with ``pass_to``."""

    @property
    def status(self) -> int: ...
    @property
    def reason(self) -> str | None: ...
    @property
    def headers(self) -> CIMultiDict[str] | CIMultiDictProxy[str]: ...

    @property
    def has_ended(self) -> bool:
        """True if the whole body has arrived and was passed on."""
        ...

    async def pass_to(self, take: Take) -> bool:
        """Call ``take`` with each piece of the body when it arrives, until ``take`` returns False: then returns True.
        Returns False at the end of the body.

        Raises BackendDown if the connection breaks, SlotWedged if nothing arrives for too long, and the errors of
        ``take``. Canceling is safe: the next call goes on with the next piece.
        """
        ...


async def next_piece(response: Response) -> bytes:
    """The next piece of the body; empty at its end. Raises as ``pass_to`` does."""
    pieces: list[bytes] = []

    def take(piece: bytes) -> bool:
        pieces.append(piece)
        return False

    await response.pass_to(take)
    return pieces[0] if pieces else b""


async def whole(response: Response) -> bytes:
    """All of the body that was not read yet, to its end. Raises as ``pass_to`` does."""
    pieces: list[bytes] = []

    def take(piece: bytes) -> bool:
        pieces.append(piece)
        return True

    await response.pass_to(take)
    return b"".join(pieces)


async def error_of(response: Response) -> UpstreamError:
    """Read an error answer to its end, and return it as an error. Raises BackendDown if the connection breaks."""
    return UpstreamError(response.status, await whole(response), content_type_of(response))


def content_type_of(response: Response) -> str:
    """The content type as llama-server sent it, with parameters; JSON's if it sent none."""
    return response.headers.get("Content-Type", "application/json")


def media_type_of(response: Response) -> str:
    """The content type without parameters, in lower case; "" if llama-server sent none."""
    return response.headers.get("Content-Type", "").partition(";")[0].strip().lower()


def length_of(response: Response) -> int | None:
    """The length of the body in bytes; None if the headers do not tell it."""
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isascii() and length.isdigit() else None
