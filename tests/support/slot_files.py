"""Slot files in llama-server's own layout, written without llama-server, and without the code that reads them.

Each row and state is a function of the tokens up to it, so two files have equal ones where their tokens are equal.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import xxhash


@dataclass(frozen=True, slots=True)
class Model:
    """What determines the layout. ``layers``: the numbers of layers with full attention, with a window, with a
    recurrent state.
    """

    layers: tuple[int, int, int] = (2, 0, 0)
    row_bytes: int = 16
    state_bytes: int = 24
    window: int = 8
    slots: int = 2
    has_mrope: bool = False
    has_v: bool = True
    seed: int = 0

    @property
    def has_states(self) -> bool:
        return any(self.layers[1:])


KINDS = {
    "dense": Model(),
    "window": Model((1, 5, 0)),
    "recurrent": Model((0, 0, 2)),
    "hybrid": Model((2, 0, 4)),
    "hybrid with a window": Model((1, 2, 2)),
    "mrope": Model(has_mrope=True),
    "mla": Model(has_v=False),
}


def slot_file(model: Model, tokens: Sequence[int], checkpoints: Sequence[int] = (), slot: int = 0) -> bytes:
    """The file of a slot that holds ``tokens``, with checkpoints after these numbers of tokens."""
    n = len(tokens)
    data = struct.pack(f"<IIIiiI{n}iI", 0x67677371, 4, n + 4, -1, 1, n, *tokens, 0)
    if model.layers[0]:
        data += _cache(model, tokens, model.layers[0], range(n), slot, 0)
    data += _state(model, tokens, slot)
    if model.has_states:
        data += struct.pack("<III", 0x504B4353, 1, len(checkpoints))
    for at in checkpoints:
        blob = struct.pack("<II", 0xAF143CD8, slot) + _state(model, tokens[:at], slot)
        pos_min = max(0, at - model.window - 3) if model.layers[1] else at - 1
        data += struct.pack("<qiiQ", at, pos_min, at - 1, len(blob)) + blob + struct.pack("<QQ", 0, 0)
    return data


def row(model: Model, tokens: Sequence[int], tensor: int) -> bytes:
    """The row of the last of ``tokens``."""
    digest = xxhash.xxh3_128_digest(struct.pack(f"<{len(tokens)}i", *tokens), seed=model.seed)
    return _row(digest, tensor, model.row_bytes)


def _row(digest: bytes, tensor: int, size: int) -> bytes:
    return ((bytes([tensor]) + digest) * (size // 17 + 1))[:size]


def _digests(model: Model, tokens: Sequence[int]) -> Iterator[bytes]:
    so_far = xxhash.xxh3_128(seed=model.seed)
    for token in tokens:
        so_far.update(struct.pack("<i", token))
        yield so_far.digest()


def _state(model: Model, tokens: Sequence[int], slot: int) -> bytes:
    n, data = len(tokens), b""
    if model.layers[1]:
        low = max(0, n - model.window)
        ring = sorted(range(low, n), key=lambda pos: pos % model.window)
        data += _cache(model, tokens, model.layers[1], ring, slot, 50)
    if model.layers[2]:
        data += struct.pack("<IiIII", 1, n - 1, 0, 0, model.layers[2])
        *_, digest = _digests(model, tokens)
        for tensor in range(2 * model.layers[2]):
            size = model.state_bytes if tensor < model.layers[2] else 0
            data += struct.pack("<iQ", 0, size) + _row(digest, 100 + tensor, size)
    return data


def _cache(
    model: Model, tokens: Sequence[int], n_layers: int, positions: Sequence[int], slot: int, tensor: int
) -> bytes:
    digests = list(_digests(model, tokens))
    data = struct.pack("<I", model.slots) + bytes(4 * slot) + struct.pack("<I", len(positions))
    for pos in positions:
        extra = (pos, pos, tokens[pos]) if model.has_mrope else ()
        data += struct.pack(f"<{3 + len(extra)}i", pos, 1, *extra, slot)
    data += struct.pack("<IIII", 0, n_layers, 0, 0)
    for index in range(n_layers * (2 if model.has_v else 1)):
        data += struct.pack("<iQ", 1, model.row_bytes)
        data += b"".join(_row(digests[pos], tensor + index, model.row_bytes) for pos in positions)
    return data + bytes(4 * (model.slots - 1 - slot))
