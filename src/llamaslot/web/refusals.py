"""llama-server's own words for what it refuses before it takes any slot."""

from __future__ import annotations

import logging

from aiohttp import web

from llamaslot.engine.backend import Backend
from llamaslot.errors import BackendDown, BadRequest, LlamaslotError, UpstreamError
from llamaslot.llama.api import content_type_of
from llamaslot.llama.routes import origin_form
from llamaslot.web.headers import to_server

log = logging.getLogger(__name__)

_PATIENCE_S = 5.0  # it needs no slot to say no


async def in_its_words(
    backend: Backend, request: web.Request, raw: bytes, error: BadRequest
) -> LlamaslotError:
    """What llama-server says to a body with which nothing can be begun.

    ``error`` where it says nothing: while it is down. Should it begin something after all, in a slot that nobody has
    leased, then that ends here, and llama-server is met again, to see what the slots hold.
    """
    try:
        async with backend.api.request(
            "POST",
            origin_form(request.raw_path),
            data=raw,
            headers=to_server(request),
            timeout_s=_PATIENCE_S,
        ) as upstream:
            if upstream.status >= 400:
                return UpstreamError(upstream.status, await upstream.read(), content_type_of(upstream))
        log.warning("%s: llama-server has accepted a body that llamaslot refuses", request.path)
        backend.changed("a slot that nobody had leased was used")
    except BackendDown:
        pass
    return error
