"""``llamaslot run`` under a supervisor: a stand-in for llama-swap, which is not on any package index.

As llama-swap's ``internal/process``: a process group of its own; ``GET /health`` until it answers 200; SIGTERM to the
whole group, and SIGKILL to it ``KILL_S`` later; the command's output is read to its end.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from tests.support.forked import die_with_parent
from tests.support.inprocess import spawn
from tests.support.real import free_port
from tests.support.stack import START_S, program

KILL_S = 10.0
ENGINE = (sys.executable, "-m", "llamaslot.llama.managed.embedded")
CHAT = "/v1/chat/completions"


def tagged(tag: str) -> list[int]:
    """The processes, except zombies, that have ``tag`` in their environment: all that a command has started."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and tag.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # ended, or a zombie
    return found


class Supervised:
    """One ``cmd:``. ``line``: llama-server's command line, after ``--``; ``options``: those of ``llamaslot run``."""

    def __init__(
        self, line: Sequence[str], store: Path, *options: str, environment: dict[str, str] | None = None
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.tag = uuid.uuid4().hex
        self._words = [*program(), "run", "--store", str(store), *options, "--", *line]
        self._environment = environment or {}
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[bytes] | None = None
        self.output = ""  # of all its lives

    @classmethod
    def of(cls, model: Path, store: Path, *options: str, flags: Sequence[str] = ()) -> Supervised:
        """The embedded engine with 2 slots. Its own command line has the port as ``${PORT}``."""
        it = cls((), store, *options)
        it._words += [
            *ENGINE,
            "-m",
            str(model),
            "-np",
            "2",
            "-c",
            "16384",
            "-t",
            "1",
            "--port",
            str(it.port),
            *flags,
        ]
        return it

    @classmethod
    def serving(cls, directory: Path, backends: list[dict[str, Any]], **settings: Any) -> Supervised:
        """``llamaslot serve`` with these backends, instead of ``llamaslot run``."""
        it = cls((), directory)
        config = {
            "listen": {"port": it.port},
            "log": {"format": "text"},
            "store": {"meta_dir": str(directory / "meta")},
            **settings,
        }
        path = directory / "config.yaml"
        path.write_text(yaml.safe_dump({**config, "backends": backends}))
        it._words = [*program(), "serve", "--config", str(path)]
        return it

    async def __aenter__(self) -> Supervised:
        await self.start()
        await self.healthy()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process is not None:
            await self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None, "it does not run"
        return self._process.pid

    @property
    def offspring(self) -> list[int]:
        """All its processes except llamaslot itself."""
        return [pid for pid in tagged(self.tag) if pid != self.pid]

    async def start(self) -> None:
        assert self._process is None, "it runs already"
        self._process = await asyncio.create_subprocess_exec(
            *self._words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "TESTED": self.tag, **self._environment},
            process_group=0,
            preexec_fn=die_with_parent,
        )
        assert self._process.stdout is not None
        self._reading = spawn(self._process.stdout.read())

    async def healthy(self) -> list[int]:
        """Wait until ``/health`` answers 200. Returns the statuses that it answered until then."""
        assert self._process is not None
        seen = list[int]()
        async with asyncio.timeout(START_S):
            while True:
                if self._process.returncode is not None:
                    raise AssertionError(f"it ended with {await self.ended()}:\n{self.output[-3000:]}")
                try:
                    async with aiohttp.request("GET", self.url + "/health") as answer:
                        seen.append(answer.status)
                        if answer.status == 200:
                            return seen
                except (aiohttp.ClientError, OSError):
                    pass
                await asyncio.sleep(0.05)

    async def stop(self) -> int:
        """SIGTERM to the group. Returns the exit status; AssertionError if that takes ``KILL_S``."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            async with asyncio.timeout(KILL_S):
                return await self.ended()
        except TimeoutError:
            os.killpg(self._process.pid, signal.SIGKILL)
            await self.ended()
            raise AssertionError(f"it was killed:\n{self.output[-3000:]}") from None

    async def kill(self) -> None:
        """SIGKILL to the group, and wait until nothing holds its output any more."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        await self.ended()

    async def ended(self) -> int:
        """Wait until it has ended and its output is read to the end. Returns the exit status."""
        assert self._process is not None
        assert self._reading is not None
        status = await self._process.wait()
        self.output += (await self._reading).decode(errors="replace")
        self._process = self._reading = None
        return status

    async def chat(self, messages: list[dict[str, str]], n: int = 8, **more: Any) -> dict[str, Any]:
        """Ask for one answer in one piece."""
        body = {"messages": messages, "max_tokens": n, "temperature": 0, **more}
        async with aiohttp.request("POST", self.url + CHAT, json=body) as answer:
            assert answer.status == 200, await answer.text()
            return dict(await answer.json())

    async def get(self, path: str) -> tuple[int, Any]:
        """Status and body."""
        async with aiohttp.request("GET", self.url + path) as answer:
            is_json = answer.content_type == "application/json"
            return answer.status, await answer.json() if is_json else await answer.text()

    async def computed(self) -> float:
        """Prompt tokens that llama-server has computed since its start, by its own counter."""
        async with aiohttp.request("GET", self.url + "/metrics", raise_for_status=True) as answer:
            lines = (await answer.text()).splitlines()
        (line,) = (line for line in lines if line.startswith("llamacpp:prompt_tokens_total "))
        return float(line.split()[1])
