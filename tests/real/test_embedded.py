"""The embedded engine: the real llama.cpp in a process that ends when it should."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llamaslot.llama.managed.process import Backoff, ManagedConfig, ManagedServer, free_port
from llamaslot.tasks import TaskOwner
from tests.support import models
from tests.support.real import RealServer

pytestmark = pytest.mark.real

TEXT = "the quick brown fox jumps over a lazy dog while seven users wait. " * 20


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the generated models lie."""
    return tmp_path_factory.mktemp("models")


async def embedded(*flags: str, stdin: int | None = asyncio.subprocess.PIPE) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "llamaslot.llama.managed.embedded", *flags),
        stdin=stdin,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )


async def last_line(process: asyncio.subprocess.Process) -> str:
    """The last line on standard error, once the process has ended."""
    _, stderr = await process.communicate()
    return stderr.decode().splitlines()[-1]


@pytest.mark.parametrize("kind", [models.dense, models.swa, models.recurrent, models.hybrid])
async def test_every_kind_answers_saves_and_restores(kind: Any, directory: Path, tmp_path: Path) -> None:
    """Whole printable answers of the full length, and a restored slot that computes only what is new."""
    async with RealServer(kind(directory), tmp_path / "kv", slots=2, context=4096) as server:
        ask = {"prompt": TEXT, "n_predict": 16, "temperature": 0, "cache_prompt": True}
        first = await server.post("/completion", ask | {"id_slot": 0})
        assert first["content"].isascii()
        assert first["content"].isprintable()
        assert first["tokens_predicted"] == 16
        assert first["timings"]["prompt_n"] == len(TEXT)  # one token per byte, no BOS
        saved = await server.post("/slots/0?action=save", {"filename": "a.kv"})
        assert saved["n_saved"] == len(TEXT) + 15
        assert stat.S_IMODE((tmp_path / "kv" / "a.kv").stat().st_mode) == 0o600
        await server.restart()
        restored = await server.post("/slots/1?action=restore", {"filename": "a.kv"})
        assert restored["n_restored"] == saved["n_saved"]
        longer = TEXT + first["content"] + "and more"
        second = await server.post("/completion", ask | {"id_slot": 1, "prompt": longer})
        # The sliding window goes back to its last checkpoint, 5 tokens before the end of the first prompt.
        reused = len(TEXT) - 5 if kind is models.swa else saved["n_saved"]
        assert second["timings"]["cache_n"] == reused
        assert (await server.metrics())["llamacpp:prompt_tokens_total"] == len(longer) - reused
        assert len(await server.slots()) == 2


async def test_chat_with_tools(directory: Path, tmp_path: Path) -> None:
    """The template renders tools, calls and their answers; a forced call comes back as one or runs out of tokens."""
    tool = {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
    }
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "reasoning_content": "Well.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]
    async with RealServer(models.dense(directory), tmp_path / "kv") as server:
        prompt = (await server.post("/apply-template", {"messages": messages, "tools": [tool]}))["prompt"]
        assert '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call><|im_end|>' in prompt
        assert "<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n" in prompt
        assert "<think>\nWell.\n</think>" in prompt
        later = [*messages, {"role": "user", "content": "Go on."}]
        prompt = (await server.post("/apply-template", {"messages": later, "tools": [tool]}))["prompt"]
        assert "Well." not in prompt
        answer = await server.post(
            "/v1/chat/completions", {"messages": messages, "tools": [tool], "max_tokens": 8}
        )
        assert answer["usage"]["completion_tokens"] == 8
        assert answer["choices"][0]["finish_reason"] == "length"


async def test_speculative_decoding(directory: Path, tmp_path: Path) -> None:
    """With a draft model the greedy answer is the same, and some drafts are accepted."""
    ask = {"prompt": TEXT, "n_predict": 24, "temperature": 0}
    model = models.dense(directory)
    async with RealServer(model, tmp_path / "kv") as server:
        alone = await server.post("/completion", ask)
    async with RealServer(model, tmp_path / "kv", draft=models.draft(directory)) as server:
        drafted = await server.post("/completion", ask)
    assert drafted["content"] == alone["content"]
    assert drafted["timings"]["draft_n_accepted"] > 0


async def test_models_of_one_shape_answer_differently(directory: Path, tmp_path: Path) -> None:
    """Another seed is another model, also under the same path after a restart."""
    ask = {"prompt": TEXT, "n_predict": 24, "temperature": 0}
    async with RealServer(models.dense(directory), tmp_path / "kv") as server:
        first = await server.post("/completion", ask)
        await server.restart(models.dense(directory, seed=2))
        second = await server.post("/completion", ask)
    assert first["content"] != second["content"]


async def test_it_ends_with_its_standard_input(directory: Path) -> None:
    """At the end of standard input it ends at once, with exit code 0."""
    port = free_port()
    process = await embedded("-m", str(models.dense(directory)), "--port", str(port), "-c", "1024")
    assert process.stdin is not None
    assert process.stderr is not None
    async for line in process.stderr:
        if b"listening on" in line:
            break
    process.stdin.close()
    await process.communicate()
    assert process.returncode == 0


async def test_it_ends_on_sigterm(directory: Path, tmp_path: Path) -> None:
    """SIGTERM ends it, cleanly once the model is loaded: /health may say so a moment before."""
    server = RealServer(models.dense(directory), tmp_path / "kv")
    async with server:
        process = server._process
        assert process is not None
        await server.stop()
        assert process.returncode in (0, -signal.SIGTERM)


async def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    """One line names the file; the exit code is 1."""
    process = await embedded("-m", str(tmp_path / "no.gguf"))
    assert (
        await last_line(process) == f"llamaslot embedded: cannot load model {tmp_path}/no.gguf: no such file"
    )
    assert process.returncode == 1


async def test_a_model_that_is_none(tmp_path: Path) -> None:
    """A file that llama.cpp refuses is named in the last line."""
    (tmp_path / "bad.gguf").write_text("not a model")
    process = await embedded("-m", str(tmp_path / "bad.gguf"), "--port", "0")
    assert f"cannot load model {tmp_path}/bad.gguf" in await last_line(process)
    assert process.returncode == 1


async def test_a_port_that_is_taken(directory: Path, tmp_path: Path) -> None:
    """The port is what the last line blames then."""
    async with RealServer(models.dense(directory), tmp_path / "kv") as server:
        process = await embedded("-m", str(models.dense(directory)), "--port", str(server.port), "-c", "1024")
        assert await last_line(process) == (
            f"llamaslot embedded: cannot listen on 127.0.0.1:{server.port}: Address already in use"
        )


@pytest.mark.parametrize(
    ("error", "said"),
    [("ModuleNotFoundError", "pipx inject llamaslot xllamacpp"), ("ImportError", "apt install libgomp1")],
)
async def test_a_missing_engine(directory: Path, tmp_path: Path, error: str, said: str) -> None:
    """Without the wheel, or a library that it needs, one line says what to install."""
    (tmp_path / "xllamacpp.py").write_text(f"raise {error}('not here')")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "llamaslot.llama.managed.embedded", "-m", str(models.dense(directory))),
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert said in await last_line(process)
    assert process.returncode == 1


async def test_help_names_the_flags() -> None:
    """`--help` names every flag, as llama-server's does."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "llamaslot.llama.managed.embedded", "--help"), stdout=asyncio.subprocess.PIPE
    )
    text = (await process.communicate())[0].decode()
    assert {"--slot-save-path", "--no-kv-unified", "--cache-ram", "-sps", "-md"} <= set(
        text.replace(",", " ").split()
    )


async def test_a_managed_server_comes_back_after_sigkill(directory: Path, tmp_path: Path) -> None:
    """Killed, it serves again on the same address; cancelled, it is gone."""
    restarts: asyncio.Queue[float] = asyncio.Queue()

    async def at_once(delay_s: float) -> None:
        restarts.put_nowait(delay_s)

    server = ManagedServer(
        ManagedConfig(model=str(models.dense(directory)), slots=2, context=4096),
        name="gpu0",
        slot_save_path=tmp_path / "kv",
        log_path=tmp_path / "llama.log",
        api_key="secret",
        backoff=Backoff(first_s=1.0),
        sleep=at_once,
    )
    tasks = TaskOwner()
    tasks.spawn(server.run(), "managed server")
    await serves(server)
    first = server.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    assert await restarts.get() == 1.0
    await serves(server)
    assert server.n_starts == 2
    assert server.pid != first
    await tasks.close()
    with pytest.raises(aiohttp.ClientConnectorError):
        await props(server)


async def props(server: ManagedServer) -> dict[str, Any]:
    headers = {"Authorization": "Bearer secret"}
    async with aiohttp.request(
        "GET", f"{server.url}/props", headers=headers, raise_for_status=True
    ) as answer:
        result: dict[str, Any] = await answer.json()
        return result


async def serves(server: ManagedServer) -> None:
    """Wait until it answers, with the slots that it was told to have."""
    async with asyncio.timeout(60):
        while True:
            try:
                assert (await props(server))["total_slots"] == 2
                return
            except aiohttp.ClientError:
                await asyncio.sleep(0.02)
