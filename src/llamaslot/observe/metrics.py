"""llamaslot's own metrics, served at ``/llamaslot/metrics``. Each llamaslot has its own registry."""

from __future__ import annotations

import contextlib
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


class Metrics:
    """The metrics of one llamaslot. Those of one llama-server are in ``of_backend``, with the labels ``backend`` and
    ``model``. The gauges are set when the metrics are read.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._families: dict[str, Any] = {}
        self.requests = self.counter(
            "requests",
            "HTTP requests of clients that llamaslot has answered, by kind of route and HTTP status (499: the client "
            "left before)",
            "kind",
            "status",
        )
        self.untokenized = self.counter(
            "completions_untokenized",
            "Completions served although llamaslot does not know their tokens, so that their context is not found"
            " again",
            "kind",
            "reason",
        )
        self.clients_left = self.counter(
            "clients_left", "Clients that closed their connection before their answer was complete"
        )
        self.prefix_wait_s = self.histogram(
            "prefix_wait_seconds",
            "Seconds that a completion waited for a prefix that another completion was computing",
        )
        self.rewrites = self.counter(
            "requests_rewritten", "Requests whose system prompt a rewrite rule of llamaslot changed", "rule"
        )
        self.n_waiting = self.gauge(
            "requests_waiting", "Completions that wait for a slot in llamaslot's queue now"
        )
        self.n_tasks = self.gauge(
            "tasks",
            "Tasks of llamaslot's event loop now; a number that grows while no requests come is a fault",
        )
        self.n_snapshots = self.gauge(
            "snapshots", "Contexts on disk (snapshots) that the models served now can use"
        )
        self.bytes_stored = self.gauge(
            "snapshot_stored_bytes",
            "Bytes that contexts on disk (snapshots) take, with space reserved for those being written",
        )
        self.quota_bytes = self.gauge(
            "snapshot_quota_bytes", "Bytes that contexts on disk may take (store.quota)"
        )
        self.bytes_added = self.gauge(
            "snapshot_added_bytes", "Bytes that saves since the start of llamaslot have added to the disk"
        )
        self.saves_differing = self.gauge(
            "snapshot_differing_saves",
            "Saves since the start of llamaslot that were kept whole, because their KV cache differed from the snapshot"
            " that the slot was restored from or saved as",
        )

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        return self._family(Counter, name, text, labels)

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return self._family(Gauge, name, text, labels)

    def histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return self._family(Histogram, name, text, labels, buckets=_SECONDS)

    def _family(self, kind: type[T], name: str, text: str, labels: Sequence[str], **more: Any) -> T:
        """Return the metric family ``llamaslot_<name>``. The first call makes it, with ``text`` as its HELP line."""
        if name not in self._families:
            self._families[name] = kind(f"llamaslot_{name}", text, labels, registry=self.registry, **more)
        family: T = self._families[name]
        return family

    def with_model(self) -> list[Any]:
        """Return the metric families whose labels are ``backend`` and ``model`` and no more."""
        return [family for family in self._families.values() if family._labelnames == ("backend", "model")]

    def of_backend(self, name: str) -> BackendMetrics:
        return BackendMetrics(self, name)

    def exposition(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self.registry)


class CounterBy:
    """A counter of one backend and model, with one more label: ``labels`` returns the counter of one value of it."""

    def __init__(self, family: Counter, backend: str, model: str) -> None:
        self._family, self._backend, self._model = family, backend, model
        self._counters: dict[str, Counter] = {}  # looked up by prometheus_client, each takes 2 us

    def labels(self, value: str) -> Counter:
        if (counter := self._counters.get(value)) is None:
            counter = self._counters[value] = self._family.labels(self._backend, self._model, value)
        return counter


class BackendMetrics:
    """The metrics of one backend. Counters and histograms have the label ``model``: each model that the backend has
    served has its own. Before the first model is known the label is empty; ``serves`` removes these series.
    """

    def __init__(self, metrics: Metrics, backend: str) -> None:
        self._metrics, self._backend, self._model = metrics, backend, ""
        self.is_up = self._gauge(
            "backend_up", "1 while llamaslot can send requests to this llama-server, else 0"
        )
        self.assist = self._gauge(
            "backend_assist",
            "1 while llamaslot chooses slots; 0 while llama-server chooses them itself, or is down",
        )
        self._bind()

    def serves(self, model: str) -> None:
        """Use the counters and histograms of ``model`` from now on."""
        if model != self._model:
            if not self._model:
                self._forget()
            self._model = model
            self._bind()

    def _forget(self) -> None:
        """Remove the series without a model name, which were made before the first model was known. As a rule they are
        empty.
        """
        for family in self._metrics.with_model():
            with contextlib.suppress(KeyError):
                family.remove(self._backend, "")

    def _gauge(self, name: str, text: str) -> Gauge:
        return self._metrics.gauge(name, text, "backend").labels(self._backend)

    def _bind(self) -> None:
        """Make the counters and histograms of this backend and its model."""
        names, values = ("backend", "model"), (self._backend, self._model)

        def counter(name: str, text: str) -> Counter:
            return self._metrics.counter(name, text, *names).labels(*values)

        def counter_by(label: str, name: str, text: str) -> CounterBy:
            return CounterBy(self._metrics.counter(name, text, *names, label), *values)

        def histogram(name: str, text: str) -> Histogram:
            return self._metrics.histogram(name, text, *names).labels(*values)

        self.refused = counter(
            "completions_refused",
            "Completions that llama-server refused in a dry run (a request that computes nothing), before any slot was"
            " changed",
        )
        self.placed = counter_by(
            "source",
            "completions",
            "Completions answered, by where the reused beginning of their prompt came from (resident: the slot; "
            "snapshot: the disk; cold: nowhere; server: llama-server chose the slot)",
        )
        self.tokens_prompt = counter("prompt_tokens", "Tokens of the prompts of answered completions")
        self.tokens_reused = counter_by(
            "source",
            "reused_tokens",
            "Prompt tokens that llama-server did not compute again, by where they came from (see"
            " llamaslot_completions_total)",
        )
        self.seconds_saved = counter_by(
            "source",
            "prefill_seconds_saved",
            "Seconds of prefill that the reused prompt tokens would have taken, by the learned speed of this "
            "llama-server; time for restoring contexts is not subtracted (llamaslot_snapshot_restore_seconds)",
        )
        self.tokens_expected = counter_by(
            "source", "expected_tokens", "Prompt tokens that llamaslot expected llama-server to reuse"
        )
        self.retired = counter(
            "snapshots_retired",
            "Contexts on disk dropped because twice in a row less than half of the expected tokens were reused from"
            " them",
        )
        self.reuse_mispredictions = counter(
            "reuse_mispredictions",
            "Completions that reused over 64 prompt tokens fewer than llamaslot expected",
        )
        self.steps_failed = counter_by(
            "step",
            "steps_failed",
            "Saves, restores, erases and prefills before a completion that failed; the completion was answered all the"
            " same",
        )
        self.saves = counter("snapshot_saves", "Contexts of slots that llama-server saved to disk")
        self.bytes_saved = counter(
            "snapshot_saved_bytes", "Bytes that llama-server wrote when it saved slots"
        )
        self.restores = counter("snapshot_restores", "Contexts restored from disk into slots")
        self.bytes_restored = counter(
            "snapshot_restored_bytes", "Bytes that llama-server read when it restored slots"
        )
        self.failovers = counter(
            "failovers",
            "Requests that another backend took because this one failed before their answer began",
        )
        self.restarts = counter("backend_restarts", "Restarts of llama-server that llamaslot noticed")
        self.save_s = histogram(
            "snapshot_save_seconds",
            "Seconds of one save of a context, with the wait until llama-server begins it",
        )
        self.restore_s = histogram(
            "snapshot_restore_seconds",
            "Seconds of one restore of a context, with the wait until llama-server begins it",
        )
        self.queue_s = histogram(
            "queue_seconds", "Seconds that a completion waited in llamaslot's queue for its slot"
        )
        self.first_byte_s = histogram(
            "completion_first_byte_seconds",
            "Seconds from the arrival of a completion to the first byte of its answer (unstreamed: to the whole"
            " answer)",
        )
        self.wedged = counter(
            "slots_wedged",
            "Slots whose request was ended because llama-server showed no progress for timeouts.watchdog_s",
        )
        self.replanned = counter(
            "completions_replanned",
            "Completions placed again because their slot held far fewer tokens than expected",
        )
        self.preempted = counter(
            "preemptions", "Completions that gave up their slot during prefill for a user with fewer slots"
        )
        self.interruptions = counter(
            "prefill_interruptions", "Chunks of long prompts interrupted so that other requests could run"
        )
        self.prefill_wait_s = histogram(
            "prefill_wait_seconds",
            "Seconds that a long prompt waited between its chunks, for other requests and running streams",
        )
        self.prefill_pause_s = counter(
            "prefill_pause_seconds",
            "Seconds that long prefills paused so that running streams got their share (prefill.decode_share)",
        )
        self.cache_misses = counter_by(
            "where",
            "cache_misses",
            "Completions that computed 1,024 or more cached tokens again, because their prompt differs from the cached"
            " one",
        )

    def saved(self, size_bytes: int, seconds: float) -> None:
        self.saves.inc()
        self.bytes_saved.inc(size_bytes)
        self.save_s.observe(seconds)

    def restored(self, size_bytes: int, seconds: float) -> None:
        self.restores.inc()
        self.bytes_restored.inc(size_bytes)
        self.restore_s.observe(seconds)

    def reused(self, source: str, n_reused: int, n_prompt: int, saved_s: float = 0.0) -> None:
        """Count one completion by ``source``: a prompt of ``n_prompt`` tokens, of which llama-server reused
        ``n_reused``. ``saved_s``: seconds that computing the reused tokens would have taken.
        """
        self.placed.labels(source).inc()
        self.tokens_reused.labels(source).inc(n_reused)
        self.tokens_prompt.inc(n_prompt)
        if saved_s > 0:
            self.seconds_saved.labels(source).inc(saved_s)

    def prefilled(self, n_interruptions: int, waited_s: float, paused_s: float) -> None:
        self.interruptions.inc(n_interruptions)
        self.prefill_wait_s.observe(waited_s)
        self.prefill_pause_s.inc(paused_s)


class UntokenizedRequests:
    """Counts the requests that were served although llamaslot does not know their tokens. Logs each reason once."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._told: set[Reason] = set()

    def count(self, format_: str, reason: Reason) -> None:
        """Count one request. ``format_``: the name of its format. Log ``reason`` if no request had it before."""
        self._metrics.untokenized.labels(format_, reason.value).inc()
        if reason not in self._told:
            self._told.add(reason)
            log.warning(
                "llamaslot does not know the tokens of a prompt (request format %s), so its context is not found again:"
                " %s; this reason is logged once",
                format_, _WHY[reason],
            )  # fmt: skip
