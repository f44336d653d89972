"""How a model remembers, read from the header of its GGUF."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamaslot.cache.reuse import CacheKind
from llamaslot.config.load import Config
from llamaslot.errors import ConfigError
from llamaslot.llama.identity import Architecture, architecture
from tests.support import models

U32, STRING, ARRAY = 4, 8, 9


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def u32(key: str, value: int) -> bytes:
    return entry(key, U32, struct.pack("<I", value))


def header(*entries: bytes, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, 0, len(entries)) + b"".join(entries)


NAME = entry("general.architecture", STRING, text("llama"))
TOKENS = entry(
    "tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 3) + text("a") + text("bb") + text("c" * 300)
)
SCORES = entry("tokenizer.ggml.scores", ARRAY, struct.pack("<IQ", 6, 1000) + bytes(4000))
NESTED = entry("x", ARRAY, struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQ", 0, 5) + bytes(5))


async def read(tmp_path: Path, data: bytes) -> Architecture | None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return await architecture(path)


@pytest.mark.parametrize(
    ("make", "cache_kind", "window"),
    [
        (models.dense, CacheKind.DENSE, 0),
        (models.swa, CacheKind.SWA, models.SLIDING_WINDOW),
        (models.recurrent, CacheKind.RECURRENT, 0),
    ],
)
async def test_generated_models_are_recognized(
    tmp_path: Path, make: object, cache_kind: CacheKind, window: int
) -> None:
    """Written by the gguf package, as everybody's are."""
    assert callable(make)
    found = await architecture(make(tmp_path))
    assert found is not None
    assert (found.cache_kind, found.window) == (cache_kind, window)


@pytest.mark.parametrize(
    ("key", "cache_kind", "window"),
    [
        ("llama.attention.sliding_window", CacheKind.SWA, 512),
        ("mamba.ssm.state_size", CacheKind.RECURRENT, 0),
        ("rwkv6.wkv.head_size", CacheKind.RECURRENT, 0),
        ("lfm2.shortconv.l_cache", CacheKind.RECURRENT, 0),
        ("llama.context_length", CacheKind.DENSE, 0),
    ],
)
@pytest.mark.parametrize("version", [2, 3])
async def test_keys_tell_how_it_remembers(
    tmp_path: Path, key: str, cache_kind: CacheKind, window: int, version: int
) -> None:
    """Wherever they stand among others, arrays included."""
    data = header(TOKENS, NAME, SCORES, NESTED, u32(key, 512), version=version)
    assert await read(tmp_path, data) == Architecture("llama", cache_kind, window)


async def test_a_window_of_zero_is_none(tmp_path: Path) -> None:
    """Some converters write it all the same."""
    found = await read(tmp_path, header(NAME, u32("llama.attention.sliding_window", 0)))
    assert found == Architecture("llama", CacheKind.DENSE)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGUF",
        header(NAME, magic=b"GGML"),
        header(NAME, version=1),
        header(NAME)[:-3],
        header(),
        header(entry("general.architecture", 77, b"")),
        header(entry("k", STRING, struct.pack("<Q", 1 << 40))),
        header(text("k")),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 40),
        header(text("\xff").replace("\xff".encode(), b"\xff\xfe") + bytes(8)),
    ],
)
async def test_what_is_no_gguf_is_unknown(tmp_path: Path, data: bytes) -> None:
    """Then the server is asked by trying."""
    assert await read(tmp_path, data) is None


async def test_a_file_that_is_not_there_is_unknown(tmp_path: Path) -> None:
    """Nor is a directory."""
    assert await architecture(tmp_path / "none.gguf") is None
    assert await architecture(tmp_path) is None


@given(st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
async def test_no_bytes_raise(tmp_path: Path, data: bytes) -> None:
    """Broken headers of all kinds."""
    await read(tmp_path, b"GGUF" + struct.pack("<I", 3) + data)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "is HTML"),
        (b"PK\x03\x04" + bytes(30), "PyTorch"),
        (struct.pack("<Q", 600) + b'{"__metadata__":{}}', "safetensors"),
        (struct.pack("<III", 0x67677371, 4, 9), "is a slot file"),
        (b"GGML and more", "begins with 'GGML', not with 'GGUF'"),
        (header(), None),
    ],
)
def test_a_configuration_names_a_gguf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, what: str | None
) -> None:
    """Of another file it is said what that is, before a llama-server fails to load it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    (tmp_path / "model.gguf").write_bytes(data)
    config = tmp_path / "config.yaml"
    config.write_text("backends: [{managed: {model: model.gguf}}]\n")
    if what is None:
        Config.load(config)
        return
    with pytest.raises(ConfigError, match=r"managed\.model: .*/model\.gguf is no GGUF: it ") as caught:
        Config.load(config)
    assert what in str(caught.value)
