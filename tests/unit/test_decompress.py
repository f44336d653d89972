"""Bodies that are packed come out as they went in, however they are cut."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from unittest.mock import Mock

import pytest
from aiohttp import StreamReader
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st

from llamaslot.errors import BadRequest, Unpackable
from llamaslot.http.request_body import Unpacking, Uploads
from tests.support.turns import with_turns


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "identity": bytes,
    "gzip": gzip.compress,
    "X-GZIP ": gzip.compress,
    "deflate": zlib.compress,
    "raw": raw_deflate,
}
LARGE = b"".join(b"%d, " % n for n in range(200_000)) + bytes(3 << 20)


def unpacked(packing: str, pieces: list[bytes]) -> list[bytes]:
    unpacking = Unpacking("deflate" if packing == "raw" else packing)
    found = [out for piece in pieces for out in unpacking.feed(piece)]
    unpacking.end()
    return found


@pytest.mark.parametrize("packing", PACK)
@given(data=st.binary(max_size=300), n=st.integers(1, 40))
def test_what_was_packed_comes_out(packing: str, data: bytes, n: int) -> None:
    """Also byte by byte."""
    packed = PACK[packing](data)
    pieces = [packed[at : at + n] for at in range(0, len(packed), n)]
    assert b"".join(unpacked(packing, pieces)) == data


@pytest.mark.parametrize("packing", ["gzip", "deflate", "raw"])
def test_much_comes_a_little_at_a_time(packing: str) -> None:
    """Who takes no more has nothing more in memory."""
    found = unpacked(packing, [PACK[packing](LARGE)])
    assert b"".join(found) == LARGE
    assert max(map(len, found)) <= 1 << 18


async def test_other_tasks_run_while_much_is_unpacked() -> None:
    """A small body may become a large one."""
    content = StreamReader(Mock(), 1 << 20)
    content.feed_data(gzip.compress(bytes(8 << 20)))
    content.feed_eof()
    request = make_mocked_request("POST", "/", headers={"Content-Encoding": "gzip"}, payload=content)
    body, n_turns = await with_turns(Uploads(16 << 20, 30.0).whole(request))
    assert len(body) == 8 << 20
    assert n_turns > 30


def test_a_body_of_several_members_is_one() -> None:
    """As gzip files that were put one behind the other."""
    packed = gzip.compress(b"one ") + gzip.compress(b"two")
    assert b"".join(unpacked("gzip", [packed])) == b"one two"


@pytest.mark.parametrize(
    ("packing", "packed"),
    [
        pytest.param("gzip", b'{"prompt": "x"}', id="gzip, plain"),
        pytest.param("gzip", gzip.compress(b"x" * 1000)[:-1], id="gzip, cut off"),
        pytest.param("gzip", gzip.compress(b"x" * 1000) + b"y", id="gzip, more"),
        pytest.param("gzip", zlib.compress(b"x"), id="gzip, deflate"),
        pytest.param("deflate", b'{"prompt": "x"}', id="deflate, plain"),
        pytest.param("deflate", zlib.compress(b"x" * 1000)[:-1], id="deflate, cut off"),
        pytest.param("deflate", zlib.compress(b"x" * 1000) + b"y", id="deflate, more"),
        pytest.param("deflate", b"[" * 200_000, id="deflate, brackets"),
        pytest.param("deflate", LARGE, id="deflate, large"),
    ],
)
def test_what_is_broken_is_refused(packing: str, packed: bytes) -> None:
    """Cut off, with something behind it, or something else."""
    with pytest.raises(BadRequest, match=f"its {packing} data is incomplete or damaged") as refused:
        unpacked(packing, [packed[at : at + 5000] for at in range(0, len(packed), 5000)])
    assert refused.value.status == 400


@pytest.mark.parametrize("packing", ["br", "zstd", "compress", "gzip, gzip", "x"])
def test_what_is_not_known_is_refused(packing: str) -> None:
    with pytest.raises(Unpackable, match="send it as gzip, or plain") as refused:
        Unpacking(packing)
    assert refused.value.status == 415
