"""llamaslot's own routes are as ``/llamaslot/openapi.json`` says."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from llamaslot.http.openapi import PATHS
from tests.support.inprocess import letters, served


async def test_own_routes_are_as_they_are_described(tmp_path: Path) -> None:
    """Every status, field and type, with something to tell."""
    from tests.support.described import examine  # schemathesis takes a second to import

    async with served(tmp_path, slots=2) as it:
        for n in range(3):
            await it.ask(letters(n, 400))
        description = (await it.get("/llamaslot/openapi.json")).json
        n_asked = await asyncio.to_thread(examine, it.url, description, 2)
    assert n_asked >= 2 * len(PATHS)


@pytest.mark.parametrize("path", [path for path in PATHS if "llamaslot" in path and "get" in PATHS[path]])
async def test_own_pages_are_only_read(tmp_path: Path, path: str) -> None:
    """HEAD is a GET without a body; all else is a 405 that says so."""
    async with served(tmp_path) as it:
        head = await it.send("HEAD", path)
        assert (head.status, head.raw) == (200, b"")
        for method in ("POST", "PUT", "DELETE"):
            answer = await it.send(method, path, body={})
            assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")
            assert answer.error["code"] == 405
