"""llamaslot's own metrics, served at ``/llamaslot/metrics``. Each llamaslot has a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """Counters and histograms by name; ``n_…`` gauges are set when they are read."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"llamaslot_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"llamaslot_{name}", text, buckets=_SECONDS, registry=self.registry)

        self.requests = counter("requests", "Requests by route kind and HTTP status", "kind", "status")
        self.unrecognized = counter(
            "unrecognized", "Completions served without knowing their tokens", "kind", "reason"
        )
        self.refused = counter(
            "refused", "Completions that llama-server refused before anything was done for them"
        )
        self.placed = counter("placed", "Jobs by where their prefix came from", "source")
        self.tokens_prompt = counter("prompt_tokens", "Tokens of all prompts")
        self.tokens_reused = counter(
            "reused_tokens", "Tokens of prompts that llama-server did not compute again", "source"
        )
        self.tokens_expected = counter(
            "expected_tokens", "Tokens of prompts that were expected to be reused", "source"
        )
        self.retired = counter("snapshots_retired", "Snapshots dropped because they twice failed to deliver")
        self.beliefs_wrong = counter("beliefs_wrong", "Jobs that reused less than was expected")
        self.steps_failed = counter("steps_failed", "Saves, erases and restores that failed", "step")
        self.saves = counter("saves", "Snapshots committed")
        self.bytes_saved = counter("saved_bytes", "Bytes of snapshots written")
        self.restores = counter("restores", "Snapshots restored")
        self.bytes_restored = counter("restored_bytes", "Bytes of snapshots read")
        self.restarts = counter("backend_restarts", "Restarts of llama-server that were noticed")
        self.clients_left = counter("clients_left", "Clients that left before their answer was complete")
        self.save_s = histogram("save_seconds", "Seconds that a save took")
        self.restore_s = histogram("restore_seconds", "Seconds that a restore took")
        self.queue_s = histogram("queue_seconds", "Seconds that a job waited for its slot")
        self.first_byte_s = histogram(
            "first_byte_seconds", "Seconds from a request to the first byte of its answer"
        )
        self.wedged = counter("wedged", "Slots that were given up because llama-server told nothing of them")
        self.replanned = counter("replanned", "Jobs whose slot held much less than was expected of it")
        self.preempted = counter("preemptions", "Requests that gave their slot up for a user with fewer")
        self.interruptions = counter("prefill_interruptions", "Prefills that stopped for somebody else")
        self.prefill_wait_s = histogram(
            "prefill_wait_seconds", "Seconds that a long prefill waited for its turn"
        )
        self.prefill_pause_s = counter("prefill_pause_seconds", "Of these, seconds for the streams of others")
        self.prefix_wait_s = histogram(
            "prefix_wait_seconds", "Seconds that a job waited for a prefix that another one computed"
        )
        self.rewrites = counter("rewrites", "Requests whose system prompt a rule has changed", "rule")
        self.divergences = counter(
            "divergences", "Requests that lost a long prefix by a difference in it", "where"
        )
        self.n_waiting = Gauge("llamaslot_waiting", "Jobs waiting for a slot", registry=self.registry)
        self.n_snapshots = Gauge("llamaslot_snapshots", "Snapshots that can be used", registry=self.registry)
        self.bytes_stored = Gauge("llamaslot_stored_bytes", "Bytes of all snapshots", registry=self.registry)
        self.assist = Gauge(
            "llamaslot_assist",
            "1 while llamaslot chooses slots, 0 while it leaves that to llama-server",
            registry=self.registry,
        )
        self.is_up = Gauge("llamaslot_backend_up", "1 while the backend serves", registry=self.registry)

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

    def exposition(self) -> bytes:
        """All of it in the Prometheus text format."""
        return generate_latest(self.registry)
