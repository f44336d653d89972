"""Serves requests that are no completions: passes them through unchanged, or runs them in slots that llama-server
chooses.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from functools import partial

import orjson
from aiohttp import web
from multidict import CIMultiDict

from llamaslot.backend.backend import Backend
from llamaslot.backend.lease import Lease
from llamaslot.backend.long_prompt import no_report
from llamaslot.cache.content import Content
from llamaslot.config.load import Config
from llamaslot.errors import (
    BackendDown,
    BackendRestarted,
    BadRequest,
    DeadlinePassed,
    LlamaslotError,
)
from llamaslot.fleet.failover import Attempts
from llamaslot.fleet.pool import Pool
from llamaslot.fleet.registry import Registry
from llamaslot.formats import format_named
from llamaslot.http.auth import user_of
from llamaslot.http.body_changes import SystemPrompts, marked_bytes
from llamaslot.http.client_stream import HAS_BEGUN, end_relayed
from llamaslot.http.deadlines import Deadlines, Watchdog
from llamaslot.http.forwarded_headers import to_server
from llamaslot.http.in_flight import begins, id_of, placed
from llamaslot.http.relay import relay
from llamaslot.http.request_body import Uploads, parse_object, read_object
from llamaslot.http.response_headers import BACKEND
from llamaslot.http.unassisted import serve_unassisted
from llamaslot.llama.answers import Response, error_of
from llamaslot.llama.routes import Route, origin_form
from llamaslot.llama.transport.fresh_connections import Check
from llamaslot.scheduling.request import Placement, Request

_MODEL_LISTS = ("/v1/models", "/models")
_CHANGES_MODEL = ("/lora-adapters", "/models")
_WAKES = ("/slots", "/lora-adapters")  # their GET wakes a sleeping llama-server; /props and /metrics do not


class Passthrough:
    """Serves routes that take no slot, and requests whose slots llama-server chooses."""

    def __init__(self, config: Config, registry: Registry, uploads: Uploads, prompts: SystemPrompts) -> None:
        self._config, self._router = config, registry.router
        self._uploads, self._prompts = uploads, prompts

    async def forward(self, request: web.Request, route: Route) -> web.StreamResponse:
        """Pass a request through unchanged. With a single model on one backend both bodies are streamed. With several
        the request's body is read whole, because it may name the model and may be sent to a second backend.

        A request that changes the model (its LoRA scales, or which model is loaded) makes all cached content invalid.
        So before the client gets the answer, llamaslot stops using that llama-server and connects to it again.
        Canceling closes the connection to llama-server.
        """
        if self._router.are_several:
            if route.path in _MODEL_LISTS and route.method == "GET":
                return web.json_response({"object": "list", "data": self._router.listed()})
            # The body names the model, and may be sent to a second backend.
            raw = await self._uploads.whole(request) if request.body_exists else b""
            pool = await self._pool(request, raw)
            return await self.unprepared(pool, request, raw, gate=route.gate)
        failure: LlamaslotError | None = None

        async def pieces() -> AsyncIterator[bytes]:
            nonlocal failure
            try:
                async for piece in self._uploads.pieces(request):
                    yield piece
            except LlamaslotError as error:  # the client of llama-server will report only a broken connection
                failure = error
                raise

        data = pieces() if request.body_exists else None
        backend = (await self._router.pool_for()).any_backend()
        try:
            async with self._upstream(backend, request, data, to_server(request)) as upstream:
                if route.gate in _CHANGES_MODEL and request.method == "POST" and upstream.status < 400:
                    backend.changed(f"{route.gate} was called")
                return await relay(request, upstream, {})
        except BackendDown as error:
            raise failure or error from None

    async def count(self, request: web.Request, route: Route) -> web.StreamResponse:
        """Count the tokens of a completion's body. The rules for system prompts are applied first, as for the
        completion itself. A body that llamaslot cannot read is passed on, so that llama-server refuses it.
        """
        raw = await self._uploads.whole(request)
        with contextlib.suppress(BadRequest):
            body = await read_object(raw)
            if self._prompts.rewrite(request, body, format_named(route.format)):
                raw = orjson.dumps(body)
        return await self.unprepared(await self._pool(request, raw), request, raw)

    async def _pool(self, request: web.Request, raw: bytes, *, loads: bool = False) -> Pool:
        """Return the pool of the model that the request names; if it names none, the pool of the default or the first
        model. Raises as ``Router.pool_for`` does.
        """
        named = named_model(request, raw) if self._router.are_several else None
        return await self._router.pool_for(named, is_named=named is not None, loads=loads)

    async def unprepared(
        self, pool: Pool, request: web.Request, raw: bytes, *, gate: str | None = None
    ) -> web.StreamResponse:
        """Relay a request that takes no slot, because it only asks for information or llama-server will refuse it.
        ``raw``: its body. ``gate``: the name under which the operator has allowed its route. A request with one may
        change something, so it is sent only once.
        """
        changes_model = gate in _CHANGES_MODEL and request.method == "POST"
        attempts = _attempts(request, pool, raw, is_once=gate is not None)

        async def attempt() -> web.StreamResponse:
            backend = attempts.backend
            _only_asks(backend, request)
            async with self._upstream(backend, request, raw, to_server(request)) as upstream:
                await _refuse_if_worth_another(attempts, upstream)
                if changes_model and upstream.status < 400:
                    backend.changed(f"{gate} was called")
                return await relay(request, upstream, {})

        return await attempts.run(attempt)

    async def run_exclusively(
        self,
        request: web.Request,
        route: Route,
        raw: bytes | None = None,
        head: bytes = b"",
        *,
        attempts: Attempts | None = None,
    ) -> web.StreamResponse:
        """Run a request in slots that llama-server chooses, while no other request is between two steps.

        ``raw``: its body, None if it was not read before. ``head``: the tokens of its prompt up to the first medium;
        llama-server finds the slot that holds them by itself. ``attempts``: given if this is one attempt to serve a
        completion, whose caller may make another one. Canceling releases the slots when llama-server has stopped
        working in them.
        """
        if raw is None:
            raw = await self._uploads.whole(request)
        pool = attempts.pool if attempts is not None else await self._pool(request, raw, loads=True)
        while await pool.ready() is None:
            with contextlib.suppress(BackendRestarted):
                return await serve_unassisted(self._config, pool, request, route, raw)
        if route.may_be_missing and not await pool.has_route(route.path):
            return await self.unprepared(pool, request, raw)
        # /slots does not show the progress of embeddings and the like.
        is_watched = route.format is not None
        try:
            async with Deadlines(None, self._config.timeouts.total_s).kept():
                if attempts is not None:
                    return await self._run_exclusively(attempts, request, raw, head, is_watched=is_watched)
                attempts = _attempts(request, pool, raw)
                attempts.check(raw)
                attempt = partial(self._run_exclusively, attempts, request, raw, head, is_watched=is_watched)
                return await attempts.run(attempt)
        except DeadlinePassed as error:
            if (relayed := await end_relayed(request, error)) is None:
                raise
            return relayed

    async def _run_exclusively(
        self, attempts: Attempts, request: web.Request, raw: bytes, head: bytes, *, is_watched: bool
    ) -> web.StreamResponse:
        id_, user, pool = id_of(request), user_of(request), attempts.pool
        begins(request, pool, None)
        await pool.ready()
        slot_request = Request(
            id_,
            placement=Placement.SERVER_CHOSEN,
            user=user,
            namespace=pool.namespace(user),
            avoids=attempts.avoids,
        )
        left = (
            Content(head, is_exact=False, namespace=slot_request.namespace, has_media=True) if head else None
        )
        with await pool.lease(slot_request) as lease:
            if not lease.table.is_assisted:
                raise BackendRestarted
            attempts.leased(lease)
            placed(request, lease)
            await pool.confirm(lease)
            backend = attempts.backend
            headers = {"x-request-id": id_, BACKEND: backend.name}
            silence_s = backend.api.watchdog_s if is_watched else None
            watchdog = Watchdog(silence_s, partial(_how_far, backend, lease))
            async with (
                backend.exclusive.section(lease, no_report, left) as unpinned,
                watchdog.kept(),
                self._upstream(
                    backend, request, marked_bytes(attempts, raw), to_server(request), attempts.check_process
                ) as upstream,
            ):
                await _refuse_if_worth_another(attempts, upstream)
                return await relay(request, upstream, headers, unpinned.settle, lease.mark_decoding)

    @contextlib.asynccontextmanager
    async def _upstream(
        self,
        backend: Backend,
        request: web.Request,
        data: bytes | AsyncIterator[bytes] | None,
        headers: CIMultiDict[str],
        check: Check | None = None,
    ) -> AsyncIterator[Response]:
        path = origin_form(request.raw_path)
        try:
            async with backend.api.request(
                request.method, path, data=data, headers=headers, is_relayed=True, check=check
            ) as upstream:
                yield upstream
        except BackendDown:
            backend.doubt()
            raise


def _attempts(request: web.Request, pool: Pool, raw: bytes, *, is_once: bool = False) -> Attempts:
    return Attempts(
        request.rel_url.raw_path, pool, raw, lambda: bool(request.get(HAS_BEGUN)), is_once=is_once
    )


async def _how_far(backend: Backend, lease: Lease) -> object:
    """Return the progress of the slots in which llama-server works for the request of ``lease``; None while
    llama-server has not begun with it.
    """
    leases = backend.leases.leases
    taken = {other.slot_id for other in leases if other.request is lease.request and other.slot is not None}
    infos = [info for info in await backend.api.slots() if info.id in taken and info.is_processing]
    return infos or None


async def _refuse_if_worth_another(attempts: Attempts, upstream: Response) -> None:
    """Raise UpstreamError if this answer is to be held back, because another backend may have a better one."""
    if attempts.is_worth_another(upstream.status):
        raise await error_of(upstream)


def _only_asks(backend: Backend, request: web.Request) -> None:
    """Raise BackendDown if a request that takes no slot would load the backend's model, or wake it."""
    if backend.is_unloaded:
        raise BackendDown(
            f"{backend.model_name or backend.name} is not loaded: the first request for it loads it"
        )
    if backend.leases.is_asleep and request.method != "POST" and request.path in _WAKES:
        raise BackendDown(f"{backend.name} sleeps, and its slots are empty: the next request wakes it")


# The field of a multipart form, and its value behind further headers. One expression for both would take quadratic time
# for a body of many such fields.
_FIELD = re.compile(rb'name="?model"?\r\n')
_VALUE = re.compile(rb"(?:[^\r\n]+\r\n)*\r\n([^\r\n]{1,256})\r\n")


def named_model(request: web.Request, raw: bytes) -> object:
    """Return the model that a request names, in its body (``raw``: JSON or a form) or in its query; None if it names
    none.
    """
    named: object = None
    # llama-server reads every other body as JSON.
    if "multipart/" not in request.headers.get("Content-Type", ""):
        with contextlib.suppress(BadRequest):
            named = parse_object(raw).get("model")
    elif (field := _FIELD.search(raw)) and (value := _VALUE.match(raw, field.end())):
        named = value[1].decode(errors="replace")
    return named or request.query.get("model")
