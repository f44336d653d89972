"""Tells the catalog which snapshots were used again, and which were abandoned after an edit."""

from __future__ import annotations

from llamaslot.backend.candidates import MIN_WORTH_TOKENS
from llamaslot.backend.lease import Lease
from llamaslot.backend.slot_table import SlotTable
from llamaslot.cache.content import SnapshotKind
from llamaslot.cache.ids import common
from llamaslot.cache.namespaces import Namespace
from llamaslot.scheduling.plan import Source
from llamaslot.store import Catalog, Snapshot, WithTokens

_N_NEAREST = 8  # snapshots that one is compared with, the longest common prefixes first


def record_hit(catalog: Catalog, lease: Lease) -> None:
    """A request has its slot: the snapshot that stands behind what it goes on from was asked for, although it needs no
    restore. A restore is a hit of its own, when it has succeeded."""
    plan, content, request = lease.plan, lease.content, lease.request
    if plan is None or content is None or content.snapshot is None or request.no_cache:
        return
    snapshot = lease.pool.model_snapshots.snapshots.get(content.snapshot)
    if plan.source is not Source.RESIDENT or snapshot is None:
        return
    if plan.n_reused >= lease.pool.rules.similarity_min * snapshot.n_tokens:
        catalog.touch(snapshot.id)


def abandoned_by(pool: SlotTable, new: WithTokens) -> str | None:
    """The snapshot of the same conversation from which ``new`` parts well before its end, to go on alone.

    As a rule an earlier message was edited. Many conversations begin alike, so only what the new one shares
    with this one, and with no other, tells that it is the same. Not before it is saved: until then the other one is all
    that it can be restored from.
    """
    nearest: Snapshot | None = None
    n_parted = n_common = 0
    for hit in pool.model_snapshots.in_spaces.match(new.tokens, (Namespace.of_text(new.space),), _N_NEAREST):
        snapshot = pool.model_snapshots.snapshots.get(hit.holder)
        if snapshot is None or snapshot.id == new.id:
            continue
        if nearest is not None:
            n_common = max(n_common, hit.n_shared)
            break
        if snapshot.kind is not SnapshotKind.LEAF:
            n_common = max(n_common, hit.n_shared)
        elif hit.n_shared >= pool.rules.similarity_min * hit.n_tokens:
            return None  # the new one goes on from there, or it is the same again
        else:
            nearest, n_parted = snapshot, hit.n_shared
    is_own = 0 < n_common <= n_parted - MIN_WORTH_TOKENS
    goes_on = new.n_tokens >= n_parted + MIN_WORTH_TOKENS
    return nearest.id if nearest is not None and is_own and goes_on else None


def supersedes(new: WithTokens, old: WithTokens, similarity_min: float) -> bool:
    """Whether ``new`` makes ``old``, from the same conversation, needless: never a trunk, nor one that is pinned.

    Not a strict prefix only: the answer in ``old`` comes back re-tokenized, so the two part somewhere inside it.
    """
    if old.kind is not SnapshotKind.LEAF or old.is_pinned or new.n_tokens < old.n_tokens:
        return False
    return common(new.tokens, old.tokens) >= similarity_min * old.n_tokens
