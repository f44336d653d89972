"""The table of routes holds against the real llama.cpp: which routes exist, which take a slot, and which slot."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
import pytest_asyncio

from llamaslot.formats import FORMATS
from llamaslot.llama.client import LlamaServer
from llamaslot.llama.dry_run import RouteAvailability
from llamaslot.llama.routes import ROUTES, Route, classify
from tests.support import models
from tests.support.inprocess import fronted
from tests.support.real import RealServer, free_port

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT | {"max_tokens": 2},
    "/chat/completions": CHAT | {"max_tokens": 2},
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/completions": {"prompt": "hi", "n_predict": 2},
    "/completion": {"prompt": "hi", "n_predict": 2},
    "/v1/responses": {"input": "hi", "max_output_tokens": 2},
    "/responses": {"input": "hi", "max_output_tokens": 2},
    "/infill": {"input_prefix": "a = ", "input_suffix": "\n", "n_predict": 2},
    "/v1/messages": CHAT | {"max_tokens": 2},
    "/embedding": {"content": "hi"},
    "/embeddings": {"input": "hi"},
    "/v1/embeddings": {"input": "hi"},
    "/tokenize": {"content": "hi"},
    "/detokenize": {"tokens": [97]},
    "/apply-template": CHAT,
    "/chat/completions/input_tokens": CHAT,
    "/v1/chat/completions/input_tokens": CHAT,
    "/responses/input_tokens": {"input": "hi"},
    "/v1/responses/input_tokens": {"input": "hi"},
    "/v1/messages/count_tokens": CHAT,
    "/v1/streams/lookup": {"conversation_ids": ["x"]},
}
#: Answered 501 here: they want a model of another kind. The table claims nothing good of them.
OTHER_MODELS = {
    *("/v1/audio/transcriptions", "/audio/transcriptions", "/v1/systemone"),
    *("/rerank", "/reranking", "/v1/rerank", "/v1/reranking"),
}
#: In the table for other builds, or for llama-server's router of several models.
NOT_HERE = {
    *("/api/chat", "/api/tags", "/api/show", "/predict", "/v1/streams", "/v1/stream/:id"),
    *("/models/sse", "POST /models", "/models/*", "/tools/*", "/cors-proxy/*"),
}
EMBEDDINGS = {"/embedding", "/embeddings", "/v1/embeddings"}

# What each slot holds, by its number, and the order in which they are filled: slot 1 was used longest ago.
HELD, ORDER = "wxyz", (1, 0, 2, 3)
# The embedded engine with --embeddings, or with --reranking, which it has no flags for.
POOLING = """
import sys, xllamacpp, llamaslot.llama.managed.embedded as embedded
plain = embedded._params
def params(module, flags):
    p = plain(module, flags)
    p.embedding, p.pooling_type = True, getattr(xllamacpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{pooling}")
    return p
embedded._params, pooling = params, sys.argv.pop(1)
embedded.main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.infill(tmp_path_factory.mktemp("models"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RealServer]:
    async with RealServer(model, tmp_path_factory.mktemp("kv"), context=2048) as running:
        yield running


async def ask(url: str, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    """Status and body; any status is an answer."""
    async with aiohttp.request(
        method, url + path, data=None if body is None else orjson.dumps(body)
    ) as answer:
        return answer.status, await answer.read()


async def until_healthy(url: str, process: asyncio.subprocess.Process) -> None:
    """Until /health answers 200; AssertionError when the process has ended."""
    while process.returncode is None:
        try:
            if (await ask(url, "GET", "/health"))[0] == 200:
                return
        except aiohttp.ClientError:
            await asyncio.sleep(0.02)
    raise AssertionError(f"llama.cpp ended with {process.returncode}")


async def tasks(url: str) -> list[int]:
    """The last task of each slot."""
    return [slot["id_task"] for slot in orjson.loads((await ask(url, "GET", "/slots"))[1])]


async def landed(url: str, path: str, body: dict[str, Any]) -> set[int]:
    """The slots that a request took, out of four that hold something else; slot 1 is the least recently used."""
    for slot in ORDER:
        held = {"prompt": HELD[slot] * 50, "n_predict": 0, "id_slot": slot}
        assert (await ask(url, "POST", "/completion", held))[0] == 200
    before = await tasks(url)
    status, payload = await ask(url, "POST", path, body)
    assert status == 200, payload
    return {slot for slot, (old, new) in enumerate(zip(before, await tasks(url), strict=True)) if old != new}


def slot_takers(*paths: str) -> pytest.MarkDecorator:
    routes = [route for route in ROUTES if route.kind in ("completion", "exclusive")]
    chosen = [route for route in routes if not paths or route.path in paths]
    usual = [route for route in chosen if paths or route.path not in OTHER_MODELS | NOT_HERE | EMBEDDINGS]
    return pytest.mark.parametrize("route", usual, ids=lambda route: route.path)


@slot_takers()
async def test_id_slot_is_honoured_where_the_format_says_so(server: RealServer, route: Route) -> None:
    """A pinned request lands in its slot; on the other routes in the least recently used one."""
    is_pinned = route.kind == "completion" and FORMATS[route.format or ""].honours_id_slot
    for pin in (3, 0):
        took = await landed(server.url, route.path, BODIES[route.path] | {"id_slot": pin})
        assert took == ({pin} if is_pinned else {ORDER[0]})


@slot_takers("/completion", "/v1/messages")
async def test_an_unpinned_request_lands_where_its_prefix_is(server: RealServer, route: Route) -> None:
    """What makes a route without id_slot steerable: among idle slots the longest common prefix wins."""
    rendered = orjson.loads((await ask(server.url, "POST", "/apply-template", CHAT))[1])["prompt"]
    await landed(server.url, "/completion", {"prompt": rendered, "n_predict": 0, "id_slot": 2})
    before = await tasks(server.url)
    body = BODIES[route.path] | ({"prompt": rendered} if route.kind == "completion" else {})
    assert (await ask(server.url, "POST", route.path, body))[0] == 200
    changed = [old != new for old, new in zip(before, await tasks(server.url), strict=True)]
    assert changed == [False, False, True, False]


@contextlib.asynccontextmanager
async def pooling(how: str, model: Path, directory: Path) -> AsyncIterator[str]:
    """A server that answers embeddings (MEAN) or also ranks (RANK); its URL."""
    port = free_port()
    flags = ["-m", str(model), "--port", str(port), "-np", "4", "-c", "8192", "-t", "1"]
    flags += ["--slot-save-path", str(directory), "--log-file", str(directory / "log")]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", POOLING, how, *flags, stdin=asyncio.subprocess.PIPE
    )
    try:
        await until_healthy(url := f"http://127.0.0.1:{port}", process)
        yield url
    finally:
        process.kill()
        await process.wait()


async def test_embeddings_take_slots_of_their_own_choice(model: Path, tmp_path: Path) -> None:
    """One slot for each input, whatever id_slot says; on a server that also answers completions."""
    async with pooling("MEAN", model, tmp_path) as url:
        for path in sorted(EMBEDDINGS):
            assert classify("POST", path).kind == "exclusive"
            assert await landed(url, path, BODIES[path] | {"id_slot": 3}) == {ORDER[0]}
        two = {"input": ["hi", "there"], "id_slot": 3}
        assert await landed(url, "/v1/embeddings", two) == set(ORDER[:2])
        assert await landed(url, "/v1/embeddings", {"input": HELD[2] * 30 + "x"}) == {2}, "the longest prefix"
        slots = orjson.loads((await ask(url, "GET", "/slots"))[1])
        assert [slot["n_prompt_tokens"] for slot in slots] == [50, 50, 31, 50], "it holds the input then"


async def test_ranking_takes_a_slot_for_each_document(model: Path, tmp_path: Path) -> None:
    """As embeddings do."""
    async with pooling("RANK", model, tmp_path) as url:
        for path in sorted(OTHER_MODELS):
            if "rank" in path:
                body = {"query": "a", "documents": ["b", "c", "d"], "id_slot": 3}
                assert await landed(url, path, body) == set(ORDER[:3])


@pytest.mark.parametrize("how", ["MEAN", "RANK"])
async def test_embeddings_and_ranks_are_the_servers_own(model: Path, tmp_path: Path, how: str) -> None:
    """Status, type and every number; and completions are answered beside them."""
    kv = tmp_path / "kv"
    kv.mkdir()
    bodies = {path: BODIES[path] for path in sorted(EMBEDDINGS)}
    bodies["/v1/embeddings"] = {"input": ["hi", "there"], "encoding_format": "base64"}
    if how == "RANK":
        ranks = [path for path in sorted(OTHER_MODELS) if "rank" in path]
        bodies = {path: {"query": "a", "documents": ["b", "c", "d"], "top_n": 2} for path in ranks}
    async with pooling(how, model, kv) as url, fronted(tmp_path / "front", url, kv, {}) as it:
        for path, body in bodies.items():
            answer, direct = await it.post(path, body), await it.post(path, body, to=url)
            assert (answer.status, answer.json) == (direct.status, direct.json)
            assert answer.status == 200, path
            assert answer.headers["Content-Type"] == direct.headers["Content-Type"]
        assert (await it.ask("hello")).status == 200


async def test_an_empty_body_tells_whether_a_route_is_there(
    server: RealServer, model: Path, tmp_path: Path
) -> None:
    """It takes no slot, wherever it is sent."""
    async with (
        pooling("RANK", model, tmp_path) as ranking,
        RealServer(models.dense(tmp_path), tmp_path) as plain,
    ):
        ranks = {route.path for route in ROUTES if "rank" in route.path or "embedding" in route.path}
        for url, there in (
            (server.url, {"/infill"}),
            (ranking, ranks | {"/infill"}),
            (plain.url, set[str]()),
        ):
            api, before = LlamaServer(url), await ask(url, "GET", "/slots")
            route_availability = RouteAvailability(api)
            found = {r.path for r in ROUTES if r.may_be_missing and await route_availability.has(r.path)}
            assert found == there
            assert await ask(url, "GET", "/slots") == before
            await api.close()


async def test_passed_on_routes_take_no_slot(server: RealServer) -> None:
    """Tokenizing, templates and counting leave the slots alone."""
    before = await tasks(server.url)
    paths = [route.path for route in ROUTES if route.kind == "passthrough" and route.path in BODIES]
    assert len(paths) == 9
    for path in paths:
        status, payload = await ask(server.url, "POST", path, BODIES[path] | {"id_slot": 3})
        assert status == 200, payload
    assert await tasks(server.url) == before


async def test_every_route_of_the_table_exists_or_is_noted_as_missing(server: RealServer) -> None:
    """A route that has gone, or has come back, shows here."""
    missing = set()
    for route in ROUTES:
        if route.path.startswith("/llamaslot"):
            continue
        method = "POST" if route.method == "*" else route.method
        path = route.path.replace(":id", "0").replace("/*", "/load")
        status, payload = await ask(server.url, method, path, None if method == "GET" else {})
        if status == 404 and b"File Not Found" in payload:
            missing.add(route.path if f"{method} {route.path}" not in NOT_HERE else f"{method} {route.path}")
    assert missing == NOT_HERE


async def test_routes_for_other_models_are_refused_here(server: RealServer) -> None:
    """They exist, and say 501: no slot is prepared for them."""
    for path in OTHER_MODELS:
        assert (await ask(server.url, "POST", path, {}))[0] == 501
        assert classify("POST", path).kind == "exclusive"


async def status_of(server: RealServer, method: str, target: str) -> int:
    """The status for a request line sent byte for byte, as no client library would."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{{}}"
    writer.write(head.encode())
    line = await reader.readline()
    await reader.read()
    writer.close()
    await writer.wait_closed()
    return int(line.split()[1])


HARMLESS = ("%{:02x}", "%{:02X}", "%u{:04x}", "{:c}%ud800")  # for llama-server still the same path
HARMFUL = ("%25{:02x}", "/{:c}", "{:c}%00", "{:c}/../", "%{:x}%", "{:c}%u12")
ENDS = ("/", "?action=erase", "%3faction=erase", ";x", "#x", "%", "%2f", "/?action=erase")


def spelled(path: str, chance: random.Random) -> str:
    """``path`` with many characters as codes, and sometimes something in between or behind."""

    def one(character: str) -> str:
        pick = chance.random()
        way = "{:c}" if pick < 0.5 else chance.choice(HARMLESS if pick < 0.97 else HARMFUL)
        return way.format(ord(character))

    return "".join(map(one, path)) + (chance.choice(ENDS) if chance.random() < 0.5 else "")


async def test_whatever_llama_server_takes_for_a_slot_action_is_forbidden(server: RealServer) -> None:
    """Hundreds of odd spellings: each that is not a 404 is one that classify refuses."""
    chance = random.Random(3)
    taken = 0
    for _ in range(600):
        target = "/" + spelled("slots/0", chance)
        if await status_of(server, "POST", target) != 404:
            taken += 1
            assert classify("POST", target).kind == "forbidden", target
    assert taken > 50


async def test_a_completion_under_any_spelling_is_recognized(server: RealServer) -> None:
    """Each spelling that llama-server takes for /completion is a completion here, and no other."""
    chance = random.Random(4)
    taken = 0
    for _ in range(300):
        target = "/" + spelled("completion", chance)
        is_taken = await status_of(server, "POST", target) != 404
        taken += is_taken
        assert (classify("POST", target).kind == "completion") == is_taken, target
    assert taken > 20
