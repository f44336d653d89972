"""On the real llama.cpp: a body that is sent on in the client's own bytes is read as llamaslot reads it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson
import pytest
import pytest_asyncio

from llamaslot.http.request_body import parse_object, written
from tests.support import models
from tests.support.real import RealServer

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RealServer]:
    directory = tmp_path_factory.mktemp("bodies")
    async with RealServer(models.dense(directory), directory / "kv", slots=2, context=2048) as running:
        yield running


async def post(server: RealServer, path: str, raw: bytes) -> Any:
    headers = {"Content-Type": "application/json"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(server.url + path, data=raw, headers=headers) as response,
    ):
        return response.status, orjson.loads(await response.read())


async def test_the_last_of_equal_names_counts(server: RealServer) -> None:
    """At any depth, and also for a value that is an object: nothing of the earlier one is left."""
    for raw in (
        b'{"prompt": "b", "n_predict": 1, "id_slot": 0, "prompt": "abc", "n_predict": 3, "id_slot": 1}',
        b'{"n_predict": 3, "id_slot": 1, "prompt": {"prompt_string": "x", "a": 1}, "prompt": "abc"}',
    ):
        status, answer = await post(server, "/completion", raw)
        told = answer["timings"]["predicted_n"], answer["tokens_evaluated"], answer["id_slot"]
        assert (status, *told) == (200, 3, 3, 1)
    raw = b'{"messages": [{"role": "user", "content": "a", "role": "system", "content": "b"}]}'
    once = b'{"messages": [{"role": "system", "content": "b"}]}'
    assert await post(server, "/apply-template", raw) == await post(server, "/apply-template", once)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"prompt": "abc"}',
        b'\xef\xbb\xbf { "prompt" :\t"a\\u00fc\\ud83c\\udf89/\\/\\u0000c"\r\n}\n',
        '{"prompt": "ü漢🎉", "seed": 18446744073709551616, "temperature": 1e-400, "unknown": [{"a": -0}]}'.encode(),
        b'{"prompt": "a", "prompt": ["b", 98, "c"], "stream": false, "top_k": 1.0}',
        b'{"prompt": "a", "stream": true, "n_predict": "many"}',
    ],
)
async def test_a_body_is_read_alike_in_either_form(server: RealServer, raw: bytes) -> None:
    """In the client's bytes with the fields added at the end, and written anew."""
    body = parse_object(raw)
    wanted = {"n_predict": 4, "temperature": 0, **body, "id_slot": 1, "cache_prompt": False}
    spliced = written(wanted, body, raw)
    assert spliced != orjson.dumps(wanted)
    answers = []
    for sent in (spliced, orjson.dumps(wanted)):
        status, answer = await post(server, "/completion", sent)
        answer.pop("timings", None)
        answers.append((status, answer))
    assert answers[0] == answers[1]
    assert answers[0][0] == (400 if b"many" in raw else 200)
