"""What was learned outlives llamaslot."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaslot.config.sections import StoreConfig
from llamaslot.fleet.pool import PoolSettings
from llamaslot.fleet.registry import Registry
from llamaslot.llama.client import LlamaServer
from llamaslot.observe.metrics import Metrics
from llamaslot.scheduling.snapshot_value import HitRateModel, ReuseClass
from llamaslot.store.snapshot_store import SnapshotStore


def make(meta_dir: Path) -> Registry:
    """Of one backend, which is not up."""
    directory = meta_dir / "kv"
    directory.mkdir(exist_ok=True)
    registry = Registry(Metrics(), PoolSettings(2.0))
    registry.add("gpu0", LlamaServer("http://127.0.0.1:9"), StoreConfig(meta_dir=meta_dir), directory)
    return registry


def store_of(registry: Registry) -> SnapshotStore:
    (store,) = registry.stores.values()
    return store


async def test_how_likely_contexts_come_back_is_kept(tmp_path: Path) -> None:
    """Beside the rates, from one run to the next; both are what the next one goes on with."""
    first = make(tmp_path)
    await first.open()
    store_of(first).hit_rates.hit(ReuseClass.TRUNK, 100.0, 5_000)
    first.backends[0].rates.prefill.observe(0, 1_000, 4.0)
    learned = store_of(first).hit_rates.to_json()
    await first.close(0)
    assert (tmp_path / "gpu0.returns.json").exists()
    second = make(tmp_path)
    await second.open()
    assert store_of(second).hit_rates.to_json() == learned
    assert second.backends[0].rates.prefill.seconds(0, 1_000) == pytest.approx(4.0)
    await second.close(0)


async def test_a_spoilt_file_is_no_reason_not_to_start(tmp_path: Path) -> None:
    """It is learned anew."""
    (tmp_path / "gpu0.returns.json").write_bytes(b"\xff{")
    (tmp_path / "gpu0.rates.json").write_text("[1, 2]")
    registry = make(tmp_path)
    await registry.open()
    assert store_of(registry).hit_rates.to_json() == HitRateModel().to_json()
    await registry.close(0)
