"""What the policies are worth over simulated days; the figures of docs/simulator.md."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

from bench.simulator.generate import crew, generate
from bench.simulator.result import Result
from bench.simulator.run import LEFT, Policy, Setting, simulate
from llamaslot.scheduling.settings import SchedulingSettings

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

QUARTER = 0.25  # of all contexts


@functools.cache
def run(policy: Policy, seed: int, disk: float = QUARTER) -> Result:
    return simulate(generate(seed), Setting(policy, disk))


@pytest.mark.parametrize(
    ("seed", "disk", "at_most"),
    [
        (1, QUARTER / 4, 0.75),
        (2, QUARTER / 4, 0.75),
        (3, QUARTER / 4, 0.75),
        (1, QUARTER / 2, 0.95),
    ],
)
def test_keeping_what_is_worth_most_recomputes_less_than_lru(seed: int, disk: float, at_most: float) -> None:
    """The same saves, on the same disk. On a quarter of all contexts LRU hardly loses anything, since rows are there
    once."""
    own, lru = run(Policy.LLAMASLOT, seed, disk).n_recomputed, run(Policy.LRU, seed, disk).n_recomputed
    print(f"seed {seed}, disk {disk:g}: {own / 1e6:.2f} M recomputed, LRU {lru / 1e6:.2f} M")
    assert own <= at_most * lru


def test_saving_what_is_worth_it_beats_saving_each_answer() -> None:
    """About half of the bytes, and everybody waits less. (Recomputed is more: see docs/simulator.md for why.)"""
    own, always = run(Policy.LLAMASLOT, 1), run(Policy.ALWAYS, 1)
    assert own.bytes_saved < 0.55 * always.bytes_saved
    assert own.took_s < always.took_s
    assert own.ttft["follow-up"].median < always.ttft["follow-up"].median
    assert own.stall_stream_s < 0.7 * always.stall_stream_s


def test_the_prototype_is_left_behind() -> None:
    """Its settings, on the same server and disk: each figure is worse."""
    own, original = run(Policy.LLAMASLOT, 1), run(Policy.ORIGINAL, 1)
    assert own.n_recomputed < 0.5 * original.n_recomputed
    assert own.bytes_saved < 0.6 * original.bytes_saved
    assert own.took_s < original.took_s


@functools.cache
def together(settings: SchedulingSettings, seed: int) -> Result:
    """Sixteen people on eight slots for two hours: they wait for prompts more than for slots."""
    recipe = replace(crew(16, 2.0), p_together=0.01)
    return simulate(generate(seed, recipe), Setting(Policy.LLAMASLOT, QUARTER, 8, settings=settings))


def test_long_prompts_in_chunks_let_others_pass() -> None:
    """What needs little waits less than half as long, and streams get three times as much beside long prompts. All in
    all people wait less, and the day takes as long."""
    for seed in (1, 2, 3):
        shared, left = together(SchedulingSettings(), seed), together(LEFT, seed)
        print(
            f"seed {seed}: little {shared.little} s, {left.little} s; all {_mean(shared):.2f} s, {_mean(left):.2f} s"
        )
        assert shared.little.mean < 0.6 * left.little.mean
        assert shared.little.p99 < 0.5 * left.little.p99
        assert (shared.prefills.stream_share or 0.0) > 2.5 * (left.prefills.stream_share or 1.0)
        assert shared.took_s < 1.02 * left.took_s
    means = [
        sum(_mean(together(settings, seed)) for seed in (1, 2, 3))
        for settings in (SchedulingSettings(), LEFT)
    ]
    assert means[0] < means[1]


def _mean(result: Result) -> float:
    """Seconds to the first token, of all requests."""
    waits = result.ttft.values()
    return sum(wait.n * wait.mean for wait in waits) / sum(wait.n for wait in waits)


def test_when_all_slots_are_taken_giving_way_costs_little() -> None:
    """Sixty people on four: everybody waits for a slot, and who has one gains what others lose."""
    recipe = crew(60, 1.0)
    shared, left = (
        simulate(generate(1, recipe), Setting(Policy.LLAMASLOT, settings=r))
        for r in (SchedulingSettings(), LEFT)
    )
    print(f"{shared.took_s / 3600:.2f} h, left to llama-server {left.took_s / 3600:.2f} h")
    assert shared.took_s < 1.05 * left.took_s
    assert shared.little.p99 < 0.6 * left.little.p99
