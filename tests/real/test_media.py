"""Images and audio for a real llama.cpp that takes none: its own error, and nobody loses anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import models
from tests.support.inprocess import CHAT, NATIVE, TEXT, fronted, letters
from tests.support.real import RealServer

pytestmark = pytest.mark.real

SAID = {"type": "text", "text": letters(1, 900)}
URL = "data:image/png;base64,aGk="
PARTS: dict[str, dict[str, Any]] = {
    "image_url": {"image_url": {"url": URL}},
    "input_audio": {"input_audio": {"data": "aGk=", "format": "wav"}},
    "video_url": {"video_url": {"url": "http://127.0.0.1:9/x.mp4"}},
    "file": {},
}
ANTHROPIC = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
RESPONSES = [{"type": "input_text", "text": "hi"}, {"type": "input_image", "image_url": URL}]
WITH_DATA = {"prompt_string": letters(2, 900) + "<__media__>", "multimodal_data": ["aGk="]}


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


ASKED = [
    *((CHAT, {"messages": user(SAID, {"type": kind, **part})}) for kind, part in PARTS.items()),
    ("/v1/messages", {"messages": user(SAID, ANTHROPIC)}),
    ("/v1/messages", {"messages": user({"type": "tool_result", "tool_use_id": "x", "content": [ANTHROPIC]})}),
    ("/v1/responses", {"input": user(*RESPONSES)}),
    (NATIVE, {"prompt": WITH_DATA}),
    (TEXT, {"prompt": WITH_DATA}),
]


async def test_each_is_refused_in_llama_servers_words(tmp_path: Path) -> None:
    """Before any slot is taken, also for a prompt that would be computed ahead."""
    settings = {"prefill": {"own_above_s": 0}}
    async with (
        RealServer(models.dense(tmp_path), tmp_path / "kv", slots=2, context=2048) as real,
        fronted(tmp_path, real.url, real.save_dir, settings) as it,
    ):
        await it.ask(letters(3, 300))
        held = [(slot["id"], slot.get("n_prompt_tokens")) for slot in await real.slots()]
        for path, body in ASKED:
            for stream in (False, True):
                direct = await it.post(path, {**body, "stream": stream}, to=real.url)
                answer = await it.post(path, {**body, "stream": stream})
                assert (answer.status, answer.json) == (direct.status, direct.json), (path, body)
                assert answer.status in (400, 500)
        assert [(slot["id"], slot.get("n_prompt_tokens")) for slot in await real.slots()] == held
        assert (await it.ask(letters(3, 300) + "more")).n_reused == 300
        assert "unrecognized_total{" not in str(await it.metrics())
