"""Saves what a slot holds: room, the file, its verification, its commit, and who is told."""

from __future__ import annotations

import logging
from collections.abc import Callable

from llamaslot.core.cost import Rates
from llamaslot.core.slots import Content
from llamaslot.engine.lease import Lease
from llamaslot.engine.pool import content_of, supersedes
from llamaslot.engine.probes import UNIFIED
from llamaslot.errors import LlamaslotError, OtherConversation, SnapshotInvalid
from llamaslot.llama.api import LlamaServer
from llamaslot.observe.journal import Act
from llamaslot.observe.metrics import Metrics
from llamaslot.store import Catalog, QuotaExceeded, Snapshot
from llamaslot.tasks import TaskOwner

log = logging.getLogger(__name__)

_MANY_EMPTIED = 2  # of a unified KV cache every save finds the slot empty


class Saving:
    """The saves of one backend. ``fingerprint`` is that of the model that is running now."""

    def __init__(
        self,
        api: LlamaServer,
        catalog: Catalog | None,
        rates: Rates,
        metrics: Metrics,
        tasks: TaskOwner,
        now: Callable[[], float],
    ) -> None:
        self.api, self.catalog, self.rates = api, catalog, rates
        self.metrics, self.tasks, self.now = metrics, tasks, now
        self.fingerprint = ""
        self._n_emptied = 0  # slots that were found empty when they were saved

    async def save(self, lease: Lease) -> Snapshot | None:
        """Write what the slot holds to a snapshot, verified and committed. None when that failed: the slot keeps it."""
        content = lease.content
        if self.catalog is None or content is None:
            return None
        plan = lease.plan
        try:
            keep = {plan.snapshot} if plan is not None and plan.snapshot else set()
            if lease.is_own:  # else slots that are all hot would evict each other in turn, for ever
                keep = lease.pool.backing(besides=lease.slot)
            draft = await self.catalog.reserve(
                self.rates.size_bytes(await self._n_held(lease, content)), keep=keep
            )
        except (QuotaExceeded, SnapshotInvalid) as error:
            self._not_saved(lease, error)
            return None
        started = self.now()
        fingerprint = self.fingerprint  # of the model that computed it: the rest takes a while
        try:
            lease.still_holds()  # making room has taken a while
            result = await self.api.save(lease.slot_id, draft.part_name)
            seconds = self.now() - started
            if result.n_tokens == 0:
                self._was_emptied()
            snapshot = await self.catalog.commit(
                draft,
                tokens_expected=content.tokens,
                n_saved=result.n_tokens,
                n_written=result.n_bytes,
                fingerprint=fingerprint,
                checkpoints=content.checkpoints,
                source=lease.job.id,
            )
        except (LlamaslotError, OSError) as error:
            await self.catalog.abandon(draft)
            self._not_saved(lease, error, self.now() - started)
            if isinstance(error, OtherConversation):
                lease.content = None  # a full disk, by contrast, says nothing about the slot
            return None
        # From here to the end nothing awaits: leaving becomes a snapshot in one breath.
        # The server's own time: what a save waits for (the batch that runs for others) a prefill would wait for too.
        self.rates.save.observe(snapshot.size_bytes, result.seconds or seconds)
        self.rates.size.observe(result.n_tokens, snapshot.size_bytes)
        self.metrics.saved(snapshot.size_bytes, seconds)
        lease.note.acted(
            lease.slot_id, Act("save", seconds, True, result.n_tokens, snapshot.size_bytes, snapshot.id)
        )
        if snapshot.id in self.catalog.snapshots:
            lease.pool.add_snapshot(snapshot)
            current = lease.scheduler.pool
            if current not in (None, lease.pool) and self.fingerprint == fingerprint:
                current.add_snapshot(snapshot)  # the server has restarted since, and can read it as well
        if lease.leaving is not None:
            lease.pool.left(lease.leaving)
        old = lease.pool.snapshot(content.snapshot) if content.snapshot else None
        lease.content = content_of(snapshot)
        if old is not None and supersedes(snapshot, old, lease.pool.rules.similarity_min):
            self.tasks.spawn(self.catalog.drop(old.id), f"drop superseded {old.id}")
        lease.scheduler.dispatch()
        return snapshot

    async def _n_held(self, lease: Lease, content: Content) -> int:
        """What the file will hold: room is made before it is written, for the answer's tokens too."""
        if content.is_exact or content.n_more:
            return content.n_held
        try:
            infos = await self.api.slots()
        except LlamaslotError:
            return content.n_held
        return max(content.n_tokens, *(info.n_tokens or 0 for info in infos if info.id == lease.slot_id))

    def _was_emptied(self) -> None:
        """A slot that held something is empty, and nobody has erased it. Once may be a late child of ``n`` > 1."""
        self._n_emptied += 1
        if self._n_emptied == _MANY_EMPTIED:
            log.warning(UNIFIED)

    def _not_saved(self, lease: Lease, error: Exception, seconds: float = 0.0) -> None:
        lease.note.acted(lease.slot_id, Act("save", seconds, is_done=False))
        if lease.leaving is not None:
            lease.pool.left(lease.leaving)
        log.warning("slot %d was not saved: %s", lease.slot_id, error)
        lease.scheduler.dispatch()
