"""The files of all snapshots of a directory. Snapshots that begin alike share files: a file goes with the last snapshot
that needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from llamaslot.cache.content import SnapshotKind
from llamaslot.store.snapshot import KV, Snapshot


class FileReferences:
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

    def __init__(self, files: FileReferences) -> None:
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
