"""Long prompts, and everybody else, small: the same runs as in ``tests/soak/test_prefill.py``, in seconds.

Who comes before whom, and how many tokens are computed: how long it takes is measured there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import models
from tests.support.figures import Figure
from tests.support.prefilling import N_SLOTS, PREFILLS_ITSELF, abandon, compare_undisturbed, rush
from tests.support.real import RealServer
from tests.support.resuming import UNSEEN, leave_and_return, prefill_in_pieces, restart_unseen
from tests.support.stack import Stack
from tests.support.together import answer_beside_others, begin_together

pytestmark = pytest.mark.real

N_BATCH = 128
# As in tests/soak/test_prefill.py, but so small a model computes more batches before it hears of anything.
N_MEETING = 300 + 5 * N_BATCH
SMALL: dict[str, Any] = {"batch": N_BATCH, "ubatch": N_BATCH, "settings": PREFILLS_ITSELF}
KINDS = ["dense", "swa", "recurrent"]


def model_of(kind: str, directory: Path) -> Path:
    if kind == "dense":
        return models.dense(directory, layers=2, width=128)
    return {"swa": models.swa, "recurrent": models.recurrent}[kind](directory)


async def test_follow_ups_are_answered_before_a_strangers_long_prompt(tmp_path: Path, figure: Figure) -> None:
    """In the lowest slot, whose prompt llama-server by itself would compute first: three follow-ups are through before
    its first token."""
    # Chunks of which the long prompt has many, however fast the machine is.
    settings = {**PREFILLS_ITSELF, "prefill": {**PREFILLS_ITSELF["prefill"], "chunk_s": 0.05}}
    options = {**SMALL, "settings": settings}
    async with Stack(model_of("dense", tmp_path), tmp_path, context=7000, **options) as stack:
        result = await rush(stack, oldest=0, n_long=6000, n_context=400, after_s=0.1)
    figure(result)
    assert result.n_before == N_SLOTS - 1


async def test_what_new_conversations_have_in_common_is_computed_once(tmp_path: Path, figure: Figure) -> None:
    """Four at once, in a plain prompt (in messages, and on other kinds of models: tests/real/test_costs.py)."""
    async with Stack(model_of("dense", tmp_path), tmp_path, context=5000, **SMALL) as stack:
        result = await begin_together(stack, "completions", n_common=3000, n_own=200)
    figure(result)
    assert result.share <= 1.1


@pytest.mark.parametrize(("kind", "n_prompt", "n_slots"), [("dense", 5000, 3), ("recurrent", 20_000, 1)])
async def test_who_leaves_a_prefill_and_comes_back_finds_what_was_computed(
    tmp_path: Path, figure: Figure, kind: str, n_prompt: int, n_slots: int
) -> None:
    """Beside a stream, and in a single slot that a short request has used meanwhile."""
    async with Stack(model_of(kind, tmp_path), tmp_path, slots=n_slots, context=20_480, **SMALL) as stack:
        result = await leave_and_return(stack, n_prompt=n_prompt, is_busy=n_slots > 1, rest_s=1.0)
    figure(result)
    assert result.again <= 0.5
    assert result.meanwhile <= 0.15


async def test_interruptions_leave_no_checkpoints(tmp_path: Path, figure: Figure) -> None:
    """The slot's file is hardly larger than that of a prefill in one piece. On a recurrent model: in tests/soak."""
    settings = {**PREFILLS_ITSELF, "store": {"idle_save_s": 0.2}}
    options = {**SMALL, "settings": settings, "slots": 2, "context": 20_480}
    model, pieces = models.swa(tmp_path), []
    for n_interruptions in (0, 5):
        async with Stack(model, tmp_path / str(n_interruptions), **options) as stack:
            pieces.append(await prefill_in_pieces(stack, n_prompt=8000, n_interruptions=n_interruptions))
        figure(pieces[-1])
    assert pieces[1].n_short >= 2
    assert pieces[1].n_computed <= pieces[1].n_prompt + 100
    assert pieces[1].n_bytes <= 1.2 * pieces[0].n_bytes


async def test_a_dense_prompt_that_is_alone_goes_on_from_the_batch_where_it_was_interrupted(
    tmp_path: Path, figure: Figure
) -> None:
    """For short requests. Nothing is computed twice."""
    settings = {**PREFILLS_ITSELF, "prefill": {**PREFILLS_ITSELF["prefill"], "chunk_s": 1.0}}
    options = {**SMALL, "settings": settings, "slots": 2, "context": 12_288}
    async with Stack(models.dense(tmp_path), tmp_path, **options) as stack:
        pieces = await prefill_in_pieces(stack, n_prompt=12_000, n_interruptions=5)
        n_stopped = (await stack.own_metrics())["llamaslot_prefill_interruptions_total"]
    figure(f"{pieces}, interrupted {n_stopped:.0f} times")
    assert pieces.n_short >= 2
    assert n_stopped >= 1
    assert pieces.n_computed <= pieces.n_prompt + 100


@pytest.mark.parametrize(
    ("kind", "is_saved", "n_question"),
    [("dense", True, 60), ("recurrent", True, 3000), ("dense", False, 60)],
)
async def test_a_restart_that_cannot_be_seen_costs_no_more_than_what_is_held_nowhere(
    tmp_path: Path, figure: Figure, kind: str, is_saved: bool, n_question: int
) -> None:
    """What is on disk is restored, what is not is computed once."""
    settings = {**PREFILLS_ITSELF, "store": {"idle_save_s": 0.3 if is_saved else 3600}}
    options = {**SMALL, "settings": settings, "context": 8192, "env": UNSEEN}
    # So slow a model that to compute 3,000 tokens again costs more than to stop, however fast the machine is.
    model = models.recurrent(tmp_path, width=256) if kind == "recurrent" else model_of(kind, tmp_path)
    async with Stack(model, tmp_path, **options) as stack:
        result = await restart_unseen(stack, n_context=3000, n_question=n_question, is_saved=is_saved)
    figure(result)
    assert not result.was_noticed
    assert (result.n_on_disk > 0) == is_saved
    assert result.n_excess <= N_MEETING


async def test_what_llamaslot_computes_itself_is_not_computed_twice(tmp_path: Path, figure: Figure) -> None:
    """A cold prompt and follow-ups at once, as many tokens as directly."""
    pairs = await compare_undisturbed(
        model_of("dense", tmp_path), tmp_path, 1, n_context=3000, context=5000, **SMALL
    )
    for pair in pairs:
        figure(pair)
        assert pair.through.n_computed <= pair.direct.n_computed + 20


@pytest.mark.parametrize("kind", KINDS)
async def test_answers_beside_others_are_those_of_an_idle_server(
    tmp_path: Path, figure: Figure, kind: str
) -> None:
    """Streaming or not, first questions and follow-ups."""
    model = model_of(kind, tmp_path)
    async with (
        Stack(model, tmp_path, context=5000, **SMALL) as stack,
        RealServer(model, tmp_path / "idle", slots=1, context=5000) as idle,
    ):
        result = await answer_beside_others(stack, idle, sizes=(2000, 200, 1000, 200), n_answer=24)
    figure(result)
    assert result.differ == ()


async def test_an_abandoned_answer_gives_up_its_slot(tmp_path: Path, figure: Figure) -> None:
    """A client that does not stream leaves while its answer is decoded beside a stream: a newcomer has its slot
    before all of it could have been decoded."""
    options = {**SMALL, "slots": 2, "context": 16_384}
    async with Stack(model_of("dense", tmp_path), tmp_path, **options) as stack:
        result = await abandon(stack, n_answer=15_000, after_s=1.0)
    figure(result)
    assert result.n_meanwhile <= 0.75 * (result.n_answer - result.n_decoded)
