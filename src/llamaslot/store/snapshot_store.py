"""One snapshot directory for the lifetime of llamaslot: its catalog, the libraries of its models, the learned hit
rates.
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
from llamaslot.store.sidecar import Snapshot
from llamaslot.tasks import TaskOwner


class SnapshotStore:
    """A snapshot directory and what belongs to it. ``name``: of its files in ``meta_dir``. ``on_drop`` is called for a
    snapshot that is gone; ``saves_s`` returns the seconds that each hit of a snapshot saves.
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
        self.n_backends = 0  # that save into this directory
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
        """Open the store. Raises LlamaslotError with the remedy if the directory cannot be used."""
        self._order.hit_rates = HitRateModel.from_json(await self._hit_rates.read())
        await self.catalog.open()

    def beyond_disk(self) -> str | None:
        """A warning if the disk is smaller than the quota, else None. Blocking."""
        catalog, limits = self.catalog, self.catalog.limits
        return beyond_disk(limits.quota_bytes, limits.min_free_bytes, catalog.directory, catalog.size_bytes)

    async def store_learned(self) -> None:
        """Write the learned hit rates to disk. Canceling is safe: the file is written to its end all the same."""
        await self._hit_rates.write(self.hit_rates.to_json())

    async def close(self) -> None:
        """Close the store; it must not be used any more."""
        await self._tasks.close()
        await self.store_learned()
        await self.catalog.settle()
        await self.catalog.write_manifest()
        self.catalog.close()
