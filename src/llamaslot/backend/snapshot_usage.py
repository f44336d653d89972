"""Tells the catalog which snapshots were hit, and which were abandoned after an edit."""

from __future__ import annotations

from llamaslot.backend.lease import Lease
from llamaslot.backend.slot_table import SlotTable
from llamaslot.cache.content import SnapshotKind
from llamaslot.cache.ids import NEGLIGIBLE_TOKENS, common
from llamaslot.cache.namespaces import Namespace
from llamaslot.scheduling.plan import Source
from llamaslot.store import Catalog, Snapshot, WithTokens

_N_NEAREST = 8  # snapshots compared with one, the longest common prefixes first


def record_hit(catalog: Catalog, lease: Lease) -> None:
    """A request has its slot: record a hit of the snapshot of the content that it resumes from, although it needs no
    restore. A restore is recorded as a hit when it has succeeded.
    """
    plan, content, request = lease.plan, lease.content, lease.request
    if plan is None or content is None or content.snapshot is None or request.no_cache:
        return
    snapshot = lease.table.model_snapshots.snapshots.get(content.snapshot)
    if plan.source is not Source.RESIDENT or snapshot is None:
        return
    if plan.n_reused >= lease.table.rules.similarity_min * snapshot.n_tokens:
        catalog.touch(snapshot.id)


def abandoned_by(table: SlotTable, new: WithTokens) -> str | None:
    """The snapshot of the same conversation from which ``new`` diverges well before its end; None if there is none.

    Usually an earlier message was edited. Many conversations have the same beginning, so only tokens that the new one
    shares with this snapshot, and with no other, show that it is the same. Called after the save: until then it can
    only be restored from the other one.
    """
    nearest: Snapshot | None = None
    n_parted = n_common = 0
    for hit in table.model_snapshots.in_namespaces.match(
        new.tokens, (Namespace.of_text(new.namespace),), _N_NEAREST
    ):
        snapshot = table.model_snapshots.snapshots.get(hit.holder)
        if snapshot is None or snapshot.id == new.id:
            continue
        if nearest is not None:
            n_common = max(n_common, hit.n_shared)
            break
        if snapshot.kind is not SnapshotKind.LEAF:
            n_common = max(n_common, hit.n_shared)
        elif hit.n_shared >= table.rules.similarity_min * hit.n_tokens:
            return None  # the new one continues it, or is the same again
        else:
            nearest, n_parted = snapshot, hit.n_shared
    is_own = 0 < n_common <= n_parted - NEGLIGIBLE_TOKENS
    goes_on = new.n_tokens >= n_parted + NEGLIGIBLE_TOKENS
    return nearest.id if nearest is not None and is_own and goes_on else None


def supersedes(new: WithTokens, old: WithTokens, similarity_min: float) -> bool:
    """Whether ``new`` makes ``old``, of the same conversation, unnecessary: never a shared prefix, nor a pinned one.

    Not only if ``old`` is a strict prefix: the answer in ``old`` comes back re-tokenized, so the two diverge
    somewhere inside it.
    """
    if old.kind is not SnapshotKind.LEAF or old.is_pinned or new.n_tokens < old.n_tokens:
        return False
    return common(new.tokens, old.tokens) >= similarity_min * old.n_tokens
