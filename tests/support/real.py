"""``RealServer``: the real llama.cpp as a child process, for tests. Nothing of it is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

from tests.support.forked import ENGINE, Forked, forked, is_forking

START_TIMEOUT_S = 60.0


_taken: set[int] = set()


def free_port() -> int:
    """A port of 127.0.0.1 below those that Linux gives to outgoing connections, so that no client can take it before a
    server listens on it. The workers of a test run share the ports out, so no two of them get the same.
    """
    n_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    first = 20_000 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = random.SystemRandom().randrange(first, 32_000, n_workers)
        if port in _taken:
            continue
        _taken.add(port)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


class RealServer:
    """llama.cpp with one thread and the flags that are recommended behind llamaslot.

    ``context`` is per slot; ``env`` is added to its environment. ``restart`` and ``kill`` + ``start`` keep the port. An
    async context manager: entering starts it (/health answers 200 when that returns), leaving kills it.
    """

    def __init__(
        self,
        model: Path,
        save_dir: Path,
        *,
        slots: int = 4,
        context: int = 16384,
        batch: int | None = None,
        ubatch: int | None = None,
        draft: Path | None = None,
        port: int | None = None,
        saves: bool = True,
        extra: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.model, self.save_dir = model, save_dir
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._logs = tempfile.TemporaryDirectory(prefix="llamaslot-real-")
        self.log_path = Path(self._logs.name) / "llama.log"
        self._process: asyncio.subprocess.Process | Forked | None = None
        self._env = env or {}
        self._flags = [
            *("--port", str(self.port), "-np", str(slots), "-c", str(slots * context), "-t", "1"),
            *("--no-kv-unified", "--cache-ram", "0", "--no-cache-idle-slots", "--metrics", "--jinja"),
            *(("--slot-save-path", str(save_dir)) if saves else ()),
            *("--log-file", str(self.log_path)),
            *(("-b", str(batch)) if batch else ()),
            *(("-ub", str(ubatch)) if ubatch else ()),
            *(("-md", str(draft)) if draft else ()),
            *extra,
        ]

    async def __aenter__(self) -> RealServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.kill()
        self._logs.cleanup()

    @property
    def is_running(self) -> bool:
        """True if it was started and not stopped since."""
        return self._process is not None

    @property
    def pid(self) -> int:
        assert self._process is not None, "not running"
        return self._process.pid

    async def start(self) -> None:
        """Start it and wait until it serves. RuntimeError with the end of its log if it does not."""
        assert self._process is None, "runs already"
        self.save_dir.mkdir(parents=True, exist_ok=True)
        words = ("-m", str(self.model), *self._flags)
        if is_forking():
            self._process = forked(ENGINE, words, out=self.log_path, err=self.log_path, **self._env)
        else:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", ENGINE, *words),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                env={**os.environ, **self._env},
            )
        try:
            await self._until_healthy(self._process)
        except BaseException:
            await self.kill()
            raise

    async def _until_healthy(self, process: asyncio.subprocess.Process | Forked) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            # A fresh connection each time: a process that used the port before may have left a stale one.
            try:
                async with aiohttp.request("GET", f"{self.url}/health") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            if process.returncode is not None or time.monotonic() > deadline:
                raise RuntimeError(f"llama.cpp does not serve ({process.returncode=}):\n{self.log()[-3000:]}")
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """End it as an operator would (SIGTERM) and wait for that. Idempotent."""
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
        await self._reap()

    async def kill(self) -> None:
        """SIGKILL, and wait for its end. Idempotent."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
        await self._reap()

    async def _reap(self) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            if not isinstance(process, Forked) and process.stdin is not None:
                process.stdin.close()
            await process.wait()

    def save_into(self, directory: Path) -> None:
        """Set its ``--slot-save-path`` for its next start."""
        at = self._flags.index("--slot-save-path") + 1
        self.save_dir, self._flags[at] = directory, str(directory)

    async def restart(self, model: Path | None = None) -> None:
        """``stop`` and ``start`` on the same port, with another model if one is given."""
        await self.stop()
        self.model = model or self.model
        await self.start()

    def log(self) -> str:
        """What it has written so far, over all its starts."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    async def metrics(self) -> dict[str, float]:
        """The samples of /metrics by name, for instance ``llamacpp:prompt_tokens_total``."""
        async with aiohttp.request("GET", f"{self.url}/metrics", raise_for_status=True) as answer:
            lines = (await answer.text()).splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    async def slots(self) -> list[dict[str, Any]]:
        """GET /slots."""
        answer: list[dict[str, Any]] = await self._json("GET", "/slots")
        return answer

    async def post(self, path: str, body: Any) -> Any:
        """POST JSON on a fresh connection; the JSON of the answer. aiohttp.ClientResponseError if not 2xx."""
        return await self._json("POST", path, json=body)

    async def _json(self, method: str, path: str, **arguments: Any) -> Any:
        timeout = aiohttp.ClientTimeout(total=None)
        async with (
            aiohttp.ClientSession(timeout=timeout, raise_for_status=True) as session,
            session.request(method, self.url + path, **arguments) as answer,
        ):
            return await answer.json()
