"""The files of all snapshots, and which snapshots need each. A file that several need is on disk once; it goes with the
last of them. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from llamaslot.cache.content import SnapshotKind
from llamaslot.store.sidecar import KV, Snapshot


class SharedFiles:
    """``sizes``: bytes by file name; ``size_bytes``: of all; ``users``: by file name the ids of the snapshots that need
    it, and up to which of their tokens.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.users: dict[str, dict[str, int]] = {}
        self.size_bytes = 0

    def add(self, snapshot: Snapshot) -> set[str]:
        """Returns the ids of those that were the only users of a file that it needs too: they own less now."""
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
        """Returns the files that no snapshot needs any more, with their bytes, and the ids of those that are the only
        users of a file now: they own more.
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
        """The bytes that would be free if it were dropped."""
        if not snapshot.parts:
            return snapshot.size_bytes if len(self.users[snapshot.file_name]) == 1 else 0
        return sum(self.sizes[name] for name in snapshot.files if len(self.users[name]) == 1)

    def n_covered(self, snapshot: Snapshot) -> int:
        """Tokens from its beginning that are there without it too: rows that another snapshot needs, on a model with
        states up to the last one that another keeps. 0 for a shared prefix: those that need it are larger, and go
        before it.
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
        """The bytes that would be free if all these were dropped."""
        departure = Departure(self)
        return sum(departure.add(snapshot) for snapshot in snapshots)

    def ids(self) -> Iterator[str]:
        """The ids in the names of all files."""
        return (name[: name.index(".")] for name in self.sizes)


class Departure:
    """What is freed by dropping some snapshots one after the other, before any of them is."""

    def __init__(self, files: SharedFiles) -> None:
        self._files = files
        self._n_gone: dict[str, int] = {}

    def add(self, snapshot: Snapshot) -> int:
        """The bytes that are freed if it goes too."""
        freed_bytes = 0
        for name in snapshot.files:
            n_gone = self._n_gone[name] = self._n_gone.get(name, 0) + 1
            if n_gone == len(self._files.users[name]):
                freed_bytes += self._files.sizes[name]
        return freed_bytes

    def needed_for(self, snapshot: Snapshot) -> int:
        """The bytes that would not be freed if one of those that were added stayed."""
        return sum(
            self._files.sizes[name]
            for name in snapshot.files
            if self._n_gone[name] == len(self._files.users[name])
        )

    def take_back(self, snapshot: Snapshot) -> None:
        """One of those that were added stays."""
        for name in snapshot.files:
            self._n_gone[name] -= 1
