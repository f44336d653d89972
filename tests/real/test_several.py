"""Lists of prompts, each of them computed ahead: the answer is the one that llama-server gives to the list."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support import models
from tests.support.stack import Stack
from tests.support.users import words

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]

# One chunk, however busy the machine is: in batches of another size a token may round otherwise.
OWN_STEPS = {"prefill": {"chunk_threshold_s": 0, "chunk_s": 60}, "stream": {"comments": False}}
TIMES = {"id", "created", "timings", "id_slot", "system_fingerprint", "usage"}


async def ask(url: str, path: str, body: dict[str, Any]) -> list[Any]:
    """The events of a stream, or the one JSON value."""
    async with aiohttp.ClientSession() as session, session.post(url + path, json=body) as response:
        text = await response.text()
        assert response.status == 200, text
    if not body["stream"]:
        return [json.loads(text)]
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    # Between two prompts llama-server sends "data: null" (seen running), which tells nothing.
    return [line if line == "[DONE]" else json.loads(line) for line in lines if line != "null"]


def plain(value: Any) -> Any:
    """Without what differs from one time to the next, and without the settings, which name the slot and the seed."""
    if isinstance(value, dict):
        left = TIMES | {"generation_settings"}
        return {name: plain(part) for name, part in value.items() if name not in left}
    return [plain(part) for part in value] if isinstance(value, list) else value


def counted(value: Any) -> Iterator[tuple[int, int]]:
    """Of each ``timings`` the tokens of the prompt and of the answer."""
    if isinstance(value, dict):
        if "timings" in value and "prompt_n" in value["timings"]:
            timings = value["timings"]
            yield timings["cache_n"] + timings["prompt_n"], timings["predicted_n"]
        value = list(value.values())
    for part in value if isinstance(value, list) else ():
        yield from counted(part)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    directory = tmp_path_factory.mktemp("several")
    async with Stack(models.dense(directory), directory, slots=3, settings=OWN_STEPS) as running:
        yield running


async def n_prefills(stack: Stack) -> int:
    """The prefills that the journal tells of."""
    return json.dumps((await stack.journal())["decisions"]).count("prefill")


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/completion"])
async def test_a_list_is_answered_as_by_llama_server(stack: Stack, path: str, stream: bool, n: int) -> None:
    """Events in their order, numbers in their places; with several answers to each prompt, too."""
    rng = random.Random(f"{path} {stream} {n}")  # nothing of it is in a slot already
    prompts: list[Any] = [words(rng, 900), words(rng, 600), [ord(c) for c in words(rng, 700)]]
    body = {"prompt": prompts, "n_predict": 5, "temperature": 0, "stream": stream, "n_cmpl": n}
    n_before = await n_prefills(stack)
    through = await ask(stack.url, path, body)
    assert await n_prefills(stack) > n_before
    direct = await ask(stack.server.url, path, {**body, "id_slot": 0})
    if n > 1 and stream:  # the answers to one prompt are decoded side by side
        through, direct = (sorted(map(json.dumps, map(plain, events))) for events in (through, direct))
    assert plain(through) == plain(direct)
    assert sorted(counted(through)) == sorted(counted(direct))
    if stream and path.startswith("/v1"):
        assert len({event["id"] for event in through if isinstance(event, dict)}) <= 1
