"""What the policies are worth over simulated days; the figures of docs/simulator.md."""

from __future__ import annotations

import functools

import pytest

from llamaslot.bench.simulator.generate import generate
from llamaslot.bench.simulator.result import Result
from llamaslot.bench.simulator.run import Policy, Setting, simulate

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

QUARTER = 0.25  # of all contexts


@functools.cache
def run(policy: Policy, seed: int, disk: float = QUARTER) -> Result:
    return simulate(generate(seed), Setting(policy, disk))


@pytest.mark.parametrize(
    ("seed", "disk", "at_most"),
    [
        (1, QUARTER, 0.85),
        (2, QUARTER, 0.85),
        (3, QUARTER, 0.85),
        (1, QUARTER / 2, 0.95),
        (2, QUARTER * 2, 0.95),
    ],
)
def test_keeping_what_is_worth_most_recomputes_less_than_lru(seed: int, disk: float, at_most: float) -> None:
    """The same saves, on the same disk. With half of it the disk is too small for those who will come back; with twice
    as much LRU hardly loses anything."""
    own, lru = run(Policy.LLAMASLOT, seed, disk).n_recomputed, run(Policy.LRU, seed, disk).n_recomputed
    print(f"seed {seed}, disk {disk:g}: {own / 1e6:.2f} M recomputed, LRU {lru / 1e6:.2f} M")
    assert own <= at_most * lru


def test_saving_what_is_worth_it_beats_saving_each_answer() -> None:
    """About half of the bytes, and everybody waits less. (Recomputed is more: see docs/simulator.md for why.)"""
    own, always = run(Policy.LLAMASLOT, 1), run(Policy.ALWAYS, 1)
    assert own.bytes_saved < 0.55 * always.bytes_saved
    assert own.took_s < always.took_s
    assert own.ttft["follow-up"].median_s < always.ttft["follow-up"].median_s
    assert own.stall_stream_s < 0.7 * always.stall_stream_s


def test_the_prototype_is_left_behind() -> None:
    """Its rules, on the same server and disk: each figure is worse."""
    own, original = run(Policy.LLAMASLOT, 1), run(Policy.ORIGINAL, 1)
    assert own.n_recomputed < 0.5 * original.n_recomputed
    assert own.bytes_saved < 0.6 * original.bytes_saved
    assert own.took_s < original.took_s
