"""Serves requests while assist is off, that is, while llama-server chooses their slots: authentication, queue and relay
only.

The body is forwarded unchanged (except for the rules of ``rewrite``, and the markers of media), and so is the answer.
The answer's figures about its prompt go to the journal and the metrics.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from aiohttp import web

from llamaslot.backend.backend import Backend
from llamaslot.backend.lease import Lease
from llamaslot.config.load import Config
from llamaslot.errors import BackendDown, BackendRestarted, LlamaslotError
from llamaslot.fleet.failover import Attempts
from llamaslot.fleet.pool import Pool
from llamaslot.formats import format_named
from llamaslot.formats.base import Format
from llamaslot.formats.comments import Comment
from llamaslot.http.auth import user_of
from llamaslot.http.body_changes import marked_bytes, rewrote
from llamaslot.http.client_stream import SSE_HEADERS, Downstream
from llamaslot.http.deadlines import Deadlines
from llamaslot.http.forwarded_headers import to_client, to_server
from llamaslot.http.in_flight import id_of, in_flight, placed
from llamaslot.http.parse import max_tokens
from llamaslot.http.relay import relay
from llamaslot.http.response_headers import ASSIST_OFF, BACKEND
from llamaslot.http.stream_reader import Reading
from llamaslot.llama.answers import Response, error_of, media_type_of
from llamaslot.llama.routes import Route, origin_form
from llamaslot.scheduling.plan import Source
from llamaslot.scheduling.request import Request

log = logging.getLogger(__name__)


async def serve_unassisted(
    config: Config, pool: Pool, request: web.Request, route: Route, raw: bytes
) -> web.StreamResponse:
    """Serve a request that is no completion while assist is off. ``raw``: its body. Raises ClientGone, and
    BackendRestarted if llama-server has restarted or assist is on again.

    Canceling (the client has gone) closes the connection to llama-server, and the next waiting request may be sent.
    """
    down = Downstream(request, config.stream, False, {"x-request-id": id_of(request)})
    deadlines = Deadlines(None, config.timeouts.total_s)
    # After a restart of llama-server the caller serves the request again, perhaps with assist.
    id_ = down.headers["x-request-id"]
    attempts = Attempts(id_, pool, raw, lambda: down.has_answer, follows_restarts=False)
    attempt = partial(relay_unassisted, attempts, down, deadlines, format_named(route.format), raw, {})
    try:
        attempts.check(raw)
        async with deadlines.kept():
            return await attempts.run(attempt)
    except BackendDown as error:
        pool.doubt()
        return await down.fail(error)
    except BackendRestarted:  # raised before anything was sent
        raise
    except LlamaslotError as error:
        return await down.fail(error)


async def relay_unassisted(
    attempts: Attempts,
    down: Downstream,
    deadlines: Deadlines,
    format_: Format | None,
    raw: bytes,
    body: Mapping[str, Any],
) -> web.StreamResponse:
    """Make one of ``attempts`` to serve a request while assist is off: wait until llama-server has a slot for it, send
    it, and relay the answer. ``format_``: None for a request that is no completion.

    Raises LlamaslotError, and BackendRestarted if assist was turned on before it was sent. Canceling (the client
    has gone) closes the connection to llama-server, and the next waiting request may be sent.
    """
    began, request = time.monotonic(), down.request
    await down.write(down.add_headers(ASSIST_OFF))
    async with AsyncExitStack() as stack:
        async with down.waiting():
            lease = await _lease(stack, attempts, down, body)
            backend = attempts.backend
            backend.metrics.queue_s.observe(time.monotonic() - began)
            if not down.is_streaming:
                deadlines.begin_answer()  # llamaslot detects the beginning of streams only
            upstream = await stack.enter_async_context(
                backend.api.request(
                    request.method,
                    origin_form(request.raw_path),
                    data=marked_bytes(attempts, raw),
                    headers=to_server(request, content_type="application/json" if format_ else None),
                    is_relayed=True,
                )
            )
            if upstream.status >= 400:
                raise await error_of(upstream)
        if format_ is None:
            return await relay(request, upstream, down.headers)
        n_answers = format_.n_prompts(body) * format_.n_answers(body)
        reading = Reading(upstream, format_, None, down.errors, n_answers=n_answers, wants_progress=True)
        if media_type_of(upstream) == "text/event-stream":
            await _relay(down, deadlines, upstream, reading)
            _note(down, backend, lease, format_, reading, began)
            return await down.end()
        payload = await reading.whole()
        _note(down, backend, lease, format_, reading, began)
        return web.Response(status=upstream.status, body=payload, headers=to_client(upstream, down.headers))


async def _lease(
    stack: AsyncExitStack, attempts: Attempts, down: Downstream, body: Mapping[str, Any]
) -> Lease:
    """Wait for the right to send the request, which the end of ``stack`` gives back. Raises as ``relay_unassisted``
    does.
    """
    slot_request = Request(
        down.headers["x-request-id"],
        user=user_of(down.request),
        max_tokens=max_tokens(body),
        avoids=attempts.avoids,
    )
    lease = stack.enter_context(await attempts.pool.lease(slot_request, down.say))
    if lease.table.is_assisted:  # llama-server was replaced while the request waited
        for name in ASSIST_OFF:
            down.headers.pop(name, None)
        raise BackendRestarted
    attempts.leased(lease)
    placed(down.request, lease, down)
    await down.write(down.add_headers({BACKEND: attempts.backend.name}))
    lease.recorder.rewrote(rewrote(down.request))
    down.say(Comment.WAITING_FOR_SERVER)
    return lease


async def _relay(down: Downstream, deadlines: Deadlines, upstream: Response, reading: Reading) -> None:
    down.is_answered = True
    await down.begin(upstream.status, to_client(upstream, {**down.headers, **SSE_HEADERS}))
    while (events := await reading.next(down.put)) is not None:
        if reading.has_token or reading.is_over:
            deadlines.begin_answer()
        await down.write(b"".join(events))
    await down.write(reading.rest)


def _note(
    down: Downstream,
    backend: Backend,
    lease: Lease,
    format_: Format,
    reading: Reading,
    began: float,
) -> None:
    """Record what llama-server has reported about the prompt, in journal, metrics and log."""
    n_reused, n_prompt = reading.n_reused, reading.n_prompt
    if n_reused is not None and (timings := reading.timings) is not None and "cache_n" in timings:
        n_prompt = n_reused + int(timings["prompt_n"])
    if n_reused is not None and n_prompt is not None:
        backend.metrics.reused(Source.SERVER.value, n_reused, n_prompt)
        lease.recorder.found(n_prompt, n_reused)
        if (flight := in_flight(down.request)) is not None:
            flight.n_prompt = n_prompt
            flight.answered(Source.SERVER.value, n_reused, n_prompt - n_reused, 0.0, None)
            flight.timed(reading.timings or {}, reading.n_predicted)
    log.info(
        "%s: answered user %s from a slot that llama-server chose (assist is off; request format %s): %s of %s prompt"
        " tokens reused, complete after %.2f s",
        lease.request.id, lease.request.user.id, format_.name, n_reused, n_prompt, time.monotonic() - began,
    )  # fmt: skip
