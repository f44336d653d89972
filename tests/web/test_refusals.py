"""What llama-server refuses before it takes a slot is refused in its words, and in llamaslot's own while it is away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.inprocess import CHAT, NATIVE, TEXT, letters, served


@pytest.mark.parametrize("body", [{}, {"prompt": None}, {"prompt": [[None]]}, {"prompt": {"a": 1}}])
@pytest.mark.parametrize("path", [TEXT, NATIVE])
async def test_no_prompt_is_refused_at_once(tmp_path: Path, path: str, body: Any) -> None:
    """In llama-server's words, also while all slots are at work."""
    async with served(tmp_path, slots=1) as it, it.busy():
        answer = await it.post(path, body)
        direct = await it.post(path, body, to=it.fake.url)
        it.fake.go()
    assert answer.status == direct.status == 400
    assert answer.json == direct.json


async def test_without_llama_server_what_is_no_json_is_still_a_fault_of_the_client(tmp_path: Path) -> None:
    """In llamaslot's own words: a 503 would have it sent again and again."""
    async with served(tmp_path) as it:
        await it.fake.kill()
        for path in (CHAT, "/infill"):
            answer = await it.send("POST", path, data=b'{"messages": ')
            assert answer.status == 400
        await it.fake.start()


async def test_a_nul_behind_a_body_hides_nothing_from_llamaslot(tmp_path: Path) -> None:
    """llama-server would read on to the NUL, and take a slot: it is not asked."""
    async with served(tmp_path) as it:
        n_before = len(it.fake.requests)
        answer = await it.send("POST", NATIVE, data=b'{"prompt": "x"}\0')
        assert answer.status == 400
        assert len(it.fake.requests) == n_before


async def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    """As llama-server does it."""
    async with served(tmp_path) as it:
        data = b'\xef\xbb\xbf{"prompt": "' + letters(1, 50).encode() + b'", "n_predict": 1}'
        assert (await it.send("POST", NATIVE, data=data)).status == 200


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("fault", [{"temperature": "hot"}, {"max_tokens": 2**31}, {"n_predict": -5}])
async def test_a_wrong_field_is_refused_while_all_slots_are_at_work(
    tmp_path: Path, fault: dict[str, Any], is_stream: bool
) -> None:
    """It waits for no slot: a stream that has begun could only tell it as an event."""
    body = {"prompt": letters(1, 600), "stream": is_stream, **fault}
    async with served(tmp_path, {"stream": {"keepalive_s": 0.01}}, slots=1) as it, it.busy():
        answer = await it.post(NATIVE, body)
        direct = await it.post(NATIVE, body, to=it.fake.url)
        it.fake.go()
    assert answer.status == direct.status == 400
    assert answer.json == direct.json
