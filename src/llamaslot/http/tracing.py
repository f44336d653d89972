"""Traces of completions by OpenTelemetry (``log.otlp_endpoint``, the extra ``otel``).

OpenTelemetry takes a third of a second to import, so it is imported only if an endpoint is configured. Without one a
client's ``traceparent`` reaches llama-server unchanged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aiohttp import web

from llamaslot.fleet.registry import Registry
from llamaslot.http.auth import user_of
from llamaslot.http.forwarded_headers import TRACE_HEADERS

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_EXPORT_TIMEOUT_S = 5.0
_LOOKED_THROUGH = 50  # newest decisions of a pool among which a request that has just ended is searched


def _exporter(endpoint: str) -> SpanExporter:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S)


class Tracing:
    """Makes an OpenTelemetry span of each completion. A thread of OpenTelemetry sends the spans to ``endpoint``."""

    def __init__(self, endpoint: str, registry: Registry) -> None:
        from opentelemetry.propagate import get_global_textmap
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        provider = TracerProvider(
            shutdown_on_exit=False, resource=Resource.create({"service.name": "llamaslot"})
        )
        provider.add_span_processor(BatchSpanProcessor(_exporter(endpoint)))
        self._provider, self._registry = provider, registry
        self._tracer, self._map = provider.get_tracer("llamaslot"), get_global_textmap()

    def begin(self, request: web.Request) -> Callable[[int, web.StreamResponse | None], None]:
        """Begin the span of a request, in its client's trace if it has one. Returns a function that ends the span: call
        it at the request's end with the status and the response, None if there is no response.
        """
        from opentelemetry import trace
        from opentelemetry.trace import SpanKind, Status, StatusCode

        context = self._map.extract(request.headers)
        span = self._tracer.start_span(f"{request.method} {request.path}", context, SpanKind.SERVER)
        carrier = request[TRACE_HEADERS] = dict[str, str]()
        self._map.inject(carrier, trace.set_span_in_context(span, context))

        def end(status: int, response: web.StreamResponse | None) -> None:
            span.set_attributes({"http.response.status_code": status, "enduser.id": user_of(request).id})
            if response is not None and (id_ := response.headers.get("x-request-id")):
                span.set_attributes(self._of_decision(id_))
            if status >= 500:
                span.set_status(Status(StatusCode.ERROR))
            span.end()

        return end

    async def close(self, app: web.Application) -> None:
        """Send the remaining spans. Takes some seconds if the collector does not answer."""
        await asyncio.to_thread(self._provider.shutdown)

    def _of_decision(self, id_: str) -> dict[str, Any]:
        """Return what the journal has about the request with this id, as attributes of its span."""
        for pool in self._registry.pools:
            for decision in pool.journal.latest(_LOOKED_THROUGH):
                if decision.id == id_:
                    chosen = decision.chosen
                    told = {
                        "backend": decision.slot.backend if decision.slot is not None else None,
                        "slot": decision.slot.id if decision.slot is not None else None,
                        "source": chosen.source if chosen is not None else None,
                        "prompt_tokens": decision.n_tokens,
                        "reused_tokens": decision.n_reused,
                        "expected_tokens": decision.n_expected,
                        "queued_s": decision.queued_s,
                        "steps": [f"{act.step} {act.seconds:.3f} s" for act in decision.acts],
                    }
                    return {f"llamaslot.{name}": value for name, value in told.items() if value is not None}
        return {}
