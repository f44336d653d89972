"""Learns about a backend from answers and prefills: compares reuse with the forecast, and measures the speed of
llama-server. ``fleet.model_context`` learns from its counts of prompt tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from msgspec import Struct

from llamaslot.backend.lease import Lease
from llamaslot.backend.slot_table import SlotTable
from llamaslot.cache.ids import NEGLIGIBLE_TOKENS
from llamaslot.cache.reuse import CacheKind, Strikes
from llamaslot.llama.answers import Progress
from llamaslot.observe.metrics import BackendMetrics
from llamaslot.scheduling.plan import PrefillStats, Source
from llamaslot.scheduling.rates import Rates
from llamaslot.store import Catalog, Snapshot
from llamaslot.tasks import TaskOwner

log = logging.getLogger(__name__)


class ReportedCounts(Struct, frozen=True):
    """The numbers that llama-server reported at the end of an answer; None or 0 where it reported none.

    ``n_found``: the tokens of the prompt that it found in the slot. ``n_prompt``: the tokens of the whole prompt.
    ``n_computed``: the tokens of the prompt that it computed, which took ``prompt_s`` seconds. ``n_predicted``: the
    tokens of the answer, which took ``predicted_s`` seconds.
    """

    n_found: int | None
    n_prompt: int | None = None
    n_computed: int = 0
    prompt_s: float = 0.0
    n_predicted: int = 0
    predicted_s: float | None = None


class Feedback:
    """Learns from the answers and prefills of one backend. Saves, restores and waits are measured by the code that
    performs them.
    """

    def __init__(
        self,
        catalog: Catalog | None,
        rates: Rates,
        metrics: BackendMetrics,
        tasks: TaskOwner,
        now: Callable[[], float],
    ) -> None:
        self.catalog, self.rates = catalog, rates
        self.metrics, self.tasks, self._now = metrics, tasks, now
        self._strikes = Strikes()

    def answered(self, lease: Lease, reported: ReportedCounts, prefill_stats: PrefillStats | None) -> None:
        """Learn from the answer to the request of ``lease``. ``prefill_stats``: what llamaslot computed ahead of the
        request in this slot; None if nothing.
        """
        n_reused = prefill_stats.n_reused if prefill_stats is not None else reported.n_found
        if n_reused is not None and lease.request.tokens:
            self._compare(lease, n_reused)
        if prefill_stats is None and reported.n_found is not None and reported.n_computed > 1:
            n_prompt = reported.n_found + reported.n_computed
            self.rates.prefill.observe(reported.n_found, n_prompt, reported.prompt_s)
        if reported.n_predicted and reported.predicted_s is not None:
            self.rates.answer.observe(reported.n_predicted, reported.predicted_s)

    def progressed(self, table: SlotTable, last: Progress, event: Progress, end: int) -> None:
        """Learn the speed from ``event``, the next progress event after ``last`` in a prefill of llamaslot's own.
        ``end``: the token at which the prefill ends.
        """
        n_tokens = event.processed - last.processed
        if n_tokens >= NEGLIGIBLE_TOKENS:
            self.rates.prefill.observe(last.processed, event.processed, event.seconds - last.seconds)
        if event.processed < end:  # a full batch; the last one may be smaller
            table.n_batch = max(table.n_batch, n_tokens)

    def piece_ended(self, table: SlotTable, more_s: float, *, is_alone: bool) -> None:
        """Record that sending one piece of a prompt took ``more_s`` seconds besides its computation. ``is_alone``:
        llama-server computed nothing for other requests meanwhile.
        """
        if table.rewind_model.is_rewindable:
            self.rates.interruption.observe(more_s)
        if is_alone:
            self.rates.request.observe(more_s)

    def misplaced(self, lease: Lease, n_found: int) -> None:
        """Record that the slot of ``lease`` had only ``n_found`` tokens of the prompt, so few that the request is
        placed again.
        """
        self.metrics.replanned.inc()
        if lease.restored is None:
            lease.table.lost_slots.count(self._now())
        log.info(
            "%s: slot %s holds only %d tokens of the prompt, %d were expected; llamaslot places the request again",
            lease.request.id, lease.slot_name, n_found, lease.forecast.n_expected,
        )  # fmt: skip

    def _compare(self, lease: Lease, n_reused: int) -> None:
        """Compare the ``n_reused`` tokens of the prompt with the forecast of ``lease``, and learn from the
        difference.
        """
        assert lease.plan is not None
        forecast = lease.forecast
        source = lease.plan.source if n_reused else Source.COLD
        rate = self.rates.prefill
        saved_s = rate.long_seconds(0, n_reused) if rate.known else 0.0
        self.metrics.reused(source.value, n_reused, lease.request.n_tokens, saved_s)
        self.metrics.tokens_expected.labels(lease.plan.source.value).inc(forecast.n_expected)
        lease.recorder.reused(forecast.n_expected, n_reused)
        restored = lease.restored
        if forecast.n_whole is not None:
            n_answer = forecast.n_answer
            lease.table.rewind_model.returned.answered(n_answer, n_reused - (forecast.n_whole - n_answer))
        if n_reused < forecast.n_expected - NEGLIGIBLE_TOKENS:
            self._was_wrong(lease, n_reused)
        if restored is not None and self._strikes.count(restored.id, forecast.n_expected, n_reused):
            self._retire(restored, forecast.n_expected, n_reused)

    def _was_wrong(self, lease: Lease, n_reused: int) -> None:
        table, forecast = lease.table, lease.forecast
        self.metrics.reuse_mispredictions.inc()
        log.info(
            "%s: llama-server reused only %d prompt tokens in slot %s, %d were expected",
            lease.request.id, n_reused, lease.slot_name, lease.forecast.n_expected,
        )  # fmt: skip
        is_resident = lease.restored is None and forecast.n_expected >= NEGLIGIBLE_TOKENS
        if is_resident and n_reused < forecast.n_expected / 2:
            table.lost_slots.count(self._now())
        # Without a rewind this tells nothing about the model: then the slot has lost its content.
        is_lost = forecast.is_rewind and n_reused == 0 and forecast.n_expected >= NEGLIGIBLE_TOKENS
        if not is_lost or table.cache_kind is not CacheKind.DENSE or table.is_cache_kind_sure:
            return
        if self._strikes.count("memory", forecast.n_expected, n_reused):  # once may be an accident
            log.warning(
                "%s: llama-server twice reused nothing of slots that it had to rewind: from now on llamaslot expects"
                " reuse at checkpoints only (as of SWA and recurrent models)",
                table.backend,
            )
            table.cache_kind = CacheKind.SWA

    def _retire(self, snapshot: Snapshot, n_expected: int, n_reused: int) -> None:
        log.warning(
            "snapshot dropped: %s: twice in a row less than half of the expected tokens were reused from it (%d of %d)",
            snapshot.id, n_reused, n_expected,
        )  # fmt: skip
        self.metrics.retired.inc()
        assert self.catalog is not None
        self.tasks.spawn(self.catalog.drop(snapshot.id), f"retire {snapshot.id}")
