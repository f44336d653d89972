"""Everything that is no completion: passed through unchanged, taken in turn, or refused."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from llamaslot.core.slots import Job
from llamaslot.engine.backend import Backend
from llamaslot.errors import BackendDown, BackendRestarted, ClientGone
from llamaslot.llama.routes import Route, origin_form
from llamaslot.web.bodies import read_body
from llamaslot.web.deadlines import Deadlines, Timeouts
from llamaslot.web.downstream import BROKEN_OFF, begin, cut, error_event, send
from llamaslot.web.headers import to_client, to_server
from llamaslot.web.jobs import ATTEMPTS, request_id
from llamaslot.web.users import user_of

log = logging.getLogger(__name__)

# Of /v1/messages. Inside a text the quotes would be escaped. One that arrives in two pieces
# is not recognized: then what comes after it is waited for.
_LAST_EVENTS = (b'"message_stop"',)


_CHANGES_MODEL = ("/lora-adapters", "/models")


class Passthrough:
    """Routes that take no slot, and requests whose slot llama-server chooses."""

    def __init__(self, backend: Backend, max_body: int, timeouts: Timeouts) -> None:
        self._backend, self._max_body, self._timeouts = backend, max_body, timeouts

    async def forward(self, request: web.Request, route: Route) -> web.StreamResponse:
        """Unchanged, streaming both ways. Cancelling closes the upstream connection.

        What has changed the model (its LoRA scales, or which one is loaded) makes all that was computed before
        worthless: the server is met again before the client can know.
        """
        data = request.content if request.body_exists else None
        async with self._upstream(request, data, to_server(request)) as upstream:
            if route.gate in _CHANGES_MODEL and request.method == "POST" and upstream.status < 400:
                self._backend.changed(f"{route.gate} was called")
            return await _relay(request, upstream, {})

    async def is_offered(self, route: Route) -> bool:
        """Whether llama-server has this route for its model. Raises BackendDown."""
        await self._backend.ready()
        return await self._backend.offered.has(route.path)

    async def unprepared(self, request: web.Request, raw: bytes) -> web.StreamResponse:
        """A request that takes no slot, for llama-server refuses it. ``raw``: its body."""
        async with self._upstream(request, raw, to_server(request)) as upstream:
            return await _relay(request, upstream, {})

    async def in_turn(
        self, request: web.Request, route: Route, raw: bytes | None = None
    ) -> web.StreamResponse:
        """A request that takes slots of llama-server's choice: while nobody else is between two steps. Cancelling gives
        the slots back when the server is through with them. ``raw``: its body, if that was read before."""
        if raw is None:
            raw = await read_body(request, self._max_body)
        if route.may_be_missing and not await self.is_offered(route):
            return await self.unprepared(request, raw)
        # Nobody reads these answers closely enough to tell when they begin.
        async with Deadlines(replace(self._timeouts, first_token_s=None)).kept():
            return await self._in_turns(request, raw)

    async def _in_turns(self, request: web.Request, raw: bytes) -> web.StreamResponse:
        id_ = request_id(request.headers)
        for _ in range(ATTEMPTS):
            met = await self._backend.ready()
            try:
                return await self._in_turn(request, raw, id_)
            except BackendRestarted:  # raised before anything was sent
                self._backend.lost(met)
        raise BackendDown("llama-server restarts again and again; see its log")

    async def _in_turn(self, request: web.Request, raw: bytes, id_: str) -> web.StreamResponse:
        user = user_of(request)
        job = Job(id_, is_unpinned=True, user=user, space=self._backend.rules.space(user))
        with await self._backend.scheduler.lease(job) as lease:
            async with (
                self._backend.turns.take(lease, lambda _: None) as turn,
                self._upstream(request, raw, to_server(request)) as upstream,
            ):
                return await _relay(request, upstream, {"x-request-id": id_}, turn.settle, lease.talks)

    @contextlib.asynccontextmanager
    async def _upstream(
        self,
        request: web.Request,
        data: bytes | aiohttp.StreamReader | None,
        headers: CIMultiDict[str],
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with self._backend.api.request(
                request.method, origin_form(request.raw_path), data=data, headers=headers
            ) as upstream:
                yield upstream
        except BackendDown:
            self._backend.doubt()
            raise


async def _relay(
    request: web.Request,
    upstream: aiohttp.ClientResponse,
    told: dict[str, str],
    ended: Callable[[], Awaitable[None]] | None = None,
    begun: Callable[[], None] = lambda: None,
) -> web.StreamResponse:
    """The answer as it comes. ``begun`` is called with the first of it.

    ``ended`` is called when llama-server is through with its slot, before the client can read that: a client may hang
    up at once after it, and that must not look as if it had left the slot at work.
    """
    headers = to_client(upstream)
    headers.update(told)
    response = web.StreamResponse(status=upstream.status, reason=upstream.reason, headers=headers)
    if upstream.content_length is not None and upstream.status not in (204, 304):
        response.content_length = upstream.content_length
    is_stream = upstream.content_type == "text/event-stream"
    try:
        if ended is not None and not is_stream:
            whole = await upstream.read()  # JSON: there is nothing to be gained by passing it on in pieces
            await ended()
            await begin(response, request)
            await send(response, whole)
            return response
        await begin(response, request)
        async for chunk in upstream.content.iter_any():
            begun()
            if ended is not None and any(mark in chunk for mark in _LAST_EVENTS):
                await ended()
            await send(response, chunk)
        if ended is not None:
            await ended()
    except aiohttp.ClientError as error:
        if not response.prepared:
            raise
        log.warning("%s %s: llama-server closed the connection in the middle", request.method, request.path)
        if not is_stream:
            cut(request)  # half an answer must not look like a whole one
            raise ClientGone from error
        await send(response, error_event(request, BackendDown(BROKEN_OFF).body()))
    return response
