"""The snapshots of one directory, in memory: usage, pins, the files that each needs, and which are evicted next.
Touches no files and never awaits. Times come in as arguments, in seconds of any one clock.

Who does what in an eviction:

1. ``Quota`` decides *when*, and how much: before a reservation that does not fit. ``Catalog`` does so at the start and
   after a change of limits (``_beyond_limits``).
2. ``scheduling/snapshot_value.py`` ranks by value. ``_rank`` puts snapshots of models that no backend serves before all
   others.
3. ``victims`` chooses in that order, and passes over what *must stay now*: snapshots that are pinned (``_is_held``),
   and those in ``keep``. These are ids that the save names, and, as long as others are enough, ``spare``: the snapshots
   that queued requests need (``Catalog.reserve``).
4. ``Catalog._drop`` unlists the victims. ``Quota.remove`` unlinks those of their files that no other snapshot needs.
5. In a shared store, ``shared_store.Neighbours`` also evicts snapshots of other llamaslots, by last use, not by value.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager

from msgspec.structs import replace

from llamaslot.cache.content import SnapshotKind
from llamaslot.scheduling.priority_heap import Rank, Ranking
from llamaslot.scheduling.snapshot_value import ByValue, Order, SnapshotStats
from llamaslot.store.learned import NEVER, Hits
from llamaslot.store.sidecar import EXT, KV, Snapshot


class SharedFiles:
    """The files of all snapshots. ``sizes``: bytes by file name; ``size_bytes``: their sum; ``users``: by file name the
    snapshots that need the file, as a dict from id to the last token for which the snapshot needs it.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.users: dict[str, dict[str, int]] = {}
        self.size_bytes = 0

    def add(self, snapshot: Snapshot) -> set[str]:
        """Add the files of a snapshot. Returns the ids of the snapshots that alone needed one of these files until now:
        ``own_bytes`` of these is smaller now.
        """
        if not snapshot.parts and (name := snapshot.file_name) not in self.users:
            # Most snapshots are whole slot files: this takes a third of the time.
            self.users[name], self.sizes[name] = {snapshot.id: snapshot.n_tokens}, snapshot.size_bytes
            self.size_bytes += snapshot.size_bytes
            return set()
        touched, ends = set[str](), {part.file: part.end for part in snapshot.parts}
        for name, size_bytes in snapshot.files.items():
            users = self.users.setdefault(name, {})
            if len(users) == 1:
                touched |= users.keys()
            self.size_bytes += 0 if users else size_bytes
            users[snapshot.id] = ends.get(name, snapshot.n_tokens)
            self.sizes[name] = size_bytes
        return touched - {snapshot.id}

    def drop(self, snapshot: Snapshot) -> tuple[dict[str, int], set[str]]:
        """Remove a snapshot. Returns the files that no snapshot needs any more, with their bytes, and the ids of the
        snapshots that alone need one of the other files now: ``own_bytes`` of these is larger now.
        """
        freed, touched = dict[str, int](), set[str]()
        for name in snapshot.files:
            users = self.users[name]
            users.pop(snapshot.id, None)
            if not users:
                freed[name] = self.sizes.pop(name)
                self.size_bytes -= freed[name]
                del self.users[name]
            elif len(users) == 1:
                touched |= users.keys()
        return freed, touched

    def own_bytes(self, snapshot: Snapshot) -> int:
        """The bytes that would be free if this snapshot alone were dropped."""
        if not snapshot.parts:
            return snapshot.size_bytes if len(self.users[snapshot.file_name]) == 1 else 0
        return sum(self.sizes[name] for name in snapshot.files if len(self.users[name]) == 1)

    def share_bytes(self, snapshot: Snapshot) -> int:
        """The snapshot's share of the files that other snapshots need too: the bytes of each such file, divided by the
        number of snapshots that need it. ``own_bytes`` and ``share_bytes`` of all snapshots add up to ``size_bytes``.
        """
        users = ((name, len(self.users[name])) for name in snapshot.files)
        return round(sum(self.sizes[name] / n for name, n in users if n > 1))

    def n_covered(self, snapshot: Snapshot) -> int:
        """The number of the snapshot's first tokens that could still be reused if the snapshot was dropped: those whose
        rows another snapshot needs too; on a model with states, up to the last state that another snapshot needs too.
        0 for a shared-prefix snapshot: the snapshots that share its files are larger, and are evicted before it.
        """
        if snapshot.kind is SnapshotKind.TRUNK:
            return 0
        has_states = any(part.is_state for part in snapshot.parts)
        rows = [(part.file, part.start) for part in snapshot.parts if part.is_state is has_states]
        for name, start in reversed(rows or [(snapshot.id + KV, 0)]):
            users, n = self.users[name], 0
            own = users[snapshot.id]
            for id_, end in users.items():  # of thousands, nearly always the first ends the search
                if id_ != snapshot.id:
                    n = max(n, min(end, own))
                    if n == own:
                        return n
            if n > start:
                return n
        return 0

    def freed_bytes(self, snapshots: Iterable[Snapshot]) -> int:
        """The bytes that would be free if all these snapshots were dropped."""
        departure = Departure(self)
        return sum(departure.add(snapshot) for snapshot in snapshots)

    def ids(self) -> Iterator[str]:
        """The id in the name of each file; an id may occur twice."""
        return (name[: name.index(".")] for name in self.sizes)


class Departure:
    """Computes how many bytes would be freed by dropping snapshots one after the other. Drops none itself."""

    def __init__(self, files: SharedFiles) -> None:
        self._files = files
        self._n_gone: dict[str, int] = {}

    def add(self, snapshot: Snapshot) -> int:
        """Count this snapshot as dropped. Returns the bytes that its drop frees, after those added before."""
        freed_bytes = 0
        for name in snapshot.files:
            n_gone = self._n_gone[name] = self._n_gone.get(name, 0) + 1
            if n_gone == len(self._files.users[name]):
                freed_bytes += self._files.sizes[name]
        return freed_bytes

    def needed_for(self, snapshot: Snapshot) -> int:
        """The bytes that would not be freed if this snapshot, which was added before, stayed after all."""
        return sum(
            self._files.sizes[name]
            for name in snapshot.files
            if self._n_gone[name] == len(self._files.users[name])
        )

    def take_back(self, snapshot: Snapshot) -> None:
        """Undo ``add``: count ``snapshot`` as not dropped."""
        for name in snapshot.files:
            self._n_gone[name] -= 1


class Pin(AbstractContextManager[Snapshot]):
    """Protects a snapshot's files from removal, from the moment the pin is made until the context exits. Between the
    lookup of a snapshot and its pin there must be no await.

    A pin that is never released lasts as long as the process: garbage collection does not unpin.
    """

    def __init__(self, snapshot: Snapshot, unpin: Callable[[str], None]) -> None:
        self.snapshot = snapshot
        self._unpin: Callable[[str], None] | None = unpin

    def __enter__(self) -> Snapshot:
        return self.snapshot

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """End the protection. If the snapshot was dropped meanwhile, its files are removed now. Idempotent."""
        if (unpin := self._unpin) is not None:
            self._unpin = None
            unpin(self.snapshot.id)


class SnapshotTable:
    """The snapshots of one directory, in memory. Those in ``snapshots`` are listed: they can be found, pinned and
    restored. Those in ``pending_delete`` are dropped, but still pinned. All are by id.

    ``stats``: usage of the listed snapshots, by id. ``order`` ranks snapshots by value, and learns hit rates from those
    of the models that backends serve, which ``fingerprints`` name. ``files``: the files of all snapshots, until
    ``release``.
    """

    def __init__(self, order: Order | None = None) -> None:
        self.order: Order = ByValue() if order is None else order
        self.snapshots: dict[str, Snapshot] = {}
        self.stats: dict[str, SnapshotStats] = {}
        self.pending_delete: dict[str, Snapshot] = {}
        self.files = SharedFiles()
        self._fingerprints = frozenset[str]()
        self._pins: Counter[str] = Counter()
        self._ranking = Ranking(self._rank)
        self._now = 0.0

    def __len__(self) -> int:
        """The number of snapshots, those pending deletion included."""
        return len(self.snapshots) + len(self.pending_delete)

    @property
    def fingerprints(self) -> frozenset[str]:
        return self._fingerprints

    @fingerprints.setter
    def fingerprints(self, fingerprints: frozenset[str]) -> None:
        if fingerprints != self._fingerprints:
            self._fingerprints = fingerprints
            self._ranking.recompute_all()

    def add(
        self, snapshot: Snapshot, now: float, *, last_used: float | None = None, hits: Hits = NEVER
    ) -> None:
        """List a snapshot. ``last_used`` defaults to ``now``; no hit rate is learned from the time before ``now``."""
        self._now = now
        self.snapshots[snapshot.id] = snapshot
        last_used = now if last_used is None else last_used
        touched = self.files.add(snapshot)
        self.stats[snapshot.id] = SnapshotStats(
            snapshot.id, snapshot.n_tokens, self.files.own_bytes(snapshot), snapshot.kind, last_used, now,
            *hits, read_bytes=snapshot.restored_bytes(),
        )  # fmt: skip
        self._ranking.put(snapshot.id)
        self._weigh(touched)

    def add_many(
        self,
        snapshots: Iterable[Snapshot],
        last_used: Mapping[str, float],
        hits: Mapping[str, Hits],
        now: float,
    ) -> None:
        """List the snapshots of a whole directory. Ranking takes 20 us for each: ``rank_some`` does it in portions, or
        ``victims`` when it needs the order.
        """
        self._now, stats = now, self.stats
        listed = {snapshot.id: snapshot for snapshot in snapshots}
        self.snapshots |= listed
        for snapshot in listed.values():
            self.files.add(snapshot)
        for id_, snapshot in listed.items():
            stats[id_] = SnapshotStats(
                id_, snapshot.n_tokens, self.files.own_bytes(snapshot), snapshot.kind, last_used[id_], now,
                *hits.get(id_, NEVER), read_bytes=snapshot.restored_bytes(),
            )  # fmt: skip
        self._ranking.add_many(listed)

    def rank_some(self, n: int) -> bool:
        """Rank ``n`` of the snapshots that ``add_many`` has listed. Returns True if more of them are unranked."""
        return self._ranking.rank_some(n)

    def hit(self, id_: str, now: float) -> None:
        """Record that a request used a snapshot at the time ``now``. Raises KeyError for an unlisted id."""
        stats = self.stats[id_]
        if self._is_valid(id_):
            self.order.hit(stats, now)
        stats.n_hits += 1
        stats.is_branched = False
        stats.last_used = stats.counted_until = now
        self._rank_again(id_, now)

    def branch(self, id_: str, now: float) -> None:
        """Record that the snapshot's conversation went on from an earlier point, for instance after an edit, so a hit
        is unlikely. Raises KeyError for an unlisted id.
        """
        stats = self.stats[id_]
        if self._is_valid(id_):
            self.order.passed(stats, now)
        stats.is_branched = True
        self._rank_again(id_, now)

    def inherit(self, id_: str, from_id: str, now: float) -> None:
        """Add the hits of the snapshot ``from_id`` to those of ``id_``, which continues the same conversation."""
        self.stats[id_].n_hits += self.stats[from_id].n_hits
        self._rank_again(id_, now)

    def take(self, id_: str, now: float) -> bool:
        """Unlist a snapshot. True if the caller may call ``release`` and remove the files now. False if the snapshot is
        pinned: then ``unpin`` returns it at the last pin, and the files may be removed only after that.
        """
        if self._is_valid(id_):
            self.order.gone(self.stats[id_], now)
        snapshot = self.snapshots.pop(id_)
        del self.stats[id_]
        self._ranking.drop(id_)
        if self._pins[id_]:
            self.pending_delete[id_] = snapshot
            return False
        return True

    def release(self, snapshot: Snapshot) -> dict[str, int]:
        """Remove an unlisted snapshot from ``files``. Returns those of its files that no other snapshot needs, with
        their bytes: the caller removes them.
        """
        freed, touched = self.files.drop(snapshot)
        self._weigh(touched)
        return freed

    def checksum_of(self, name: str) -> int | None:
        """The checksum of the whole slot file ``name``; None if no snapshot that needs the file has recorded one."""
        for id_ in self.files.users.get(name, ()):
            snapshot = self.snapshots.get(id_) or self.pending_delete.get(id_)
            for part in snapshot.parts if snapshot is not None else ():
                if part.file == name and part.checksum is not None:
                    return part.checksum
        return None

    def _weigh(self, ids: Iterable[str]) -> None:
        """Update the size and rank of those snapshots in ``ids`` that are listed."""
        for id_ in ids:
            if (stats := self.stats.get(id_)) is not None:
                stats.size_bytes = self.files.own_bytes(self.snapshots[id_])
                self._ranking.put(id_)

    def change_kind(
        self, id_: str, kind: SnapshotKind, is_pinned: bool, is_prewarmed: bool = False
    ) -> Snapshot:
        """Change a snapshot's kind and pin. Raises KeyError for an unlisted id."""
        self.snapshots[id_] = replace(
            self.snapshots[id_], kind=kind, is_pinned=is_pinned, is_prewarmed=is_prewarmed
        )
        self.stats[id_].kind = kind
        self._ranking.put(id_)
        return self.snapshots[id_]

    def pin(self, id_: str) -> Snapshot:
        """Count one more pin of a snapshot, and return the snapshot. Raises KeyError for an unlisted id."""
        snapshot = self.snapshots[id_]
        self._pins[id_] += 1
        return snapshot

    def unpin(self, id_: str) -> Snapshot | None:
        """Count one pin less. Returns the snapshot if it is in ``pending_delete`` and this was its last pin: the caller
        removes its files now. Else None.
        """
        self._pins[id_] -= 1
        if self._pins[id_]:
            return None
        del self._pins[id_]
        return self.pending_delete.pop(id_, None)

    # -- eviction ------------------------------------------------------------------------------------------------

    def tend(self, now: float) -> None:
        """Let ``order`` learn from the time that has passed, for some of the snapshots, and rank these anew. Called
        before each reservation.
        """
        self._now = now
        due = self._ranking.turn()
        for id_ in due:
            if self._is_valid(id_):
                self.order.passed(self.stats[id_], now)
        # Rank only after all have been learned from: else the first rank would use other rates than the last.
        for id_ in due:
            self._ranking.put(id_)

    def victims(self, short_bytes: int, n_short: int, keep: Collection[str], now: float) -> list[Snapshot]:
        """Choose the snapshots to evict so that at least ``short_bytes`` bytes and ``n_short`` places for snapshots
        become free. Changes nothing. Lowest rank first; no more than necessary; none in ``keep``, and none that must
        stay (``_is_held``). If these are not enough, returns all that may go: the caller must check.

        Evicting a snapshot frees only those files that no remaining snapshot needs.
        """
        self._now = now
        victims: list[Snapshot] = []
        departure = Departure(self.files)
        over_bytes, n_over = -short_bytes, -n_short
        if over_bytes >= 0 and n_over >= 0:
            return victims
        with contextlib.closing(self._ranking.least_first()) as ranked:
            for id_ in ranked:
                snapshot = self.snapshots[id_]
                if self._is_held(snapshot) or id_ in keep:
                    continue
                victims.append(snapshot)
                over_bytes += departure.add(snapshot)
                n_over += 1
                if over_bytes >= 0 and n_over >= 0:
                    break
        for snapshot in reversed(victims[:-1]):  # a later victim may have made this one unnecessary
            freed_bytes = departure.needed_for(snapshot)
            if freed_bytes <= over_bytes and n_over > 0:
                victims.remove(snapshot)
                departure.take_back(snapshot)
                over_bytes -= freed_bytes
                n_over -= 1
        return victims

    def _is_held(self, snapshot: Snapshot) -> bool:
        """True if a snapshot must not be evicted now: a request or a step uses it (``pin``), or its sidecar marks it as
        pinned (prewarmed, or pinned on the page) and a backend serves its model.
        """
        is_other_model = bool(self._fingerprints) and snapshot.fingerprint not in self._fingerprints
        return snapshot.id in self._pins or (snapshot.is_pinned and not is_other_model)

    def _is_valid(self, id_: str) -> bool:
        return self.snapshots[id_].fingerprint in self._fingerprints

    def _rank(self, id_: str) -> Rank:
        """The sort key of a snapshot; the smallest is evicted first. Snapshots of models that no backend serves come
        first, then those of least value by ``order``; of equal ones, the least recently used.
        """
        stats = self.stats[id_]
        stats.n_covered = self.files.n_covered(self.snapshots[id_])
        return self._is_valid(id_), self.order.rank(stats, self._now), stats.last_used, id_

    def _rank_again(self, id_: str, now: float) -> None:
        self._now = now
        self._ranking.put(id_)

    def is_known(self, id_: str) -> bool:
        """True if a snapshot has this id, listed or pending, or any snapshot needs a .kv or .ext file of this id."""
        is_listed = id_ in self.snapshots or id_ in self.pending_delete
        return is_listed or id_ + KV in self.files.sizes or id_ + EXT in self.files.sizes

    def check(self) -> None:
        """Raise AssertionError with the name of the invariant that does not hold."""
        assert self.stats.keys() == self.snapshots.keys(), "stats and snapshots differ"
        assert len(self._ranking) == len(self.snapshots), "not everything is ranked"
        assert self.pending_delete.keys() <= self._pins.keys(), "pending deletion without a pin"
        assert not self.snapshots.keys() & self.pending_delete.keys(), "listed and pending deletion"
        needed = SharedFiles()
        for snapshot in (*self.snapshots.values(), *self.pending_delete.values()):
            needed.add(snapshot)
        assert needed.users == self.files.users, "files are those of the snapshots"
        assert sum(self.files.sizes.values()) == self.files.size_bytes, "bytes are those of the files"
        for id_, stats in self.stats.items():
            assert stats.size_bytes == self.files.own_bytes(self.snapshots[id_]), "own bytes are up to date"
        assert all(n > 0 for n in self._pins.values()), "pins that hold nothing"
