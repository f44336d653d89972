"""What the end of an answer teaches: what was reused against what was predicted, and what follows from that."""

from __future__ import annotations

import logging

from llamaslot.backend.candidates import MIN_WORTH_TOKENS, source_of
from llamaslot.backend.lease import Lease
from llamaslot.backend.probes import NO_CHECKPOINTS, WORTHLESS
from llamaslot.cache.reuse import RESIDENT, Memory, Strikes, has_failed
from llamaslot.observe.metrics import Metrics
from llamaslot.scheduling.plan import Source
from llamaslot.store import Catalog, Snapshot
from llamaslot.tasks import TaskOwner

log = logging.getLogger(__name__)


class Settling:
    """The lessons of one backend."""

    def __init__(self, catalog: Catalog | None, metrics: Metrics, tasks: TaskOwner) -> None:
        self.catalog, self.metrics, self.tasks = catalog, metrics, tasks
        self._strikes = Strikes()

    def learn(self, lease: Lease, n_reused: int) -> None:
        """Of ``lease.n_expected`` tokens ``n_reused`` were reused."""
        assert lease.plan is not None
        source = lease.plan.source if n_reused else Source.COLD
        self.metrics.reused(source.value, n_reused, lease.job.n_tokens)
        self.metrics.tokens_expected.labels(lease.plan.source.value).inc(lease.n_expected)
        lease.note.reused(lease.n_expected, n_reused)
        restored = lease.restored
        kind = source_of(restored) if restored is not None else RESIDENT
        lease.pool.recall.predictions.observe(lease.pool.memory, kind, lease.n_usable, n_reused)
        if lease.n_whole is not None:
            n_answer = lease.n_answer
            lease.pool.recall.predictions.answered(n_answer, n_reused - (lease.n_whole - n_answer))
        if n_reused < lease.n_expected:
            self._was_wrong(lease, n_reused)
        if restored is None or self._learn_checkpoints(lease, restored, n_reused):
            return
        if self._strikes.note(restored.id, lease.n_expected, n_reused):
            self._retire(restored, lease.n_expected, n_reused)

    def _was_wrong(self, lease: Lease, n_reused: int) -> None:
        plan, pool = lease.plan, lease.pool
        assert plan is not None
        self.metrics.beliefs_wrong.inc()
        log.info(
            "%s: slot %s gave %d tokens instead of the %d expected",
            lease.job.id, lease.slot_name, n_reused, lease.n_expected,
        )  # fmt: skip
        is_resident = lease.restored is None and lease.n_expected >= MIN_WORTH_TOKENS
        if is_resident and n_reused < lease.n_expected / 2:
            pool.lost_slots.note(lease.scheduler.now())
        # Nothing at all of something that had only to be gone on from: it was lost, whatever the model.
        is_lost = lease.is_going_back and n_reused == 0 and lease.n_expected >= MIN_WORTH_TOKENS
        if not is_lost or pool.memory is not Memory.DENSE or pool.is_memory_sure:
            return
        if self._strikes.note("memory", lease.n_expected, n_reused):  # once may be a stranger in the slot
            log.warning(
                "%s: this model cannot rewind to any token (SWA or recurrent): only its checkpoints are counted on",
                pool.backend,
            )
            pool.memory = Memory.SWA

    def _learn_checkpoints(self, lease: Lease, restored: Snapshot, n_reused: int) -> bool:
        """From the first restored snapshots that had to be gone back in: whether files have their checkpoints. True
        when that they have not is why this one failed, or may be."""
        pool = lease.pool
        is_end = lease.n_usable >= restored.n_tokens
        is_known = pool.memory is Memory.DENSE or pool.recall.keeps_checkpoints is not None
        if is_known or is_end or not lease.n_usable:
            return False
        if not has_failed(lease.n_usable, n_reused):
            pool.recall.keeps_checkpoints = True
            return False
        if self._strikes.note("files", lease.n_usable, n_reused):
            pool.recall.keeps_checkpoints = False
            pool.can_save = pool.can_save and pool.memory is not Memory.SWA
            log.warning("%s: %s", pool.backend, NO_CHECKPOINTS if pool.can_save else WORTHLESS)
        return True

    def _retire(self, snapshot: Snapshot, n_expected: int, n_reused: int) -> None:
        log.warning(
            "snapshot %s twice gave less than half of what was expected (%d of %d tokens) and is dropped",
            snapshot.id, n_reused, n_expected,
        )  # fmt: skip
        self.metrics.retired.inc()
        assert self.catalog is not None
        self.tasks.spawn(self.catalog.drop(snapshot.id), f"retire {snapshot.id}")
