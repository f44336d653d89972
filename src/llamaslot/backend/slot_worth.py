"""The value of the content of idle slots, so that a request takes the slot whose loss costs least."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from llamaslot.backend.candidates import N_COVERING, SnapshotCandidates
from llamaslot.backend.pending import PendingSnapshots
from llamaslot.cache.content import Content
from llamaslot.cache.ids import NEGLIGIBLE_TOKENS, count
from llamaslot.cache.namespaces import InNamespaces, mark
from llamaslot.cache.prefix_index import PrefixIndex, Shared
from llamaslot.cache.reuse import RewindModel
from llamaslot.scheduling.cost import Rates
from llamaslot.scheduling.placement import Rules, Stranger, weight, worth_a_look
from llamaslot.scheduling.save_policy import Unsaved, is_worth
from llamaslot.scheduling.slots import Slot, SlotKey
from llamaslot.store.model_snapshots import ModelSnapshots

_FEW_SLOTS = 8  # up to this number all are considered
# The inputs of a slot's worth: its content, what others have of that, speeds, and whether slots are saved.
_Worn = tuple[Content, int, int, tuple[int, ...], bool]


class _Worth(NamedTuple):
    """``eviction_cost_s``: for a slot that was used just now."""

    n_tokens: int
    is_worth_saving: bool
    save_s: float
    eviction_cost_s: float


class SlotWorth:
    """The idle slots of one slot table. ``can_save``: slots are saved and restored."""

    def __init__(self, slots: list[Slot], rules: Rules, rates: Rates, rewind_model: RewindModel) -> None:
        self.slots, self.rules, self.rates, self.rewind_model = slots, rules, rates, rewind_model
        self.can_save = False
        self._index: PrefixIndex[int] = PrefixIndex()  # by their tokens; busy ones are not in it
        self._idle = InNamespaces(self._index, lambda slot: slots[slot].content.space)
        self._on_disk: dict[int, tuple[Content, tuple[int, int], int]] = {}
        self._worths: dict[int, tuple[_Worn, _Worth]] = {}

    def offer(self, library: ModelSnapshots, pending: PendingSnapshots, offers: SnapshotCandidates) -> None:
        """Use the snapshots in ``library``."""
        self.model_snapshots, self._pending, self._candidates = library, pending, offers
        self._on_disk.clear()

    def holds(self, slot: Slot) -> None:
        """``slot`` is idle, with its present content."""
        if slot.content.tokens:
            self._index.insert(slot.id, mark(slot.content.space) + slot.content.tokens)
        else:
            self._index.drop(slot.id)

    def lost(self, slot: Slot) -> None:
        """``slot`` is no longer idle. Idempotent."""
        self._index.drop(slot.id)

    def looked_at(
        self,
        hits: list[Shared[int]],
        now: float,
        reserved: Mapping[SlotKey, float],
    ) -> Collection[Slot]:
        """The slots to consider: all, or of many those that the prompt may resume from, and of the others those of
        least loss.
        """
        if len(self.slots) <= _FEW_SLOTS or not self.rewind_model.is_rewindable:
            return self.slots
        shared = {hit.holder: hit.n_shared for hit in hits}
        near = {hit.holder for hit in hits if hit.n_shared >= self._similar(hit.n_tokens)}
        near |= {hit.holder for hit in hits[:1]}
        about, small = self.rates.about(), self.rules.small_prompt_tokens
        strangers = list[Stranger]()
        for slot in self.slots:
            if slot.is_idle and slot.id not in near and not (reserved and slot.key in reserved):
                worth = self._worth(slot, about)
                loss_s = worth.save_s + worth.eviction_cost_s * weight(now - slot.used_at)
                is_loss = worth.eviction_cost_s > 0 and worth.n_tokens >= small
                n_shared = shared.get(slot.id, 0)
                strangers.append(Stranger(slot.id, loss_s, slot.used_at, n_shared, is_loss))
        return [self.slots[slot] for slot in sorted(near | worth_a_look(strangers))]

    def _similar(self, n_tokens: int) -> float:
        """The number of tokens that a prompt must reuse of a slot with ``n_tokens`` to resume there."""
        return self.rules.similarity_min * n_tokens

    def _worth(self, slot: Slot, about: tuple[int, ...]) -> _Worth:
        """The worth of an idle slot's content directly after its use. ``about``: speeds and sizes; the result is
        reused while these and the copies of the content elsewhere stay the same.
        """
        content, n_covered = slot.content, self.covered(slot)
        worn = content, n_covered, self.can_save and self.on_disk(slot), about, self.can_save
        known = self._worths.get(slot.id)
        if known is not None and known[0][0] is content and known[0][1:] == worn[1:]:
            return known[1]
        delay_s = self.rates.save_delay.seconds
        is_worth = self.is_worth_saving(slot, delay_s)
        save_s = self.rates.save_s(content.n_held) + delay_s if is_worth else 0.0
        worth = _Worth(content.n_tokens, is_worth, save_s, self.eviction_cost_s(slot, is_worth))
        self._worths[slot.id] = worn, worth
        return worth

    def covered(self, slot: Slot) -> int:
        """The number of the slot's tokens that are also in another idle slot or a snapshot."""
        tokens, space = slot.content.tokens, slot.content.space
        on_disk = self.on_disk(slot) if self.can_save else 0
        if self.rewind_model.is_rewindable:
            if slot.id in self._index:
                n_covered = self._index.shared_with_others(slot.id) - count(mark(space))
            else:
                n_covered = self._index.cover(mark(space) + tokens) - count(mark(space)) if tokens else 0
            return max(n_covered, on_disk)
        hits = [hit for hit in self._idle.match(tokens, (space,), N_COVERING) if hit.holder != slot.id]
        n_prompt = slot.content.n_tokens + 1
        found = (
            self.rewind_model.of_slot(self.slots[hit.holder].content, hit.n_shared, n_prompt) for hit in hits
        )
        return max([on_disk, *found])

    def on_disk(self, slot: Slot) -> int:
        """The number of the slot's tokens that a snapshot makes reusable."""
        content, n_changes = slot.content, (self.model_snapshots.n_changes, self._pending.n_changes)
        known = self._on_disk.get(slot.id)
        if (
            known is not None
            and known[0] is content
            and known[1] == n_changes
            and self.rewind_model.is_rewindable
        ):
            return known[2]
        n_tokens = self._candidates.on_disk(content.tokens, content.space)
        self._on_disk[slot.id] = content, n_changes, n_tokens
        return n_tokens

    def is_worth_saving(self, slot: Slot, delay_s: float = 0.0) -> bool:
        """Whether saving this slot's content is worth it, the answer included if that goes into the file.
        ``delay_s``: the additional cost for a request that waits for the save.
        """
        content = slot.content
        if not (self.can_save and content.is_dirty) or content.n_tokens < NEGLIGIBLE_TOKENS:
            return False
        n_covered = self.on_disk(slot)
        n_saved = content.n_tokens if self.rewind_model.is_rewound else content.n_held
        lacking_s = self.rates.prefill.seconds(n_covered, n_saved)
        return is_worth(Unsaved(lacking_s, self.rates.save_s(n_saved) + delay_s))

    def eviction_cost_s(self, slot: Slot, is_saved: bool) -> float:
        """The seconds that the owner of the slot's content loses if it is gone at its next request."""
        n = slot.content.n_tokens
        if n == 0:
            return 0.0
        n_covered = self.covered(slot)
        recompute_s = self.rates.prefill.seconds(min(n_covered, n), n)
        if is_saved or (self.can_save and n_covered >= n):
            whole_s = self.rates.prefill.seconds(0, n)
            return min(self.rates.restore_s(n), whole_s)
        return recompute_s

    def check(self) -> None:
        """Raise AssertionError naming the invariant that does not hold."""
        self._index.check()
        for slot in self.slots:
            held = slot.content.tokens if slot.is_idle else b""
            assert (slot.id in self._index) == bool(held), f"idle slots are known: {slot}"
            if held:
                assert self._idle.tokens(slot.id) == held, f"by what they hold: {slot}"
