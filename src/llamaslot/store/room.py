"""The accounts of a quota, and the removal that gives room back.

What takes room is accounted for before it is on disk, and what gives room only after it is gone from there. Nothing is
awaited between looking at the accounts and changing them, so on one event loop they need no lock.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from llamaslot.errors import LlamaslotError
from llamaslot.store import scan
from llamaslot.store.sidecar import readable
from llamaslot.tasks import TaskOwner

log = logging.getLogger(__name__)


class QuotaExceeded(LlamaslotError):
    """There is no room for a snapshot, and nothing that may be evicted for it."""


class Room:
    """How many bytes of a directory are taken, by what.

    ``committed`` are snapshots, ``granted`` are drafts, ``leaving`` is being unlinked, ``left`` are leftovers: ours, no
    snapshots, but not to be removed, so they count until they are. On disk is never more than the sum of these four.
    ``waiting`` are reservations for whose bytes a removal must end first; nothing of them is on disk.
    """

    def __init__(self, directory: Path, quota_bytes: int, tasks: TaskOwner) -> None:
        self.directory, self.quota_bytes = directory, quota_bytes
        self._tasks = tasks
        self.committed = self.granted = self.leaving = self.left = self.waiting = 0
        self.removing: dict[str, tuple[int, asyncio.Task[None]]] = {}
        self.leftovers: dict[str, int] = {}

    @property
    def size_bytes(self) -> int:
        """Bytes on disk or promised."""
        return self.committed + self.granted + self.leaving + self.left

    def short(self, size_bytes: int = 0) -> int:
        """How much has to be evicted for all who wait for room, and for ``size_bytes`` more."""
        return self.committed + self.granted + self.left + self.waiting + size_bytes - self.quota_bytes

    async def make(self, size_bytes: int, evict: Callable[[int], bool]) -> None:
        """Wait until ``size_bytes`` more fit; the caller must take them without an await in between.

        ``evict(short)`` gives up snapshots of at least ``short`` bytes at once, or nothing and says False. Raises
        QuotaExceeded. Canceling is safe: removals that have begun are finished.
        """
        self.waiting += size_bytes
        try:
            has_retried = False
            while True:
                # What is leaving counts as gone here, and what others wait for as taken: each reservation evicts only
                # for what is short when all removals have succeeded, so that no two of them evict for the same bytes.
                short = self.short()
                if short > 0 and self.leftovers and not has_retried:
                    has_retried = True
                    for id_ in list(self.leftovers):
                        self.remove(id_, self._unleave(id_))
                    continue
                if short > 0 and not evict(short):
                    raise QuotaExceeded(self._why_full(size_bytes))
                if self.size_bytes + size_bytes <= self.quota_bytes:
                    return
                await self.next_removal()
        finally:
            self.waiting -= size_bytes

    def _why_full(self, size_bytes: int) -> str:
        parts = f"{readable(self.committed)} in snapshots, {readable(self.granted)} being written"
        if self.left:
            parts += f", {readable(self.left)} in files that cannot be removed"
        return f"no room for {readable(size_bytes)}: the quota is {readable(self.quota_bytes)} ({parts})"

    def remove(self, id_: str, size_bytes: int) -> asyncio.Task[None]:
        """Start to unlink the files of an id; its bytes count until that is done."""
        self.leaving += size_bytes
        task = self._tasks.spawn(self._unlink(id_, size_bytes), f"remove {id_}")
        self.removing[id_] = size_bytes, task
        return task

    async def _unlink(self, id_: str, size_bytes: int) -> None:
        n_left = size_bytes  # as long as nothing else is known
        try:
            n_left, error = await asyncio.to_thread(scan.remove, self.directory, id_)
            if error is not None:
                log.warning("snapshots: %s cannot be removed: %s", id_, error.strerror or error)
        finally:
            # On every path: whoever waits for this removal looks here for what became of it.
            del self.removing[id_]
            self.leaving -= size_bytes
            if n_left:
                self.leave(id_, n_left)

    def known(self) -> set[str]:
        """The ids whose files are accounted for here."""
        return self.removing.keys() | self.leftovers.keys()

    async def removed(self, id_: str) -> None:
        """Wait until the files of the id are gone or left over. Canceling is safe."""
        if (removal := self.removing.get(id_)) is not None:
            await asyncio.shield(removal[1])

    async def next_removal(self) -> None:
        """Wait until one of the removals under way has ended. Canceling is safe."""
        await asyncio.wait([task for _, task in self.removing.values()], return_when=asyncio.FIRST_COMPLETED)

    def leave(self, id_: str, size_bytes: int) -> None:
        """Account for files that could not be removed."""
        self.leftovers[id_] = size_bytes
        self.left += size_bytes

    def _unleave(self, id_: str) -> int:
        size_bytes = self.leftovers.pop(id_)
        self.left -= size_bytes
        return size_bytes

    def check(self, committed: int, granted: int) -> None:
        """Raises AssertionError naming the account that is not the sum of its parts."""
        assert self.committed == committed, "committed is not what is listed and condemned"
        assert self.granted == granted, "granted is not the drafts"
        assert self.leaving == sum(size for size, _ in self.removing.values()), (
            "leaving is not what is removed"
        )
        assert self.left == sum(self.leftovers.values()), "left is not the leftovers"
        assert self.waiting >= 0, "waiting is negative"
