"""Answers reach the client as llama-server words them, however they were asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.answers import untimed, without_progress
from tests.support.inprocess import CHAT, NATIVE, TEXT, letters, served

ROUTES = [CHAT, TEXT, NATIVE, "/chat/completions", "/completions"]


def asked(path: str, text: str, **more: Any) -> dict[str, Any]:
    what = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
    return {**what, "n_predict": 8, "max_tokens": 8, **more}


@pytest.mark.parametrize("path", ROUTES)
async def test_a_stream_is_what_the_server_sent(tmp_path: Path, path: str) -> None:
    """Byte by byte, on every route of a completion, but for the events of progress that nobody has asked for."""
    async with served(tmp_path) as it:
        answer = await it.post(path, asked(path, letters(1, 300), stream=True))
        sent = bytes(it.fake.sent(path)[-1].answer)
    assert answer.status == 200
    assert answer.raw == without_progress(sent)
    assert b"prompt_progress" in sent
    assert len(answer.raw) > 300


@pytest.mark.parametrize("path", ROUTES)
async def test_a_stream_with_progress_is_what_the_server_sent(tmp_path: Path, path: str) -> None:
    """Whoever asks for ``return_progress`` gets every event."""
    async with served(tmp_path, batch=100) as it:
        answer = await it.post(path, asked(path, letters(1, 300), stream=True, return_progress=True))
        sent = bytes(it.fake.sent(path)[-1].answer)
    assert answer.raw == sent
    told = [event["prompt_progress"]["processed"] for event in answer.events if "prompt_progress" in event]
    assert told[:3] == [0, 100, 200]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("chunk_threshold_s", [0, 3600])
async def test_an_answer_in_one_piece_is_what_the_server_says_without_a_stream(
    tmp_path: Path, path: str, chunk_threshold_s: float
) -> None:
    """It was asked for as a stream, and has every field that the server gives when it is asked directly."""
    async with served(tmp_path, {"prefill": {"chunk_threshold_s": chunk_threshold_s}}) as it:
        body = asked(path, letters(1, 300))
        answer = await it.post(path, body)
        assert it.fake.sent(path)[-1].body["stream"] is True
        again = {**body, "id_slot": answer.slot, "cache_prompt": False}
        direct = await it.post(path, again, to=it.fake.url)
    assert (answer.status, untimed(answer.json)) == (200, untimed(direct.json))
    assert answer.headers["Content-Type"] == direct.headers["Content-Type"]
    assert answer.timings["predicted_n"] == 8


@pytest.mark.parametrize(
    ("path", "more"),
    [
        (CHAT, {"logprobs": True, "top_logprobs": 2}),
        (TEXT, {"logprobs": 1}),
        (NATIVE, {"n_probs": 2}),
        (NATIVE, {"return_tokens": True}),
        (NATIVE, {"unheard_of": 1}),
    ],
)
async def test_what_no_stream_can_give_is_passed_through(tmp_path: Path, path: str, more: Any) -> None:
    """It is asked for in one piece, and comes byte by byte."""
    async with served(tmp_path) as it:
        answer = await it.post(path, asked(path, letters(1, 300), **more))
        seen = it.fake.sent(path)[-1]
    assert not seen.body.get("stream")
    assert answer.raw == bytes(seen.answer)
    assert len(answer.raw) > 300
