"""The snapshots in memory: usage, pins, the files that each needs, and the order of eviction. No files are touched; no
awaits.

Times come in as arguments, in seconds of any one clock.
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
    """The files of all snapshots, and which snapshots need each. ``sizes``: bytes by file name; ``size_bytes``: of
    all; ``users``: by file name the ids of the snapshots that need it, and up to which of their tokens.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.users: dict[str, dict[str, int]] = {}
        self.size_bytes = 0

    def add(self, snapshot: Snapshot) -> set[str]:
        """Add the files of a snapshot. Returns the ids of snapshots that were the only users of one of these files:
        they own less now.
        """
        if not snapshot.parts and (name := snapshot.file_name) not in self.users:
            # As most are: in a third of the time.
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
        """Remove a snapshot. Returns the files that no snapshot needs any more, with their bytes, and the ids of
        snapshots that are the only users of a file now: they own more.
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
        """A snapshot's share of the files that others need too, each divided equally: the sum of what all own and
        share is all there is.
        """
        users = ((name, len(self.users[name])) for name in snapshot.files)
        return round(sum(self.sizes[name] / n for name, n in users if n > 1))

    def n_covered(self, snapshot: Snapshot) -> int:
        """How many of the snapshot's first tokens could be reused without it: those whose rows another snapshot needs
        too; on a model with states, up to the last state that another one keeps. 0 for a shared prefix: the snapshots
        that need it are larger, and go before it.
        """
        if snapshot.kind is SnapshotKind.TRUNK:
            return 0
        has_states = any(part.is_state for part in snapshot.parts)
        rows = [(part.file, part.start) for part in snapshot.parts if part.is_state is has_states]
        for name, start in reversed(rows or [(snapshot.id + KV, 0)]):
            users, n = self.users[name], 0
            own = users[snapshot.id]
            for id_, end in users.items():  # nearly always the first of thousands has as much
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
        """The ids that occur in the names of all files."""
        return (name[: name.index(".")] for name in self.sizes)


class Departure:
    """Computes what is freed by dropping some snapshots one after the other, before any of them is dropped."""

    def __init__(self, files: SharedFiles) -> None:
        self._files = files
        self._n_gone: dict[str, int] = {}

    def add(self, snapshot: Snapshot) -> int:
        """The bytes that are freed if this snapshot is dropped too."""
        freed_bytes = 0
        for name in snapshot.files:
            n_gone = self._n_gone[name] = self._n_gone.get(name, 0) + 1
            if n_gone == len(self._files.users[name]):
                freed_bytes += self._files.sizes[name]
        return freed_bytes

    def needed_for(self, snapshot: Snapshot) -> int:
        """The bytes that would not be freed if this snapshot, one of those that were added, stayed."""
        return sum(
            self._files.sizes[name]
            for name in snapshot.files
            if self._n_gone[name] == len(self._files.users[name])
        )

    def take_back(self, snapshot: Snapshot) -> None:
        """One of the snapshots that were added stays after all."""
        for name in snapshot.files:
            self._n_gone[name] -= 1


class Pin(AbstractContextManager[Snapshot]):
    """Keeps a snapshot's file until the context exits. It takes effect when it is made: no await may come between the
    lookup and the pin.

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
        """Let go of the snapshot's file, which may be removed from now on. Idempotent."""
        if (unpin := self._unpin) is not None:
            self._unpin = None
            unpin(self.snapshot.id)


class SnapshotTable:
    """The snapshots of one directory in memory. ``snapshots`` can be found, pinned and restored; ``pending_delete``
    ones are dropped but still pinned.

    ``stats``: usage by id of listed snapshots. ``order`` decides which is evicted first and learns from hits; only
    from snapshots of the models that are served, by their ``fingerprints``, once any is known. ``files``: of both
    kinds of snapshots, until ``release``.
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
        """List a snapshot. ``last_used`` defaults to ``now``; nothing is learned from the time before ``now``."""
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
        """List the snapshots of a whole directory. They are ranked by ``rank_some``, or before the next choice: 20 us
        each.
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
        """Rank ``n`` snapshots that were listed with many others. Returns whether there are more."""
        return self._ranking.rank_some(n)

    def hit(self, id_: str, now: float) -> None:
        """Record a hit of a snapshot now. Raises KeyError for an unlisted id."""
        stats = self.stats[id_]
        if self._is_valid(id_):
            self.order.hit(stats, now)
        stats.n_hits += 1
        stats.is_branched = False
        stats.last_used = stats.counted_until = now
        self._rank_again(id_, now)

    def branch(self, id_: str, now: float) -> None:
        """Record that a snapshot's conversation went on without it, from an earlier point. Raises KeyError for an
        unlisted id.
        """
        stats = self.stats[id_]
        if self._is_valid(id_):
            self.order.passed(stats, now)
        stats.is_branched = True
        self._rank_again(id_, now)

    def inherit(self, id_: str, from_id: str, now: float) -> None:
        """Give ``id_`` the hits of ``from_id``, whose conversation it continues."""
        self.stats[id_].n_hits += self.stats[from_id].n_hits
        self._rank_again(id_, now)

    def take(self, id_: str, now: float) -> bool:
        """Unlist a snapshot. True if its files may be removed now, after ``release``; False if a pin holds them until
        ``unpin`` returns the snapshot.
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
        """A snapshot needs its files no more. Returns those files that no other snapshot needs, with their bytes."""
        freed, touched = self.files.drop(snapshot)
        self._weigh(touched)
        return freed

    def checksum_of(self, name: str) -> int | None:
        """The checksum of a whole slot file, if a snapshot that needs the file has recorded one."""
        for id_ in self.files.users.get(name, ()):
            snapshot = self.snapshots.get(id_) or self.pending_delete.get(id_)
            for part in snapshot.parts if snapshot is not None else ():
                if part.file == name and part.checksum is not None:
                    return part.checksum
        return None

    def _weigh(self, ids: Iterable[str]) -> None:
        """Rank snapshots anew that own more or fewer bytes than before."""
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
        """Count a pin of a snapshot. Raises KeyError for an unlisted id."""
        snapshot = self.snapshots[id_]
        self._pins[id_] += 1
        return snapshot

    def unpin(self, id_: str) -> Snapshot | None:
        """Release a pin. Returns the snapshot if its deletion is pending and this was its last pin: its
        files may be removed now.
        """
        self._pins[id_] -= 1
        if self._pins[id_]:
            return None
        del self._pins[id_]
        return self.pending_delete.pop(id_, None)

    # -- eviction ------------------------------------------------------------------------------------------------

    def tend(self, now: float) -> None:
        """Learn from the time that has passed, and recompute some ranks. Called before each choice."""
        self._now = now
        due = self._ranking.turn()
        for id_ in due:
            if self._is_valid(id_):
                self.order.passed(self.stats[id_], now)
        # Only after all learning: else the first rank would use other rates than the last.
        for id_ in due:
            self._ranking.put(id_)

    def victims(self, short_bytes: int, n_short: int, keep: Collection[str], now: float) -> list[Snapshot]:
        """The snapshots to evict so that ``short_bytes`` bytes, and the places of ``n_short`` snapshots, become free;
        fewer if there are not enough. No more than necessary; none in ``keep``, and none that is pinned.

        What evicting one frees is what no snapshot needs that stays. A pin that is recorded in its sidecar protects a
        snapshot only while its model is served.
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
        is_other_model = bool(self._fingerprints) and snapshot.fingerprint not in self._fingerprints
        return snapshot.id in self._pins or (snapshot.is_pinned and not is_other_model)

    def _is_valid(self, id_: str) -> bool:
        return self.snapshots[id_].fingerprint in self._fingerprints

    def _rank(self, id_: str) -> Rank:
        """The sort key of a snapshot; the smallest is evicted first: snapshots of models that are not served, then by
        ``order``, then the least recently used.
        """
        stats = self.stats[id_]
        stats.n_covered = self.files.n_covered(self.snapshots[id_])
        return self._is_valid(id_), self.order.rank(stats, self._now), stats.last_used, id_

    def _rank_again(self, id_: str, now: float) -> None:
        self._now = now
        self._ranking.put(id_)

    def is_known(self, id_: str) -> bool:
        """Whether the table has files of that id."""
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
