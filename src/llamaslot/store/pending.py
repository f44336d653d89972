"""Saves that are running, and saves promised by a running prefill. Lookups find them like snapshots, and requests may
wait for them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from llamaslot.cache.content import Content
from llamaslot.cache.namespaces import Namespace, marker
from llamaslot.cache.prefix_index import Changes, PrefixIndex
from llamaslot.scheduling.slots import SlotKey


@dataclass(frozen=True, slots=True)
class PendingSave:
    """Content being saved by ``backend``: neither in a slot nor a snapshot until the save is committed.

    ``slot``: for a shared prefix that is still to be computed, the slot of the request that computes it; ``users``:
    those that wait for it.
    """

    holder: str
    content: Content
    until: float
    backend: str
    slot: SlotKey | None = None
    users: set[str] = field(default_factory=set, compare=False)


class PendingSnapshots:
    """All pending saves of one model, by whichever backend. ``index`` has the tokens of each by its holder, behind the
    mark of its namespace.
    """

    def __init__(self) -> None:
        self.index: PrefixIndex[str] = PrefixIndex()
        self._entries: dict[str, PendingSave] = {}
        self._serial = itertools.count()
        self.changes = Changes()  # of ``index``

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, holder: str) -> PendingSave | None:
        return self._entries.get(holder)

    def namespace_of(self, holder: str) -> Namespace:
        """Raises KeyError for an unknown holder."""
        return self._entries[holder].content.namespace

    def contents(self) -> list[Content]:
        """The contents of all. Only tests use it."""
        return [entry.content for entry in self._entries.values()]

    @property
    def trunks(self) -> list[str]:
        """The holders of shared prefixes to come: not computed yet, and the request that computes them may leave."""
        return [entry.holder for entry in self._entries.values() if entry.slot is not None]

    def add(self, content: Content, until: float, backend: str, slot: SlotKey | None = None) -> PendingSave:
        name = "leaving" if slot is None else "prefix"
        entry = PendingSave(f"{name}-{next(self._serial)}", content, until, backend, slot)
        self._entries[entry.holder] = entry
        marked = marker(content.namespace) + content.tokens
        self.index.insert(entry.holder, marked)
        self.changes.note(marked)
        return entry

    def end(self, entry: PendingSave) -> None:
        """It is a snapshot now, or has failed. Idempotent."""
        if self._entries.pop(entry.holder, None) is not None:
            self.index.drop(entry.holder)
            self.changes.note(marker(entry.content.namespace) + entry.content.tokens)

    def end_of(self, backend: str) -> None:
        """The process of ``backend`` is gone, or may hang: none of its saves is waited for any more."""
        for entry in [entry for entry in self._entries.values() if entry.backend == backend]:
            self.end(entry)

    def trunks_of(self, slot: SlotKey) -> list[PendingSave]:
        """The shared prefixes to come from ``slot``."""
        return [entry for entry in self._entries.values() if entry.slot == slot]

    def check(self) -> None:
        """Raise AssertionError naming the invariant that does not hold."""
        self.index.check()
        assert self.index.holders() == self._entries.keys(), "what is leaving is indexed"
