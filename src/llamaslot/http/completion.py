"""Serves a completion: finds its tokens, waits for a slot, performs the steps of the plan, sends the request, and
relays the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import orjson
from aiohttp import web
from msgspec.structs import replace

from llamaslot.backend.backend import Backend
from llamaslot.backend.exclusive import UnpinnedRequest
from llamaslot.backend.lease import Lease
from llamaslot.backend.lease_states import EarlierPlaces, Preempted, RetryPlacement
from llamaslot.backend.long_prompt import Prefilling, no_report
from llamaslot.config.load import Config
from llamaslot.errors import (
    BackendDown,
    BackendRestarted,
    BadRequest,
    ClientGone,
    LlamaslotError,
    PromptTooLong,
    SlotWedged,
)
from llamaslot.fleet.failover import Attempts
from llamaslot.fleet.model_context import ModelContext
from llamaslot.fleet.pool import Pool
from llamaslot.fleet.registry import Registry
from llamaslot.formats import FORMATS
from llamaslot.formats.base import Format
from llamaslot.formats.comments import Comment
from llamaslot.http.auth import user_of
from llamaslot.http.body_changes import SystemPrompts, marked, rewrote
from llamaslot.http.client_stream import MISTAKE, Downstream
from llamaslot.http.completion_stream import Answering, RetryNonStreamed
from llamaslot.http.deadlines import Deadlines
from llamaslot.http.forwarded_headers import to_server
from llamaslot.http.in_flight import begins, by_operator, id_of, placed
from llamaslot.http.parse import ClientRequest, ParsedRequest, keep_what_follows, parse_request
from llamaslot.http.passthrough import Passthrough
from llamaslot.http.prompt_list import PromptPart, joined
from llamaslot.http.refusals import ensure_accepted, ensure_body_accepted, servers_error_for
from llamaslot.http.request_body import NoObject, Uploads, read_object, written
from llamaslot.http.response_headers import of_placement
from llamaslot.http.unassisted import relay_unassisted
from llamaslot.llama.answers import Response
from llamaslot.llama.routes import Route, origin_form
from llamaslot.scheduling.plan import PrefillStats
from llamaslot.scheduling.request import Placement, Request
from llamaslot.tokens.tokenizer import NoPrompt

log = logging.getLogger(__name__)

_BEYOND = "llama-server has fewer slots than n asks answers for, or its model does not read such media"


class Completions:
    """Serves the routes whose prompts llamaslot knows token by token."""

    def __init__(
        self,
        config: Config,
        registry: Registry,
        uploads: Uploads,
        passthrough: Passthrough,
        prompts: SystemPrompts,
    ) -> None:
        self.config, self.router, self.passthrough = config, registry.router, passthrough
        self._uploads, self._prompts = uploads, prompts

    async def handle(self, request: web.Request, route: Route) -> web.StreamResponse:
        """Serve a completion. Raises LlamaslotError if it fails before its exchange begins, and ClientGone. Canceling
        (the client has gone) releases the slot: at once, or when llama-server has stopped working in it.
        """
        raw = await self._uploads.whole(request)
        try:
            body = await read_object(raw)
        except NoObject as error:
            backend = (await self.router.pool_for(is_named=False)).any_backend()
            raise await servers_error_for(backend, request, raw, error) from error
        # If the model must be loaded first, the exchange waits for that, and sends comments meanwhile.
        unloaded = None if route.may_be_missing else self.router.unloaded_pool(body.get("model"))
        assert route.format is not None, "only completions have a format"
        format_ = FORMATS[route.format]
        # Said before a model is unloaded for this one.
        if unloaded is not None and format_.required_key not in body:
            raise BadRequest(f"'{format_.required_key}' is required")
        pool = unloaded or await self.router.pool_for(body.get("model"), loads=True)
        if self._prompts.rewrite(request, body, format_):
            raw = orjson.dumps(body)
        if route.may_be_missing and not await pool.has_route(route.path):
            return await self.passthrough.unprepared(pool, request, raw)
        exchange = _Exchange(self, pool, request, route, format_, raw, body)
        exchange.must_load = unloaded is not None
        return await exchange.run()


class _Exchange:
    """One completion request from its body to the end of its answer."""

    def __init__(
        self,
        server: Completions,
        pool: Pool,
        request: web.Request,
        route: Route,
        format_: Format,
        raw: bytes,
        body: dict[str, Any],
        deadlines: Deadlines | None = None,
        down: Downstream | None = None,
    ) -> None:
        """``raw``: ``body`` as JSON bytes. For one prompt of a list, ``deadlines`` are those of the whole list, and
        ``down`` is this prompt's part of the client's side.

        No object that belongs to the exchange refers back to it. So its memory is free as soon as it has ended, without
        a garbage collection.
        """
        self.server, self.request, self.route, self.format = server, request, route, format_
        self.raw, self.body = raw, body
        self.in_one_piece = False  # True: the answer cannot be assembled from a stream
        self.must_load = False  # True: the model is not loaded, and ``pool`` may be another model's
        self.id = id_of(self.request)
        if down is None:
            headers = {"x-request-id": self.id}
            down = Downstream(self.request, server.config.stream, body.get("stream") is True, headers)
        self.down = down
        self.attempts = Attempts(self.id, pool, raw, lambda: down.has_answer)
        self.attempts.pool_again = partial(server.router.pool_for, body.get("model"), loads=True)
        post = partial(_post, self.attempts, self.request, body, raw)
        self.client_request = ClientRequest(self.id, body, format_, post, time.monotonic())
        begins(self.request, pool, body.get("model"), self.down)
        limits = server.config.timeouts
        self.deadlines = deadlines or Deadlines(limits.first_token_s, limits.total_s)

    async def run(self) -> web.StreamResponse:
        try:
            async with self.deadlines.kept():
                return await self._run()
        except (BackendDown, SlotWedged) as error:
            if isinstance(error, SlotWedged):
                self.backend.metrics.wedged.inc()
                log.warning("%s: the request ends without a complete answer: %s", self.id, error)
            self.backend.doubt()
            return await self.down.fail(error)
        except NoPrompt as error:
            return await self.down.fail(await servers_error_for(self.backend, self.request, self.raw, error))
        except LlamaslotError as error:
            if isinstance(error, PromptTooLong):
                self.pool.refused_too_long(error.n_prompt_tokens)
            return await self.down.fail(error)
        except asyncio.CancelledError:
            return await self.down.fail(by_operator(self.request))
        except ClientGone:
            raise
        except Exception:
            if not self.down.has_begun:
                raise
            log.exception(
                "%s: the answer ends with an error: internal error in llamaslot; please report it", self.id
            )
            return await self.down.fail(LlamaslotError(f"{MISTAKE} (request id {self.id})"))

    async def _run(self) -> web.StreamResponse:
        if self.must_load:
            self.down.say(Comment.LOADING)
            async with self.down.waiting():
                await self.attempts.look_up_pool()
                with contextlib.suppress(BackendRestarted):
                    await self.pool.ready()
        return await self.attempts.run(self._try)

    async def _try(self) -> web.StreamResponse:
        """Make one attempt to serve the request. Raises LlamaslotError. After BackendRestarted, BackendDown or
        UpstreamError another attempt may follow.
        """
        context, parsed = await self.pool.ready_with(self._parsed)
        if context is None or parsed is None:
            return await relay_unassisted(
                self.attempts, self.down, self.deadlines, self.format, self.raw, self.body
            )
        has_one = len(parsed.prompts) == 1 and not parsed.is_head
        self.attempts.check(parsed.request.tokens if has_one else self.raw)
        if parsed.is_beyond_server:
            raise await servers_error_for(self.backend, self.request, self.raw, BadRequest(_BEYOND))
        await ensure_body_accepted(self.backend, self.request, self.client_request, parsed)
        if parsed.request.placement is Placement.STEERED and (not parsed.prompts or parsed.is_head):
            if parsed.is_head:
                await self._prepare_head(parsed, context)
            self.deadlines.begin_answer()  # llamaslot does not detect the beginning of this answer
            response = await self.server.passthrough.run_exclusively(
                self.request, self.route, self.raw, parsed.left_in_slot, attempts=self.attempts
            )
            return self._counted(context, parsed, response)
        if len(parsed.prompts) > 1 and self._is_long(parsed):
            return await self._serve_each(parsed)
        return self._counted(context, parsed, await self._serve(parsed, context))

    @property
    def pool(self) -> Pool:
        return self.attempts.pool

    @property
    def backend(self) -> Backend:
        """As ``Attempts.backend``."""
        return self.attempts.backend

    async def _prepare_head(self, parsed: ParsedRequest, context: ModelContext) -> None:
        """Have the text before the first medium in a slot before the request is sent, if computing that text takes
        long: restore it, or compute it in turn with other requests. llama-server will choose the slot, and finds the
        text there. Canceling releases the slot.
        """
        slot_request = replace(parsed.request, placement=Placement.PINNED)
        if not self.pool.takes_long(slot_request.n_tokens):
            return
        with await self.pool.lease(slot_request) as lease:
            if self.pool.context is not context:
                return  # llama-server has restarted, and its slots are empty
            self.attempts.leased(lease)
            keep_what_follows(lease)
            # If the slot is needed for another request, the computed tokens stay in it.
            with contextlib.suppress(RetryPlacement, BackendRestarted):
                await ensure_accepted(self.backend, self.request, self.client_request, parsed, lease)
                await self.backend.executor.prepare(lease, no_report)

    def _counted(
        self, context: ModelContext, parsed: ParsedRequest, response: web.StreamResponse
    ) -> web.StreamResponse:
        """Return ``response``, and count its request in the metrics if it was served without known tokens and
        llama-server has not refused it.
        """
        if parsed.unknown is not None and response.status < 400:
            context.untokenized.count(self.format.name, parsed.unknown)
        return response

    async def _parsed(self, context: ModelContext) -> ParsedRequest:
        parsed = await parse_request(
            self.id, self.body, self.raw, self.format, context, user_of(self.request)
        )
        if not self.attempts.avoids:
            return parsed
        return replace(parsed, request=replace(parsed.request, avoids=self.attempts.avoids))

    # -- several prompts -----------------------------------------------------------------------------------------

    def _is_long(self, parsed: ParsedRequest) -> bool:
        """True if any prompt of a list but the first takes long to compute. The first, if long, is computed ahead in
        any case.
        """
        return self.pool.takes_long(max(prompt.n_tokens for prompt in parsed.prompts[1:]))

    async def _serve_each(self, parsed: ParsedRequest) -> web.StreamResponse:
        """Serve the prompts of a list one after the other, each as a request of its own, and return their joined
        answer. Raises the LlamaslotError of the first prompt that fails; no later prompt is sent.
        """
        n_each, parts = 1 + parsed.request.n_children, []
        prompts = self.body["prompt"]
        response: web.StreamResponse | None = None
        for number, prompt in enumerate(prompts):
            body = {**self.body, "prompt": prompt}
            part = PromptPart(self.down, number * n_each, is_last=number == len(prompts) - 1)
            one = _Exchange(
                self.server, self.pool, self.request, self.route, self.format, orjson.dumps(body), body,
                self.deadlines, part,
            )  # fmt: skip
            response = await one._run()
            if part.has_failed:  # llama-server's own error in the stream ends it
                return await self.down.end()
            if isinstance(response, web.Response) and isinstance(response.body, bytes):
                parts.append(response.body)
        assert response is not None, "a list of prompts is not empty"
        if not parts:
            return response
        headers = {name: value for name, value in response.headers.items() if name != "Content-Length"}
        return web.Response(body=joined(parts, n_each), headers=headers)

    # -- a slot --------------------------------------------------------------------------------------------------

    async def _serve(self, parsed: ParsedRequest, context: ModelContext) -> web.StreamResponse:
        """Serve the request in a slot. It is placed again whenever its slot holds less than expected or goes to another
        user, or the answer assembled from its stream is in doubt.
        """
        earlier = EarlierPlaces()
        while True:
            try:
                answer = await self._serve_at_a_place(parsed, context, earlier)
            except Preempted as preempted:
                earlier.lost(preempted.prefill_stats, preempted)
                self._told_to_stop(parsed.request, preempted)
            except RetryPlacement as again:
                earlier.lost(again.prefill_stats)
            else:
                if not isinstance(answer, RetryNonStreamed):
                    return answer
                self.in_one_piece = True
                earlier.lost(answer.prefill_stats)

    def _told_to_stop(self, slot_request: Request, preempted: Preempted) -> None:
        self.backend.metrics.preempted.inc()
        n_done = preempted.prefill_stats.n_tokens if preempted.prefill_stats is not None else 0
        log.info(
            "%s: its slot goes to a user with fewer slots; the request waits in the queue again, with %d of its %d"
            " prompt tokens computed",
            self.id, n_done, slot_request.n_tokens,
        )  # fmt: skip

    async def _serve_at_a_place(
        self, parsed: ParsedRequest, context: ModelContext, earlier: EarlierPlaces
    ) -> web.StreamResponse | RetryNonStreamed:
        """Serve the request in one slot. Raises RetryPlacement if the slot is not as expected, or is needed for another
        purpose. Returns RetryNonStreamed if the request must be repeated without a stream.
        """
        if self.client_request.wants_progress:
            self.down.progress = partial(self._progress_event, context, earlier.prefill_stats)
        async with AsyncExitStack() as stack:
            async with self.down.waiting():
                lease = await self._lease(stack, parsed, context, earlier)
                answering = await self._prepare(stack, lease, parsed, context, earlier)
                await self.down.write(
                    self.down.add_headers(of_placement(lease.slot_key, parsed.request.n_tokens))
                )
                if not answering.is_streamed:
                    self.deadlines.begin_answer()
                await answering.begin(stack, may_replan=earlier.may_replan)
            self.deadlines.begin_answer()
            try:
                return await answering.finish()
            except (asyncio.CancelledError, ClientGone):
                if answering.is_streamed:
                    answering.note()
                raise

    async def _lease(
        self, stack: AsyncExitStack, parsed: ParsedRequest, context: ModelContext, earlier: EarlierPlaces
    ) -> Lease:
        """Wait for a slot, which ``stack`` releases at its end. Raises LlamaslotError, also if llama-server will refuse
        the request.
        """
        queued = time.monotonic()
        lease = stack.enter_context(
            await self.pool.lease(
                parsed.request, self.down.say, is_back=earlier.is_back, preempted=earlier.preempted
            )
        )
        if self.pool.context is not context:
            raise BackendRestarted  # its model may be another one now
        self.attempts.leased(lease)
        placed(self.request, lease)
        await self.pool.confirm(lease)
        backend, is_first = self.backend, not earlier.is_back and earlier.preempted is None
        backend.metrics.queue_s.observe(time.monotonic() - queued)
        lease.recorder.rewrote(rewrote(self.request))
        if is_first and parsed.prompts:
            backend.cache_misses.examine(lease, parsed.prompts[0], self.body, self.format)
        if parsed.is_head:
            keep_what_follows(lease)
        if is_first:
            await ensure_accepted(backend, self.request, self.client_request, parsed, lease)
        return lease

    async def _prepare(
        self,
        stack: AsyncExitStack,
        lease: Lease,
        parsed: ParsedRequest,
        context: ModelContext,
        earlier: EarlierPlaces,
    ) -> Answering:
        """Perform the steps of the plan. If llama-server will choose slots, then wait until it can choose them. For
        ``n`` > 1: no other request is between two steps; the end of ``stack`` lets others begin again. On /v1/messages:
        no idle slot shares more with the prompt than the slot of ``lease``. Raises RetryPlacement.
        """
        backend, say = self.backend, self.down.say
        here = await backend.executor.prepare(lease, say, may_replan=earlier.may_replan, can_stop=True)
        unpinned: UnpinnedRequest | None = None
        if parsed.request.n_children:
            unpinned = await stack.enter_async_context(backend.exclusive.section(lease, say))
        if parsed.request.placement is Placement.STEERED:
            say(Comment.WAITING_FOR_TURN)
            await backend.exclusive.evict_competitors(lease, here)
        say(Comment.WAITING_FOR_SERVER)
        return Answering(
            self.attempts, context, self.down, self.client_request, parsed, lease, here, earlier.prefill_stats,
            unpinned, in_one_piece=self.in_one_piece,
        )  # fmt: skip

    def _progress_event(self, context: ModelContext, before: PrefillStats | None, state: Prefilling) -> bytes:
        """Return the event that tells the client how much of its prompt llamaslot has computed ahead, in this slot
        (``state``) and in the slots that the request had before (``before``; None if there were none). Returns no bytes
        if the client's API has no such event.
        """
        so_far = PrefillStats(state.n_reused, state.n_done, state.seconds)
        so_far = so_far if before is None else before.then(so_far)
        progress = {
            "total": state.n_tokens,
            "cache": so_far.n_reused,
            "processed": so_far.n_tokens,
            "time_ms": round(so_far.seconds * 1000),
        }
        return self.format.progress_event(self.id, context.name, progress)


def _post(
    attempts: Attempts, request: web.Request, given: dict[str, Any], raw: bytes, body: dict[str, Any]
) -> contextlib.AbstractAsyncContextManager[Response]:
    """Send ``body`` to the backend of the present attempt. ``given``: the client's own body; ``raw``: its bytes."""
    body = marked(attempts, body, raw)
    return attempts.backend.api.request(
        "POST",
        origin_form(request.raw_path),
        data=written(body, given, raw),
        headers=to_server(request, content_type="application/json"),
        is_watched=body.get("stream") is True,
        is_relayed=True,
        check=attempts.check_process,
    )
