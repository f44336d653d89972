"""The way of a completion: tokens, a slot, the steps of its plan, its own request, the relay of the answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import replace
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from llamaslot.core.slots import NOTHING, Job, Source
from llamaslot.engine.backend import Backend
from llamaslot.engine.handshake import Met
from llamaslot.engine.lease import Lease
from llamaslot.engine.turns import Turn
from llamaslot.errors import BackendDown, BackendRestarted, ClientGone, LlamaslotError, UpstreamError
from llamaslot.llama.api import content_type_of
from llamaslot.llama.prompts import Prompt
from llamaslot.llama.routes import Format, Route, origin_form
from llamaslot.llama.sse import Earlier, EventSplitter, data_of, index_of
from llamaslot.web.bodies import parse_object, read_body
from llamaslot.web.downstream import BROKEN_OFF, MISTAKE, SSE_HEADERS, Downstream, StreamRules
from llamaslot.web.headers import to_client, to_server
from llamaslot.web.jobs import ATTEMPTS, Wanted, request_id, wanted

log = logging.getLogger(__name__)


class Completions:
    """Serves the routes whose prompts are known token by token."""

    def __init__(self, backend: Backend, rules: StreamRules, max_body: int) -> None:
        self._backend, self._rules, self._max_body = backend, rules, max_body

    async def handle(self, request: web.Request, route: Route) -> web.StreamResponse:
        """Cancelling (the client has gone) gives the slot back, at once or when the server is through with it."""
        raw = await read_body(request, self._max_body)
        body = parse_object(raw)
        exchange = _Exchange(self._backend, self._rules, request, route, body)
        return await exchange.run()


class _Exchange:
    """One request from its body to the end of its answer."""

    def __init__(
        self, backend: Backend, rules: StreamRules, request: web.Request, route: Route, body: dict[str, Any]
    ) -> None:
        self.backend, self.request, self.route, self.body = backend, request, route, body
        self.id = request_id(request.headers)
        self.down = Downstream(request, rules, body.get("stream") is True, {"x-request-id": self.id})
        self.started = time.monotonic()
        self.first_byte_s: float | None = None
        self.told: dict[str, str] = {}
        self.turn: Turn | None = None  # of one with several answers

    async def run(self) -> web.StreamResponse:
        try:
            return await self._run()
        except BackendDown as error:
            self.backend.doubt()
            return await self.down.fail(error)
        except LlamaslotError as error:
            return await self.down.fail(error)
        except ClientGone:
            raise
        except Exception:
            if not self.down.has_begun:
                raise
            log.exception("%s failed", self.id)
            return await self.down.fail(LlamaslotError(MISTAKE))

    async def _run(self) -> web.StreamResponse:
        for _ in range(ATTEMPTS):
            met, want = await self._met_and_wanted()
            if want.is_beyond_server:
                return await self._refused_by_server()
            try:
                return await self._serve(want, met)
            except BackendRestarted:
                self.backend.lost(met)
        raise BackendDown("llama-server restarts again and again; see its log")

    async def _met_and_wanted(self) -> tuple[Met, Wanted]:
        """The server, known to be the one that was met, and the job.

        Both are asked for at once: together they are most of what llamaslot adds to a follow-up. What was tokenized by
        a server that turns out to be another one is done again.
        """
        if (met := self.backend.met) is not None:
            try:
                async with asyncio.TaskGroup() as group:
                    checked = group.create_task(self.backend.ready())
                    want = group.create_task(self._wanted(met))
                if checked.result() is met:
                    return met, want.result()
            except ExceptionGroup as errors:
                if self.backend.met is met:
                    raise errors.exceptions[0] from None
        met = await self.backend.ready()
        return met, await self._wanted(met)

    async def _wanted(self, met: Met) -> Wanted:
        return await wanted(self.id, self.body, self._format, self.backend, met.pool)

    @property
    def _format(self) -> Format:
        assert self.route.format is not None, "only completions have a format"
        return self.route.format

    # -- a slot --------------------------------------------------------------------------------------------------

    async def _serve(self, want: Wanted, met: Met) -> web.StreamResponse:
        job, scheduler = want.job, self.backend.scheduler
        queued = time.monotonic()
        async with contextlib.AsyncExitStack() as stack:
            async with self.down.waiting(self.backend.tasks):
                self.down.say(_Queued(self.backend, job))
                lease = stack.enter_context(await scheduler.lease(job))
                if lease.pool is not met.pool:
                    raise BackendRestarted("llama-server has restarted")  # and may have another model now
                self.backend.metrics.queue_s.observe(time.monotonic() - queued)
                earlier = await self.backend.steps.prepare(lease, self.down.say)
                if earlier is not None:
                    earlier = replace(earlier, n_answers=1 + job.n_children)
                if job.n_children:
                    self.turn = await stack.enter_async_context(self.backend.turns.take(lease, self.down.say))
                self.down.say("waiting for llama-server")
                await self.down.write(self.down.add_headers(self._about(lease, earlier, want)))
                lease.sent()
                upstream = await stack.enter_async_context(self._send(lease, earlier))
                first = await upstream.content.readany() if self.down.is_streaming else b""
            return await self._answer(want, lease, earlier, upstream, first)

    def _about(self, lease: Lease, earlier: Earlier | None, want: Wanted) -> dict[str, str]:
        """What llamaslot tells of itself. Without a prefill of its own the reuse is what it expects."""
        assert lease.plan is not None
        n_reused = earlier.n_reused if earlier is not None else lease.n_expected
        source = lease.plan.source if n_reused else Source.COLD
        self.told = {
            "x-llamaslot-slot": str(lease.slot_id),
            "x-llamaslot-source": source.value,
            "x-llamaslot-reused-tokens": str(n_reused),
            "x-llamaslot-prompt-tokens": str(want.job.n_tokens),
        }
        return self.told

    def _send(
        self, lease: Lease, earlier: Earlier | None
    ) -> contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]:
        # For a job that may use nothing cached, what is in the slot after a prefill of its own is its own work.
        # What nobody knows may have been computed with somebody's LoRA scales.
        may_reuse = earlier is not None or not (lease.job.is_fresh or lease.content is None)
        return self._post({**self.body, "id_slot": lease.slot_id, "cache_prompt": may_reuse})

    def _post(self, body: dict[str, Any]) -> contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]:
        return self.backend.api.request(
            "POST",
            origin_form(self.request.raw_path),
            data=orjson.dumps(body),
            headers=to_server(self.request, content_type="application/json"),
        )

    # -- the answer ----------------------------------------------------------------------------------------------

    async def _answer(
        self,
        want: Wanted,
        lease: Lease,
        earlier: Earlier | None,
        upstream: aiohttp.ClientResponse,
        first: bytes,
    ) -> web.StreamResponse:
        lease.started()
        if upstream.status != 200:
            payload = first + await upstream.read()
            if upstream.status < 500:
                lease.refused()
            else:
                lease.done(None)
            raise UpstreamError(upstream.status, payload, content_type_of(upstream))
        before = lease.content or NOTHING
        lease.begun(replace(before, tokens=want.left_in_slot, is_exact=False, is_dirty=True))
        seen = _Seen(max(len(want.prompts), 1) * (1 + want.job.n_children))
        if upstream.content_type == "text/event-stream":
            await self._relay(want, lease, upstream, first, earlier, seen)
        else:
            payload = seen.answer(first + await upstream.read(), earlier)
            self.first_byte_s = time.monotonic() - self.started
            response = web.Response(
                status=200, body=payload, headers={**to_client(upstream), **self.down.headers}
            )
        self._settle(want, lease, earlier, seen)
        self._log(lease, earlier, seen)
        if upstream.content_type == "text/event-stream":
            return await self.down.end()
        return response

    async def _relay(
        self,
        want: Wanted,
        lease: Lease,
        upstream: aiohttp.ClientResponse,
        first: bytes,
        earlier: Earlier | None,
        seen: _Seen,
    ) -> None:
        """Events as they come, each byte as it was but for the numbers that ``earlier`` puts right.

        llama-server releases the slot before it sends the last event: so it is given back before the client, who may
        ask again or hang up at once, can read that event.
        """
        splitter = EventSplitter()
        headers = {**to_client(upstream), **SSE_HEADERS}
        try:
            chunk = first
            while chunk:
                events = [seen.event(event, earlier) for event in splitter.feed(chunk)]
                if self.first_byte_s is None:
                    self.first_byte_s = time.monotonic() - self.started
                    await self.down.begin(headers=headers)
                if seen.is_over:
                    if self.turn is not None:
                        await self.turn.settle()
                    self._settle(want, lease, earlier, seen)
                await self.down.write(b"".join(events))
                chunk = await upstream.content.readany()
            await self.down.write(splitter.rest)
        except aiohttp.ClientError as error:
            raise BackendDown(BROKEN_OFF) from error

    def _settle(self, want: Wanted, lease: Lease, earlier: Earlier | None, seen: _Seen) -> None:
        """Note what the slot holds now, and give it back. Idempotent."""
        if lease.is_released:
            return
        timings = seen.timings
        n_found = int(timings["cache_n"]) if timings and "cache_n" in timings else None
        if seen.has_failed:
            lease.done(None)
            lease.release()
            return
        n_answer = int(timings.get("predicted_n", 0)) if timings and len(want.prompts) == 1 else 0
        self.backend.steps.settle(lease, n_found, earlier, want.left_in_slot, n_answer)
        lease.release()
        if timings and n_found is not None and len(want.prompts) == 1:
            self._learn(want.prompts[0], timings, n_found, earlier)

    def _log(self, lease: Lease, earlier: Earlier | None, seen: _Seen) -> None:
        """One line per answer: where it ran, what was reused, and how long the client waited."""
        first_s = self.first_byte_s or 0.0
        self.backend.metrics.first_byte_s.observe(first_s)
        n_computed = earlier.n_tokens - earlier.n_reused if earlier is not None else 0
        if seen.timings is not None:
            n_computed += int(seen.timings.get("prompt_n", 0))
        log.info(
            "%s slot %d %s: %d of %d prompt tokens computed%s, first byte after %.2f s, all after %.2f s",
            self.id, lease.slot_id, self.told["x-llamaslot-source"], n_computed, lease.job.n_tokens,
            f", {earlier.seconds:.2f} s of it ahead" if earlier is not None else "",
            first_s, time.monotonic() - self.started,
        )  # fmt: skip

    def _learn(self, prompt: Prompt, timings: dict[str, Any], n_found: int, earlier: Earlier | None) -> None:
        rates, n_total = self.backend.rates, n_found + int(timings["prompt_n"])
        self.backend.prompts.confirm(prompt, n_total)
        if earlier is None and n_total - n_found > 1:
            rates.prefill.observe(n_found, n_total, float(timings["prompt_ms"]) / 1000)
        if n_predicted := int(timings.get("predicted_n", 0)):
            rates.answer.observe(n_predicted, float(timings["predicted_ms"]) / 1000)

    async def _refused_by_server(self) -> web.StreamResponse:
        """More answers than slots: llama-server refuses that before it takes any slot."""
        async with self._post(self.body) as upstream:
            payload = await upstream.read()
            raise UpstreamError(upstream.status, payload, content_type_of(upstream))


class _Queued:
    """``queued 2``, told with the place that the job has when it is told."""

    def __init__(self, backend: Backend, job: Job) -> None:
        self._backend, self._job = backend, job

    def __str__(self) -> str:
        return f"queued {self._backend.scheduler.position(self._job)}"


class _Seen:
    """What was read in passing from the answer: the timings of its first prompt, and whether it failed.

    ``is_over``: its last event has come; in the native format that is the last of ``n_answers`` that end.
    """

    def __init__(self, n_answers: int) -> None:
        self.timings: dict[str, Any] | None = None
        self.has_failed = False
        self.is_over = False
        self._n_left = n_answers

    def event(self, event: bytes, earlier: Earlier | None) -> bytes:
        if event.startswith(b"data: [DONE]"):
            self.is_over = True
        if b'"timings"' in event or b'"error"' in event:
            self._note(data_of(event))
        return earlier.correct_event(event) if earlier is not None else event

    def answer(self, payload: bytes, earlier: Earlier | None) -> bytes:
        try:
            answer = orjson.loads(payload)
        except orjson.JSONDecodeError:
            return payload
        changed = False
        for part in answer if isinstance(answer, list) else [answer]:
            self._note(part)
            if earlier is not None and isinstance(part, dict):
                changed = earlier.correct(part) or changed
        return orjson.dumps(answer) if changed else payload

    def _note(self, payload: Any) -> None:
        if not isinstance(payload, dict):
            return
        timings = payload.get("timings")
        if isinstance(timings, dict) and not index_of(payload):
            self.timings = dict(timings)
        self.has_failed = self.has_failed or "error" in payload
        if payload.get("stop") is True:
            self._n_left -= 1
            self.is_over = self._n_left <= 0
