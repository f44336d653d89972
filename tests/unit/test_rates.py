"""Rates learned from samples that are noisy, few, stalled by others' work, or spoilt on disk."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaslot.scheduling.prefill_rate import PrefillRate
from llamaslot.scheduling.rates import AnswerLength, Rates, SnapshotSize, TransferRate

TOKENS = st.integers(-10, 200_000)
SIZES = st.integers(-10, 2**40)
SECONDS = st.floats(allow_nan=True, allow_infinity=True) | st.floats(0, 1000)
MIB = 2**20


def true_s(a: float, b: float, start: int, end: int) -> float:
    """The definition: each token costs ``a`` and ``b`` for every token before it, on average over the range."""
    return a * (end - start) + b * (end**2 - start**2) / 2


def learned(a: float, b: float, seed: int, *, noise: float, stalls: float = 0.0, n: int = 200) -> PrefillRate:
    rng, rate = random.Random(seed), PrefillRate()
    for _ in range(n):
        start = rng.choice([0, rng.randrange(60_000)])
        end = start + rng.randrange(64, 8192)
        took = true_s(a, b, start, end) * rng.uniform(1 - noise, 1 + noise)
        rate.observe(start, end, took * (10 if rng.random() < stalls else 1))
    return rate


def test_prefill_prior_is_a_millisecond_per_token() -> None:
    """Before the first sample there is a plain guess, and it is said to be one."""
    rate = PrefillRate()
    assert not rate.known
    assert rate.seconds(0, 3000) == pytest.approx(3.0)
    assert rate.seconds(30_000, 33_000) == pytest.approx(3.0)


def test_first_prefill_replaces_the_prior() -> None:
    """One real prefill says more than the guess."""
    rate = PrefillRate()
    rate.observe(0, 4000, 0.4)
    assert rate.known
    assert rate.seconds(0, 8000) == pytest.approx(0.8)


@given(st.floats(1e-5, 1e-2), st.floats(100, 100_000), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_prefill_recovers_the_rate_and_its_growth(a: float, doubled_at: float, seed: int) -> None:
    """From samples 5 % off, both parts are known within 10 %, each where it makes up a fair part of the time."""
    b = a / doubled_at
    rate = learned(a, b, seed, noise=0.05)
    for start, end in [(0, 1000), (0, 20_000), (0, 60_000), (40_000, 41_000), (59_000, 60_000)]:
        assert rate.seconds(start, end) == pytest.approx(true_s(a, b, start, end), rel=0.1)
    if 2_000 < doubled_at < 20_000:
        shallow, deep = rate.seconds(0, 1), rate.seconds(50_000, 50_001)
        assert shallow == pytest.approx(a, rel=0.1)
        assert (deep - shallow) / 50_000 == pytest.approx(b, rel=0.1)


@pytest.mark.parametrize("seed", range(10))
def test_stalls_do_not_move_the_prefill_rate(seed: int) -> None:
    """One prefill in ten that took ten times as long changes the estimates by less than 10 %."""
    a, b = 1e-3, 2e-8
    rate = learned(a, b, seed, noise=0.1, stalls=0.1)
    for start, end in [(0, 2000), (0, 60_000), (50_000, 51_000)]:
        assert rate.seconds(start, end) == pytest.approx(true_s(a, b, start, end), rel=0.1)


def test_many_short_follow_ups_do_not_forget_what_depth_costs() -> None:
    """A thousand shallow samples leave the one deep prefill in place."""
    a, b = 1e-4, 1e-8
    rate, rng = PrefillRate(), random.Random(1)
    rate.observe(0, 60_000, true_s(a, b, 0, 60_000))
    for _ in range(1000):
        rate.observe(1000, 1500, true_s(a, b, 1000, 1500) * rng.uniform(0.9, 1.1))
    assert rate.seconds(0, 60_000) == pytest.approx(true_s(a, b, 0, 60_000), rel=0.15)


def test_a_server_that_became_slower_is_noticed() -> None:
    """Three times slower for good is learned within a dozen prefills, though one such sample changes nothing."""
    rate = PrefillRate()
    for _ in range(20):
        rate.observe(0, 1000, 1.0)
    rate.observe(0, 1000, 3.0)
    assert rate.seconds(0, 1000) == pytest.approx(1.0)
    for _ in range(11):
        rate.observe(0, 1000, 3.0)
    assert rate.seconds(0, 1000) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("start", "end", "seconds"),
    [
        *[(0, 1, 0.5), (5, 5, 1.0), (9, 1, 1.0), (-1, 999, 1.0), (0, 2**40, 1.0)],
        *[(0, 1000, seconds) for seconds in (0.0, 1e-9, -1.0, float("nan"), float("inf"))],
    ],
)
def test_samples_without_meaning_are_ignored(start: int, end: int, seconds: float) -> None:
    """A few tokens, no time, or nonsense is no prefill to learn from."""
    rate = PrefillRate()
    rate.observe(start, end, seconds)
    assert not rate.known


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.tuples(TOKENS, TOKENS, SECONDS), max_size=30), st.lists(TOKENS, min_size=3, max_size=3))
def test_prefill_is_never_negative_and_adds_up(
    samples: list[tuple[int, int, float]], bounds: list[int]
) -> None:
    """Whatever was observed: >= 0, longer takes longer, and two parts take what the whole takes."""
    rate = PrefillRate()
    for start, stop, seconds in samples:
        rate.observe(start, stop, seconds)
    low, middle, high = sorted(max(bound, 0) for bound in bounds)
    first, second, whole = rate.seconds(low, middle), rate.seconds(middle, high), rate.seconds(low, high)
    assert 0 <= first <= whole < 1e18
    assert first + second == pytest.approx(whole, rel=1e-6)
    assert rate.seconds(high, low) == 0


def test_transfer_prior() -> None:
    """Before the first sample: a gigabyte per second and 5 ms."""
    assert TransferRate().seconds(10**9) == pytest.approx(1.005)
    assert TransferRate().seconds(0) == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("latency_s", "bytes_per_s"), [(0.005, 1e9), (0.02, 178e6), (0.3, 3.5e9), (0.001, 8e9)]
)
@pytest.mark.parametrize("seed", range(5))
def test_transfer_learns_latency_and_rate(latency_s: float, bytes_per_s: float, seed: int) -> None:
    """From files of 100 kB to 2 GB with 10 % noise, every size is predicted within 15 %."""
    rng, rate = random.Random(seed), TransferRate()
    for _ in range(200):
        size = int(10 ** rng.uniform(5, 9.3))
        rate.observe(size, (latency_s + size / bytes_per_s) * rng.uniform(0.9, 1.1))
    for size in (100_000, 10**7, 10**9):
        assert rate.seconds(size) == pytest.approx(latency_s + size / bytes_per_s, rel=0.15)


def test_one_stalled_transfer_moves_the_estimate_little() -> None:
    """A restore that waited 0.8 s for others' batch does not make the next one look that slow."""
    rate = TransferRate()
    for _ in range(30):
        rate.observe(20 * MIB, 0.02)
    rate.observe(20 * MIB, 0.8)
    assert rate.seconds(20 * MIB) < 0.03


def test_the_first_transfers_may_be_far_from_the_prior() -> None:
    """A hard disk 20 times slower than the prior is known after a few saves."""
    rate = TransferRate()
    for _ in range(5):
        rate.observe(10**9, 20.0)
    assert rate.seconds(10**9) == pytest.approx(20.0, rel=0.5)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.tuples(SIZES, SECONDS), max_size=60), SIZES, SIZES)
def test_transfer_is_never_negative_and_grows(samples: list[tuple[int, float]], a: int, b: int) -> None:
    """Whatever was observed: > 0 and finite, and a larger file takes no less."""
    rate = TransferRate()
    for size, seconds in samples:
        rate.observe(size, seconds)
    assert 0 < rate.seconds(min(a, b)) <= rate.seconds(max(a, b)) < 1e12


def test_size_is_unknown_before_the_first_file() -> None:
    """No guess: whoever needs room for the first snapshot looks at one first."""
    assert SnapshotSize().bytes(1000) is None


def test_size_from_one_file_is_in_proportion() -> None:
    """One file says about how much a token takes, with a margin."""
    size = SnapshotSize()
    size.observe(1000, 10_000_000)
    assert size.bytes(500) == 5_250_000
    assert size.bytes(2000) == 21_000_000


@settings(deadline=None)  # the machine may be busy
@given(
    st.integers(0, 200 * MIB),
    st.integers(1, MIB),
    st.lists(st.integers(1, 200_000), min_size=2, unique=True),
    TOKENS,
)
def test_size_of_a_dense_model_is_exact(constant: int, per_token: int, ns: list[int], n: int) -> None:
    """Files that lie on a line tell every other file's size to the byte."""
    size = SnapshotSize()
    for known in ns:
        size.observe(known, constant + per_token * known)
    assert size.bytes(n) == max(constant + per_token * max(n, 0), 1)


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(st.tuples(st.integers(1, 200_000), st.integers(1, 2**36)), min_size=1, max_size=32),
    TOKENS,
    TOKENS,
)
def test_size_covers_every_known_file(files: list[tuple[int, int]], a: int, b: int) -> None:
    """Files with checkpoints or of windowed attention lie on no line: none of them is above the estimate."""
    size = SnapshotSize()
    for n, size_bytes in files:
        size.observe(n, size_bytes)
    estimates = [(size.bytes(n), size_bytes) for n, size_bytes in files]
    assert all(estimate is not None and estimate >= size_bytes for estimate, size_bytes in estimates)
    low, high = size.bytes(min(a, b)), size.bytes(max(a, b))
    assert low is not None
    assert high is not None
    assert 0 < low <= high


def test_answer_length_follows_what_was_seen() -> None:
    """After answers of 1,000 tokens in 20 s a new one is expected to take about that, and less as it runs."""
    answer = AnswerLength()
    for _ in range(50):
        answer.observe(1000, 20.0)
    assert answer.seconds_left(0.0) == pytest.approx(20.0, rel=0.05)
    assert answer.seconds_left(10.0) == pytest.approx(10.0, rel=0.1)


def test_an_answer_that_outlived_the_usual_is_not_about_to_end() -> None:
    """The longer it has run already, the longer it will still run: one that does not stop is nobody's to wait for."""
    answer = AnswerLength()
    for _ in range(50):
        answer.observe(300, 10.0)
    assert answer.seconds_left(9.9) < 3.0
    assert answer.seconds_left(60.0) > 20.0
    assert answer.seconds_left(600.0) > 200.0


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.tuples(TOKENS, SECONDS), max_size=60), st.floats(-1, 1e6), st.floats(-1, 1e6))
def test_answer_is_never_negative(samples: list[tuple[int, float]], a: float, b: float) -> None:
    """Whatever was observed, and however long it has run: > 0 and finite."""
    answer = AnswerLength()
    for n, seconds in samples:
        answer.observe(n, seconds)
    for at in (a, b):
        assert 0 < answer.seconds_left(at) < 1e10


def test_of_prompts_longer_than_any_seen_too_little_is_known_to_save_a_request() -> None:
    """Whatever a request costs, it is worth a prompt of more than four times as many tokens as any that was seen."""
    rates = Rates()
    rates.prefill.observe(10, 50, 0.001)
    assert 20 * rates.request_s == pytest.approx(rates.prefill.seconds(0, 200), rel=0.1)
    rates.prefill.observe(0, 3000, 0.5)
    assert rates.request_s == rates.request.seconds


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(st.tuples(st.integers(0, 60_000), st.integers(32, 9000), st.floats(1e-3, 1e3)), max_size=40),
    st.lists(st.tuples(st.integers(1, 60_000), st.integers(1, 2**36), st.floats(1e-3, 1e3)), max_size=40),
)
def test_rates_survive_a_restart(
    prefills: list[tuple[int, int, float]], files: list[tuple[int, int, float]]
) -> None:
    """Written as JSON and read back, every estimate is the same."""
    rates = Rates()
    for start, n, seconds in prefills:
        rates.prefill.observe(start, start + n, seconds)
    for n, size_bytes, seconds in files:
        rates.size.observe(n, size_bytes)
        rates.save.observe(size_bytes, seconds)
        rates.restore.observe(size_bytes, seconds / 2)
        rates.answer.observe(n, seconds)
    again = Rates.from_json(json.loads(json.dumps(rates.to_json())))
    assert again.to_json() == rates.to_json()
    assert again.prefill.seconds(100, 30_000) == rates.prefill.seconds(100, 30_000)
    assert again.size.bytes(777) == rates.size.bytes(777)
    assert again.save.seconds(10**8) == rates.save.seconds(10**8)
    assert again.answer.seconds_left(1.0) == rates.answer.seconds_left(1.0)


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.just(10**400) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
PARTS = st.fixed_dictionaries(
    {},
    optional={
        "samples": JSON | st.lists(st.lists(JSON, min_size=4, max_size=4)),
        "files": JSON | st.lists(st.lists(JSON, min_size=2, max_size=2)),
        "latency_s": JSON,
        "bytes_per_s": JSON,
        "n_samples": JSON,
        "n_tokens": JSON,
        "tokens_per_s": JSON,
    },
)


@settings(deadline=None)  # the machine may be busy
@given(
    JSON | st.dictionaries(st.sampled_from(["prefill", "save", "restore", "size", "answer"]), JSON | PARTS)
)
def test_spoilt_rates_are_forgotten(data: object) -> None:
    """A file that somebody edited or that a crash cut off never keeps llamaslot from starting."""
    rates = Rates.from_json(data)
    assert rates.prefill.seconds(0, 1000) > 0
    assert rates.save.seconds(1) > 0
    assert rates.restore.seconds(1) > 0
    assert rates.answer.seconds_left(0) > 0
    assert (rates.size.bytes(1) or 1) > 0
    rates.save.observe(1000, 1.0)
    rates.answer.observe(1000, 1.0)


def test_reprs_are_readouts() -> None:
    """Logs and dashboard show the learned numbers with their units."""
    rates = Rates()
    assert "unknown" in repr(rates.prefill)
    assert "unknown" in repr(rates.size)
    rates.prefill.observe(0, 1000, 1.0)
    rates.size.observe(1000, 1024)
    assert repr(rates.prefill) == "<PrefillRate 1000.0 us/tok + 0.00 us/tok per 1000 depth>"
    assert repr(rates.save) == "<TransferRate 5.0 ms + 954 MiB/s>"
    assert repr(rates.size) == "<SnapshotSize 0 B + 1 B/tok>"
    assert repr(rates.answer) == "<AnswerLength 300 tok at 30.0 tok/s>"


def test_many_files_are_learned_from_as_one_by_one() -> None:
    """Those that are repeated too: only the last that differ are kept."""
    rng = random.Random(5)
    for n in (0, 1, 40, 200):
        files = [(rng.randrange(1, 60), rng.randrange(1, 5) * 1000) for _ in range(n)]
        at_once, in_turn = SnapshotSize(), SnapshotSize()
        at_once.observe_each(files)
        for file in files:
            in_turn.observe(*file)
        assert list(at_once._points) == list(in_turn._points)
