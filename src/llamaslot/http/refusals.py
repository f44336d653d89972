"""Gets llama-server's own error for a request that it will refuse, before anything is saved or computed for the
request.
"""

from __future__ import annotations

import logging

import orjson
from aiohttp import web

from llamaslot.backend.backend import Backend
from llamaslot.backend.lease import Lease
from llamaslot.backend.lease_states import RetryPlacement
from llamaslot.backend.slot_content import wait_until_idle
from llamaslot.cache.content import NOTHING
from llamaslot.errors import BackendDown, BadRequest, LlamaslotError, Reason, UpstreamError
from llamaslot.http.forwarded_headers import to_server
from llamaslot.http.parse import ClientRequest, ParsedRequest
from llamaslot.llama.answers import error_of
from llamaslot.llama.client import QUICK_S
from llamaslot.llama.dry_run import IS_NOT_OFFERED, Verdict
from llamaslot.llama.routes import origin_form
from llamaslot.scheduling.request import Placement

log = logging.getLogger(__name__)

_REFUSED = "llama-server refuses the fields of this request"
_TIMEOUT_S = 5.0  # a refusal needs no slot


async def servers_error_for(
    backend: Backend, request: web.Request, raw: bytes, error: BadRequest
) -> LlamaslotError:
    """Send the body ``raw``, which llamaslot cannot use, and return llama-server's error for it. Returns ``error`` if
    llama-server is down.

    If llama-server accepts the body after all, it may compute it in any slot. Then the connection is closed, llamaslot
    connects to llama-server again to learn what its slots hold, and ``error`` is returned.
    """
    try:
        async with backend.api.request(
            "POST",
            origin_form(request.raw_path),
            data=raw,
            headers=to_server(request),
            timeout_s=_TIMEOUT_S,
        ) as upstream:
            if upstream.status >= 400:
                return await error_of(upstream)
        log.warning(
            "%s: llama-server ran a request to %s that llamaslot takes for invalid; llamaslot reconnects, as a slot may"
            " have changed",
            backend.name, request.path,
        )  # fmt: skip
        backend.changed("it has computed in a slot that llamaslot had not given to a request")
    except BackendDown:
        pass
    return error


async def ensure_accepted(
    backend: Backend, request: web.Request, client_request: ClientRequest, parsed: ParsedRequest, lease: Lease
) -> None:
    """Find out, before anything is saved, erased, restored or computed for a request, whether llama-server will refuse
    it. A request without such steps is not checked: its own answer comes as soon.

    Raises UpstreamError with llama-server's answer to the request itself. Raises RetryPlacement if llama-server has
    accepted a request that its dry run refused: then the slot is idle, and similar requests are no longer checked.
    Raises BackendDown and BackendRestarted. Canceling is safe.
    """
    plan, slot_request, table = lease.plan, lease.request, lease.table
    assert plan is not None
    is_steered_past = slot_request.placement is Placement.STEERED and bool(
        table.competing_slots(slot_request, lease.slot_id)
    )
    if not (plan.steps or slot_request.n_children or is_steered_past):
        return
    worth_s = (
        plan.cost.save_s
        + plan.cost.restore_s
        + table.rates.prefill.seconds(plan.n_reused, slot_request.n_tokens)
    )
    lora = lease.content.namespace.lora if lease.content is not None else ""
    run = parsed.dry_run()
    verdict = await backend.dry_runs.ask(run, lease.slot_id, n_ctx=table.n_ctx, lora=lora, worth_s=worth_s)
    lease.check_current()
    if verdict in (Verdict.TAKEN, Verdict.UNSURE):
        return
    if verdict is Verdict.REFUSED:
        backend.metrics.refused.inc()
        if not client_request.format.honours_id_slot:  # llama-server refuses it before it chooses a slot
            raise await servers_error_for(
                backend, request, orjson.dumps(client_request.body), BadRequest(_REFUSED)
            )
        if (refusal := await _answer_to(backend, client_request, lease)) is not None:
            raise refusal
    log.warning(
        "%s: llama-server accepted this request, although it had refused a dry run of it (the same fields with a prompt"
        " that is never computed); llamaslot has closed the request, and places it again",
        client_request.id,
    )
    backend.dry_runs.note_accepted(run)
    await _stopped(backend, lease)
    raise RetryPlacement(None)


async def ensure_body_accepted(
    backend: Backend, request: web.Request, client_request: ClientRequest, parsed: ParsedRequest
) -> None:
    """Find out, before a request waits for a slot, whether llama-server refuses it without one. There are two cases:

    1. It refuses a field.
    2. It cannot make a prompt of the body. This is checked only if llamaslot does not know the tokens: on the route
       that counts the tokens of such a body, or for /infill by a dry run with the whole body.

    Raises llama-server's answer to the request itself, and BackendDown. Canceling is safe.
    """
    is_refused = await backend.dry_runs.is_unreadable(parsed.dry_run())
    if not is_refused and parsed.unknown in (Reason.SHAPE, Reason.TEMPLATE, Reason.MISCOUNTED):
        if (path := client_request.format.count_path) is not None:
            status, _ = await backend.api.ask(path, client_request.body, QUICK_S)
            is_refused = status >= 400 and status not in IS_NOT_OFFERED
        elif (path := client_request.format.whole_dry_run_path) is not None:
            is_refused = await backend.dry_runs.is_malformed(path, client_request.body)
    if is_refused:
        backend.metrics.refused.inc()
        raise await servers_error_for(
            backend, request, orjson.dumps(client_request.body), BadRequest(_REFUSED)
        )


async def _answer_to(backend: Backend, client_request: ClientRequest, lease: Lease) -> UpstreamError | None:
    """Send the client's request itself in the slot of ``lease``. Returns llama-server's error, None if it begins to
    answer.
    """
    may_reuse = lease.content is not None and lease.request.may_use(lease.content)
    body = {**client_request.body, "id_slot": lease.slot_id}
    if client_request.may_set("cache_prompt"):
        body["cache_prompt"] = may_reuse and not lease.request.no_cache
    if client_request.may_set("stream"):  # so that llama-server reports at once if it begins
        body["stream"] = True
        if client_request.may_set("return_progress"):
            body["return_progress"] = True
    lease.begin_request()
    async with client_request.post(body) as upstream:
        if upstream.status < 400:
            return None
        error = await error_of(upstream)
    await backend.executor.refused(lease, error.status)
    return error


async def _stopped(backend: Backend, lease: Lease) -> None:
    """Wait until llama-server has stopped working on the closed request. The slot's content counts as unknown."""
    await wait_until_idle(backend.api, lease, NOTHING)
    lease.finish(None)
