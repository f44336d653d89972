"""Everything that belongs to one snapshot directory while llamaslot runs: its catalog, the libraries of its models, and
the learned hit rates.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from llamaslot.scheduling.snapshot_value import ByValue, HitRateModel, SnapshotStats
from llamaslot.store.catalog import Catalog
from llamaslot.store.learned import LearnedFile
from llamaslot.store.model_snapshots import Libraries
from llamaslot.store.quota import Limits, beyond_disk
from llamaslot.store.snapshot import Snapshot
from llamaslot.tasks import TaskOwner


class SnapshotStore:
    """A snapshot directory and what belongs to it. ``name``: the names of its files in ``meta_dir`` begin with it.
    ``on_drop`` is called when a snapshot is dropped. ``saves_s`` returns the seconds that a hit of a snapshot saves.
    """

    def __init__(
        self,
        directory: Path,
        meta_dir: Path,
        name: str,
        *,
        limits: Limits,
        landing: Path | None,
        landing_bytes: int,
        on_drop: Callable[[Snapshot], None],
        saves_s: Callable[[SnapshotStats], float],
    ) -> None:
        self.n_backends = 0  # number of backends that save into this directory
        self.name, self._on_drop, self._tasks = name, on_drop, TaskOwner()
        self._order = ByValue()
        self._order.saves_s = saves_s
        self.catalog = Catalog(
            directory,
            limits,
            now=time.time,
            on_drop=self._dropped,
            order=self._order,
            landing=landing,
            landing_bytes=landing_bytes,
            manifest=meta_dir / f"{name}.sidecars",
        )
        self.libraries = Libraries(self.catalog, meta_dir / f"{name}.index", self._tasks)
        self._hit_rates = LearnedFile(name, meta_dir / f"{name}.returns.json")

    @property
    def hit_rates(self) -> HitRateModel:
        """The learned hit rates of this directory's snapshots."""
        return self._order.hit_rates

    def _dropped(self, snapshot: Snapshot) -> None:
        self.libraries.drop(snapshot.id)
        self._on_drop(snapshot)

    def keep_learned(self) -> None:
        """Write the learned hit rates to disk in the background."""
        self._tasks.spawn(self.store_learned(), f"{self.name}: keep what was learned")

    async def open(self) -> None:
        """Read the learned hit rates and open the catalog. Raises LlamaslotError, with the remedy, if the directory
        cannot be used.
        """
        self._order.hit_rates = HitRateModel.from_json(await self._hit_rates.read())
        await self.catalog.open()

    def beyond_disk(self) -> str | None:
        """A warning if the disk will be full before the snapshots reach the quota, else None. Blocking."""
        catalog, limits = self.catalog, self.catalog.limits
        return beyond_disk(limits.quota_bytes, limits.min_free_bytes, catalog.directory, catalog.size_bytes)

    async def store_learned(self) -> None:
        """Write the learned hit rates to disk. Canceling is safe: the file is written all the same."""
        await self._hit_rates.write(self.hit_rates.to_json())

    async def close(self) -> None:
        """Wait for all work on the files, write the hit rates and the manifest, and release the lock. The store must
        not be used after that.
        """
        await self._tasks.close()
        await self.store_learned()
        await self.catalog.settle()
        await self.catalog.write_manifest()
        self.catalog.close()
