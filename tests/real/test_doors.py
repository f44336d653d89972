"""What needs a key, and where it is looked for: as the real llama-server does it with ``--api-key``."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

import aiohttp
import pytest
import pytest_asyncio
from aiohttp.test_utils import make_mocked_request

from llamaslot.http.auth import is_open, key_of
from llamaslot.llama.routes import ROUTES
from tests.support import models
from tests.support.real import RealServer

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]

KEY = "s3cret"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RealServer]:
    directory = tmp_path_factory.mktemp("doors")
    async with RealServer(
        models.dense(directory), directory / "kv", slots=1, context=1024, extra=("--api-key", KEY)
    ) as running:
        yield running


async def status(server: RealServer, method: str, path: str, headers: dict[str, str] | None = None) -> int:
    async with aiohttp.request(method, server.url + path, headers=headers) as answer:
        return answer.status


async def test_what_is_open_is_what_it_leaves_open(server: RealServer) -> None:
    """Each route of the table, unknown ones, and every file that its web UI names."""
    async with aiohttp.request("GET", server.url + "/") as answer:
        page = await answer.text()
    files = {"/" + name.removeprefix("./") for name in re.findall(r'href="(\.?/?[\w./-]+\.\w+)"', page)}
    assert any(name.startswith("/_app/") for name in files)
    known = {route.path.replace(":id", "0").replace("*", "x") for route in ROUTES}
    asked = [(method, path) for path in sorted(known) for method in ("GET", "POST", "OPTIONS")]
    asked += [("GET", path) for path in sorted(files) if "splash" not in path]
    asked += [(method, path) for path in ("/nothing", "/models/x.js", "/sw.js") for method in ("GET", "HEAD")]
    # POST of an open path is its 404; here it needs a key, as all that is no reading.
    asked = [
        (method, path)
        for method, path in asked
        if method != "POST" or not is_open(make_mocked_request("GET", path))
    ]
    answers = await asyncio.gather(*(status(server, method, path) for method, path in asked))
    for (method, path), given in zip(asked, answers, strict=True):
        assert (given != 401) == is_open(make_mocked_request(method, path)), (method, path, given)


@pytest.mark.parametrize(
    ("headers", "is_more"),
    [
        ({}, False),
        ({"Authorization": f"Bearer {KEY}"}, False),
        ({"Authorization": KEY}, False),
        ({"X-Api-Key": KEY}, False),
        ({"Authorization": f"Bearer {KEY}", "X-Api-Key": "wrong"}, False),
        ({"Authorization": "Bearer wrong", "X-Api-Key": KEY}, False),
        ({"Authorization": f"Basic {KEY}"}, False),
        ({"Authorization": f"bearer {KEY}"}, True),
        ({"Api-Key": KEY}, True),
        ({"Authorization": "Basic eDp5", "X-Api-Key": KEY}, True),
    ],
)
async def test_keys_are_looked_for_where_it_looks(
    server: RealServer, headers: dict[str, str], is_more: bool
) -> None:
    """``is_more``: llamaslot finds the key there, too."""
    found = key_of(make_mocked_request("GET", "/props", headers=headers).headers) == KEY
    assert found == ((await status(server, "GET", "/props", headers)) == 200 or is_more)
