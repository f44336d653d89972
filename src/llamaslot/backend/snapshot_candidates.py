"""Finds the snapshots that a request may resume from: those on disk, and those that are being saved."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial

from llamaslot.cache.content import SnapshotKind
from llamaslot.cache.ids import MIN_SHARED_TOKENS, NEGLIGIBLE_TOKENS, common, count, head
from llamaslot.cache.joined_index import Joined
from llamaslot.cache.namespaces import InNamespaces, Namespace
from llamaslot.cache.prefix_index import Shared
from llamaslot.cache.reuse import RewindModel
from llamaslot.scheduling.placement import SnapshotView
from llamaslot.scheduling.rates import Rates
from llamaslot.scheduling.request import Request
from llamaslot.store.model_snapshots import ModelSnapshots, PendingSave

N_CANDIDATES = 16  # a placement considers so many snapshots, those with the longest common prefixes
N_COVERING = 4  # so many holders are asked how much of a slot's content they have too


def branch_of(others: Iterable[tuple[int, Callable[[], bytes]]]) -> int:
    """Return how many tokens a prompt shares with two other conversations; 0 if a shared-prefix snapshot would not be
    worth it there.

    ``others``: for each holder that begins like the prompt, the number of tokens that both share, and a function that
    returns all tokens of the holder. The prompt's own conversation, a holder that is a prefix of the prompt, does not
    count. Holders that share further tokens behind the prompt's divergence count as one conversation, for example a
    slot and its snapshot. A prefix shared with only one other conversation may be chance, such as the same first word
    of two questions.
    """
    first: bytes | None = None
    for n_shared, tokens in sorted(others, key=lambda other: -other[0]):
        if n_shared < MIN_SHARED_TOKENS:
            return 0
        held = tokens()
        if count(held) <= n_shared + NEGLIGIBLE_TOKENS:
            continue
        if first is None:
            first = held
        elif common(first, held) <= n_shared + NEGLIGIBLE_TOKENS:
            return n_shared
    return 0


class SnapshotCandidates:
    """Finds snapshots that a request may resume from. ``rewind_model`` knows how much of each snapshot the model can
    reuse.
    """

    def __init__(
        self, backend: str, library: ModelSnapshots, rates: Rates, rewind_model: RewindModel
    ) -> None:
        self._rates, self._rewind_model = rates, rewind_model
        self._library, self._snapshots, self._pending = library, library.snapshots, library.pending
        kept = library.index, library.pending.index
        self._kept = InNamespaces(Joined(*kept), self._namespace_of)
        to_come = library.pending.trunk_index(backend)
        self._index = InNamespaces(Joined(*kept, to_come), self._namespace_of)

    @property
    def _is_empty(self) -> bool:
        """True if there are no snapshots and no pending saves. Then searches are skipped: each takes 10 us, and each
        request needs several.
        """
        return not (self._snapshots or len(self._pending))

    def _namespace_of(self, holder: str) -> Namespace:
        is_passing = self._pending.get(holder) is not None
        return self._pending.namespace_of(holder) if is_passing else self._library.namespace_of(holder)

    def found(self, request: Request, now: float) -> list[Shared[str]]:
        """Return the snapshots with the longest common prefix with ``request``. The first one is the longest snapshot
        that is a whole prefix of the request, if there is one: it is cheap to restore, and would be missing if many
        other snapshots share a few tokens more. Snapshots that are set aside for now are left out.
        """
        if request.no_cache or not request.tokens or self._is_empty:
            return []
        # Where reuse depends on a checkpoint, the longest common prefix is not always the most useful.
        found = self._candidates(
            self._index,
            request.tokens,
            request.reads,
            N_CANDIDATES if self._rewind_model.is_rewindable else 4 * N_CANDIDATES,
        )
        aside = self._library.set_aside
        return [hit for hit in found if aside.get(hit.holder, now) <= now] if aside else found

    @staticmethod
    def _candidates(
        index: InNamespaces[str], tokens: bytes, namespaces: Collection[Namespace], n: int
    ) -> list[Shared[str]]:
        found = index.match(tokens, namespaces, n)
        whole = index.longest_full_prefix(tokens, namespaces)
        return found if whole is None else [whole, *(hit for hit in found if hit != whole)]

    def best_snapshot(self, request: Request) -> str | None:
        """Return the snapshot that ``request`` would resume from if it got a slot now; None if there is none, or the
        request needs less than half of it.
        """
        found = (
            []
            if request.no_cache or not request.tokens
            else self._candidates(self._index, request.tokens, request.reads, 2)
        )
        best = max(self.views(found, request.n_tokens, 0.0), key=lambda view: view.n_usable, default=None)
        snapshot = self._snapshots.get(best.id) if best is not None else None
        is_needed = best is not None and snapshot is not None and 2 * best.n_usable >= snapshot.n_tokens
        return snapshot.id if snapshot is not None and is_needed else None

    def views(self, found: Iterable[Shared[str]], n_prompt: int, now: float) -> list[SnapshotView]:
        """Return those snapshots in ``found`` that are worth restoring for a prompt of ``n_prompt`` tokens."""
        views = []
        for hit in found:
            n_usable = self._usable(hit, n_prompt)
            if n_usable >= NEGLIGIBLE_TOKENS:
                if (leaving := self._pending.get(hit.holder)) is not None:
                    wait_s, restore_s = self._wait_s(leaving, now), self._rates.restore_s(hit.n_tokens)
                else:
                    wait_s = 0.0
                    restore_s = self._rates.restore.seconds(self._restored_bytes(hit))
                views.append(SnapshotView(hit.holder, n_usable, restore_s, wait_s))
        return views[:1] + sorted(views[1:], key=lambda view: -view.n_usable)[:N_CANDIDATES]

    def _restored_bytes(self, hit: Shared[str]) -> int:
        """Return the bytes that a restore reads: those of the shared tokens, or the whole file if the model cannot
        rewind and the snapshot is one file.
        """
        snapshot = self._snapshots[hit.holder]
        can_cut = snapshot.parts or self._rewind_model.is_rewindable
        return snapshot.restored_bytes(hit.n_shared if can_cut else None)

    def _wait_s(self, leaving: PendingSave, now: float) -> float:
        """Return the seconds that waiting for the pending save ``leaving`` costs.

        If its shared prefix is still being computed, only the save counts. There is one prefill at a time, so no other
        request could compute the prefix sooner.
        """
        if leaving.slot is not None:
            return self._rates.save_s(leaving.content.n_tokens)
        return max(leaving.until - now, 0.001)

    def _usable(self, hit: Shared[str], n_prompt: int) -> int:
        """Return how many tokens of a prompt of ``n_prompt`` tokens need not be computed after the snapshot of ``hit``
        was restored.
        """
        if (leaving := self._pending.get(hit.holder)) is not None:
            is_end_known = leaving.content.is_exact or self._rewind_model.is_rewound
            n_held = hit.n_tokens if is_end_known else None
            checkpoints = leaving.content.checkpoints
        else:
            snapshot = self._snapshots[hit.holder]
            checkpoints, n_held = snapshot.checkpoints, hit.n_tokens
        return self._rewind_model.usable(
            hit.n_shared, n_held, self._rewind_model.in_file(checkpoints), n_prompt
        )

    def on_disk(self, tokens: bytes, namespace: Namespace) -> int:
        """Return how many of ``tokens`` need not be computed if a snapshot is restored. A shared prefix that is still
        to be computed does not count, because the request that computes it may leave.
        """
        if self._is_empty:
            return 0
        if self._rewind_model.is_rewindable:
            return self._kept.cover(tokens, namespace)
        hits = self._candidates(self._kept, tokens, (namespace,), N_COVERING)
        return max((self._usable(hit, count(tokens) + 1) for hit in hits), default=0)

    def is_worth_sharing(self, request: Request, n_tokens: int, n_reused: int) -> bool:
        """True if a prefill of ``request`` should save its first ``n_tokens`` on its way, as a shared-prefix snapshot:
        they are not on disk, and computing them costs more than saving and restoring them. ``n_reused``: the tokens
        that the request itself reuses.
        """
        n_most = request.n_tokens - NEGLIGIBLE_TOKENS
        if request.no_cache or request.is_prewarm or not MIN_SHARED_TOKENS <= n_tokens < n_most:
            return False
        cost_s = self._rates.save_s(n_tokens) + self._rates.restore_s(n_tokens)
        if self._rates.prefill.seconds(n_reused, n_tokens) <= cost_s:
            return False
        n_there = self.on_disk(head(request.tokens, n_tokens), request.namespace)
        return n_there < n_tokens - NEGLIGIBLE_TOKENS

    def branch(
        self, residents: Iterable[tuple[int, Callable[[], bytes]]], found: Iterable[Shared[str]]
    ) -> int:
        """Return how many tokens a prompt shares with two other conversations. ``residents``: slots, as in
        ``branch_of``. ``found``: snapshots that begin like the prompt.
        """
        on_disk = ((hit.n_shared, partial(self._index.tokens, hit.holder)) for hit in found)
        return branch_of([*residents, *on_disk])

    def trunk(self, found: Iterable[Shared[str]]) -> int:
        """Return the length in tokens of the longest shared prefix in ``found``, saved or still to be computed, with
        which a prompt begins; 0 without one.
        """
        whole = (hit for hit in found if hit.n_shared == hit.n_tokens)
        return max((hit.n_tokens for hit in whole if self._is_trunk(hit.holder)), default=0)

    def _is_trunk(self, holder: str) -> bool:
        if (leaving := self._pending.get(holder)) is not None:
            return leaving.slot is not None
        return self._snapshots[holder].kind is SnapshotKind.TRUNK
