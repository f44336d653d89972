"""The identity of the running model: the *fingerprint* that tells which snapshots are valid for it.

A slot file does not name its model, and llama-server restores a file of another model with the same shape without an
error. If an operator replaces the GGUF under the same path, ``/props`` and ``/v1/models`` stay the same. So what the
server reports is not enough: llamaslot has a fixed short prompt computed, and compares the log-probabilities of the
next token.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import xxhash
from msgspec import Struct

from llamaslot.cache.ids import pack
from llamaslot.cache.reuse import CacheKind

# The largest difference of two log-probabilities that count as equal. It distinguished any two models of one shape;
# builds of llama.cpp differ by less.
TOLERANCE = 0.02
N_PROBS = 8
N_PROBE_TOKENS = 50
_MIN_COMMON = 6  # at least so many of N_PROBS must be the same: the last may differ within the tolerance
_N_SAMPLES, _SAMPLE_BYTES = 256, 4096
_META = ("vocab_type", "n_vocab", "n_ctx_train", "n_embd", "n_params", "size")


class Identity(Struct, frozen=True):
    """What identifies a model. ``told``: what the server reports (``told_properties``); ``behaviour``: the likeliest
    tokens after the probe prompt, as a dict from id to log-probability; ``gguf``: ``gguf_mark`` of the model file, None
    if llamaslot cannot read it.
    """

    told: Mapping[str, Any]
    behaviour: Mapping[int, float]
    gguf: str | None = None

    def is_same(self, other: Identity) -> bool:
        """True if snapshots of the model ``other`` are valid for this model. False in doubt."""
        if dict(self.told) != dict(other.told):
            return False
        if self.gguf is not None and other.gguf is not None and self.gguf != other.gguf:
            return False
        common = self.behaviour.keys() & other.behaviour.keys()
        return len(common) >= _MIN_COMMON and all(
            abs(self.behaviour[id_] - other.behaviour[id_]) <= TOLERANCE for id_ in common
        )

    def is_same_as(self, text: str) -> bool:
        """As ``is_same``, for the model with the fingerprint ``text``; False if ``text`` is no fingerprint."""
        other = Identity.from_text(text)
        return other is not None and self.is_same(other)

    def to_text(self) -> str:
        behaviour = {str(id_): round(value, 4) for id_, value in self.behaviour.items()}
        data = {"told": dict(self.told), "behaviour": behaviour, "gguf": self.gguf}
        return orjson.dumps(data, option=orjson.OPT_SORT_KEYS).decode()

    @property
    def key(self) -> str:
        """A short name for this model, used in file names. The key depends on whether the GGUF can be read, so one
        model may have two.
        """
        data = orjson.dumps([dict(self.told), self.gguf], option=orjson.OPT_SORT_KEYS)
        return xxhash.xxh3_64_hexdigest(data)

    @classmethod
    def from_text(cls, text: str) -> Identity | None:
        """The inverse of ``to_text``. None if ``text`` has another form: snapshots with such a fingerprint are not
        used.
        """
        try:
            data = orjson.loads(text)
            behaviour = {int(id_): float(value) for id_, value in data["behaviour"].items()}
            return cls(dict(data["told"]), behaviour, data["gguf"])
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


def told_properties(model: Mapping[str, Any], n_slots: int, lora: Any) -> dict[str, Any]:
    """The properties that the server reports and on which the content of a slot file depends. ``model``: an entry of
    ``/v1/models``; ``lora``: the answer of ``/lora-adapters``.

    The number of slots is part of them because files of a non-unified KV cache contain it. The LoRA adapters are part
    of them because slot files do not name them.
    """
    meta = model.get("meta") or {}
    return {**{key: meta.get(key) for key in _META}, "n_slots": n_slots, "lora": lora}


def probe_tokens(n_vocab: int) -> bytes:
    """The fixed prompt whose next token is compared: token ids spread over the vocabulary."""
    return pack([(i * 7919 + 101) % max(n_vocab, 2) for i in range(N_PROBE_TOKENS)])


async def gguf_mark(path: Path) -> str | None:
    """A text with the size of a GGUF file and a hash of 256 samples spread over the file; None if the file cannot be
    read.
    """
    return await asyncio.to_thread(_mark, path)


def _mark(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            digest = xxhash.xxh3_128()
            for i in range(_N_SAMPLES):
                file.seek(max(size - _SAMPLE_BYTES, 0) * i // (_N_SAMPLES - 1))  # both ends are sampled
                digest.update(file.read(_SAMPLE_BYTES))
    except OSError:
        return None
    return f"{size}-{digest.hexdigest()}"


_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_KEYS = 10_000


class Architecture(Struct, frozen=True):
    """What a GGUF file says of its model. ``name``: its architecture, such as "llama"; ``window``: tokens of the
    sliding window, 0 without one.
    """

    name: str
    cache_kind: CacheKind
    window: int = 0


async def architecture(path: Path) -> Architecture | None:
    """The architecture in a GGUF file; None if the file cannot be read or is no GGUF of version 2 or 3."""
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
    """Read one value of type ``kind`` from the GGUF's metadata. Skips an array and returns None."""
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
