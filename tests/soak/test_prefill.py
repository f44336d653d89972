"""Long prompts, and everybody else: who waits for them, what is computed twice, what an interruption costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import models
from tests.support.figures import Figure
from tests.support.prefilling import (
    N_SLOTS,
    PREFILLS_ITSELF,
    TELLS_OFTEN,
    abandon,
    both,
    compare_undisturbed,
    median_ratio,
    rush,
    stream_beside,
)
from tests.support.real import RealServer
from tests.support.resuming import UNSEEN, TokenizeCache, leave_and_return, prefill_in_pieces, restart_unseen
from tests.support.stack import Stack
from tests.support.together import PLACES, Place, answer_beside_others, begin_together

pytestmark = [pytest.mark.soak, pytest.mark.real, pytest.mark.timeout(3600)]

N_PAIRS = 5
# Tokens: what llamaslot computes when it meets a llama-server anew, and what models that cannot go back compute again
# behind their last checkpoint; and the batches that run when a connection is closed.
N_MEETING = 300 + 2 * 512
BATCH: dict[str, Any] = {"batch": 512, "ubatch": 512}
KINDS = ["dense", "swa", "recurrent"]


def model_of(kind: str, directory: Path) -> Path:
    if kind == "dense":
        return models.dense(directory, layers=4, width=256)
    if kind == "swa":
        return models.swa(directory, width=128)
    return models.recurrent(directory, layers=4, width=128)


def settings_of(kind: str) -> dict[str, Any]:
    return TELLS_OFTEN if kind == "dense" else PREFILLS_ITSELF


@pytest.mark.parametrize("oldest", range(N_SLOTS))
async def test_follow_ups_do_not_wait_for_a_strangers_long_prompt(
    tmp_path: Path, figure: Figure, oldest: int
) -> None:
    """12,000 tokens over one of four conversations, a second later the other three: at most 0.15 of the time directly.

    Directly in slot 0, which is the bad case, through llamaslot over each of the four.
    """
    pair = await both(
        lambda stack: rush(stack, oldest=0 if stack.alone else oldest),
        model_of("dense", tmp_path),
        tmp_path,
        is_through_first=oldest % 2 == 1,
        **BATCH,
    )
    long = pair.ratio(lambda run: run.long.undisturbed_s)
    figure(f"{pair}; worst {pair.ratio(lambda run: run.worst_s):.3f}, long {long:.3f} of directly")
    assert pair.ratio(lambda run: run.worst_s) <= 0.15
    assert long <= 1.15


async def test_a_stream_beside_a_prefill_goes_on(tmp_path: Path, figure: Figure) -> None:
    """15 times the tokens that it gets directly, no gap longer than two batches, and the prefill a quarter longer."""
    pair = await both(stream_beside, model_of("dense", tmp_path), tmp_path, slots=2, context=20_480, **BATCH)
    tokens, took = (
        pair.ratio(lambda run: run.n_tokens),
        pair.ratio(lambda run: run.prefill.undisturbed_s),
    )
    figure(f"{pair}; tokens {tokens:.1f}, prefill {took:.3f} of directly")
    assert tokens >= 15
    assert took <= 1.25
    assert pair.through.gap_s <= 2 * pair.direct.gap_s, "directly the longest gap is one batch"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
async def test_what_new_conversations_have_in_common_is_computed_once(
    tmp_path: Path, figure: Figure, kind: str, place: Place
) -> None:
    """Four at once, 12,000 common tokens and 500 own each: at most 1.08 of the distinct ones are computed."""
    pair = await both(
        lambda stack: begin_together(stack, place),
        model_of(kind, tmp_path),
        tmp_path,
        settings=settings_of(kind),
        **BATCH,
    )
    mean = pair.ratio(lambda run: run.mean_s)
    figure(f"{pair}; mean {mean:.3f} of directly")
    assert pair.through.share <= 1.08
    assert mean <= 0.55


@pytest.mark.parametrize("is_busy", [True, False], ids=["beside a stream", "in a single slot"])
@pytest.mark.parametrize("kind", KINDS)
async def test_who_leaves_a_prefill_and_comes_back_finds_what_was_computed(
    tmp_path: Path, figure: Figure, kind: str, is_busy: bool
) -> None:
    """Left at 60 % of 14,000 tokens, then a short request: at most 45 % are computed later, for nobody two batches."""
    pair = await both(
        lambda stack: leave_and_return(stack, is_busy=is_busy),
        model_of(kind, tmp_path),
        tmp_path,
        settings=settings_of(kind),
        slots=3 if is_busy else 1,
        context=20_480,
        **BATCH,
    )
    figure(pair)
    assert pair.through.again <= 0.45
    assert pair.through.n_meanwhile <= 2 * 512
    assert pair.through.n_told > 0, "comments say how far it is"
    if kind == "recurrent":  # in batches of any size it rounds alike
        assert pair.through.text == pair.direct.text
    assert max(pair.direct.again, pair.direct.meanwhile) > 0.3, "the measure can tell the difference"


@pytest.mark.parametrize("kind", ["swa", "recurrent"])
async def test_interruptions_leave_no_checkpoints(tmp_path: Path, figure: Figure, kind: str) -> None:
    """Five short requests of others in the course of a prefill: the slot's file is at most 1.2 times as large as that
    of a prefill in one piece."""
    options = {"slots": 2, "context": 32_768, "settings": PREFILLS_ITSELF, **BATCH}

    async def run(n_interruptions: int, *, is_alone: bool = False) -> TokenizeCache:
        where = tmp_path / f"{n_interruptions}-{is_alone}"
        async with Stack(model_of(kind, tmp_path), where, alone=is_alone, **options) as stack:
            return await prefill_in_pieces(stack, n_prompt=30_000, n_interruptions=n_interruptions)

    direct, whole, pieces = await run(0, is_alone=True), await run(0), await run(5)
    figure(f"through, in pieces {pieces} | whole {whole} | directly, whole {direct}")
    assert pieces.n_short == 5, "each was served before the long prompt was through"
    assert pieces.n_computed <= pieces.n_prompt + 100
    assert pieces.n_bytes <= 1.2 * whole.n_bytes


@pytest.mark.parametrize("n_question", [60, 6000], ids=["a short prefill", "a long prefill"])
@pytest.mark.parametrize(
    ("kind", "is_saved"), [("dense", True), ("dense", False), ("swa", True), ("recurrent", True)]
)
async def test_a_restart_that_cannot_be_seen_costs_no_more_than_what_is_held_nowhere(
    tmp_path: Path, figure: Figure, kind: str, is_saved: bool, n_question: int
) -> None:
    """What is on disk is restored, what is not is computed once. Estimated to be short or long, it is found out."""
    settings = {**settings_of(kind), "store": {"idle_save_s": 0.3 if is_saved else 3600}}
    async with Stack(
        model_of(kind, tmp_path), tmp_path, settings=settings, context=20_480, env=UNSEEN, **BATCH
    ) as stack:
        result = await restart_unseen(stack, n_question=n_question, is_saved=is_saved)
    figure(result)
    assert not result.was_noticed
    assert (result.n_on_disk > 0) == is_saved
    assert result.n_excess <= N_MEETING


async def test_who_is_alone_waits_no_longer_than_directly(tmp_path: Path, figure: Figure) -> None:
    """12,000 tokens cold: 1.05; a follow-up at once: 1.1. Without the time in which others had llama-server's CPU; for
    the plain ratios the machine should have nothing else to do."""
    pairs = await compare_undisturbed(model_of("dense", tmp_path), tmp_path, N_PAIRS, **BATCH)
    for pair in pairs:
        figure(pair)
    cold = median_ratio(pairs, lambda run: run.cold.undisturbed_s)
    hot = median_ratio(pairs, lambda run: run.hot.undisturbed_s)
    by_the_clock = [
        median_ratio(pairs, of) for of in (lambda run: run.cold.wall_s, lambda run: run.hot.wall_s)
    ]
    figure(
        f"medians of {len(pairs)}: cold {cold:.3f}, hot {hot:.3f}; "
        f"by the clock {by_the_clock[0]:.3f}, {by_the_clock[1]:.3f}"
    )
    for pair in pairs:
        assert pair.through.n_computed <= pair.direct.n_computed + 20
    assert cold <= 1.05
    assert hot <= 1.1


@pytest.mark.parametrize("kind", KINDS)
async def test_answers_beside_others_are_those_of_an_idle_server(
    tmp_path: Path, figure: Figure, kind: str
) -> None:
    """Streaming or not, first questions and follow-ups."""
    model = model_of(kind, tmp_path)
    async with (
        Stack(model, tmp_path, settings=settings_of(kind), **BATCH) as stack,
        RealServer(model, tmp_path / "idle", slots=1, **BATCH) as idle,
    ):
        result = await answer_beside_others(stack, idle)
    figure(result)
    assert result.are_right


async def test_an_abandoned_answer_gives_up_its_slot(tmp_path: Path, figure: Figure) -> None:
    """A client that does not stream leaves while its answer is decoded beside a stream: a newcomer has the slot within
    2 s or two batches."""
    pair = await both(abandon, model_of("dense", tmp_path), tmp_path, slots=2, context=20_480, **BATCH)
    figure(pair)
    assert pair.through.newcomer_s <= pair.through.limit_s
    assert pair.direct.newcomer_s > 1.5 * pair.direct.limit_s, "the measure can tell the difference"
