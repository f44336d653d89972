"""Saves a slot as a snapshot: reserves space, has llama-server write the file, verifies and commits it, adds it to
the index.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from functools import partial

from msgspec.structs import replace

from llamaslot.backend.lease import Lease
from llamaslot.backend.leases import Leases
from llamaslot.backend.slot_content import prefilled
from llamaslot.backend.slot_table import SlotTable
from llamaslot.backend.snapshot_usage import abandoned_by, supersedes
from llamaslot.cache.content import Content, SnapshotKind
from llamaslot.cache.ids import NEGLIGIBLE_TOKENS, head
from llamaslot.cache.reuse import CacheKind, RewindModel
from llamaslot.errors import LlamaslotError, OtherConversation, SlotWedged, SnapshotInvalid
from llamaslot.llama.client import LlamaServer
from llamaslot.observe.journal import Act
from llamaslot.observe.metrics import BackendMetrics
from llamaslot.scheduling.cost import Rates
from llamaslot.store import Catalog, QuotaExceeded, SavedSlot, Snapshot, WithTokens
from llamaslot.store.model_snapshots import content_of
from llamaslot.store.taking_in import Base
from llamaslot.tasks import TaskOwner

log = logging.getLogger(__name__)

_N_NEAREST = 8  # snapshots that share most with a new one

NOT_SAVED = "%s: slot %s was not saved: %s"  # request, slot, reason


def never() -> bool:
    """For a save that yields to nothing."""
    return False


class Saving:
    """The saves of one backend. ``fingerprint``: of the model that runs now."""

    def __init__(
        self,
        api: LlamaServer,
        catalog: Catalog | None,
        rates: Rates,
        metrics: BackendMetrics,
        tasks: TaskOwner,
        leases: Leases,
    ) -> None:
        self.api, self.catalog, self.rates = api, catalog, rates
        self.metrics, self.tasks, self.now = metrics, tasks, leases.now
        self.leases = leases
        self.fingerprint = ""
        self._lock = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def in_turn(self, lease: Lease, seconds: float) -> AsyncIterator[None]:
        """Run a save or restore of about ``seconds``. Each stops every stream of this llama-server, so there is one
        at a time, followed by a wait for one batch. While no answer is being decoded, actions shorter than that wait
        take no turns: all that are due run between the same two batches.
        """
        is_decoding = any(other.is_decoding for other in self.leases.leases if other is not lease)
        if is_decoding or seconds > self.rates.save_delay.seconds:
            async with self._lock:
                yield
        else:
            yield

    async def save(self, lease: Lease, must_give_way: Callable[[], bool] = never) -> Snapshot | None:
        """Save the slot's content as a snapshot, verified and committed. None if that failed: the slot keeps its
        content. ``must_give_way`` is called just before the file is written: True cancels the save.

        Raises SlotWedged if the slot had to be rewound first, and llama-server sent nothing.
        """
        if self.catalog is None or lease.content is None:
            return None
        if lease.content.has_media:  # llama-server may write it, but the content of the file would be unknown
            lease.set_content(replace(lease.content, is_dirty=False, snapshot=None))
            return None
        if not await self._has_gone_back(lease, lease.content, SnapshotKind.LEAF):
            lease.end_pending_save()
            self.leases.dispatch()
            return None
        content, keep = lease.content, _planned(lease)
        if lease.is_own:  # otherwise slots that are all hot would evict each other in turn, for ever
            keep = lease.table.backing(besides=lease.slot)
        n_held = await self._n_held(lease, content)
        snapshot = await self._write(lease, content, n_held, keep, SnapshotKind.LEAF, must_give_way)
        # No await from here to the end: the pending save becomes a snapshot at once.
        lease.end_pending_save()
        if snapshot is not None:
            old = lease.table.snapshot(content.snapshot) if content.snapshot else None
            lease.set_content(replace(content_of(snapshot), checkpoints=content.checkpoints))
            if old is not None and supersedes(snapshot, old, lease.table.rules.similarity_min):
                self.catalog.inherit(snapshot.id, old.id)
                self.tasks.spawn(self.catalog.drop(old.id), f"drop superseded {old.id}")
        self.leases.dispatch()
        return snapshot

    async def keep(self, lease: Lease, n_tokens: int) -> bool:
        """Save the slot's content, exactly the first ``n_tokens`` of its request, as a shared-prefix snapshot. False if
        that failed. Raises SlotWedged as ``save`` does.

        The slot continues from there: its unsaved content is the same as before.
        """
        content, is_kept = lease.content, False
        try:
            if (
                self.catalog is None
                or content is None
                or content.tokens != head(lease.request.tokens, n_tokens)
            ):
                return False  # the prefill has failed
            if not await self._has_gone_back(lease, content, SnapshotKind.TRUNK) or lease.content is None:
                return False
            snapshot = await self._write(lease, lease.content, n_tokens, _planned(lease), SnapshotKind.TRUNK)
            is_kept = snapshot is not None
            return is_kept
        finally:  # without an await since it became a snapshot
            if not is_kept:
                lease.stop_keeping()
            lease.table.end_expected_trunks(lease.slot_id, n_tokens)
            self.leases.dispatch()

    async def _write(
        self,
        lease: Lease,
        content: Content,
        n_held: int,
        keep: set[str],
        kind: SnapshotKind,
        must_give_way: Callable[[], bool] = never,
    ) -> WithTokens | None:
        """Reserve space, save, verify, commit, and add it to the index. None if that failed, which is logged.

        There is no await between the commit and the return.
        """
        assert self.catalog is not None
        began = self.now()
        try:
            size_bytes = self.rates.size_bytes(n_held)
            reservation = await self.catalog.reserve(
                size_bytes, keep=keep, spare=self.leases.snapshots_in_demand()
            )
        except (QuotaExceeded, SnapshotInvalid) as error:
            _not_saved(lease, kind, error)
            return None
        asked_at = started = self.now()
        used_at = lease.slot.used_at if lease.slot is not None and kind is SnapshotKind.LEAF else started
        idle_s = max(started - used_at, 0.0)
        fingerprint = self.fingerprint  # of the model that computed it: the rest takes a while
        try:
            async with self.in_turn(lease, self.rates.save.seconds(size_bytes)):
                started = self.now()
                lease.check_current()  # reserving has taken a while
                if must_give_way():
                    await self.catalog.abandon(reservation)
                    return None
                result = await self.api.save(lease.slot_id, reservation.part_name)
                seconds = self.now() - started
            if result.n_tokens == 0:
                lease.table.lost_slots.count(self.now())
            if kind is SnapshotKind.TRUNK and result.n_tokens != n_held:
                raise OtherConversation(f"{result.n_tokens} tokens were saved instead of {n_held}")
            saved = SavedSlot(
                tokens_expected=content.tokens,
                n_saved=result.n_tokens,
                n_written=result.n_bytes,
                fingerprint=fingerprint,
                checkpoints=lease.table.rewind_model.in_file(content.checkpoints),
                source=lease.request.id,
                kind=kind,
                is_pinned=kind is SnapshotKind.TRUNK and lease.request.is_prewarm,
                namespace=content.namespace.text,
                idle_s=idle_s,
                find_base=partial(_base, lease.table, content),
                marks=(*content.checkpoints, *lease.request.boundaries, lease.request.n_system),
            )
            snapshot = await self.catalog.commit(reservation, saved)
        except (LlamaslotError, OSError) as error:
            await self.catalog.abandon(reservation)
            if isinstance(error, OtherConversation):
                lease.set_content(None)  # a full disk, by contrast, says nothing about the slot
            _not_saved(lease, kind, error, self.now() - started)
            return None
        # The server's own time: what a save waits for (the batch of other requests) a prefill would wait for too.
        save_s, waited_s = result.seconds or seconds, started - asked_at
        self.rates.save.observe(result.n_bytes, save_s)
        if lease.plan is not None and kind is SnapshotKind.LEAF:
            # Without the wait for other saves: those are few if this delay makes them expensive.
            self.rates.save_delay.observe(max(self.now() - began - waited_s - save_s, 0.0))
        self.rates.size.observe(result.n_tokens, result.n_bytes)
        self.metrics.saved(result.n_bytes, seconds)
        act = Act(
            _step(kind), seconds, is_done=True, n_tokens=result.n_tokens, size_bytes=result.n_bytes,
            snapshot=snapshot.id, waited_s=waited_s,
        )  # fmt: skip
        lease.recorder.record_step(lease.slot_key, act)
        if kind is SnapshotKind.TRUNK:
            log.info(
                "%s: shared-prefix snapshot of %d tokens saved: %s", lease.request.id, n_held, snapshot.id
            )
        if snapshot.id in self.catalog.snapshots:
            lease.table.add_snapshot(snapshot)
            if kind is SnapshotKind.LEAF and (left := abandoned_by(lease.table, snapshot)) is not None:
                self.catalog.branched(left)
            current = self.leases.table
            if current not in (None, lease.table) and self.fingerprint == fingerprint:
                current.add_snapshot(snapshot)  # the server has restarted since, and can read it too
        return snapshot

    @staticmethod
    def _must_go_back(rewind_model: RewindModel, content: Content) -> bool:
        """Whether the slot must be rewound to the end of its prompt first, or its file would be useless.

        1. The build keeps no checkpoints in files: then the next prompt has the answer tokenized differently. The
           rewind costs the few tokens since the slot's last checkpoint; without one near the end it would cost the
           whole prompt, and is not done.
        2. With a sliding window, after a prefill that was stopped on the way: it has left no checkpoint, and without
           one the file restores nothing (2,560 tokens: 0 reused; rewound by one token: 2,559).
        """
        is_near = content.n_tokens - max(content.checkpoints, default=0) <= NEGLIGIBLE_TOKENS
        if rewind_model.is_rewound:
            return is_near and not content.is_exact
        return rewind_model.cache_kind is CacheKind.SWA and content.is_exact and not is_near

    async def _has_gone_back(self, lease: Lease, content: Content, kind: SnapshotKind) -> bool:
        """Rewind the slot if its file would be useless otherwise. False if that failed: then its content is unknown,
        and it drains when released, because llama-server may be working in it. Raises SlotWedged if llama-server sent
        nothing.
        """
        if self._must_go_back(lease.table.rewind_model, content):
            try:
                await self._rewind(lease, content)
            except LlamaslotError as error:
                lease.lose_track()
                _not_saved(lease, kind, error)
                if not isinstance(error, SlotWedged):
                    return False
                # With a plan, it is counted where the client is told.
                if lease.plan is None:
                    self.metrics.wedged.inc()
                raise
        return True

    async def _rewind(self, lease: Lease, content: Content) -> None:
        """Rewind the slot to the end of its prompt. Raises LlamaslotError: then its content is unknown."""
        lease.check_current()
        n_reused = 0
        async with contextlib.aclosing(
            self.api.prefill(lease.slot_id, content.tokens, content.namespace.lora)
        ) as events:
            async for event in events:
                n_reused = event.cache
        after = prefilled(content, content.tokens, n_reused)
        # If so few tokens are computed, the checkpoint is created at their beginning (measured).
        lease.set_content(replace(after, checkpoints=(*after.checkpoints, n_reused)))

    async def _n_held(self, lease: Lease, content: Content) -> int:
        """The number of tokens in the file: space is reserved before it is written, for the answer's tokens too."""
        if content.is_exact or content.n_more:
            return content.n_held
        try:
            infos = await self.api.slots()
        except LlamaslotError:
            return content.n_held
        return max(content.n_tokens, *(info.n_tokens or 0 for info in infos if info.id == lease.slot_id))


def _base(table: SlotTable, content: Content, tokens: bytes) -> Base | None:
    """The snapshot that begins with most of ``tokens``, which were saved from a slot with that ``content``; of several,
    that of the same conversation.
    """
    library = table.model_snapshots
    hits = library.in_namespaces.match(tokens, (content.namespace,), _N_NEAREST)
    best = [hit for hit in hits if hit.n_shared == hits[0].n_shared]
    hit = next((hit for hit in best if hit.holder == content.snapshot), best[0] if best else None)
    snapshot = library.snapshots.get(hit.holder) if hit is not None else None
    if hit is None or snapshot is None:
        return None
    return Base(snapshot, hit.n_shared, is_lineage=snapshot.id == content.snapshot)


def _step(kind: SnapshotKind) -> str:
    """The name of the step in the journal."""
    return "keep" if kind is SnapshotKind.TRUNK else "save"


def _planned(lease: Lease) -> set[str]:
    """The snapshot that its own plan resumes from, which must not be evicted."""
    return {lease.plan.snapshot} if lease.plan is not None and lease.plan.snapshot else set()


def _not_saved(lease: Lease, kind: SnapshotKind, error: Exception, seconds: float = 0.0) -> None:
    lease.recorder.record_step(lease.slot_key, Act(_step(kind), seconds, is_done=False))
    if kind is SnapshotKind.TRUNK:
        log.warning(
            "%s: shared prefix in slot %s was not saved: %s", lease.request.id, lease.slot_name, error
        )
    else:
        log.warning(NOT_SAVED, lease.request.id, lease.slot_name, error)
