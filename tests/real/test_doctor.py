"""``llamaslot doctor`` on the real llama.cpp: what is started wrongly is found by its effect, what is right is not.

Each way to start it needs a server of its own: 12 s of CPU in all.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from llamaslot.cli.doctor.examine import examined as examined_by_config
from llamaslot.cli.doctor.examine import probed
from llamaslot.cli.doctor.findings import Finding
from llamaslot.config.load import Config
from tests.support import models
from tests.support.real import RealServer, free_port
from tests.support.stack import Stack

pytestmark = pytest.mark.real


def configured(directory: Path, url: str, **backend: str) -> Path:
    path = directory / "config.yaml"
    its = {"name": "gpu0", "url": url, "slot_save_path": str(directory / "kv"), **backend}
    settings = {
        "listen": {"port": free_port()},
        "backends": [its],
        "store": {"meta_dir": "meta", "quota": "1GiB"},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


async def examined(directory: Path, url: str, **backend: str) -> list[Finding]:
    (settings,) = Config.load(configured(directory, url, **backend)).backends
    return await probed(settings, None)


def found(findings: Sequence[Finding]) -> dict[str, str]:
    """What was found, with the flag that mends it."""
    return {its.check.removeprefix("gpu0: "): its.remedy for its in findings if its.is_found}


async def n_held(server: RealServer) -> list[int]:
    return [slot["n_prompt_tokens"] for slot in await server.slots()]


@pytest.mark.parametrize("kind", ["dense", "swa", "recurrent"])
async def test_nothing_is_found_where_nothing_is_wrong(tmp_path: Path, kind: str) -> None:
    """With the flags that docs/install.md recommends, while all slots hold contexts: they are there afterwards, and
    none of doctor's files."""
    model = {"dense": models.dense, "swa": models.swa, "recurrent": models.recurrent}[kind](tmp_path)
    kept = () if kind == "dense" else ("--ctx-checkpoints", "8")
    async with RealServer(
        model, tmp_path / "kv", slots=2, context=1536, batch=512, ubatch=512, extra=kept
    ) as server:
        texts = ["x" * 900, "y" * 700]
        for slot, text in enumerate(texts):
            await server.post("/completion", {"prompt": text, "n_predict": 3, "id_slot": slot})
        held = await n_held(server)
        findings = await examined(tmp_path, server.url)
        assert await n_held(server) == held
        for slot, text in enumerate(texts):
            timings = (
                await server.post("/completion", {"prompt": text + "z", "n_predict": 1, "id_slot": slot})
            )["timings"]
            assert timings["prompt_n"] <= 8
    assert found(findings) == {}
    assert {its.state for its in findings} == {"ok"}
    assert list((tmp_path / "kv").iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "check", "flag"),
    [
        (("--kv-unified", "--cache-idle-slots", "--cache-ram", "64"), "idle slots", "--no-kv-unified"),
        (("--cache-ram", "64"), "RAM cache", "--cache-ram 0"),
        (("--context-shift",), "context shift", "--context-shift"),
        (("--no-slots",), "connection", "--no-slots"),
        (("--api-key", "not-that-of-the-configuration"), "connection", "api_key_file"),
    ],
    ids=["unified", "RAM cache", "context shift", "no slots", "key"],
)
async def test_a_flag_that_is_wrong(tmp_path: Path, flags: Sequence[str], check: str, flag: str) -> None:
    """Each is found by what it does, and named."""
    async with RealServer(
        models.dense(tmp_path), tmp_path / "kv", slots=2, context=1024, batch=512, extra=flags
    ) as server:
        wrong = found(await examined(tmp_path, server.url))
    assert flag in wrong[check]
    # On a unified cache a saved slot is empty, and the RAM cache is what it was emptied into.
    assert (
        wrong.keys() <= {check, "save and restore", "RAM cache"}
        if check == "idle slots"
        else wrong.keys() == {check}
    )


async def test_no_directory_and_another_one(tmp_path: Path) -> None:
    """Without --slot-save-path, and with another one than slot_save_path."""
    (tmp_path / "kv").mkdir()
    shape: dict[str, Any] = {"slots": 2, "context": 1024, "batch": 512}
    async with RealServer(models.dense(tmp_path), tmp_path / "kv", saves=False, **shape) as server:
        assert found(await examined(tmp_path, server.url)) == {
            "slot files": "llama-server --slot-save-path DIR"
        }
        for slot in (0, 1):
            await server.post("/completion", {"prompt": "x" * 200, "n_predict": 3, "id_slot": slot})
        held = await n_held(server)
        findings = await examined(tmp_path, server.url)
        assert await n_held(server) == held, "what cannot be saved first is left alone"
        assert "could not be saved" in findings[-1].text
    async with RealServer(models.dense(tmp_path), tmp_path / "other", **shape) as server:
        wrong = found(await examined(tmp_path, server.url))
    assert wrong == {"slot files": f"llama-server --slot-save-path {tmp_path / 'kv'}"}


async def test_a_large_batch_and_many_checkpoints(tmp_path: Path) -> None:
    """Both are llama-server's defaults."""
    async with RealServer(models.swa(tmp_path), tmp_path / "kv", slots=2, context=2600) as server:
        wrong = found(await examined(tmp_path, server.url))
    assert wrong.keys() == {"batch", "checkpoints"}
    assert wrong["batch"].startswith("llama-server -b 512 -ub 512")
    assert wrong["checkpoints"] == "llama-server --ctx-checkpoints 8"


async def test_beside_a_running_answer(tmp_path: Path) -> None:
    """Only what is short is tried, in the idle slot; the answer goes on as it would have."""
    async with RealServer(
        models.dense(tmp_path), tmp_path / "kv", slots=2, context=4096, batch=512
    ) as server:
        body = {"prompt": "x" * 50, "n_predict": 3000, "id_slot": 1, "stream": True, "ignore_eos": True}
        async with (
            aiohttp.ClientSession() as client,
            client.post(server.url + "/completion", json=body) as answer,
        ):
            await answer.content.readany()
            findings = await examined(tmp_path, server.url)
            assert (await server.slots())[1]["is_processing"], "it has run all the time"
            assert b'"tokens_predicted":3000' in await answer.content.read()
    assert found(findings) == {}
    assert [its.check for its in findings if its.state == "skipped"] == [
        "gpu0: speed, context shift",
        "gpu0: idle slots",
    ]


async def test_a_running_llamaslot_is_asked(tmp_path: Path) -> None:
    """As a program: no slot is touched behind its back; exit codes and JSON are for programs."""
    async with Stack(
        models.dense(tmp_path),
        tmp_path,
        slots=2,
        context=1024,
        batch=512,
        settings={"log": {"level": "debug"}},
    ) as stack:
        chat = {"messages": [{"role": "user", "content": "x" * 2000}]}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "llamaslot", "doctor", "--json", "--config", stack.llamaslot.config_path),
            stdout=asyncio.subprocess.PIPE,
        )
        before = await stack.server.metrics()
        out, _ = await process.communicate()
        told = json.loads(out)
        assert (
            before["llamacpp:prompt_tokens_total"]
            == (await stack.server.metrics())["llamacpp:prompt_tokens_total"]
        )
        assert (
            process.returncode,
            [its for its in told["findings"] if its["state"] in ("fault", "warning")],
        ) == (0, [])
        states = {its["check"]: its["state"] for its in told["findings"]}
        assert states["gpu0: slots"] == "ok"
        assert states["gpu0: batch, context shift"] == "skipped"

        async with (
            aiohttp.ClientSession() as client,
            client.post(stack.url + "/v1/chat/completions", json=chat) as answer,
        ):
            assert answer.status == 400
        path = stack.llamaslot.config_path
        findings = await asyncio.to_thread(lambda: list(examined_by_config(path, Config.load(path), None)))
    (wrong,) = (its for its in findings if its.is_found)
    assert (wrong.check, wrong.remedy.startswith("llama-server -c 16384 ")) == ("context per slot", True)
