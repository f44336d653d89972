"""What was learned outlives llamaslot."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaslot.backend.backend import Backend
from llamaslot.fleet.queue import QueueLimits
from llamaslot.llama.client import LlamaServer
from llamaslot.observe.metrics import Metrics
from llamaslot.scheduling.eviction import Habit, Returns
from llamaslot.scheduling.placement import Rules


def make(meta_dir: Path) -> Backend:
    return Backend(
        "gpu0",
        LlamaServer("http://127.0.0.1:9"),
        rules=Rules(),
        limits=QueueLimits(),
        metrics=Metrics(),
        meta_dir=meta_dir,
        idle_save_s=2.0,
        slot_save_path=None,
        quota_bytes=0,
    )


async def test_how_likely_contexts_come_back_is_kept(tmp_path: Path) -> None:
    """Beside the rates, from one run to the next; both are what the next one goes on with."""
    first = make(tmp_path)
    await first.open()
    first.order.returns.hit(Habit.TRUNK, 100.0, 5_000)
    first.rates.prefill.observe(0, 1_000, 4.0)
    await first.close(0)
    assert (tmp_path / "gpu0.returns.json").exists()
    second = make(tmp_path)
    await second.open()
    assert second.order.returns.to_json() == first.order.returns.to_json()
    assert second.rates.prefill.seconds(0, 1_000) == pytest.approx(4.0)
    await second.close(0)


async def test_a_spoilt_file_is_no_reason_not_to_start(tmp_path: Path) -> None:
    """It is learned anew."""
    (tmp_path / "gpu0.returns.json").write_bytes(b"\xff{")
    (tmp_path / "gpu0.rates.json").write_text("[1, 2]")
    backend = make(tmp_path)
    await backend.open()
    assert backend.order.returns.to_json() == Returns().to_json()
    await backend.close(0)
