"""llamaslot's own metrics, served at ``/llamaslot/metrics``. Each llamaslot has its own registry."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llamaslot.errors import Reason

log = logging.getLogger(__name__)
T = TypeVar("T", Counter, Gauge, Histogram)

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)

_WHY = {
    Reason.SHAPE: "something in its body is not known to llamaslot; please report its shape",
    Reason.TEMPLATE: "the chat template renders it otherwise than expected; please report the model",
    Reason.MEDIA: "it has images or audio with no text before them, or llama-server chooses its slot",
    Reason.INFILL: "how its prompt is built is unknown; a --batch-size below the context of a slot helps",
    Reason.MISCOUNTED: "llama-server counted other tokens in it; please report the model",
}

_COSTS = "the prompt of a %s request could not be tokenized, so its context is not found again: %s"


class Metrics:
    """Counters and histograms of all backends together; ``n_…`` gauges are set when they are read.

    Metrics of a single backend are in ``of_backend``, with the label ``backend``.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._families: dict[str, Any] = {}
        self.requests = self.counter(
            "requests",
            "HTTP requests answered, by kind of route and status; 499: the client left",
            "kind",
            "status",
        )
        self.untokenized = self.counter(
            "untokenized",
            "Completions whose prompt could not be tokenized, so that their context is not found again",
            "kind",
            "reason",
        )
        self.clients_left = self.counter("clients_left", "Clients that left before their answer was complete")
        self.queue_s = self.histogram(
            "queue_seconds", "Seconds that a completion waited in the queue for its slot"
        )
        self.prefix_wait_s = self.histogram(
            "prefix_wait_seconds",
            "Seconds that a completion waited for a prefix that another request was computing",
        )
        self.rewrites = self.counter(
            "rewrites", "Requests whose system prompt a rewrite rule changed", "rule"
        )
        self.n_waiting = self.gauge("waiting", "Requests waiting for a slot now")
        self.n_snapshots = self.gauge("snapshots", "Snapshots that can be used with the present model")
        self.bytes_stored = self.gauge("stored_bytes", "Bytes of snapshots on disk or reserved")

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        return self._family(Counter, name, text, labels)

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return self._family(Gauge, name, text, labels)

    def histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return self._family(Histogram, name, text, labels, buckets=_SECONDS)

    def _family(self, kind: type[T], name: str, text: str, labels: Sequence[str], **more: Any) -> T:
        """The family of this name, created by the first backend that uses it."""
        if name not in self._families:
            self._families[name] = kind(f"llamaslot_{name}", text, labels, registry=self.registry, **more)
        family: T = self._families[name]
        return family

    def of_backend(self, name: str) -> BackendMetrics:
        return BackendMetrics(self, name)

    def exposition(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return generate_latest(self.registry)


class CounterBy:
    """A counter of one backend with one more label."""

    def __init__(self, family: Counter, backend: str) -> None:
        self._family, self._backend = family, backend
        self._counters: dict[str, Counter] = {}  # looked up by prometheus_client, each takes 2 us

    def labels(self, value: str) -> Counter:
        if (counter := self._counters.get(value)) is None:
            counter = self._counters[value] = self._family.labels(self._backend, value)
        return counter


class BackendMetrics:
    """Counters and histograms of one backend."""

    def __init__(self, metrics: Metrics, backend: str) -> None:
        def counter(name: str, text: str) -> Counter:
            return metrics.counter(name, text, "backend").labels(backend)

        def counter_by(label: str, name: str, text: str) -> CounterBy:
            return CounterBy(metrics.counter(name, text, "backend", label), backend)

        def histogram(name: str, text: str) -> Histogram:
            return metrics.histogram(name, text, "backend").labels(backend)

        def gauge(name: str, text: str) -> Gauge:
            return metrics.gauge(name, text, "backend").labels(backend)

        self.refused = counter(
            "refused", "Completions that llama-server refused in a dry run, before any slot was changed"
        )
        self.placed = counter_by(
            "source", "placed", "Completions answered, by where their reused prefix came from"
        )
        self.tokens_prompt = counter("prompt_tokens", "Prompt tokens of completions answered")
        self.tokens_reused = counter_by(
            "source", "reused_tokens", "Prompt tokens that llama-server reused, by where they came from"
        )
        self.tokens_expected = counter_by(
            "source", "expected_tokens", "Prompt tokens that llamaslot expected llama-server to reuse"
        )
        self.retired = counter(
            "snapshots_retired",
            "Snapshots dropped because restoring them twice gave less than half of the expected tokens",
        )
        self.reuse_mispredictions = counter(
            "reuse_mispredictions", "Completions that reused fewer tokens than expected"
        )
        self.steps_failed = counter_by(
            "step",
            "steps_failed",
            "Steps before a completion that failed; the completion was answered all the same",
        )
        self.saves = counter("saves", "Slots saved to disk")
        self.bytes_saved = counter("saved_bytes", "Bytes written to snapshots")
        self.restores = counter("restores", "Snapshots restored into slots")
        self.bytes_restored = counter("restored_bytes", "Bytes read from snapshots")
        self.failovers = counter(
            "failovers",
            "Requests that went to another backend because this one failed before their answer began",
        )
        self.restarts = counter("backend_restarts", "Times that llama-server was found to be another process")
        self.save_s = histogram("save_seconds", "Seconds of one save, waiting for llama-server included")
        self.restore_s = histogram(
            "restore_seconds", "Seconds of one restore, waiting for llama-server included"
        )
        self.first_byte_s = histogram(
            "first_byte_seconds", "Seconds from the arrival of a completion to the first byte of its answer"
        )
        self.wedged = counter(
            "wedged", "Slots given up because llama-server sent nothing for timeouts.watchdog_s"
        )
        self.replanned = counter(
            "replanned", "Completions placed again because their slot held far fewer tokens than expected"
        )
        self.preempted = counter(
            "preemptions", "Requests that gave up their slot during prefill for a user with fewer slots"
        )
        self.interruptions = counter(
            "prefill_interruptions", "Prefill chunks interrupted so that other requests could run"
        )
        self.prefill_wait_s = histogram(
            "prefill_wait_seconds", "Seconds that a long prompt waited between its prefill chunks"
        )
        self.prefill_pause_s = counter(
            "prefill_pause_seconds",
            "Seconds that long prefills paused so that running streams got their share (prefill.decode_share)",
        )
        self.cache_misses = counter_by(
            "where",
            "cache_misses",
            "Requests that recomputed 1,024 tokens or more because of a difference in front of them",
        )
        self.assist = gauge(
            "assist", "1 while llamaslot chooses slots, 0 while it leaves that to llama-server"
        )
        self.is_up = gauge("backend_up", "1 while requests are served by this backend")

    def saved(self, size_bytes: int, seconds: float) -> None:
        self.saves.inc()
        self.bytes_saved.inc(size_bytes)
        self.save_s.observe(seconds)

    def restored(self, size_bytes: int, seconds: float) -> None:
        self.restores.inc()
        self.bytes_restored.inc(size_bytes)
        self.restore_s.observe(seconds)

    def reused(self, source: str, n_reused: int, n_prompt: int) -> None:
        self.placed.labels(source).inc()
        self.tokens_reused.labels(source).inc(n_reused)
        self.tokens_prompt.inc(n_prompt)

    def prefilled(self, n_interruptions: int, waited_s: float, paused_s: float) -> None:
        self.interruptions.inc(n_interruptions)
        self.prefill_wait_s.observe(waited_s)
        self.prefill_pause_s.inc(paused_s)


class UntokenizedRequests:
    """Counts and logs the requests served without known tokens; each reason is logged once."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._told: set[Reason] = set()

    def count(self, format_: str, reason: Reason) -> None:
        """Count one more request of ``format_``, the name of a format."""
        self._metrics.untokenized.labels(format_, reason.value).inc()
        if reason not in self._told:
            self._told.add(reason)
            log.warning(_COSTS, format_, _WHY[reason])
