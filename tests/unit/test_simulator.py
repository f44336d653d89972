"""The simulator: what a run comes to, and that nothing gets lost in it."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from bench.simulator import many
from bench.simulator.__main__ import main
from bench.simulator.generate import Recipe, generate
from bench.simulator.machine import Hardware
from bench.simulator.result import Result
from bench.simulator.run import LEFT, Policy, Setting, simulate
from bench.simulator.trace import Text, Trace, TraceRequest, Turn
from llamaslot.cache.ids import count, head
from llamaslot.cache.prefix_index import PrefixIndex
from llamaslot.scheduling.settings import PrefillSettings, SchedulingSettings

SMALL = Recipe(n_users=6, day_s=400.0, arrival_s=60.0, burst_each=4, p_pause=0.0, usual_answer_s=30.0)
FEW_SLOTS = 2

pytestmark = pytest.mark.xdist_group("simulator")  # each run is made once
FAST = Hardware().times(4)  # fewer chunks of half a second


@functools.cache
def trace(seed: int = 1) -> Trace:
    return generate(seed, SMALL, "small")


@functools.cache
def run(policy: Policy, disk: float | None = 0.25, seed: int = 1) -> Result:
    return simulate(trace(seed), Setting(policy, disk, FEW_SLOTS, FAST))


def figures(result: Result) -> dict[str, object]:
    """All of them but the time that the machine took."""
    return {**result.to_json(), "wall_s": None}


@pytest.mark.parametrize("policy", [Policy.LLAMASLOT, Policy.RANDOM])
def test_the_same_seed_gives_the_same_figures(policy: Policy) -> None:
    """A run depends on nothing but its trace and its settings. (Each run checks at its end that nothing is left.)"""
    again = simulate(generate(1, SMALL, "small"), Setting(policy, 0.25, FEW_SLOTS, FAST))
    assert figures(again) == figures(run(policy))


def test_another_seed_gives_other_figures() -> None:
    """What is the same for each seed would say nothing about any."""
    assert figures(run(Policy.LRU, seed=2)) != figures(run(Policy.LRU))


@pytest.mark.parametrize("policy", list(Policy))
def test_each_token_is_either_reused_or_computed(policy: Policy) -> None:
    """By the clients' count and by the server's; and what was known is either reused or recomputed."""
    result = run(policy)
    assert result.n_reused + result.n_computed == result.n_prompt
    assert result.n_reused + result.n_recomputed == result.n_known


@pytest.mark.parametrize("policy", list(Policy))
def test_the_disk_is_full_and_never_overfull(policy: Policy) -> None:
    """The quota is used, else nothing would be compared, and it holds at every moment."""
    result = run(policy)
    assert result.n_evicted > 0
    assert 0.9 * result.quota_bytes < result.largest_bytes <= result.quota_bytes


def test_with_each_answer_saved_and_room_for_all_nothing_known_is_computed_again() -> None:
    """But for requests that came beside the first of their kind, or while what they begin with was not yet saved."""
    result = run(Policy.ALWAYS, None)
    assert result.n_evicted == 0
    assert result.n_recomputed < 0.002 * result.n_known


def test_foresight_computes_less_than_lru() -> None:
    """Knowing what will be asked is worth something."""
    clairvoyant = sum(run(Policy.CLAIRVOYANT, seed=seed).n_recomputed for seed in (1, 2))
    assert clairvoyant < sum(run(Policy.LRU, seed=seed).n_recomputed for seed in (1, 2))


def test_more_disk_computes_less() -> None:
    """Else room would make no difference in any of the comparisons."""
    assert run(Policy.LRU, 0.5).n_recomputed < run(Policy.LRU).n_recomputed


def test_what_is_known_is_what_a_tree_of_all_prompts_knows() -> None:
    """The scripts say what an unlimited cache would reuse; an index of everything that was asked says the same."""
    index: PrefixIndex[int] = PrefixIndex()
    n_known, serial = 0, itertools.count()
    held: dict[int, bytes] = {}
    for request in trace().requests:
        prompt = head(held.get(request.conversation, b""), request.keep)
        prompt += b"".join(map(trace().text, request.add))
        n_found = next((hit.n_shared for hit in index.hits(prompt)), 0)
        n_known += min(n_found, request.n_prompt - 1)
        held[request.conversation] = prompt + trace().text(request.answer)
        index.insert(next(serial), held[request.conversation])
    # In the order of users here and in that of time there: whoever comes first pays for all.
    assert n_known == run(Policy.LRU).n_known


def test_a_trace_survives_a_file(tmp_path: Path) -> None:
    """Written and read it is the same."""
    trace().write(tmp_path / "trace.jsonl")
    assert Trace.read(tmp_path / "trace.jsonl") == _rounded(trace())


def _rounded(trace: Trace) -> Trace:
    requests = (replace(one, think_s=round(one.think_s, 3)) for one in trace.requests)
    return replace(trace, requests=tuple(requests))


def test_a_trace_that_keeps_what_is_not_there_is_refused() -> None:
    """A file from elsewhere may have faults; a run on it would be about nothing."""
    request = TraceRequest(0, 0, 0.0, 7, Turn.FOLLOW_UP, 10, (Text(1, 5),), Text(2, 5))
    with pytest.raises(ValueError, match="conversation 7"):
        Trace("broken", 1, (request,)).check()


def test_a_text_begins_as_its_shorter_ones() -> None:
    """That is what makes an edited or re-tokenized prompt share what it keeps; other keys share nothing."""
    long = trace().text(Text(5, 1000))
    assert count(long) == 1000
    assert trace().text(Text(5, 300)) == head(long, 300)
    assert trace().text(Text(6, 300))[:40] != long[:40]


def test_the_command_prints_a_table_and_writes_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a file, two policies in processes of their own."""
    file, figures = tmp_path / "trace.jsonl", tmp_path / "figures.json"
    generate(1, replace(SMALL, n_users=2, burst_each=0), "small").write(file)
    assert main(["--trace", str(file), "--policies", "lru", "clairvoyant", "--json", str(figures)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "small, seed 1" in lines[0]
    assert [line.split()[0] for line in lines[2:4] + lines[6:8]] == ["lru", "clairvoyant"] * 2
    assert '"n_recomputed"' in figures.read_text()


def test_the_command_compares_rules_for_long_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    """With and without them, and several values of one setting."""
    crew = ["--users", "3", "--hours", "0.1", "--together", "0.1", "--policies", "llamaslot"]
    assert main([*crew, "--prefill", "shared", "left", "--sweep", "chunk_s", "0.25", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "3 users, 0.1 h, 0.1 together, seed 1" in lines[0]
    assert [line[12:30].strip() for line in lines[2:6]] == ["shared", "left", "chunk_s 0.25", "chunk_s 2"]


def test_a_setting_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is run."""
    with pytest.raises(SystemExit):
        main(["--sweep", "patience_s", "1"])
    assert "one of chunk_threshold_s, decode_share" in capsys.readouterr().err


@functools.cache
def with_settings(scheduling: SchedulingSettings) -> Result:
    """Few people, so that they wait for prompts and not for slots."""
    recipe = Recipe(
        n_users=6, day_s=1500.0, arrival_s=60.0, p_pause=0.0, usual_answer_s=30.0, p_together=0.05
    )
    return simulate(generate(1, recipe, "few"), Setting(Policy.LLAMASLOT, None, 6, settings=scheduling))


def beside(result: Result) -> float:
    """Of its full speed, what a stream had beside long prompts."""
    assert result.prefills.stream_share is not None
    return result.prefills.stream_share


def test_with_the_scheduler_what_needs_little_waits_less() -> None:
    """And streams go on beside long prompts; these take longer for it, and the day does not."""
    shared, left = with_settings(SchedulingSettings()), with_settings(LEFT)
    assert shared.little.p90 < 0.75 * left.little.p90
    assert beside(shared) > 2 * beside(left)
    assert shared.slowed.mean < 1.5 * left.slowed.mean
    assert shared.took_s < 1.05 * left.took_s


def test_the_share_of_streams_is_what_the_setting_says_and_a_token_per_batch() -> None:
    """More of it, more for them."""
    shares = [
        beside(with_settings(SchedulingSettings(prefill=PrefillSettings(decode_share=share))))
        for share in (0.1, 0.4)
    ]
    assert shares[0] >= 0.1
    assert shares[1] >= 0.4


def test_many_servers_behind_one_queue() -> None:
    """So many that a placement looks at a few only: conversations go on where they are, and nothing is left."""
    figures = many.simulate(9, users=2, hours=0.03, seed=1, slots=2)
    assert (figures.n_backends, figures.n_users) == (9, 18)
    assert figures.n_requests > 18
    assert figures.hit_ratio_follow_up > 0.95
    assert figures.row().count("|") == many.HEAD.splitlines()[0].count("|")
