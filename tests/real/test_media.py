"""Images and audio for a real llama.cpp: one that takes none, and one that has eyes."""

from __future__ import annotations

import base64
import struct
import zlib
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llamaslot.cache.ids import count
from llamaslot.store import read_slot_file
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


ASKED: list[tuple[str, dict[str, Any]]] = [
    *((CHAT, {"messages": user(SAID, {"type": kind, **part})}) for kind, part in PARTS.items()),
    ("/v1/messages", {"messages": user(SAID, ANTHROPIC)}),
    ("/v1/messages", {"messages": user({"type": "tool_result", "tool_use_id": "x", "content": [ANTHROPIC]})}),
    ("/v1/responses", {"input": user(*RESPONSES)}),
    (NATIVE, {"prompt": WITH_DATA}),
    (TEXT, {"prompt": WITH_DATA}),
]


async def test_each_is_refused_in_llama_servers_words(tmp_path: Path) -> None:
    """Before any slot is taken, also for a prompt that would be computed ahead."""
    settings = {"prefill": {"chunk_threshold_s": 0}}
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
        assert "completions_untokenized_total{" not in str(await it.metrics())


def png(red: int, green: int, blue: int) -> str:
    """An image of one colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 28, 28, 8, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes((red, green, blue)) * 28) * 28)
    return base64.b64encode(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    ).decode()


RED, BLUE = png(255, 0, 0), png(0, 0, 255)
TALK = letters(5, 900)


def seen(path: str, marker: str, image: str, *behind: str) -> dict[str, Any]:
    """A text, an image, and what comes behind it. ``marker``: of this process of llama-server."""
    url = f"data:image/png;base64,{image}"
    if path == NATIVE:
        whole = marker.join([TALK, "".join(("?", *behind))])
        return {"prompt": {"prompt_string": whole, "multimodal_data": [image]}, "n_predict": 4}
    kind = "input_text" if path == "/v1/responses" else "text"
    parts = {
        CHAT: {"type": "image_url", "image_url": {"url": url}},
        "/v1/responses": {"type": "input_image", "image_url": url},
        "/v1/messages": {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/png", "data": image},
        },
    }
    said = user({"type": kind, "text": TALK}, parts[path], *({"type": kind, "text": one} for one in behind))
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    return {"input" if path == "/v1/responses" else "messages": said, limit: 4}


@pytest.mark.parametrize("path", [CHAT, NATIVE, "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("kind", ["dense", "swa", "recurrent"])
async def test_it_goes_on_from_the_text_before_an_image(tmp_path: Path, kind: str, path: str) -> None:
    """The answer is the server's own, the text is computed ahead, and a turn that has the same image computes neither
    again. No slot with an image is saved."""
    flags = ("--mmproj", str(models.eyes(tmp_path)))
    settings = {"prefill": {"chunk_threshold_s": 0}}
    model = getattr(models, kind)(tmp_path)
    async with RealServer(model, tmp_path / "kv", slots=2, context=4096, extra=flags) as real:
        async with aiohttp.request("GET", real.url + "/props") as props:
            marker = (await props.json())["media_marker"]
        asked = [seen(path, marker, RED), seen(path, marker, RED, " more"), seen(path, marker, BLUE)]
        direct = [
            await real.post(path, body | {"temperature": 0, "cache_prompt": False, "id_slot": 1})
            for body in asked
        ]
        async with fronted(tmp_path, real.url, real.save_dir, settings) as it:
            answers = [await it.post(path, body | {"temperature": 0}) for body in asked]
            assert [said(path, answer.json) for answer in answers] == [said(path, one) for one in direct]
            assert 'reason="template"' not in str(await it.metrics())
            assert await it.count("reuse_mispredictions_total") == 0
            if path in (CHAT, NATIVE):
                reused = [answer.timings["cache_n"] for answer in answers]
                assert reused[0] == 0
                if kind == "dense":
                    assert reused[1] >= 903, "text and image"
                    assert 899 <= reused[2] <= 922, "the text"
            await it.backend.idle_save.save_all()
            for file in it.files():  # of /v1/messages, whose text is there before the image is
                assert count((await read_slot_file(file)).tokens) < 930


def said(path: str, answer: Any) -> str:
    if path == CHAT:
        return str(answer["choices"][0]["message"]["content"])
    if path == NATIVE:
        return str(answer["content"])
    if path == "/v1/messages":
        return str(answer["content"][0]["text"])
    return str(answer["output"][0]["content"][0]["text"])
