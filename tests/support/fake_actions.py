"""Save, restore and erase of the fake: run between two steps of its main loop."""

from __future__ import annotations

from pathlib import Path

from tests.support import fake_files
from tests.support.fake_faults import SAVE_FAILED
from tests.support.fake_model import BadInput
from tests.support.fake_state import Engine
from tests.support.fake_types import FakeSlot


def save(engine: Engine, slot: FakeSlot, path: Path) -> tuple[int, int]:
    """Returns n_saved and n_written."""
    fault = engine.faults.take_save(slot.tokens)
    if fault.clears:
        slot.clear()
    tokens = slot.tokens if fault.tokens is None else fault.tokens
    checkpoints = tuple(slot.checkpoints) if engine.shape.checkpoints_in_file else ()
    saved = fake_files.Saved(tokens, checkpoints, slot.origins)
    try:
        n_written = fake_files.write(path, saved, engine.shape.bytes_per_token)
    except OSError as error:
        raise BadInput(SAVE_FAILED, 500, "server_error") from error
    if fault.part is not None:
        fake_files.truncate(path, fault.part)
    if fault.error is not None:
        raise fault.error
    return len(tokens) // 4, n_written


def restore(engine: Engine, slot: FakeSlot, path: Path) -> tuple[int, int]:
    """Returns n_restored and n_read. Any failure leaves the slot empty."""
    if not slot.was_erased:
        engine.violations.append(f"restore into slot {slot.id} without an erase before")
    slot.was_erased = False
    stale = slot.checkpoints if engine.shape.stale_checkpoints else []
    slot.clear()
    if (error := engine.faults.take("restore")) is not None:
        raise error
    try:
        saved = fake_files.read(path, engine.shape.bytes_per_token)
    except (OSError, ValueError) as error_of_file:
        text = "Unable to restore slot: No available space in KV cache or invalid slot save file"
        raise BadInput(text) from error_of_file
    slot.tokens, slot.checkpoints, slot.origins = (
        saved.tokens,
        sorted({*saved.checkpoints, *stale}),
        saved.origins,
    )
    slot.lowest = max(0, slot.n_tokens - engine.shape.window) if engine.shape.kind == "swa" else 0
    return slot.n_tokens, path.stat().st_size


def erase(engine: Engine, slot: FakeSlot) -> int:
    """Returns n_erased."""
    if (error := engine.faults.take("erase")) is not None:
        raise error
    n_erased, stale = slot.n_tokens, slot.checkpoints if engine.shape.stale_checkpoints else []
    slot.clear()
    slot.checkpoints = list(stale)
    slot.was_erased = True
    return n_erased
