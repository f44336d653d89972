"""The benchmark of the index: that it measures what it says. Its bounds are for a quiet machine, not for tests."""

from __future__ import annotations

from itertools import islice

import pytest

from bench import index as bench
from llamaslot.cache.ids import count


def test_traffic_is_that_of_a_busy_server() -> None:
    """Long conversations on shared system prompts: a few unique thousand tokens for each snapshot of many thousand."""
    snapshots = list(islice(bench.Traffic().snapshots(), 1500))
    index = bench.build(snapshots)
    index.check()
    assert 8_000 < sum(map(count, snapshots)) / len(snapshots) < 20_000
    assert 1_500 < index.n_tokens / len(snapshots) < 5_000


def test_prompts_share_and_go_on() -> None:
    """Every prompt has the length asked for and shares something with what is stored, but not all."""
    traffic = bench.Traffic()
    stored = list(islice(traffic.snapshots(), 300))
    index = bench.build(stored)
    for prompt in traffic.prompts(stored, 5_000, 40):
        assert count(prompt) == 5_000
        assert 0 < index.match(prompt, 1)[0].n_shared < 5_000


def test_measures_every_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """With small numbers each row is there, and says whether its bound is met."""
    monkeypatch.setattr(bench, "LONG", 4_000)
    rows = list(bench.measure(n_few=20, n_many=60, n_slots=8, n_prompts=10))
    assert [row.name.split(",")[0].split(" of ")[0] for row in rows] == [
        "bytes per unique token",
        "lookup",
        "lookup",
        "lookup",
        "lookup",
        "insert",
        "drop",
        "index file",
        "shares",
    ]
    assert all(row.value > 0 for row in rows)
    assert bench.Row("ratio", 2.0, 3, False, "").is_met
    assert str(bench.Row("ratio", 2.0, 3, True, "")).startswith("FAIL")
