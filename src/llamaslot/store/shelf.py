"""What is listed: snapshots in memory, when they were used, who holds them, and who goes first. No files, no awaits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager

from llamaslot.store.sidecar import Snapshot


class Pin(AbstractContextManager[Snapshot]):
    """Keeps a snapshot's file, from its making (nothing may come between the look and the pin) until it is left.

    Leaving is idempotent. One that is forgotten holds for as long as the process lives: the collector unpins nothing.
    """

    def __init__(self, snapshot: Snapshot, release: Callable[[str], None]) -> None:
        self.snapshot = snapshot
        self._release: Callable[[str], None] | None = release

    def __enter__(self) -> Snapshot:
        return self.snapshot

    def __exit__(self, *_: object) -> None:
        if (release := self._release) is not None:
            self._release = None
            release(self.snapshot.id)


class Shelf:
    """``snapshots`` can be found, pinned and restored; ``condemned`` ones are dropped but still pinned.

    ``last_used`` is in seconds, ``n_hits`` is how often it was asked for, both by id of what is listed. ``fingerprint``
    is the one that is valid now, if it is known.
    """

    def __init__(self) -> None:
        self.snapshots: dict[str, Snapshot] = {}
        self.last_used: dict[str, float] = {}
        self.n_hits: dict[str, int] = {}
        self.condemned: dict[str, Snapshot] = {}
        self.fingerprint: str | None = None
        self._pins: Counter[str] = Counter()

    def add(self, snapshot: Snapshot, last_used: float, n_hits: int = 0) -> None:
        self.snapshots[snapshot.id] = snapshot
        self.last_used[snapshot.id] = last_used
        self.n_hits[snapshot.id] = n_hits

    def hit(self, id_: str, now: float) -> None:
        """Asked for now. Raises KeyError for what is not listed."""
        self.n_hits[id_] += 1
        self.last_used[id_] = now

    def take(self, id_: str) -> bool:
        """No longer listed. True if its files may go at once; False if a pin holds them until ``unpin`` says so."""
        snapshot = self.snapshots.pop(id_)
        del self.last_used[id_], self.n_hits[id_]
        if self._pins[id_]:
            self.condemned[id_] = snapshot
            return False
        return True

    def pin(self, id_: str) -> Snapshot:
        """Raises KeyError for what is not listed."""
        snapshot = self.snapshots[id_]
        self._pins[id_] += 1
        return snapshot

    def unpin(self, id_: str) -> Snapshot | None:
        """The snapshot whose files may go now, if this was the last pin of a condemned one."""
        self._pins[id_] -= 1
        if self._pins[id_]:
            return None
        del self._pins[id_]
        return self.condemned.pop(id_, None)

    def victims(self, short: int, keep: Collection[str]) -> list[Snapshot]:
        """Who goes for ``short`` bytes; together they may have less. Neither ``keep`` nor what is held.

        A pin in its sidecar holds a snapshot as long as it is of use: not once another model is served.
        """
        victims: list[Snapshot] = []
        if short <= 0:
            return victims
        for snapshot in sorted(self.snapshots.values(), key=self.eviction_key):
            if not self._is_held(snapshot) and snapshot.id not in keep:
                victims.append(snapshot)
                short -= snapshot.size_bytes
                if short <= 0:
                    break
        return victims

    def _is_held(self, snapshot: Snapshot) -> bool:
        is_other = self.fingerprint is not None and snapshot.fingerprint != self.fingerprint
        return snapshot.id in self._pins or (snapshot.is_pinned and not is_other)

    def eviction_key(self, snapshot: Snapshot) -> tuple[bool, float, str]:
        """Smallest goes first: what another fingerprint made, then what was used longest ago."""
        is_valid = self.fingerprint is not None and snapshot.fingerprint == self.fingerprint
        return is_valid, self.last_used[snapshot.id], snapshot.id

    def known(self) -> set[str]:
        """The ids whose files are accounted for here."""
        return self.snapshots.keys() | self.condemned.keys()

    def check(self) -> None:
        """Raises AssertionError naming the invariant."""
        assert self.last_used.keys() == self.snapshots.keys(), "last_used and snapshots differ"
        assert self.n_hits.keys() == self.snapshots.keys(), "n_hits and snapshots differ"
        assert self.condemned.keys() <= self._pins.keys(), "condemned without a pin"
        assert not self.snapshots.keys() & self.condemned.keys(), "listed and condemned"
        assert all(n > 0 for n in self._pins.values()), "pins that hold nothing"
