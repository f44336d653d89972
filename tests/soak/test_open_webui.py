"""Open WebUI itself, used in a browser, through llamaslot on the real llama.cpp.

``make open-webui`` installs it, and runs this; LLAMASLOT_OPEN_WEBUI is its program otherwise. It sends 25 kB of tools
with each question, one token each here.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support import models
from tests.support.figures import Figure
from tests.support.forked import die_with_parent
from tests.support.real import free_port
from tests.support.stack import Stack
from tests.web.test_page_browser import CHROMIUM, browsing

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
PROGRAM = Path(os.environ.get("LLAMASLOT_OPEN_WEBUI") or _CACHE / "llamaslot/open-webui/bin/open-webui")
COMPUTED = "llamacpp:prompt_tokens_total"
WHO = "admin@localhost"  # its user where nobody logs in

pytestmark = [
    pytest.mark.soak,
    pytest.mark.real,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not PROGRAM.exists(), reason="make open-webui installs it"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: make test-page installs it"),
]


@asynccontextmanager
async def serving(home: Path, url: str) -> AsyncIterator[str]:
    """Its address, when it serves."""
    port = free_port()
    process = start(home, url, port)
    try:
        async with asyncio.timeout(240), aiohttp.ClientSession() as session:
            while not await _is_up(session, f"http://127.0.0.1:{port}/health"):
                assert process.poll() is None, "it has ended"
                await asyncio.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        await asyncio.to_thread(process.wait)


def start(home: Path, url: str, port: int) -> subprocess.Popen[bytes]:
    """Everything that it would ask of others is switched off."""
    environment = {
        "HOME": str(home), "PATH": os.environ["PATH"], "DATA_DIR": str(home / "data"), "WEBUI_SECRET_KEY": "x" * 32,
        "OPENAI_API_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "anything", "ENABLE_OLLAMA_API": "False",
        "ENABLE_FORWARD_USER_INFO_HEADERS": "true", "FORWARD_USER_INFO_HEADER_USER_EMAIL": "x-llamaslot-user",
        "WEBUI_AUTH": "False", "OFFLINE_MODE": "True", "HF_HUB_OFFLINE": "1", "RAG_EMBEDDING_ENGINE": "openai",
        "ANONYMIZED_TELEMETRY": "False", "ENABLE_VERSION_UPDATE_CHECK": "False",
    }  # fmt: skip
    home.mkdir()
    with (home / "log").open("wb") as log:
        return subprocess.Popen(
            [PROGRAM, "serve", "--host", "127.0.0.1", "--port", str(port)],
            env=environment, cwd=home, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            preexec_fn=die_with_parent,
        )  # fmt: skip


async def _is_up(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url) as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


async def ended(stack: Stack, n: int) -> list[dict[str, Any]]:
    """The requests so far, oldest first, once there are ``n`` and none is in flight."""
    async with asyncio.timeout(120), aiohttp.ClientSession() as session:
        while True:
            async with session.get(stack.url + "/llamaslot/activity") as response:
                told = await response.json()
            if len(told["ended"]) >= n and not told["in_flight"]:
                return list(reversed(told["ended"]))
            await asyncio.sleep(0.5)


async def test_a_chat_in_its_page(tmp_path: Path, figure: Figure) -> None:
    """A question, and another one in the same chat, whose prompt is reused. Its title, tags and suggestions, asked for
    beside them, take no slot of the chat. Its users are told apart."""
    server: dict[str, Any] = {"slots": 3, "context": 3 * 49152, "extra": ("-n", "48", "--alias", "tiny")}
    async with (
        Stack(models.dense(tmp_path, layers=1), tmp_path, **server) as stack,
        serving(tmp_path / "home", stack.url) as url,
        browsing(url, "/") as (page, _),
    ):
        await page.locator('[role="dialog"] button').last.click()  # what is new
        await page.locator('[role="dialog"]').wait_for(state="detached")
        for text, n in (("Name three colours, please. " * 8, 4), ("And three more.", 6)):
            await page.locator("#chat-input").click()
            await page.keyboard.type(text)
            await page.keyboard.press("Enter")
            made = await ended(stack, n)
        computed = (await stack.server.metrics())[COMPUTED]
    assert {(its["status"], its["user"]) for its in made} == {(200, f"named:{WHO}")}
    first, second = [its for its in made if its["n_prompt"] > 8000]
    reuse = second["n_reused"] / second["n_prompt"]
    beside = [its["n_prompt"] for its in made if its not in (first, second)]
    figure(
        f"first prompt {first['n_prompt']}, follow-up {second['n_prompt']} tokens, {reuse:.4f} reused; beside them "
        f"prompts of {beside}; {computed:.0f} computed"
    )
    assert reuse >= 0.98
