"""The main job on the real llama.cpp, small: the same runs as in ``tests/soak``, in seconds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support import models
from tests.support.figures import Figure
from tests.support.jobs import (
    ask_at_idle_save,
    ask_many,
    ask_while_saved,
    exchange_model,
    kill_server,
    take_turns,
    take_turns_over_restarts,
)
from tests.support.killing import TELLS, kill_llamaslot, work_within_quota
from tests.support.leaving import Stage, leave, slots_for
from tests.support.real import RealServer
from tests.support.stack import Stack

pytestmark = pytest.mark.real

SAVES_SOON: dict[str, Any] = {"store": {"idle_save_s": 0.3}}


@pytest.mark.parametrize("kind", ["with a draft model", "hybrid"])
async def test_more_users_than_slots_find_their_contexts_again(
    tmp_path: Path, figure: Figure, kind: str
) -> None:
    """Nearly all of what an unlimited cache would reuse is reused, and nothing fails. A turn of 100 tokens, 0.005 of
    all, may be sooner computed again than saved on a model that is so small; a context would be 0.08. Other kinds: in
    ``test_predictions.py``."""
    is_dense = kind == "with a draft model"
    model, draft = models.of_kind("dense" if is_dense else kind, tmp_path), None
    if is_dense:
        draft = models.draft(tmp_path)
    async with Stack(model, tmp_path, draft=draft) as stack:
        result = await take_turns(stack, n_users=6, n_context=1600, n_turns=3)
    figure(result)
    assert result.n_errors == 0
    assert result.ratio >= 0.95


async def test_long_contexts_are_restored_where_short_ones_were_beside_a_draft_model(
    tmp_path: Path, figure: Figure
) -> None:
    """The draft model's context is not saved: a slot that is not emptied first would fail every running request."""
    async with Stack(models.dense(tmp_path), tmp_path, draft=models.draft(tmp_path), slots=2) as stack:
        result = await take_turns(stack, n_users=5, n_context=(3000, 800), n_turns=3, at_a_time=2)
    figure(result)
    assert result.n_errors == 0
    assert result.ratio >= 0.95


async def test_clean_restarts_lose_nothing(tmp_path: Path, figure: Figure) -> None:
    """llama-server restarts when all is saved, llamaslot and both at once after an answer. A turn of 120 tokens, 0.013
    of all, may be sooner computed again than saved on a model that is so small; a context would be 0.2."""
    async with Stack(models.dense(tmp_path), tmp_path, settings=SAVES_SOON) as stack:
        results = await take_turns_over_restarts(stack, n_users=5, n_context=1600, quiet_s=None)
    for what, result in results.items():
        figure(f"{what}: {result}")
        assert result.n_errors == 0, what
        assert result.ratio >= 0.95, what


async def test_a_stop_saves_what_is_not_saved_yet(tmp_path: Path, figure: Figure) -> None:
    """SIGTERM at once after the last answer, of llamaslot alone and before llama-server's. Turns as above."""
    async with Stack(models.dense(tmp_path), tmp_path) as stack:
        results = await take_turns_over_restarts(
            stack, n_users=5, n_context=1600, whats=("llamaslot", "both"), quiet_s=0.0
        )
    for what, result in results.items():
        figure(f"{what}: {result}")
        assert result.n_errors == 0, what
        assert result.ratio >= 0.95, what


@pytest.mark.parametrize("is_asking", [False, True], ids=["all saved", "asking"])
async def test_a_kill_of_llama_server_costs_what_was_not_on_disk(
    tmp_path: Path, figure: Figure, is_asking: bool
) -> None:
    """After some quiet nothing; while everybody is asking only what had not been written yet."""
    settings = None if is_asking else SAVES_SOON
    async with Stack(models.dense(tmp_path), tmp_path, settings=settings) as stack:
        result = await kill_server(stack, n_users=6, n_context=1600, is_asking=is_asking, quiet_s=None)
    figure(result)
    assert result.tally.n_errors == 0
    assert result.of_disk >= 0.95
    if not is_asking:
        assert result.tally.ratio >= 0.95


async def test_kills_of_llamaslot_leave_whole_snapshots_within_the_quota(
    tmp_path: Path, figure: Figure
) -> None:
    """It starts again each time, every snapshot can be restored, the quota holds at every moment."""
    model, quota_mib = models.dense(tmp_path), 5
    async with (
        Stack(model, tmp_path, quota=f"{quota_mib}MiB", settings=TELLS | SAVES_SOON) as stack,
        RealServer(model, stack.server.save_dir) as other,
    ):
        result = await kill_llamaslot(
            stack, other, quota_bytes=quota_mib << 20, n_kills=4, n_context=2500, longest_s=2.0
        )
    figure(result)
    assert result.faults == []
    assert result.n_restored > 0
    assert result.n_restored + result.n_gone == result.n_listed
    assert result.n_unlisted == 0
    assert result.n_saved > 0


async def test_the_quota_holds_while_slots_with_long_answers_are_saved(
    tmp_path: Path, figure: Figure
) -> None:
    """Room is made before each write, also for the answer's tokens, which only the written file tells."""
    quota_mib = 4
    async with Stack(models.dense(tmp_path), tmp_path, quota=f"{quota_mib}MiB") as stack:
        result = await work_within_quota(stack, quota_bytes=quota_mib << 20, n_users=6, n_turns=2)
    figure(
        f"{result.n_answers} answers, at most {result.most_bytes} of {result.quota_bytes} bytes, {result.faults}"
    )
    assert result.faults == []
    assert result.n_answers == 12
    assert result.most_bytes > result.quota_bytes / 2


async def test_a_client_that_leaves_a_prefill_frees_its_slot(tmp_path: Path, figure: Figure) -> None:
    """Also while another client streams all the time: the rest of its prompt is not computed. Those that leave at other
    stages are in ``tests/soak``, and in ``test_serve.py``."""
    stage: Stage = "prefill, not streaming"
    model = models.dense(tmp_path, layers=4, width=256)
    async with Stack(model, tmp_path, batch=512, slots=slots_for(stage), context=20_480) as stack:
        result = await leave(stack, stage, after_s=2.0)
    figure(result)
    assert result.n_busy == 0
    assert result.n_computed_late <= 0
    assert result.n_computed < result.n_prompt * 0.8


async def test_owners_ask_again_while_their_contexts_are_saved(tmp_path: Path, figure: Figure) -> None:
    """For a newcomer who takes the slot, and because it is idle: no context, 0.1 of all, is computed a second time."""
    async with Stack(models.dense(tmp_path, layers=4, width=128), tmp_path) as stack:
        result = await ask_while_saved(stack, n_context=2000, n_rounds=4, at_most_s=0.05)
    figure(result)
    assert result.n_errors == 0
    assert result.ratio >= 0.98


async def test_owners_ask_again_when_the_idle_save_is_due(tmp_path: Path, figure: Figure) -> None:
    """A save while nobody waits never costs those who come just then a context, 0.06 of all."""
    async with Stack(models.dense(tmp_path), tmp_path, settings=SAVES_SOON) as stack:
        result = await ask_at_idle_save(stack, n_context=2500, n_rounds=4, idle_save_s=0.3)
    figure(result)
    assert result.n_errors == 0
    assert result.ratio >= 0.98


async def test_an_exchanged_model_never_answers_from_the_old_ones_snapshots(
    tmp_path: Path, figure: Figure
) -> None:
    """Another GGUF of the same shape under the same path: every answer is that of the new model asked cold."""
    path = tmp_path / "model.gguf"
    shutil.copyfile(models.dense(tmp_path), path)
    other = models.dense(tmp_path, seed=2)
    async with Stack(path, tmp_path) as stack, RealServer(other, tmp_path / "cold") as cold:
        result = await exchange_model(stack, path, other, cold, n_users=3, n_context=1200)
    figure(result)
    assert result.n_all == 6
    assert result.are_right


async def test_requests_that_take_several_slots_cost_no_context(tmp_path: Path, figure: Figure) -> None:
    """n = 3 and a list of three prompts, between the turns of as many users as slots."""
    async with Stack(models.dense(tmp_path), tmp_path) as stack:
        result, n_answers = await ask_many(stack, n_context=2500, n_rounds=2)
    figure(f"{result}; {n_answers} answers to others")
    assert n_answers == 12
    assert result.n_errors == 0
    assert result.ratio >= 0.98
