"""On the real llama.cpp: the reasoning of an answer is where the server puts it, whatever its flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support import models
from tests.support.stack import Stack

pytestmark = pytest.mark.real


@pytest.mark.parametrize("reasoning", ["none", "deepseek", "deepseek-legacy"])
async def test_reasoning_is_in_the_servers_own_field(tmp_path: Path, reasoning: str) -> None:
    """Of an answer that llamaslot may have assembled from a stream."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Hello"}],
        "grammar": 'root ::= "<think>hm</think>ok"',
        "max_tokens": 40,
        "temperature": 0,
    }
    flags = ("--reasoning-format", reasoning)
    async with Stack(models.dense(tmp_path), tmp_path, slots=2, context=1024, extra=flags) as stack:
        answers = [await post(url, body) for url in (stack.server.url, stack.url)]
    assert answers[0]["choices"][0]["message"] == answers[1]["choices"][0]["message"]


async def post(url: str, body: Any) -> Any:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/chat/completions", json=body) as answer,
    ):
        assert answer.status == 200
        return await answer.json()
