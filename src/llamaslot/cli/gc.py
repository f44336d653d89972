"""Which snapshots of a directory exceed the configured limits, in the order of their value."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import orjson
from msgspec import Struct
from msgspec.structs import replace

from llamaslot.config.load import Config
from llamaslot.llama.identity import Identity
from llamaslot.scheduling.cost import Rates
from llamaslot.scheduling.eviction import ByValue, HitRateModel, SnapshotStats
from llamaslot.store.directory import DirectoryUnusable
from llamaslot.store.entries import SnapshotTable
from llamaslot.store.inventory import Item
from llamaslot.store.quota import Limits
from llamaslot.store.sidecar import readable

_OURS, _OTHERS = "served last", "another"


class Removal(Struct, frozen=True):
    """A snapshot to remove, and the reason for the table."""

    item: Item
    why: str

    @property
    def row(self) -> tuple[str, str, str]:
        return self.item.id, readable(self.item.size_bytes), self.why


class OfflineStore(Struct, frozen=True):
    """A directory, its limits, and what llamaslot has learned there. ``models``: those last served by the backends with
    that directory; empty if that of any is not known yet.
    """

    directory: Path
    limits: Limits
    now: float
    models: tuple[Identity, ...]
    rates: Rates
    hit_rates: HitRateModel

    @classmethod
    def of(cls, config: Config, now: float) -> OfflineStore:
        """Of the first directory that the configuration names. Raises DirectoryUnusable if it names none. Blocking."""
        store = config.store
        named = [backend for backend in config.backends if backend.slot_save_path is not None]
        if not named:
            raise DirectoryUnusable("backends[0].slot_save_path is not set: nothing is kept on disk")
        backend, directory = named[0], os.path.realpath(str(named[0].slot_save_path))
        that_share_it = [its for its in named if os.path.realpath(str(its.slot_save_path)) == directory]
        learned = [Rates.from_json(_read(store.meta_dir / f"{its.name}.rates.json")) for its in that_share_it]
        rates = learned[0]
        models = [Identity.from_text(its.model) for its in learned]
        known = tuple(model for model in models if model is not None) if None not in models else ()
        hit_rates = HitRateModel.from_json(_read(store.meta_dir / f"{backend.name}.returns.json"))
        limits = Limits(store.quota, store.max_files, store.min_free)
        return cls(Path(str(backend.slot_save_path)), limits, now, known, rates, hit_rates)

    def is_ours(self, item: Item) -> bool:
        """Whether a model that was served last can use it; also true if those are not known."""
        if item.noted is None or not self.models:
            return True
        other = Identity.from_text(item.noted.fingerprint)
        return other is not None and any(model.is_same(other) for model in self.models)

    def saves_s(self, stats: SnapshotStats) -> float:
        """Seconds saved by each hit, without regard to other snapshots."""
        return self.rates.prefill.seconds(0, stats.n_tokens) - self.rates.restore.seconds(stats.read_bytes)


def over_limits(store: OfflineStore, items: list[Item]) -> list[Removal]:
    """The snapshots of least value that exceed the configured limits: bytes, files, or free space."""
    order = ByValue(store.hit_rates)
    order.saves_s = store.saves_s
    table = SnapshotTable(order)
    table.fingerprints = frozenset({_OURS} if store.models else ())
    for item in items:
        noted = item.noted
        assert noted is not None, "what is whole has a sidecar"
        snapshot = replace(noted.snapshot(""), fingerprint=_OURS if store.is_ours(item) else _OTHERS)
        table.add(snapshot, store.now, last_used=item.last_used, hits=item.hits)
    size_bytes = table.files.size_bytes
    found = os.statvfs(store.directory)
    short = {
        "store.quota": size_bytes - store.limits.quota_bytes,
        "store.min_free": store.limits.min_free_bytes - found.f_bavail * found.f_frsize,
    }
    n_short = len(items) - store.limits.max_files
    over = [key for key, n in (*short.items(), ("store.max_files", n_short)) if n > 0]
    why = f"worth least: {' and '.join(over)}"
    by_id = {item.id: item for item in items}
    victims = table.victims(max(short.values()), n_short, (), store.now)
    return [Removal(by_id[victim.id], why) for victim in victims]


def _read(file: Path) -> Any:
    try:
        return orjson.loads(file.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
