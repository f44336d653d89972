"""The way of a completion: tokens, a slot, the steps of its plan, its own request, the relay of the answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from llamaslot.backend.backend import Backend
from llamaslot.backend.connect import Met
from llamaslot.backend.exclusive import Turn
from llamaslot.backend.lease import Lease
from llamaslot.backend.lease_states import PlanAgain, Preempted
from llamaslot.backend.long_prompt import Prefilling, no_report
from llamaslot.errors import (
    BackendDown,
    BackendRestarted,
    BadRequest,
    ClientGone,
    LlamaslotError,
    SlotWedged,
)
from llamaslot.fleet.queue import QueuePosition
from llamaslot.formats.base import Format
from llamaslot.formats.comments import Comment
from llamaslot.formats.registry import FORMATS, format_named
from llamaslot.http.auth import user_of
from llamaslot.http.client_request import Asked
from llamaslot.http.client_stream import MISTAKE, Downstream, StreamRules
from llamaslot.http.completion_stream import Answering, InOnePiece
from llamaslot.http.deadlines import Deadlines
from llamaslot.http.headers import to_server
from llamaslot.http.json_body import NoObject, parse_object
from llamaslot.http.parse import ATTEMPTS, GIVEN_UP, Wanted, keep_what_follows, request_id, wanted
from llamaslot.http.passthrough import Passthrough
from llamaslot.http.prompt_list import Part, joined
from llamaslot.http.request_body import Uploads
from llamaslot.http.rewriting import SystemPrompts, rewrote
from llamaslot.http.unassisted import Unassisted
from llamaslot.http.upstream_errors import check, check_body, in_its_words
from llamaslot.llama.routes import Route, origin_form
from llamaslot.llama.sse import Earlier
from llamaslot.scheduling.request import Job, Placement
from llamaslot.tokens.tokenizer import NoPrompt

log = logging.getLogger(__name__)

_BEYOND = "llama-server has fewer slots than answers were asked for, or its model reads no such media"
_REPLANS = 2  # for a slot that holds less than was believed


class Completions:
    """Serves the routes whose prompts are known token by token."""

    def __init__(
        self,
        backend: Backend,
        rules: StreamRules,
        uploads: Uploads,
        passthrough: Passthrough,
        unassisted: Unassisted,
        prompts: SystemPrompts,
    ) -> None:
        self._backend, self._rules, self._uploads = backend, rules, uploads
        self._passthrough, self._unassisted, self._prompts = passthrough, unassisted, prompts

    async def handle(self, request: web.Request, route: Route) -> web.StreamResponse:
        """Cancelling (the client has gone) gives the slot back, at once or when the server is through with it."""
        raw = await self._uploads.whole(request)
        try:
            body = parse_object(raw)
        except NoObject as error:
            raise await in_its_words(self._backend, request, raw, error) from error
        if self._prompts.rewrite(request, body, format_named(route.format)):
            raw = orjson.dumps(body)
        if route.may_be_missing and not await self._passthrough.is_offered(route):
            return await self._passthrough.unprepared(request, raw)
        unrecognized = partial(self._passthrough.in_turn, request, route, raw)
        exchange = _Exchange(
            self._backend, self._rules, request, route, raw, body, unrecognized, self._unassisted
        )
        return await exchange.run()


class _Exchange:
    """One request from its body to the end of its answer."""

    def __init__(
        self,
        backend: Backend,
        rules: StreamRules,
        request: web.Request,
        route: Route,
        raw: bytes,
        body: dict[str, Any],
        unrecognized: Callable[..., Awaitable[web.StreamResponse]],
        unassisted: Unassisted,
        whole: _Exchange | None = None,
    ) -> None:
        """``raw``: the bytes that ``body`` was read from.
        ``unrecognized`` serves the request without knowing its tokens, in whatever slot llama-server chooses, and
        ``unassisted`` where llamaslot stands aside.
        ``whole``: of a prompt in a list, the exchange for all of them.
        """
        self.unrecognized, self.unassisted, self.raw = unrecognized, unassisted, raw
        self.in_one_piece = False  # the answer cannot be put together from a stream
        self.backend, self.request, self.route, self.body = backend, request, route, body
        self.id: str = whole.id if whole is not None else request_id(request.headers)
        self.asked = Asked(self.id, body, self._format, self._post, time.monotonic())
        self.down = Downstream(request, rules, self.asked.is_streaming, {"x-request-id": self.id})
        self.deadlines: Deadlines = whole.deadlines if whole is not None else Deadlines(rules.timeouts)

    async def run(self) -> web.StreamResponse:
        try:
            async with self.deadlines.kept():
                return await self._run()
        except (BackendDown, SlotWedged) as error:
            if isinstance(error, SlotWedged):
                self.backend.metrics.wedged.inc()
                log.warning("%s: %s", self.id, error)
            self.backend.doubt()
            return await self.down.fail(error)
        except NoPrompt as error:
            raw = orjson.dumps(self.body)
            return await self.down.fail(await in_its_words(self.backend, self.request, raw, error))
        except LlamaslotError as error:
            return await self.down.fail(error)
        except ClientGone:
            raise
        except Exception:
            if not self.down.has_begun:
                raise
            log.exception("%s: internal error; please report it", self.id)
            return await self.down.fail(LlamaslotError(f"{MISTAKE} (request id {self.id})"))

    async def _run(self) -> web.StreamResponse:
        for _ in range(ATTEMPTS):
            met, want = await self._met_and_wanted()
            if want is None:
                with contextlib.suppress(BackendRestarted):  # it does not stand aside any more
                    return await self.unassisted.relay(
                        self.down, self.deadlines, self._format, self.raw, self.body
                    )
                continue
            if want.is_beyond_server:
                raise await in_its_words(
                    self.backend, self.request, orjson.dumps(self.body), BadRequest(_BEYOND)
                )
            await check_body(self.backend, self.request, self.asked, want)
            if want.job.placement is Placement.STEERED and (not want.prompts or want.is_head):
                if want.is_head:
                    await self._prepare_head(want, met)
                self.deadlines.answering()  # nobody reads the answer closely enough to tell when it begins
                return self._counted(want, await self.unrecognized(head=want.left_in_slot))
            if len(want.prompts) > 1 and self._is_long(want, met):
                return await self._serve_each(want)
            try:
                return self._counted(want, await self._serve(want, met))
            except BackendRestarted:
                self.backend.lost(met)
        raise BackendDown(GIVEN_UP)

    async def _prepare_head(self, want: Wanted, met: Met) -> None:
        """Have what comes before the first medium in a slot, if it takes long: restored, or computed in turn with what
        others want. llama-server, which will choose the slot, finds it there. Cancelling gives the slot back."""
        job = replace(want.job, placement=Placement.PINNED)
        if self.backend.rates.prefill.seconds(0, job.n_tokens) <= met.pool.long_s:
            return
        with await self.backend.scheduler.lease(job) as lease:
            if lease.pool is not met.pool:
                return  # the slots of another process are as good as none
            keep_what_follows(lease)
            # The slot was needed for somebody else, or is another process's: what is there stays there.
            with contextlib.suppress(PlanAgain, BackendRestarted):
                await check(self.backend, self.request, self.asked, want, lease)
                await self.backend.steps.prepare(lease, no_report)

    def _counted(self, want: Wanted, response: web.StreamResponse) -> web.StreamResponse:
        """What was served without its tokens; what llama-server has refused anyway does not count."""
        if want.unknown is not None and response.status < 400:
            self.backend.unrecognized.count(self._format.name, want.unknown)
        return response

    async def _met_and_wanted(self) -> tuple[Met, Wanted | None]:
        """The server, known to be the one that was met, and the job; None for it where llamaslot stands aside.

        Both are asked for at once: together they are most of what llamaslot adds to a follow-up. What was tokenized by
        a server that turns out to be another one is done again.
        """
        if (met := self.backend.met) is not None and met.is_assisted:
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
        return met, await self._wanted(met) if met.is_assisted else None

    async def _wanted(self, met: Met) -> Wanted:
        return await wanted(self.id, self.body, self._format, self.backend, met, user_of(self.request))

    @property
    def _format(self) -> Format:
        assert self.route.format is not None, "only completions have a format"
        return FORMATS[self.route.format]

    # -- several prompts -----------------------------------------------------------------------------------------

    def _is_long(self, want: Wanted, met: Met) -> bool:
        """Whether any prompt but the first, which has the slot to itself, would take long to compute."""
        longest = max(prompt.n_tokens for prompt in want.prompts[1:])
        return self.backend.rates.prefill.seconds(0, longest) > met.pool.long_s

    async def _serve_each(self, want: Wanted) -> web.StreamResponse:
        """One prompt after the other, each as a request of its own. Raises LlamaslotError: the first ends it all."""
        n_each, parts = 1 + want.job.n_children, []
        prompts = self.body["prompt"]
        response: web.StreamResponse | None = None
        for number, prompt in enumerate(prompts):
            body = {**self.body, "prompt": prompt}
            one = _Exchange(
                self.backend,
                self.down.rules,
                self.request,
                self.route,
                orjson.dumps(body),
                body,
                self.unrecognized,
                self.unassisted,
                self,
            )
            one.down = part = Part(self.down, number * n_each, is_last=number == len(prompts) - 1)
            response = await one._run()
            if part.has_failed:  # llama-server's own error in the stream is the end of it
                return await self.down.end()
            if isinstance(response, web.Response) and isinstance(response.body, bytes):
                parts.append(response.body)
        assert response is not None, "a list of prompts is not empty"
        if not parts:
            return response
        headers = {name: value for name, value in response.headers.items() if name != "Content-Length"}
        return web.Response(body=joined(parts, n_each), headers=headers)

    # -- a slot --------------------------------------------------------------------------------------------------

    async def _serve(self, want: Wanted, met: Met) -> web.StreamResponse:
        """Until a place was what it was taken for."""
        before: Earlier | None = None
        last: PlanAgain | InOnePiece | None = None
        n_before, preempted = 0, None
        while True:
            try:
                answer = await self._serve_at_a_place(want, met, before, n_before, last, preempted)
            except PlanAgain as again:
                last = again
            else:
                if not isinstance(answer, InOnePiece):
                    return answer
                self.in_one_piece, last = True, answer
            later = last.earlier
            before = before.then(later) if before is not None and later is not None else later or before
            if isinstance(last, Preempted):
                preempted = last
                self._told_to_stop(want.job, last)
            else:
                n_before += 1

    def _told_to_stop(self, job: Job, preempted: Preempted) -> None:
        self.backend.metrics.preempted.inc()
        n_done = preempted.earlier.n_tokens if preempted.earlier is not None else 0
        log.info(
            "%s: its slot goes to a user with fewer slots; queued again with %d of %d tokens computed",
            self.id, n_done, job.n_tokens,
        )  # fmt: skip

    async def _serve_at_a_place(
        self,
        want: Wanted,
        met: Met,
        before: Earlier | None,
        n_before: int,
        last: PlanAgain | InOnePiece | None,
        preempted: Preempted | None,
    ) -> web.StreamResponse | InOnePiece:
        """``before``: what was done for the job at the places that it had, of which ``n_before`` were not what they
        were taken for; ``last``: why it lost the last one; ``preempted``: when it last gave one up for another user.
        Raises PlanAgain.
        """
        job, scheduler, may_replan = want.job, self.backend.scheduler, n_before < _REPLANS
        queued = time.monotonic()
        if self.asked.wants_progress and self._format.has_progress_events:
            self.down.progress = partial(self._progress, met, before)
        async with contextlib.AsyncExitStack() as stack:
            async with self.down.waiting(self.backend.tasks):
                self.down.say(QueuePosition(partial(scheduler.position, job)))
                is_back = last is not None and last is not preempted
                lease = stack.enter_context(await scheduler.lease(job, is_back=is_back, preempted=preempted))
                if lease.pool is not met.pool:
                    raise BackendRestarted  # and may have another model now
                self.backend.metrics.queue_s.observe(time.monotonic() - queued)
                lease.note.rewrote(rewrote(self.request))
                if last is None and want.prompts:
                    self.backend.divergences.look(lease, want.prompts[0], self.body, self._format)
                if want.is_head:
                    keep_what_follows(lease)
                if last is None:
                    await check(self.backend, self.request, self.asked, want, lease)
                here = await self.backend.steps.prepare(
                    lease, self.down.say, may_replan=may_replan, can_stop=True
                )
                turn: Turn | None = None
                if job.n_children:
                    turn = await stack.enter_async_context(self.backend.turns.take(lease, self.down.say))
                if job.placement is Placement.STEERED:
                    self.down.say(Comment.WAITING_FOR_TURN)
                    await self.backend.turns.clear_the_way(lease, here)
                self.down.say(Comment.WAITING_FOR_SERVER)
                answering = Answering(
                    self.backend, self.down, self.asked, want, lease, here, before, turn,
                    in_one_piece=self.in_one_piece,
                )  # fmt: skip
                await self.down.write(self.down.add_headers(_about(lease, want)))
                if not answering.is_streamed:
                    self.deadlines.answering()
                await answering.begin(stack, may_replan=may_replan)
            self.deadlines.answering()
            return await answering.finish()

    def _progress(self, met: Met, before: Earlier | None, state: Prefilling) -> bytes:
        """An event of progress for a prefill of llamaslot's own, to a client that has asked for them."""
        so_far = Earlier(state.n_reused, state.n_done, state.seconds)
        so_far = so_far if before is None else before.then(so_far)
        progress = {
            "total": state.n_tokens,
            "cache": so_far.n_reused,
            "processed": so_far.n_tokens,
            "time_ms": round(so_far.seconds * 1000),
        }
        return self._format.progress_event(self.id, met.model_name, progress)

    def _post(self, body: dict[str, Any]) -> contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]:
        return self.backend.api.request(
            "POST",
            origin_form(self.request.raw_path),
            data=orjson.dumps(body),
            headers=to_server(self.request, content_type="application/json"),
            is_watched=body.get("stream") is True,
            is_relayed=True,
        )


def _about(lease: Lease, want: Wanted) -> dict[str, str]:
    """What is known before llama-server has seen the request. What is reused it tells itself (``Answering``)."""
    return {
        "x-llamaslot-slot": str(lease.slot_id),
        "x-llamaslot-prompt-tokens": str(want.job.n_tokens),
    }
