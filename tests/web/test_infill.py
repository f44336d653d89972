"""/infill: known token by token, where llama-server can be found out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from llamaslot.fleet.infill_prompts import InfillPrompts
from tests.support.fake_model import FakeModel
from tests.support.inprocess import NATIVE, letters, served, spawn

INFILL = "/infill"
FILE = letters(1, 900)


def at(n: int, **more: Any) -> dict[str, Any]:
    """The cursor behind the first ``n`` characters."""
    return {"input_prefix": FILE[:n], "input_suffix": FILE[n:], "n_predict": 3, "temperature": 0, **more}


@pytest.mark.parametrize("stream", [True, False])
async def test_what_comes_before_the_cursor_is_found_again(tmp_path: Path, stream: bool) -> None:
    """The answer is that of a server that has computed everything; the counts are the server's own."""
    async with served(tmp_path, slots=2) as it:
        direct = await it.post(INFILL, at(605), to=it.fake.url)
        first = await it.post(INFILL, at(600, stream=stream))
        other = await it.ask(letters(2, 500))
        second = await it.post(INFILL, at(605, stream=stream))
        assert second.text == direct.text
        assert (first.slot, second.slot) == (first.slot, first.slot)
        assert other.slot != first.slot
        assert second.timings["cache_n"] == second.n_reused == 601
        assert second.timings["cache_n"] + second.timings["prompt_n"] == 903
        assert await it.count('completions_untokenized_total{kind="infill",reason="miscounted"}') == 0


async def test_its_context_comes_back_from_disk(tmp_path: Path) -> None:
    """As that of any other completion."""
    async with served(tmp_path, slots=1) as it:
        await it.post(INFILL, at(600))
        await it.ask(letters(2, 700))
        assert (await it.post(INFILL, at(605))).source == "snapshot"


async def test_how_parts_are_put_together_is_found_out_once(tmp_path: Path) -> None:
    """With four questions; again after a restart, when it may be another model."""
    async with served(tmp_path) as it:
        for _ in range(2):
            for n in (600, 610):
                assert (await it.post(INFILL, at(n))).status == 200
            assert len(it.fake.sent(INFILL)) in (7, 14)
            await it.fake.restart()


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input_prefix": "x"},
        {"input_prefix": 5, "input_suffix": "x"},
        {"input_prefix": "x", "input_suffix": "x", "input_extra": [{"filename": "x"}]},
        {"input_prefix": "x", "input_suffix": "", "prompt": "y" * 600},
    ],
)
async def test_what_llama_server_refuses(tmp_path: Path, body: Any, caplog: pytest.LogCaptureFixture) -> None:
    """In its words; none of that is called a request that was not recognized."""
    async with served(tmp_path, context=512, batch=128) as it:
        answer = await it.post(INFILL, body)
        direct = await it.post(INFILL, body, to=it.fake.url)
        assert "completions_untokenized_total{" not in str(await it.metrics())
    assert (answer.status, answer.json) == (direct.status, direct.json)
    assert answer.status == 400
    assert "does not know the tokens of a prompt" not in caplog.text


async def test_a_model_without_tokens_for_it(tmp_path: Path) -> None:
    """llama-server's 501, and no slot is prepared for it, however large the body is."""
    async with served(tmp_path, slots=1, model=FakeModel(has_infill=False)) as it:
        kept = await it.ask(FILE)
        answer = await it.post(INFILL, at(600))
        again = await it.ask(FILE + "more")
    assert answer.status == 501
    assert "Infill is not supported" in answer.error["message"]
    assert (again.slot, again.n_reused) == (kept.slot, 900)


async def test_a_server_that_cannot_be_found_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Is asked all the same, in a slot of its own; what costs what is said once, and counted each time."""
    async with served(tmp_path, batch=65536) as it:  # no prefix that was tried was cut
        with caplog.at_level(logging.WARNING):
            answers = [await it.post(INFILL, at(600)) for _ in range(2)]
        assert await it.count('completions_untokenized_total{kind="infill",reason="infill"}') == 2
    assert [answer.status for answer in answers] == [200, 200]
    assert caplog.text.count("does not know the tokens of a prompt") == 1
    assert FILE[:20] not in caplog.text


async def test_a_slot_that_falls_silent_while_it_is_found_out_holds_no_request_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given up, and all who wait are served without their tokens; after a while it is tried again."""
    monkeypatch.setattr("llamaslot.fleet.infill_prompts._LEARNING_S", 0.1)
    async with served(tmp_path, slots=2) as it:
        it.fake.hold()
        asked = [spawn(it.post(INFILL, at(n))) for n in (600, 605)]
        await it.until(lambda: "tries again in ten minutes" in caplog.text)
        monkeypatch.undo()
        it.fake.go()
        assert [(await answer).status for answer in asked] == [200, 200]
        await it.at_rest()
        assert await it.count("slots_wedged_total") == 1
        assert await it.count('completions_untokenized_total{kind="infill",reason="infill"}') == 2
        assert (await it.post(INFILL, at(610))).n_reused == 0
        context = it.pool.context
        assert context is not None
        assert isinstance(context.infill, InfillPrompts)
        context.infill._known_until = it.backend.now()
        n_reused = [(await it.post(INFILL, at(n))).n_reused for n in (610, 615)]
        assert n_reused == [0, 611]


async def test_whether_there_is_such_a_route_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error while nothing comes; asked again for the next request."""
    async with served(tmp_path) as it:
        hang = it.fake.faults.hang(INFILL)
        with monkeypatch.context() as patch:
            patch.setattr("llamaslot.llama.dry_run.QUICK_S", 0.05)
            answer = await it.post(INFILL, at(600))
        assert (answer.status, answer.error["type"]) == (503, "unavailable_error")
        hang.release()
        assert (await it.post(INFILL, at(600))).status == 200


async def test_a_server_that_counts_otherwise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From then on it is served without its tokens, until the server is met again."""
    async with served(tmp_path) as it:
        assert (await it.post(INFILL, at(600))).status == 200
        it.fake.faults.miscount = 1
        assert (await it.post(INFILL, at(610))).status == 200
        it.fake.faults.miscount = 0
        assert (await it.post(INFILL, at(620))).n_reused == 0
        assert await it.count('completions_untokenized_total{kind="infill",reason="miscounted"}') == 2
    assert "counted other tokens" in caplog.text


@pytest.mark.parametrize("more", [{"input_extra": [{"text": "x"}] * 513}, {"input_prefix": ["x"] * 513}])
async def test_more_parts_than_anybody_sends(tmp_path: Path, more: Any) -> None:
    """Are not asked about one by one."""
    async with served(tmp_path) as it:
        assert (await it.post(INFILL, at(600))).status == 200
        n_before = len(it.fake.sent("/tokenize"))
        assert (await it.post(INFILL, at(600, **more))).status == 200
        assert len(it.fake.sent("/tokenize")) <= n_before + 2
        assert await it.count('completions_untokenized_total{kind="infill",reason="shape"}') == 1


async def test_a_long_one_gives_way_to_others(tmp_path: Path) -> None:
    """What is long of it is computed ahead, as of any prompt."""
    async with served(tmp_path, {"prefill": {"chunk_threshold_s": 0.01}}) as it:
        await it.ask(letters(3, 100))
        it.fake.pace.prompt_token_s = 1e-4
        assert (await it.post(INFILL, at(600))).status == 200
        ahead = [seen for seen in it.fake.sent(NATIVE) if seen.body.get("n_predict") == 0]
        assert any(len(seen.body["prompt"]) == 902 for seen in ahead)


async def test_chunks_of_other_files_are_remembered_for_each_user(tmp_path: Path) -> None:
    """Where users are isolated nobody can tell by the time that another has the same file open."""
    chunk = letters(4, 500)
    async with served(tmp_path, {"cache": {"isolation": "per_user"}}) as it:
        n_asked = []
        for user in ("anna", "anna", "bert"):
            body = at(600, input_extra=[{"text": chunk}])
            assert (await it.post(INFILL, body, **{"x-llamaslot-user": user})).status == 200
            n_asked.append(sum(seen.body["content"] == chunk for seen in it.fake.sent("/tokenize")))
    assert n_asked == [1, 1, 2]
