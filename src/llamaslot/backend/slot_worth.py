"""The value of the content of idle slots, so that a request takes the slot whose loss costs least, and the decision
when to save a slot.

A save costs its time once. Unsaved content costs its prefill each time its user returns. As in the ski-rental problem,
a slot is saved as soon as computing what the disk lacks takes as long as the save. A context that grows by ``c``
seconds of prefill a turn and takes ``s`` seconds to save is saved every ``s / c`` turns, and no turn costs more than a
save.

A request that waits for a save also waits for a running batch before it. This wait is divided by the number of slots,
because computing tokens again delays the requests in all slots. Measured with 24 users on three servers of 4 slots,
contexts of 2,200 tokens, five turns, two runs each in turns. Follow-ups reuse so much of what an unlimited cache
gives:

    whole wait counted     0.978 and 0.981, at 15.9 and 15.8 requests/s
    divided by four        0.999 and 1.000, at 12.6 and 15.2 requests/s
    not counted            1.000 in both,   at 16.0 and 13.5 requests/s

Simulated with 60 users on 4 slots for a day: with saves at 1 GB/s, one after every answer writes twice as many bytes
and makes all requests wait a sixth longer, and 0.7 M tokens are computed again in place of 3.7. At 8 GB/s, into memory,
this rule saves 99.6 % of what a save after every answer does, and computes as little again. At 1 GB/s, if a save counts
1.5 times, a fifth less is written and requests wait 2 % longer; if it counts twice, a third less and 6 %. Not saving
contexts that are worth less than the snapshots evicted for them recomputes more tokens, and writes no less.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

from llamaslot.backend.snapshot_candidates import N_COVERING, SnapshotCandidates
from llamaslot.cache.content import Content
from llamaslot.cache.ids import NEGLIGIBLE_TOKENS, count
from llamaslot.cache.namespaces import InNamespaces, marker
from llamaslot.cache.prefix_index import Near, PrefixIndex
from llamaslot.cache.reuse import RewindModel
from llamaslot.scheduling.placement import TIE_S, Ranked, ranked, return_likelihood, worth_a_look
from llamaslot.scheduling.rates import Rates, are_close
from llamaslot.scheduling.settings import SchedulingSettings
from llamaslot.scheduling.slots import Slot, SlotKey
from llamaslot.store.model_snapshots import ModelSnapshots

_FEW_SLOTS = 8  # a placement considers all of so many slots
# A request waits for the save of a small content only if computing that again takes so many times the wait. Titles and
# completions of code hardly ever come back, and a save takes as long again in the background. Eight small requests at
# once on four slots took 1.35 times as long as on llama-server alone in place of 1.6.
_SMALL_DELAYS = 4
_RANKED_S = 1.0  # a rank is valid for so long: ``return_likelihood`` changes by a twentieth of a percent


class Worth(NamedTuple):
    """The value of an idle slot's ``content``. ``save_s``: the seconds of a save, 0 if a save is not worth it.
    ``eviction_cost_s``: the seconds that the loss costs its user, as if the slot was used just now. ``is_large``: the
    loss costs a user a large context.
    """

    content: Content
    is_worth_saving: bool
    save_s: float
    eviction_cost_s: float
    is_large: bool


class SlotWorth:
    """The value of the idle slots of one table. ``can_save``: slots are saved and restored.

    The value of a slot is kept until its content, other copies of this content, or speeds and sizes change. So a
    placement reads a few numbers for each slot, which takes 0.1 ms for 256 slots. Computing all values takes 2 ms.
    """

    def __init__(
        self, slots: list[Slot], settings: SchedulingSettings, rates: Rates, rewind_model: RewindModel
    ) -> None:
        self.slots, self.settings, self.rates, self.rewind_model = slots, settings, rates, rewind_model
        self.can_save = False
        self.on_change: list[Callable[[], None]] = []  # called when a slot becomes idle or is taken
        self._worths: dict[int, Worth] = {}  # of idle slots, as last computed
        self._outdated = {slot.id for slot in slots}
        # Idle slots by their tokens.
        self._index: PrefixIndex[int] = PrefixIndex(on_cover=self._outdated.add)
        self._idle = InNamespaces(self._index, lambda slot: slots[slot].content.namespace)
        self._on_disk: dict[int, tuple[Content, tuple[int, int], int]] = {}
        # The state for which the worths were computed: can_save, and the numbers of changes of both snapshot indexes.
        self._basis: tuple[bool, int, int] | None = None
        self._figures: tuple[float, ...] = ()
        # Idle slots by the cost of their loss, ascending; by whether they have a large context. See ``_rank``.
        self._ranks: dict[bool, list[Ranked]] = {False: [], True: []}
        self._rank_of: dict[int, tuple[bool, Ranked]] = {}
        self._unranked = set[int]()
        self._ranked_at = 0.0

    def use_snapshots(self, library: ModelSnapshots, candidates: SnapshotCandidates) -> None:
        """From now on use the snapshots in ``library``."""
        self.model_snapshots, self._pending, self._candidates = library, library.pending, candidates
        self._on_disk.clear()
        self._basis = None

    def holds(self, slot: Slot) -> None:
        """Record that ``slot`` is idle, and that its content may have changed."""
        if slot.content.tokens:
            self._index.insert(slot.id, marker(slot.content.namespace) + slot.content.tokens)
        else:
            self._index.drop(slot.id)
        self._outdated.add(slot.id)
        for call in self.on_change:
            call()

    def lost(self, slot: Slot) -> None:
        """Record that ``slot`` is no longer idle. Idempotent."""
        self._index.drop(slot.id)
        self._worths.pop(slot.id, None)
        self._outdated.discard(slot.id)
        self._drop_rank(slot.id)
        for call in self.on_change:
            call()

    def of(self, slot: Slot) -> Worth:
        """Return the value of an idle slot. While its content is the same, this is the value at the last call of
        ``looked_at``.
        """
        worth = self._worths.get(slot.id)
        return worth if worth is not None and worth.content is slot.content else self._compute(slot)

    def looked_at(self, match: Near[int], now: float, reserved: Mapping[SlotKey, float]) -> Collection[Slot]:
        """Return the slots that a placement must consider: up to ``_FEW_SLOTS`` all slots. Of more slots those that
        the prompt may resume from, and of the others those whose loss costs least.
        """
        self._refresh()
        if len(self.slots) <= _FEW_SLOTS or not self.rewind_model.is_rewindable:
            return self.slots
        similarity_min, hits = self.settings.similarity_min, match.hits
        near = {slot for slot, n_shared, n_tokens in hits if n_shared >= similarity_min * n_tokens}
        near.update(hit.holder for hit in hits[:1])
        besides = near.union(key.id for key in reserved if key.backend == self.slots[0].backend)
        most_shared = next((n_shared for slot, n_shared, _ in hits if slot not in near), match.n_rest)
        self._rank(now)
        for ranks in self._ranks.values():
            near.update(worth_a_look(ranks, match.n_shared, most_shared, besides))
        return [self.slots[slot] for slot in sorted(near)]

    def cheapest(self, now: float) -> dict[bool, tuple[float, float]]:
        """Find the idle slots whose loss costs least: one without a large context (key False) and one with such a
        context (True). Returns, for those that there are, the seconds of that loss and the time when the slot was last
        used. Where another slot or a snapshot has the same content, that may have changed since the cost was computed.
        """
        self._refresh()
        if len(self.slots) > _FEW_SLOTS and self.rewind_model.is_rewindable:
            self._rank(now)
            return {
                is_large: (ranks[0][0] * TIE_S, ranks[0][1])
                for is_large, ranks in self._ranks.items()
                if ranks
            }
        found = dict[bool, tuple[float, float]]()
        for slot in self.slots:
            if slot.is_idle:
                worth = self.of(slot)
                offer = self._loss_s(worth, slot, now), slot.used_at
                found[worth.is_large] = min(found.get(worth.is_large, offer), offer)
        return found

    @staticmethod
    def _loss_s(worth: Worth, slot: Slot, now: float) -> float:
        return worth.save_s + worth.eviction_cost_s * return_likelihood(now - slot.used_at)

    def _rank(self, now: float) -> None:
        """Sort the slots by the cost of their loss, if the present order is not valid any more. The costs fall with
        time, for all slots by about the same part within a second.
        """
        if not 0 <= now - self._ranked_at <= _RANKED_S:
            self._ranked_at = now
            self._unranked.update(self._worths)
        for id_ in self._unranked:
            self._drop_rank(id_)
            if (worth := self._worths.get(id_)) is not None:
                slot = self.slots[id_]
                rank = ranked(self._loss_s(worth, slot, now), slot.used_at, id_)
                self._rank_of[id_] = worth.is_large, rank
                insort(self._ranks[worth.is_large], rank)
        self._unranked.clear()

    def _drop_rank(self, slot: int) -> None:
        if (known := self._rank_of.pop(slot, None)) is not None:
            is_large, rank = known
            del self._ranks[is_large][bisect_left(self._ranks[is_large], rank)]

    def _refresh(self) -> None:
        """Compute the value of those slots again whose content, copies or speeds have changed."""
        before, basis = self._basis, (self.can_save, self.model_snapshots.changes.n, self._pending.changes.n)
        figures = self.rates.figures()
        changed = None
        if before is not None and before[0] == basis[0] and are_close(figures, self._figures):
            saved, pending = (
                self.model_snapshots.changes.since(before[1]),
                self._pending.changes.since(before[2]),
            )
            changed = [*saved, *pending] if saved is not None and pending is not None else None
        else:
            self._figures = figures
        self._basis = basis
        if changed is None:
            self._outdated.update(slot.id for slot in self.slots if slot.is_idle)
        for tokens in changed or ():
            self._outdated.update(self._sharing(tokens))
        if self.rewind_model.is_rewindable:  # else ``of`` computes each anew: it depends on many others
            for id_ in self._outdated:
                self._worths[id_] = self._compute(self.slots[id_])
            self._unranked |= self._outdated
            self._outdated.clear()

    def _sharing(self, tokens: bytes) -> Iterator[int]:
        """Yield the idle slots whose value a snapshot with ``tokens`` may change: they share more than a negligible
        part with it, and at least as much as with any other snapshot.
        """
        for hit in self._index.hits(tokens):
            if hit.n_shared < NEGLIGIBLE_TOKENS:
                return
            n_mark = count(marker(self.slots[hit.holder].content.namespace))
            known = self._on_disk.get(hit.holder)
            if known is None or hit.n_shared - n_mark >= known[2]:
                yield hit.holder

    def _compute(self, slot: Slot) -> Worth:
        content, delay_s = slot.content, self.rates.save_delay.seconds
        is_small = content.n_tokens < self.settings.small_prompt_tokens
        is_worth = self.is_worth_saving(slot, delay_s * (_SMALL_DELAYS if is_small else 1 / len(self.slots)))
        save_s = self.rates.save_s(content.n_held) + delay_s if is_worth else 0.0
        cost_s = self.eviction_cost_s(slot, is_worth)
        is_large = cost_s > 0 and content.n_tokens >= self.settings.small_prompt_tokens
        return Worth(content, is_worth, save_s, cost_s, is_large)

    def covered(self, slot: Slot) -> int:
        """Return how many of an idle slot's tokens, of which it has some, could also be reused from another idle slot
        or a snapshot.
        """
        tokens, namespace = slot.content.tokens, slot.content.namespace
        on_disk = self.on_disk(slot) if self.can_save else 0
        if self.rewind_model.is_rewindable:
            n_covered = self._index.shared_with_others(slot.id) - count(marker(namespace))
            return max(n_covered, on_disk)
        hits = [hit for hit in self._idle.match(tokens, (namespace,), N_COVERING) if hit.holder != slot.id]
        n_prompt = slot.content.n_tokens + 1
        found = (
            self.rewind_model.of_slot(self.slots[hit.holder].content, hit.n_shared, n_prompt) for hit in hits
        )
        return max([on_disk, *found])

    def on_disk(self, slot: Slot) -> int:
        """Return how many of the slot's tokens could be reused from a snapshot."""
        content, n_changes = slot.content, (self.model_snapshots.changes.n, self._pending.changes.n)
        known = self._on_disk.get(slot.id)
        if (
            known is not None
            and known[0] is content
            and known[1] == n_changes
            and self.rewind_model.is_rewindable
        ):
            return known[2]
        n_tokens = self._candidates.on_disk(content.tokens, content.namespace)
        self._on_disk[slot.id] = content, n_changes, n_tokens
        return n_tokens

    def is_worth_saving(self, slot: Slot, delay_s: float = 0.0) -> bool:
        """True if saving this slot costs less than computing again what the disk lacks, including the answer if the
        file will contain it. ``delay_s``: the seconds that a request waits for the save besides the save itself.
        """
        content = slot.content
        if not (self.can_save and content.is_dirty) or content.n_tokens < NEGLIGIBLE_TOKENS:
            return False
        n_covered = self.on_disk(slot)
        n_saved = content.n_tokens if self.rewind_model.is_rewound else content.n_held
        lacking_s = self.rates.prefill.seconds(n_covered, n_saved)
        return lacking_s > self.rates.save_s(n_saved) + delay_s

    def eviction_cost_s(self, slot: Slot, is_saved: bool) -> float:
        """Return the seconds that the user of the slot's content loses with its next request if the slot no longer has
        the content. ``is_saved``: it is saved first.
        """
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
        """Raise AssertionError naming the first invariant that does not hold, of the values, their order or
        the index.
        """
        self._index.check()
        idle = {slot.id for slot in self.slots if slot.is_idle}
        if self.rewind_model.is_rewindable:
            assert self._worths.keys() | self._outdated == idle, "each idle slot has its worth"
        for is_large, ranks in self._ranks.items():
            expected = sorted(rank for kind, rank in self._rank_of.values() if kind is is_large)
            assert ranks == expected, "ranks ascend"
        assert self._rank_of.keys() <= idle, "idle slots are ranked"
        for slot in self.slots:
            held = slot.content.tokens if slot.is_idle else b""
            assert (slot.id in self._index) == bool(held), f"idle slots are known: {slot}"
            if held:
                assert self._idle.tokens(slot.id) == held, f"by what they hold: {slot}"
