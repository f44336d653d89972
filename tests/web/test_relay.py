"""Answers reach the client as llama-server wrote them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.inprocess import CHAT, NATIVE, TEXT, letters, served


@pytest.mark.parametrize("path", [CHAT, TEXT, NATIVE, "/chat/completions", "/completions"])
@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_is_what_the_server_sent(tmp_path: Path, path: str, stream: bool) -> None:
    """Byte by byte, streaming or not, on every route of a completion."""
    text = letters(1, 300)
    async with served(tmp_path) as it:
        asked = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
        answer = await it.post(path, {**asked, "stream": stream, "n_predict": 8, "max_tokens": 8})
        sent = it.fake.sent(path)[-1].answer
    assert answer.status == 200
    assert answer.raw == bytes(sent)
    assert len(answer.raw) > 300
