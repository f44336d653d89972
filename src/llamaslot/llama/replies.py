"""Typed answers of llama-server, as far as llamaslot needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from msgspec import Struct


@dataclass(frozen=True, slots=True)
class Props:
    """``GET /props``, the parts that llamaslot needs. ``n_ctx``: the context of one slot, in tokens.

    ``n_slots`` is None if this is not a llama-server with one model. ``max_models``: of a router, how many models it
    has loaded at a time, 0 for any number; None if it is none.
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
