"""Every route of llama-server, asked through llamaslot and directly: the answers are the same.

tests/support/http_api.py has what is asked. One llama-server answers directly, another one of the same model has
llamaslot in front; what takes no slot is asked of that one directly, too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import aiohttp
import pytest
import pytest_asyncio

from llamaslot.llama.routes import ROUTES, Gate, Route, RouteKind, classify
from tests.support import models
from tests.support.client_shapes import SHAPES
from tests.support.http_api import TABLE, UNKNOWN, Ask, ReportedCounts, tell
from tests.support.inprocess import Front, Settings, fronted
from tests.support.real import RealServer

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]

#: What llamaslot adds to answers; docs/http-api.md says what each tells.
ADDED = {"x-request-id", "x-llamaslot-backend", "x-llamaslot-slot", "x-llamaslot-source", "x-llamaslot-reused-tokens",
         "x-llamaslot-prompt-tokens", "cache-control", "x-accel-buffering"}  # fmt: skip


@dataclass(slots=True)
class Both:
    """``direct``: a llama-server alone. ``behind``: one with ``front`` before it. ``open``: llamaslot before
    ``direct``, with all gates open, for what is refused otherwise."""

    direct: RealServer
    behind: RealServer
    front: Front
    open: Front
    session: aiohttp.ClientSession

    async def ask(self, ask: Ask) -> tuple[ReportedCounts, ReportedCounts]:
        """The direct answer and that through llamaslot."""
        takes_slot = classify(ask.method, ask.target).kind in ("completion", "exclusive")
        alone = self.direct if takes_slot else self.behind
        return await tell(self.session, alone.url, ask), await tell(self.session, self.front.url, ask)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Both]:
    directory = tmp_path_factory.mktemp("both")
    model = models.infill(directory)
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(RealServer(model, directory / name, context=2048))
            for name in ("direct", "behind")
        ]
        direct, behind = servers
        front = await stack.enter_async_context(_front(directory, behind, {}))
        gates = {"passthrough": {"allow": list(get_args(Gate))}}
        is_open = await stack.enter_async_context(_front(directory, direct, gates))
        connector = aiohttp.TCPConnector(force_close=True)
        session = aiohttp.ClientSession(connector=connector, auto_decompress=False)
        yield Both(direct, behind, front, is_open, await stack.enter_async_context(session))


def _front(directory: Path, server: RealServer, settings: Settings) -> AbstractAsyncContextManager[Front]:
    return fronted(directory / f"front-{server.port}", server.url, server.save_dir, settings)


def key_of(route: Route) -> str:
    return f"{route.method} {route.path}"


def of_kind(*kinds: RouteKind) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("route", [r for r in ROUTES if r.kind in kinds], ids=key_of)


def check_same(ask: Ask, direct: ReportedCounts, through: ReportedCounts) -> None:
    """Status, content type, body, and every header that goes from end to end."""
    assert (through.status, through.content_type) == (direct.status, direct.content_type), ask
    assert through.value == direct.value, ask
    told, there = direct.end_to_end, through.end_to_end
    if ask.method != "HEAD":  # a body that has ids or times in it is not always as long
        told, there = ({**headers, "content-length": ""} for headers in (told, there))
    added = {name: value for name, value in there.items() if told.get(name) != value}
    assert added.keys() <= ADDED, ask
    assert {**told, **added} == there, ask


async def test_the_table_has_every_route() -> None:
    """What llamaslot knows of is asked for here, and nothing else."""
    assert list(TABLE) == [key_of(route) for route in ROUTES]


@of_kind("completion", "exclusive", "passthrough")
async def test_a_route_is_answered_as_by_llama_server(both: Both, route: Route) -> None:
    """What it is for, what clients get wrong, and streams event by event."""
    for ask in TABLE[key_of(route)]:
        if classify(ask.method, ask.target).kind in ("forbidden", "gated"):
            continue  # GET /slots is for all, POST /slots is not
        check_same(ask, *await both.ask(ask))


@pytest.mark.parametrize("ask", UNKNOWN, ids=str)
async def test_what_is_no_route_is_answered_as_by_llama_server(both: Both, ask: Ask) -> None:
    """Its own 404."""
    check_same(ask, *await both.ask(ask))


@pytest.mark.parametrize("ask", SHAPES, ids=lambda ask: ask.name)
async def test_what_applications_send_is_answered_as_by_llama_server(both: Both, ask: Ask) -> None:
    """With the fields and headers that each of them has."""
    direct, through = await both.ask(ask)
    assert direct.status == 200
    check_same(ask, direct, through)


@pytest.mark.parametrize("path", ["/health", "/v1/health"])
async def test_health_is_as_by_llama_server_while_it_serves(both: Both, path: str) -> None:
    """llamaslot's own answer; other methods than GET are llama-server's 404."""
    for ask in TABLE[f"GET {path}"]:
        direct, through = await both.ask(ask)
        assert (through.status, through.value) == (direct.status, direct.value), ask
        assert through.content_type == direct.content_type, ask


@of_kind("forbidden", "gated")
async def test_what_is_refused_never_reaches_llama_server(both: Both, route: Route) -> None:
    """403, and what to do about it. What llama-server would say to other methods there does not matter."""
    before = await both.behind.slots()
    for ask in TABLE[key_of(route)]:
        told = await tell(both.session, both.front.url, ask)
        assert told.status == 403, ask
        error = told.value["error"]
        assert (error["type"], error["code"]) == ("permission_error", 403)
        assert route.gate is None or f"'{route.gate}'" in error["message"]
    assert await both.behind.slots() == before


@of_kind("gated")
async def test_what_is_allowed_is_answered_as_by_llama_server(both: Both, route: Route) -> None:
    """With all gates open: its own answers, which are refusals here, for nothing of that is switched on."""
    for ask in TABLE[key_of(route)]:
        direct = await tell(both.session, both.direct.url, ask)
        check_same(ask, direct, await tell(both.session, both.open.url, ask))


async def test_a_browser_may_ask_whether_it_may_ask(both: Both) -> None:
    """OPTIONS, on any route: without an ``Origin`` it is no question of a page, and llama-server's answer."""
    for route in ROUTES:
        ask = Ask("options", "OPTIONS", route.path.replace(":id", "0").replace("/*", "/x"))
        if "/llamaslot" not in route.path:
            check_same(ask, *await both.ask(ask))


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("PUT", "/llamaslot/nothing", 404),
        ("GET", "/llamaslot/nothing", 404),
        ("GET", "/llamaslot/journal?n=x", 400),
    ],
)
async def test_errors_below_llamaslot_have_the_same_shape(
    both: Both, method: str, target: str, status: int
) -> None:
    """An OpenAI client can read them."""
    told = await tell(both.session, both.front.url, Ask("own", method, target))
    assert told.status == status
    assert set(told.value["error"]) == {"message", "type", "code"}
    assert told.value["error"]["code"] == status
