"""Saves a slot as a snapshot: reserves room, has llama-server write the file, checks and commits it, and adds it to
the index."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from msgspec.structs import replace

from llamaslot.backend.lease import Lease
from llamaslot.backend.leases import Leases
from llamaslot.backend.slot_content import goes_on, prefilled
from llamaslot.backend.slot_table import SlotTable
from llamaslot.cache.content import Content, SnapshotKind
from llamaslot.cache.ids import NEGLIGIBLE_TOKENS, head
from llamaslot.cache.reuse import CacheKind, RewindModel
from llamaslot.errors import LlamaslotError, OtherConversation, SlotActionFailed, SlotWedged, SnapshotInvalid
from llamaslot.llama.answers import SlotAction
from llamaslot.llama.client import LlamaServer
from llamaslot.observe.journal import Act
from llamaslot.observe.metrics import BackendMetrics
from llamaslot.observe.recurring_faults import Recurring
from llamaslot.scheduling.rates import Rates
from llamaslot.store import Catalog, QuotaExceeded, Reservation, SavedSlot, WithTokens
from llamaslot.store.deduplicate import Base
from llamaslot.store.landing import NoLanding
from llamaslot.store.model_snapshots import PendingSave, content_of, supersedes
from llamaslot.tasks import TaskOwner

log = logging.getLogger(__name__)

_MAX_COMMITS = 2  # commits in the background; each has a whole slot file. On disk as many as there are slots
_AT_ONCE = 2  # commits that copy and fsync, each in a thread; trunks do not count, as requests wait for them
_N_NEAREST = 8  # snapshots with most tokens in common with a new one, compared for its base


def never() -> bool:
    """A ``must_give_way`` for a save that gives way to no request."""
    return False


@dataclass(eq=False)
class _File:
    """A slot file of ``content`` that llama-server has written for ``lease``. ``is_checked``: gets the file's tokens
    once they are known to be those that were to be saved. ``pending``: the pending save, while the commit runs in the
    background."""

    lease: Lease
    content: Content
    kind: SnapshotKind
    reservation: Reservation
    result: SlotAction
    started: float
    pending: PendingSave | None = None
    is_checked: asyncio.Future[bytes] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Saving:
    """Saves the slots of one backend."""

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
        self._failures = Recurring(log, f"{leases.backend}: slots are saved again", now=leases.now)
        self._lock = asyncio.Lock()
        self._commits: set[asyncio.Task[WithTokens | None]] = set()  # in the background
        self._turns = asyncio.Semaphore(_AT_ONCE)

    @contextlib.asynccontextmanager
    async def in_turn(self, lease: Lease, seconds: float) -> AsyncIterator[None]:
        """Run a save or restore in the block, which takes about ``seconds``.

        Each save or restore stops all streams of this llama-server. So they run one at a time, and each waits for one
        batch. While no answer is decoded, actions shorter than this wait need no turn: then all that are due run
        between the same two batches."""
        is_decoding = any(other.is_decoding for other in self.leases.leases if other is not lease)
        if is_decoding or seconds > self.rates.save_delay.seconds:
            async with self._lock:
                yield
        else:
            yield

    async def save(
        self, lease: Lease, must_give_way: Callable[[], bool] = never
    ) -> asyncio.Task[WithTokens | None] | None:
        """Save the slot's content as a snapshot. Returns the task of the commit once the file is known to hold that
        content. From then on the slot may be used again, and the content is a pending save until the commit has ended.
        Returns None if the save failed; then the slot keeps its content.

        ``must_give_way`` is called just before llama-server writes the file; True cancels the save. Raises SlotWedged
        if the slot had to be rewound first, and llama-server sent nothing."""
        if self.catalog is None or lease.content is None:
            return None
        if lease.content.has_media:  # the tokens in a file with media would be unknown
            lease.set_content(replace(lease.content, is_dirty=False, snapshot=None))
            return None
        if not await self._has_gone_back(lease, lease.content, SnapshotKind.LEAF):
            lease.end_pending_save()
            self.leases.dispatch()
            return None
        content, keep = lease.content, _planned(lease)
        if lease.is_own:  # otherwise idle saves would evict each other's snapshots again and again
            keep = lease.table.backing(besides=lease.slot)
        n_held = await self._n_held(lease, content)
        commit = await self._write(lease, content, n_held, keep, SnapshotKind.LEAF, must_give_way)
        lease.end_pending_save()
        self.leases.dispatch()
        return commit

    def _has_ended(self, lease: Lease, content: Content, snapshot: WithTokens | None) -> None:
        """After the commit of ``content``: mark the slot, and delete the older snapshot that ``snapshot``
        supersedes."""
        table = lease.table
        old = table.snapshot(content.snapshot) if content.snapshot else None
        self._mark(lease, content, snapshot)
        if snapshot is None or old is None or self.catalog is None:
            return
        if supersedes(snapshot, old, table.settings.similarity_min):
            self.catalog.inherit(snapshot.id, old.id)
            self.tasks.spawn(self.catalog.drop(old.id), f"drop superseded {old.id}")

    def _mark(self, lease: Lease, content: Content, snapshot: WithTokens | None) -> None:
        """Record in the slot's present content that ``content`` is saved as ``snapshot``, or could not be saved
        (None). If the slot may hold another conversation by now, nothing is recorded: the next save of that
        conversation would delete a snapshot that is not its own."""
        table, slot = lease.table, lease.slot
        if slot is None:
            return
        holder = next((its for its in self.leases.leases if its.slot is slot), None)
        held = holder.content if holder is not None else slot.content
        if held is None or held.namespace != content.namespace or not (holder is not None or slot.is_idle):
            return
        if held is content:
            after = replace(held, is_dirty=True)
            if snapshot is not None:
                after = replace(content_of(snapshot), checkpoints=content.checkpoints)
        elif (
            snapshot is not None
            and held.snapshot == content.snapshot
            and goes_on(held, snapshot, holder, table.settings.similarity_min)
        ):
            after = replace(held, snapshot=snapshot.id)
        else:
            return
        if holder is not None:
            holder.set_content(after)
        elif after.tokens == held.tokens:
            slot.content = after
            table.worth.holds(slot)

    async def keep(self, lease: Lease, n_tokens: int) -> bool:
        """Save the slot's content, the first ``n_tokens`` of the request, as a shared-prefix snapshot. The slot then
        goes on, and its content counts as unsaved as before. Returns False if the save failed. Raises SlotWedged as
        ``save`` does."""
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
            commit = await self._write(lease, lease.content, n_tokens, _planned(lease), SnapshotKind.TRUNK)
            is_kept = commit is not None
            return is_kept
        finally:  # no await since the content became a snapshot or a pending save
            if not is_kept:
                lease.stop_keeping()
            lease.table.end_expected_trunks(lease.slot_id, n_tokens)
            self.leases.dispatch()

    async def settle(self) -> None:
        """Wait for the commits in the background. Canceling is safe."""
        while self._commits:
            await asyncio.wait(self._commits)

    async def _write(
        self,
        lease: Lease,
        content: Content,
        n_held: int,
        keep: set[str],
        kind: SnapshotKind,
        must_give_way: Callable[[], bool] = never,
    ) -> asyncio.Task[WithTokens | None] | None:
        """Reserve room, have llama-server save the slot, check the file, and begin its commit. Returns the task of the
        commit, or None if that failed, which is logged."""
        assert self.catalog is not None
        began = self.now()
        try:
            size_bytes = self.rates.size_bytes(n_held)
            base = _base(lease.table, content, content.tokens)
            new_bytes = size_bytes - (self.rates.size_bytes(base.n_shared) if base is not None else 0)
            reservation = await self.catalog.reserve(
                size_bytes, keep, self.leases.snapshots_in_demand(), max(new_bytes, 0),
                may_wait=lambda: not must_give_way(),
            )  # fmt: skip
        except (QuotaExceeded, SnapshotInvalid) as error:
            self._not_saved(lease, kind, error)
            return None
        asked_at = started = self.now()
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
        except (LlamaslotError, OSError) as error:
            await self._abandon(lease, kind, reservation, error, self.now() - started)
            return None
        file = _File(lease, content, kind, reservation, result, started)
        commit = self.tasks.spawn(self._commit(file), f"{lease.request.id} takes {reservation.id} in")
        ends: list[asyncio.Future[Any]] = [commit, file.is_checked]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if commit.done() and commit.result() is None:
            return None
        # llama-server's own time, without the wait for a batch of other requests: a prefill would wait for it too.
        save_s, waited_s = result.seconds or seconds, started - asked_at
        self.rates.save.observe(result.n_bytes, save_s)
        if lease.plan is not None and kind is SnapshotKind.LEAF:
            # Without the wait for other saves: if this delay makes saves expensive, there are few of them.
            self.rates.save_delay.observe(max(self.now() - began - waited_s - save_s, 0.0))
        self.rates.size.observe(result.n_tokens, result.n_bytes)
        self.metrics.saved(result.n_bytes, seconds)
        act = Act(
            _step(kind), seconds, is_done=True, n_tokens=result.n_tokens, size_bytes=result.n_bytes,
            snapshot=reservation.id, waited_s=waited_s,
        )  # fmt: skip
        lease.recorder.record_step(lease.slot_key, act)
        if not commit.done():
            await self._leave_to_itself(file, commit)
        return commit

    async def _leave_to_itself(self, file: _File, commit: asyncio.Task[WithTokens | None]) -> None:
        """Let ``commit`` go on in the background, as a pending save. While too many commits run, wait for one
        of them."""
        lease, content = file.lease, file.content
        if file.kind is SnapshotKind.LEAF:
            content = replace(content, tokens=file.is_checked.result(), is_exact=True, n_more=0)
            if lease.is_own:  # so that it is not saved again
                content = replace(content, is_dirty=False)
            lease.set_content(content)
            file.content = content
        until = self.now() + self.rates.save.seconds(file.result.n_bytes)
        file.pending = lease.table.model_snapshots.pending.add(content, until, lease.table.backend)
        self._commits.add(commit)
        commit.add_done_callback(self._commits.discard)
        n_slots = 0 if file.reservation.has_landed else len(lease.table.slots)
        while len(self._commits) > max(_MAX_COMMITS, n_slots):
            await asyncio.wait(self._commits, return_when=asyncio.FIRST_COMPLETED)

    async def _commit(self, file: _File) -> WithTokens | None:
        """Make the written file a snapshot, and add it to the index. Returns None if that failed, which is logged."""
        assert self.catalog is not None
        lease, content, kind, snapshot = file.lease, file.content, file.kind, None
        used_at = lease.slot.used_at if lease.slot is not None and kind is SnapshotKind.LEAF else file.started
        try:
            saved = SavedSlot(
                tokens_expected=content.tokens,
                n_saved=file.result.n_tokens,
                n_written=file.result.n_bytes,
                fingerprint=lease.table.fingerprint,
                checkpoints=lease.table.rewind_model.in_file(content.checkpoints),
                source=lease.request.id,
                kind=kind,
                is_prewarmed=kind is SnapshotKind.TRUNK and lease.request.is_prewarm,
                namespace=content.namespace.text,
                idle_s=max(file.started - used_at, 0.0),
                find_base=partial(_base, lease.table, content),
                marks=(*content.checkpoints, *lease.request.boundaries, lease.request.n_system),
                on_checked=file.is_checked.set_result,
                turn=self._turns if kind is SnapshotKind.LEAF else contextlib.nullcontext(),
            )
            snapshot = await self.catalog.commit(file.reservation, saved)
        except (LlamaslotError, OSError) as error:
            await self._abandon(lease, kind, file.reservation, error, self.now() - file.started)
        else:
            self._failures.succeeded()
            self._add(file, snapshot)
        finally:  # no await since it became a snapshot
            if file.pending is not None:
                lease.table.model_snapshots.pending.end(file.pending)
        if kind is SnapshotKind.LEAF:
            self._has_ended(lease, file.content, snapshot)
        self.leases.dispatch()
        return snapshot

    def _add(self, file: _File, snapshot: WithTokens) -> None:
        assert self.catalog is not None
        lease = file.lease
        if file.kind is SnapshotKind.TRUNK:
            log.info(
                "%s: shared-prefix snapshot of %d tokens saved as %s",
                lease.request.id, snapshot.n_tokens, snapshot.id,
            )  # fmt: skip
        if snapshot.id in self.catalog.snapshots:
            table, current = lease.table, self.leases.table
            table.add_snapshot(snapshot)
            if current not in (None, table) and current.fingerprint == table.fingerprint:
                current.add_snapshot(snapshot)  # llama-server has restarted meanwhile, and can restore it too

    async def _abandon(
        self, lease: Lease, kind: SnapshotKind, reservation: Reservation, error: Exception, seconds: float
    ) -> None:
        assert self.catalog is not None
        await self.catalog.abandon(reservation, is_refused=isinstance(error, SlotActionFailed))
        if isinstance(error, OtherConversation):
            lease.set_content(None)  # other errors, such as a full disk, tell nothing about the slot
        self._not_saved(lease, kind, error, seconds)

    def _not_saved(self, lease: Lease, kind: SnapshotKind, error: Exception, seconds: float = 0.0) -> None:
        lease.recorder.record_step(lease.slot_key, Act(_step(kind), seconds, is_done=False))
        if not isinstance(error, NoLanding):  # the landing place has logged why
            self.say_failed(lease, error, "slot" if kind is SnapshotKind.LEAF else "shared prefix in slot")

    def say_failed(self, lease: Lease, error: Exception, what: str = "slot") -> None:
        """Log why the slot of ``lease`` was not saved. The same reason is logged again only after a while."""
        text = "%s: %s %s could not be saved to disk: %s"
        self._failures.failed(error, text, lease.request.id, what, lease.slot_name, error)

    @staticmethod
    def _must_go_back(rewind_model: RewindModel, content: Content) -> bool:
        """True if the slot must be rewound to the end of its prompt before it is saved, because its file would be
        useless otherwise. There are two cases:

        1. A recurrent model, and a build that keeps no checkpoints in files: the next prompt has the answer tokenized
           differently, and could reuse nothing. The rewind computes the tokens since the slot's last checkpoint. If
           that is not near, it is not done, because it would compute the whole prompt.
        2. A sliding window, after a prefill that was stopped on the way: it has left no checkpoint, and without one
           nothing of the file can be reused (2,560 tokens: 0 reused; rewound by one token: 2,559)."""
        is_near = content.n_tokens - max(content.checkpoints, default=0) <= NEGLIGIBLE_TOKENS
        if rewind_model.is_rewound:
            return is_near and not content.is_exact
        return rewind_model.cache_kind is CacheKind.SWA and content.is_exact and not is_near

    async def _has_gone_back(self, lease: Lease, content: Content, kind: SnapshotKind) -> bool:
        """Rewind the slot if its file would be useless otherwise. Returns False if that failed: then the content is
        unknown, and the slot is abandoned when released, because llama-server may be working in it. Raises SlotWedged
        if llama-server sent nothing."""
        if self._must_go_back(lease.table.rewind_model, content):
            try:
                await self._rewind(lease, content)
            except LlamaslotError as error:
                lease.lose_track()
                self._not_saved(lease, kind, error)
                if not isinstance(error, SlotWedged):
                    return False
                # Of a client's request it is counted where the client gets the error.
                if lease.plan is None:
                    self.metrics.wedged.inc()
                raise
        return True

    async def _rewind(self, lease: Lease, content: Content) -> None:
        """Rewind the slot to the end of its prompt. Raises LlamaslotError; then the slot's content is unknown."""
        lease.check_current()
        n_reused = 0
        async with contextlib.aclosing(
            self.api.prefill(lease.slot_id, content.tokens, content.namespace.lora)
        ) as events:
            async for event in events:
                n_reused = event.cache
        after = prefilled(content, content.tokens, n_reused)
        # If so few tokens are computed, llama-server creates the checkpoint at their beginning (measured).
        lease.set_content(replace(after, checkpoints=(*after.checkpoints, n_reused)))

    async def _n_held(self, lease: Lease, content: Content) -> int:
        """Return the number of tokens that the file will have, so that room is reserved for the answer's tokens too."""
        if content.is_exact or content.n_more:
            return content.n_held
        try:
            infos = await self.api.slots()
        except LlamaslotError:
            return content.n_held
        return max(content.n_tokens, *(info.n_tokens or 0 for info in infos if info.id == lease.slot_id))


def _base(table: SlotTable, content: Content, tokens: bytes) -> Base | None:
    """Return the snapshot that shares most with ``tokens``, saved from a slot that held ``content``. Among equals it
    is the slot's own snapshot. None without any."""
    library = table.model_snapshots
    hits = library.in_namespaces.match(tokens, (content.namespace,), _N_NEAREST)
    best = [hit for hit in hits if hit.n_shared == hits[0].n_shared]
    hit = next((hit for hit in best if hit.holder == content.snapshot), best[0] if best else None)
    snapshot = library.snapshots.get(hit.holder) if hit is not None else None
    if hit is None or snapshot is None:
        return None
    return Base(snapshot, hit.n_shared, is_lineage=snapshot.id == content.snapshot)


def _step(kind: SnapshotKind) -> str:
    """Return the name of a save in the journal."""
    return "keep" if kind is SnapshotKind.TRUNK else "save"


def _planned(lease: Lease) -> set[str]:
    """Return the snapshot that the lease's own plan resumes from. The save must not evict it."""
    return {lease.plan.snapshot} if lease.plan is not None and lease.plan.snapshot else set()
