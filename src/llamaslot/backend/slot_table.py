"""The content of one running llama-server: its slots, the snapshots that it can restore, and the cost of losing
either.

Bookkeeping only, without an await. A slot table lives as long as its llama-server process. After a restart there is a
new one, and leases of the old one change only the old one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import takewhile

from msgspec import Struct
from msgspec.structs import replace

from llamaslot.backend.assist import LostSlots
from llamaslot.backend.slot_worth import SlotWorth
from llamaslot.backend.snapshot_candidates import SnapshotCandidates
from llamaslot.cache.content import NOTHING, Content, SnapshotKind
from llamaslot.cache.ids import MIN_SHARED_TOKENS, NEGLIGIBLE_TOKENS, common, count, head
from llamaslot.cache.namespaces import InNamespaces, Namespace, marker
from llamaslot.cache.prefix_index import PrefixIndex
from llamaslot.cache.reuse import CacheKind, RewindModel, checkpoints_after
from llamaslot.scheduling.placement import BackendView, SlotView, is_other_conversation, return_likelihood
from llamaslot.scheduling.plan import Plan, PrefillTo, Save
from llamaslot.scheduling.rates import AnswerLength, Rates
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.settings import SchedulingSettings
from llamaslot.scheduling.slots import Slot, SlotEvent, SlotKey, SlotState
from llamaslot.scheduling.snapshot_value import SnapshotStats
from llamaslot.store import Snapshot, WithTokens
from llamaslot.store.model_snapshots import ModelSnapshots, PendingSave

ABANDONED_S = 0.4  # usual time until llama-server notices that a client has left


class SlotForecast(Struct):
    """When a leased slot will be idle, and what it will hold. ``ready_at``: when its steps are over. ``has_answer``:
    an answer follows the steps, of at most ``max_tokens`` (None: unknown). ``will_hold``: the slot's future tokens, in
    ``namespace``."""

    ready_at: float
    has_answer: bool
    will_hold: bytes
    namespace: Namespace
    max_tokens: int | None = None
    is_at_work: bool = False  # the slot is abandoned, and ``/slots`` has shown that llama-server works in it

    def wait_s(self, now: float, answers: AnswerLength, *, is_abandoned: bool) -> float:
        wait_s = max(self.ready_at - now, ABANDONED_S if is_abandoned else 0.0)
        if self.has_answer:
            wait_s += answers.seconds_left(max(now - self.ready_at, 0.0), self.max_tokens)
        return wait_s


class SlotTable:
    """The slots of one llama-server process, and the snapshots that it can restore. Only for use in the event loop."""

    is_assisted = True  # llamaslot chooses slots

    def __init__(
        self, backend: str, n_slots: int, n_ctx: int, *, settings: SchedulingSettings, rates: Rates
    ) -> None:
        self.backend, self.n_ctx, self.settings, self.rates = backend, n_ctx, settings, rates
        self.fingerprint = self.boot_id = ""  # of its model, and of its process
        self.can_erase = False
        self.rewind_model = RewindModel(returned=rates.returned)
        # True if the GGUF tells it too. A probe alone may be too short to leave a sliding window.
        self.is_cache_kind_sure = False
        self.slots = [Slot(backend, i) for i in range(n_slots)]
        self.is_current = True
        self.lost_slots = LostSlots()
        self.n_batch = 0  # prompt tokens that llama-server computes at once; 0 until a prefill has shown it
        self._index: PrefixIndex[int] = PrefixIndex()
        self.residents = InNamespaces(self._index, self.namespace_of)
        self.worth = SlotWorth(self.slots, settings, rates, self.rewind_model)
        self.use_snapshots(ModelSnapshots())
        self._busy: dict[int, SlotForecast] = {}
        # Called with the tokens that a slot holds or will hold, behind the mark of their namespace.
        self.on_content: Callable[[Slot, bytes], None] | None = None

    def use_snapshots(self, library: ModelSnapshots) -> None:
        """Use the snapshots in ``library``, which the slot tables of earlier and later processes share."""
        self._snapshots, self._snapshot_index = library.snapshots, library.in_namespaces
        self.model_snapshots, self._pending = library, library.pending
        self._candidates = SnapshotCandidates(self.backend, library, self.rates, self.rewind_model)
        self.worth.use_snapshots(library, self._candidates)

    @property
    def can_save(self) -> bool:
        """True if slots are saved and restored."""
        return self.worth.can_save

    @can_save.setter
    def can_save(self, can_save: bool) -> None:
        self.worth.can_save = can_save

    @property
    def cache_kind(self) -> CacheKind:
        return self.rewind_model.cache_kind

    @cache_kind.setter
    def cache_kind(self, cache_kind: CacheKind) -> None:
        self.rewind_model.cache_kind = cache_kind

    # -- questions -----------------------------------------------------------------------------------------------

    @property
    def long_s(self) -> float:
        """The seconds of prefill above which a prompt is long: it is computed ahead of its request, in turns with
        others."""
        return self.settings.long_s(self.rates.request_s)

    def view(
        self, request: Request, now: float, reserved: Mapping[SlotKey, float], *, is_patient: bool = True
    ) -> BackendView:
        """Return this backend as ``request`` sees it. Changes nothing. If not ``is_patient``, shared prefixes that are
        still being computed are left out. Of many slots, those that ``place`` would never choose are left out."""
        least = min(request.n_system or NEGLIGIBLE_TOKENS, NEGLIGIBLE_TOKENS)
        near = self.residents.near(request.tokens, request.reads, least, self.settings.similarity_min)
        found = self._candidates.found(request, now) if self.can_save else []
        if not is_patient:
            found = [hit for hit in found if self.expected_trunk(hit.holder) is None]
        long = takewhile(lambda hit: hit.n_shared >= MIN_SHARED_TOKENS, near.hits)
        residents = [(hit.n_shared, partial(self.residents.tokens, hit.holder)) for hit in long]
        branch = self._candidates.branch(residents, found)
        n_alike = max(branch, request.n_system, self._candidates.trunk(found))
        looked_at = self.worth.looked_at(near, now, reserved)
        slots = list[SlotView]()
        for slot in looked_at:
            n_shared, busy = near.n_shared(slot.id), self._busy.get(slot.id)
            # ``place`` chooses a busy slot only to continue it.
            if busy is None or 0 < n_shared >= self.settings.similarity_min * count(busy.will_hold):
                slots.append(self._slot_view(slot, n_shared, request, now))
        return BackendView(
            slots=tuple(
                slot._replace(is_other_conversation=True) if is_other_conversation(slot, n_alike) else slot
                for slot in slots
            ),
            snapshots=tuple(self._candidates.views(found, request.n_tokens, now)),
            prefill_s=self.rates.prefill.seconds,
            reserved=reserved,
            can_erase=self.can_erase,
            request_s=self.rates.request_s,
            shared={hit.holder: hit.n_shared for hit in near.hits},
            branch=branch,
        )

    def _slot_view(self, slot: Slot, n_shared: int, request: Request, now: float) -> SlotView:
        content = slot.content
        if slot.is_idle:
            n_usable = self.rewind_model.likely_of_slot(content, n_shared, request.n_tokens)
            worth = self.worth.of(slot)
            cost_s = worth.eviction_cost_s
            if cost_s:
                cost_s *= return_likelihood(now - slot.used_at)
            return SlotView(
                slot.key, slot.state, content.n_tokens, n_shared, n_usable, worth.save_s,
                worth.is_worth_saving, cost_s, 0.0, slot.used_at, False, not request.may_use(content),
            )  # fmt: skip
        busy = self._busy[slot.id]
        n_held = count(busy.will_hold)
        # Not with checkpoints: those of the running prompt do not exist yet. This is an estimate.
        n_usable = min(n_shared, request.n_tokens - 1) if request.n_tokens else 0
        return SlotView(
            key=slot.key,
            state=slot.state,
            n_tokens=n_held,
            n_shared=n_shared,
            n_usable=n_usable,
            wait_s=busy.wait_s(now, self.rates.answer, is_abandoned=slot.state is SlotState.ABANDONED),
            used_at=slot.used_at,
        )

    def missing_s(self, request: Request) -> float:
        """Return the estimated seconds of computing the request's prompt behind its longest cached prefix."""
        held = self.residents.match(request.tokens, request.reads, 1) if not request.no_cache else []
        n_held = held[0].n_shared if held else 0
        is_kept = self.can_save and not request.no_cache
        n_saved = self._candidates.on_disk(request.tokens, request.namespace) if is_kept else 0
        return self.rates.prefill.seconds(min(max(n_held, n_saved), request.n_tokens), request.n_tokens)

    def save_s(self, content: Content) -> float:
        return self.rates.save_s(content.n_held)

    def saves_s(self, stats: SnapshotStats) -> float:
        """Return the seconds that each hit of the snapshot with these ``stats`` saves on this backend."""
        return stats.saves_s(self.rates.prefill.seconds, self.rates.restore.seconds)

    # -- snapshots -----------------------------------------------------------------------------------------------

    def add_snapshot(self, snapshot: WithTokens) -> None:
        """Add a snapshot to the index. Idempotent."""
        self.model_snapshots.add(snapshot)

    def drop_snapshot(self, snapshot_id: str) -> None:
        """Remove a snapshot from the index. Slots whose content was saved as this snapshot are dirty again.
        Idempotent."""
        self.model_snapshots.drop(snapshot_id)
        for slot in self.slots:
            if slot.content.snapshot == snapshot_id:
                slot.content = replace(slot.content, snapshot=None, is_dirty=True)

    def keep_only(self, snapshots: Mapping[str, Snapshot]) -> None:
        """Remove all snapshots from the index that are not among ``snapshots``, the existing ones."""
        held = {slot.content.snapshot for slot in self.slots if slot.content.snapshot is not None}
        for snapshot_id in (self._snapshots.keys() | held) - snapshots.keys():
            self.drop_snapshot(snapshot_id)

    def snapshot(self, snapshot_id: str) -> WithTokens | None:
        """Return the snapshot with its tokens, None if unknown. Reading 60,000 tokens from the index takes a
        millisecond."""
        if (snapshot := self._snapshots.get(snapshot_id)) is None:
            return None
        return snapshot.with_tokens(self._snapshot_index.tokens(snapshot_id))

    def has_snapshot(self, snapshot_id: str) -> bool:
        return snapshot_id in self._snapshots

    def competing_slots(self, request: Request, own: int) -> list[Slot]:
        """Return the slots that llama-server, which knows no namespaces, may choose for ``request`` instead of slot
        ``own``, which has all tokens of the request but the last."""
        n = max(request.n_tokens - 1, 1)
        return [slot for slot in self.slots if slot.id != own and self._may_hold(slot, request, n)]

    def _may_hold(self, slot: Slot, request: Request, n: int) -> bool:
        """True if the slot has or will have the first ``n`` tokens of ``request``, or may have them: its content is
        unknown, or it is another namespace's and its end is unknown."""
        busy = self._busy.get(slot.id)
        known = busy.will_hold if busy else slot.content.tokens
        n_shared = common(known, request.tokens)
        if slot.state is SlotState.SUSPECT or n_shared >= n:
            return True
        may_go_on = n_shared == count(known) and (busy is not None or slot.content.may_hold(n))
        return may_go_on and self.is_other_namespace(slot, request)

    def is_other_namespace(self, slot: Slot, request: Request) -> bool:
        """True if ``request`` must not use the slot's present or future content. Unknown content counts as in the
        shared namespace."""
        return self.namespace_of(slot.id) not in request.reads

    def best_snapshot(self, request: Request) -> str | None:
        return self._candidates.best_snapshot(request) if self.can_save else None

    def prewarmed(self) -> list[Snapshot]:
        """The snapshots that are pinned because ``prewarm`` names them, or named them before a reload or restart."""
        return [snapshot for snapshot in self._snapshots.values() if snapshot.is_prewarmed]

    def kind_changed(self, snapshot: Snapshot) -> None:
        """Record that ``snapshot`` is of another kind now. Slots that have continued it hold conversations of their
        own."""
        if snapshot.id in self._snapshots:
            self._snapshots[snapshot.id] = snapshot
            for slot in self.slots:
                if slot.content.snapshot == snapshot.id and slot.content.is_dirty:
                    slot.content = replace(slot.content, snapshot=None)

    def _is_trunk(self, snapshot_id: str) -> bool:
        snapshot = self._snapshots.get(snapshot_id)
        return snapshot is not None and snapshot.kind is SnapshotKind.TRUNK

    def backing(self, besides: Slot | None) -> set[str]:
        """Return the snapshots of the contents of all slots but ``besides``. If one is evicted, its slot is dirty
        again."""
        kept = (slot.content.snapshot for slot in self.slots if slot is not besides)
        return {snapshot for snapshot in kept if snapshot is not None}

    @property
    def n_idle(self) -> int:
        return len(self.slots) - len(self._busy)

    def filled(self) -> list[Slot]:
        """Return the idle slots that hold tokens, or may hold some."""
        return [slot for slot in self.slots if slot.is_idle and slot.state is not SlotState.FREE]

    # -- leases --------------------------------------------------------------------------------------------------

    def take(self, slot: Slot, request: Request, now: float, plan: Plan | None = None) -> PendingSave | None:
        """Lease ``slot`` to ``request``. With a ``plan`` the slot counts from now on as holding the prompt of the
        request, whose answer follows the steps. Content that the plan saves first is pending at once: other requests
        for it wait for the commit instead of computing it. Returns that pending save, None without one."""
        old = slot.content
        steps_s = plan.cost.steps_s if plan else self.save_s(old)
        leaving = None
        if plan is not None and any(isinstance(step, Save) for step in plan.steps):
            leaving = self._pending.add(old, now + self.save_s(old), self.backend)
        if plan is not None and self.can_save and any(isinstance(step, PrefillTo) for step in plan.steps):
            self._share(request, plan, now)
        slot.become(SlotEvent.LEASE)
        slot.leased_by = request.id
        will_hold, namespace = (
            (request.tokens, request.namespace) if plan is not None else (old.tokens, old.namespace)
        )
        ready_at, max_tokens = now + steps_s, request.max_tokens
        self._busy[slot.id] = SlotForecast(ready_at, plan is not None, will_hold, namespace, max_tokens)
        self._index_content(slot, will_hold, namespace)
        self.worth.lost(slot)
        return leaving

    def end_pending_save(self, leaving: PendingSave) -> None:
        """Record that the save of ``leaving`` has ended, successful or not. Idempotent."""
        self._pending.end(leaving)

    def _share(self, request: Request, plan: Plan, now: float) -> None:
        """Have shared-prefix snapshots saved while ``request`` is prefilled: of its system part, and of what it shares
        with two other conversations. This is done where a later request with the same beginning would have to compute
        it again: if the model cannot rewind, because after ten turns without a pause the slot has no checkpoint there;
        else only if another slot, which is busy, has the same beginning."""
        branch, n_done = plan.branch, plan.n_reused
        is_new = abs(branch - request.n_system) > NEGLIGIBLE_TOKENS
        for n in sorted({request.n_system, branch}) if is_new else (request.n_system,):
            is_elsewhere = any(
                n_shared >= n and slot != plan.slot.id for slot, n_shared in plan.shared.items()
            )
            is_at_risk = is_elsewhere or not self.rewind_model.is_rewindable
            if is_at_risk and self._candidates.is_worth_sharing(request, n, n_done):
                self.expect_trunk(
                    request, n, plan.slot.id, now + self.rates.prefill.seconds(plan.n_reused, n)
                )
                n_done = n

    def expect_trunk(self, request: Request, n_tokens: int, slot: int, due_at: float) -> None:
        """Announce that ``request`` will save its first ``n_tokens`` as a shared prefix while it is computed in
        ``slot``, at about ``due_at``. Other requests can wait for it from now on."""
        checkpoints = checkpoints_after((), 0, [n_tokens])
        trunk = Content(head(request.tokens, n_tokens), checkpoints=checkpoints, namespace=request.namespace)
        self._pending.add(trunk, due_at, self.backend, self.slots[slot].key)

    def end_expected_trunks(self, slot: int, upto: int | None = None) -> bool:
        """End the waits for shared prefixes from ``slot`` that have up to ``upto`` tokens (None: any number), because
        they are saved or will not be. Returns True if there were any. Idempotent."""
        trunks = self._pending.trunks_of(self.slots[slot].key)
        ended = [end for end in trunks if upto is None or end.content.n_tokens <= upto]
        for trunk in ended:
            self._pending.end(trunk)
        return bool(ended)

    def expected_trunks(self, slot: int) -> list[int]:
        """Return the token counts at which the prefill in ``slot`` will save a shared prefix, ascending."""
        return sorted(trunk.content.n_tokens for trunk in self._pending.trunks_of(self.slots[slot].key))

    def users_awaiting(self, slot: int) -> set[str]:
        """Return the users whose requests wait for a shared prefix from ``slot``."""
        return {user for trunk in self._pending.trunks_of(self.slots[slot].key) for user in trunk.users}

    def expected_trunk(self, holder: str | None) -> PendingSave | None:
        """Return the pending save of the shared prefix ``holder`` if it is still to be computed, else None."""
        entry = self._pending.get(holder) if holder is not None else None
        return entry if entry is not None and entry.slot is not None else None

    def begin_answer(self, slot: Slot, now: float) -> None:
        """Record that the steps in ``slot`` are over, so the answer begins."""
        if (busy := self._busy.get(slot.id)) is not None:
            busy.ready_at = now

    def set_ready_in(self, slot: int, seconds: float, now: float) -> None:
        """Record that the steps in ``slot`` are expected to take ``seconds`` more."""
        if slot in self._busy:
            self._busy[slot].ready_at = now + seconds

    def seen_at_work(self, slot: Slot) -> None:
        """Record that llama-server still works on the request in ``slot``, although its client has left."""
        if (busy := self._busy.get(slot.id)) is not None:
            busy.is_at_work = True

    @property
    def is_anything_on_its_way(self) -> bool:
        """True if llama-server may yet begin with a request of a departed client."""
        return any(s.state is SlotState.ABANDONED and not self._busy[s.id].is_at_work for s in self.slots)

    def expect_unknown_content(self, slot: Slot, namespace: Namespace) -> None:
        """Record that a leased slot will hold unknown content, computed in ``namespace``. No request waits for it
        then."""
        if (busy := self._busy.get(slot.id)) is not None:
            busy.will_hold, busy.namespace = b"", namespace
            self._index_content(slot, b"", busy.namespace)

    def give_back(self, slot: Slot, event: SlotEvent, content: Content, now: float) -> None:
        """End a lease of ``slot``, or the time in which it was abandoned. The slot holds ``content`` now."""
        self.end_expected_trunks(slot.id)
        if event is SlotEvent.KEEP and content.n_tokens == 0:
            event = SlotEvent.EMPTY
        if content.snapshot is not None and content.snapshot not in self._snapshots:
            content = replace(content, snapshot=None, is_dirty=True)  # dropped while the slot was leased
        elif content.snapshot is not None and content.is_dirty and self._is_trunk(content.snapshot):
            content = replace(content, snapshot=None)  # a separate conversation continues it
        slot.become(event, content)
        expected = self._busy[slot.id]
        if event is SlotEvent.LEAVE:
            self._busy[slot.id] = SlotForecast(now, False, content.tokens, content.namespace)
        else:
            self._busy.pop(slot.id, None)
            slot.leased_by = None
            slot.used_at = now
        content = slot.content  # if it is as expected, it is in the index already
        if content.tokens != expected.will_hold or content.namespace != expected.namespace:
            self._index_content(slot, content.tokens, content.namespace)
        if slot.is_idle:
            self.worth.holds(slot)

    def _index_content(self, slot: Slot, tokens: bytes, namespace: Namespace) -> None:
        if marked := marker(namespace) + tokens if tokens else b"":
            self._index.insert(slot.id, marked)
        else:
            self._index.drop(slot.id)
        if self.on_content is not None:
            self.on_content(slot, marked)

    def namespace_of(self, slot: int) -> Namespace:
        busy = self._busy.get(slot)
        return self.slots[slot].content.namespace if busy is None else busy.namespace

    # -- invariants ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise AssertionError naming the first invariant that does not hold, of slots, their worth, indexes or
        snapshots.
        """
        self._index.check()
        self.worth.check()
        self._pending.check()
        for slot in self.slots:
            is_busy = slot.id in self._busy
            assert is_busy == (not slot.is_idle), f"a slot is busy exactly while it is not idle: {slot}"
            assert (slot.leased_by is None) == slot.is_idle, f"a leased slot has an owner: {slot}"
            held = self._busy[slot.id].will_hold if is_busy else slot.content.tokens
            assert (slot.id in self._index) == bool(held), f"a slot is indexed by what it holds: {slot}"
            if held:
                assert self.residents.tokens(slot.id) == held, f"the index holds what the slot holds: {slot}"
            if slot.state is SlotState.FREE:
                assert slot.content == NOTHING, f"a free slot holds nothing: {slot}"
            if slot.content.snapshot is not None:
                assert slot.content.snapshot in self._snapshots, f"a slot's snapshot exists: {slot}"
            is_trunk = slot.content.snapshot is not None and self._is_trunk(slot.content.snapshot)
            assert not (is_trunk and slot.content.is_dirty), f"no conversation is that of a trunk: {slot}"
        self.model_snapshots.check()
