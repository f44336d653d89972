"""HTTP byte by byte, asked of llama-server and of llamaslot in front of one: the same comes back.

tests/support/http_shapes.py has what is sent, and where the two differ on purpose.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support import models
from tests.support.http_shapes import DIFFERENT, SHAPES, Shape, look
from tests.support.inprocess import fronted
from tests.support.real import RealServer

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]

DOCS = Path(__file__).parents[2] / "docs" / "http-api.md"
ON_PURPOSE = {
    name: brief for conversion_checks in DIFFERENT.values() for name, brief in conversion_checks.items()
}

Ports = tuple[int, int]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ports(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Ports]:
    """Of a llama-server alone, and of llamaslot in front of one."""
    directory = tmp_path_factory.mktemp("shapes")
    model = models.dense(directory)
    async with AsyncExitStack() as stack:
        direct, behind = [
            await stack.enter_async_context(RealServer(model, directory / name, slots=2, context=2048))
            for name in ("direct", "behind")
        ]
        front = await stack.enter_async_context(fronted(directory / "front", behind.url, behind.save_dir))
        yield direct.port, front.config.listen.port


@pytest.mark.parametrize("shape", SHAPES, ids=str)
async def test_a_shape_of_http_is_answered_as_by_llama_server(ports: Ports, shape: Shape) -> None:
    """Version, status, how the body ends, what is in it, whether the connection is kept; else as the docs say. Where
    llamaslot closes it, it has said so."""
    direct, through = [await look(port, shape) for port in ports]
    assert all(got.version == "HTTP/1.1" for got in through.answers)
    if through.answers:
        assert through.answers[-1].says_close == (through.ending == "closed")
    if shape.name in ON_PURPOSE:
        assert (direct.brief, through.brief) == ON_PURPOSE[shape.name]
        assert direct != through, "no difference any more"
    else:
        assert direct == through


@pytest.mark.parametrize("row", DIFFERENT)
async def test_each_difference_has_a_row_in_the_docs(row: str) -> None:
    """And each is about shapes that are asked."""
    assert DIFFERENT[row].keys() <= {shape.name for shape in SHAPES}
    rows = DOCS.read_text().partition("## What is different on purpose")[2].partition("\n## ")[0]
    assert f"\n| {row}" in rows


async def test_the_shapes_have_names_of_their_own() -> None:
    assert len({shape.name for shape in SHAPES}) == len(SHAPES)
