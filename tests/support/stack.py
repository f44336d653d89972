"""All of it as a user runs it: a real llama.cpp server, and ``llamaslot serve`` as a process in front of it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import aiohttp
import yaml

from tests.support.forked import LLAMASLOT, Forked, die_with_parent, forked, is_forking
from tests.support.real import RealServer, free_port

START_S = 60.0  # for a process to answer, on a busy machine
STOP_S = 90.0


def program() -> list[str]:
    """The installed ``llamaslot`` command: the entry point that users have."""
    script = Path(sysconfig.get_path("scripts"), "llamaslot")
    return [str(script)] if script.exists() else [sys.executable, "-m", "llamaslot.cli"]


class Proxy:
    """``llamaslot serve`` as a subprocess: started, stopped by SIGTERM, killed, started again on the same port."""

    def __init__(
        self, server: RealServer, directory: Path, *, quota: str, settings: Mapping[str, Any] | None
    ) -> None:
        self.directory = directory
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.config_path = directory / "config.yaml"
        self.log_path = directory / "llamaslot.log"
        config: dict[str, Any] = {
            "listen": {"host": "127.0.0.1", "port": self.port},
            "backends": [{"name": "gpu0", "url": server.url, "slot_save_path": str(server.save_dir)}],
            "store": {"quota": quota, "meta_dir": str(directory / "meta")},
            "log": {"format": "text"},
        }
        for section, values in (settings or {}).items():
            if section == "backends":
                config["backends"][0].update(values[0])
            elif isinstance(values, Mapping):
                config.setdefault(section, {}).update(values)
            else:
                config[section] = values
        directory.mkdir(parents=True, exist_ok=True)
        self.config_path.write_text(yaml.safe_dump(config, sort_keys=False))
        self._process: asyncio.subprocess.Process | Forked | None = None
        self._log: IO[bytes] | None = None

    def prewarm(self, *bodies: Mapping[str, Any]) -> None:
        """Name these chat bodies in its configuration, for its next start."""
        config = yaml.safe_load(self.config_path.read_text())
        config["prewarm"] = [f"body-{i}.json" for i in range(len(bodies))]
        for name, body in zip(config["prewarm"], bodies, strict=True):
            (self.directory / name).write_text(json.dumps(body))
        self.config_path.write_text(yaml.safe_dump(config, sort_keys=False))

    @property
    def pid(self) -> int:
        assert self._process is not None, "llamaslot is not running"
        return self._process.pid

    @property
    def log(self) -> str:
        """All that llamaslot has logged so far, over its restarts."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    async def start(self, *, wait: bool = True) -> None:
        """Start it; with ``wait`` until ``/health`` answers 200. AssertionError with its log if it ends instead."""
        assert self._process is None, "llamaslot runs already"
        words = ("serve", "--config", str(self.config_path))
        if is_forking():
            self._process = forked(LLAMASLOT, words, out=self.log_path, err=self.log_path)
        else:
            self._process = await self._program(words)
        if wait:
            await self.healthy()

    async def _program(self, words: Sequence[str]) -> asyncio.subprocess.Process:
        self._log = self.log_path.open("ab")
        return await asyncio.create_subprocess_exec(
            *program(),
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=self._log,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            preexec_fn=die_with_parent,
        )

    async def listens(self) -> None:
        """Wait until ``/health`` answers anything."""
        await self.healthy(None)

    async def healthy(self, status: int | None = 200) -> None:
        """Wait until ``/health`` answers ``status``; None: any."""
        assert self._process is not None
        async with aiohttp.ClientSession() as session, asyncio.timeout(START_S):
            while True:
                if self._process.returncode is not None:
                    raise AssertionError(
                        f"llamaslot ended with {self._process.returncode}:\n{self.log[-3000:]}"
                    )
                try:
                    async with session.get(self.url + "/health") as response:
                        if status in (None, response.status):
                            return
                except (aiohttp.ClientError, OSError):
                    pass
                await asyncio.sleep(0.05)

    async def stop(self, *, timeout_s: float = STOP_S) -> int:
        """SIGTERM, wait, return the exit status; SIGKILL and an AssertionError if it does not end in time."""
        assert self._process is not None, "llamaslot is not running"
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(timeout_s):
                status = await self._process.wait()
        except TimeoutError:
            await self.kill()
            raise AssertionError(
                f"llamaslot did not end {timeout_s} s after SIGTERM:\n{self.log[-3000:]}"
            ) from None
        self._ended()
        return status

    async def kill(self) -> None:
        """SIGKILL: what a power cut or the OOM killer does."""
        assert self._process is not None, "llamaslot is not running"
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        self._ended()

    def _ended(self) -> None:
        self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None


class Stack:
    """A llama-server and a llamaslot in front of it; with ``alone`` only the llama-server, for comparison.

    ``url`` is where clients ask. An async context manager: both are started, and ended at the end. A failure inside
    prints the end of llamaslot's log, and a traceback in the log is a failure.
    """

    def __init__(
        self,
        model: Path,
        directory: Path,
        *,
        alone: bool = False,
        quota: str = "4GiB",
        settings: Mapping[str, Any] | None = None,
        save_dir: Path | None = None,
        **server: Any,
    ) -> None:
        self.server = RealServer(model, save_dir or directory / "kv", **server)
        self.alone, self.directory = alone, directory
        self._quota, self._settings = quota, settings
        self._proxy: Proxy | None = None

    @property
    def llamaslot(self) -> Proxy:
        assert self._proxy is not None, "only llama-server was asked for, or it is not started yet"
        return self._proxy

    @property
    def url(self) -> str:
        return self.server.url if self.alone else self.llamaslot.url

    async def __aenter__(self) -> Stack:
        await self.server.__aenter__()
        try:
            if not self.alone:
                self._proxy = Proxy(
                    self.server, self.directory / "front", quota=self._quota, settings=self._settings
                )
                await self._proxy.start()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        if kind is not None and self._proxy is not None:
            print(f"--- llamaslot's log, its last lines:\n{self._proxy.log[-8000:]}\n---")
        await self._end()
        if kind is None and self._proxy is not None:
            before, found, rest = self._proxy.log.partition("Traceback")
            assert not found, f"llamaslot has made a mistake:\n{before[-500:]}{found}{rest[:3000]}"

    async def _end(self) -> None:
        try:
            if self._proxy is not None and self._proxy.is_running:
                await self._proxy.stop()
        finally:
            await self.server.__aexit__(None, None, None)

    async def status(self) -> dict[str, Any]:
        """llamaslot's own state: slots, snapshots, queue."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(self.llamaslot.url + "/llamaslot/status") as response,
        ):
            return dict(await response.json())

    async def journal(self) -> dict[str, Any]:
        """llamaslot's last decisions."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(self.llamaslot.url + "/llamaslot/journal") as response,
        ):
            return dict(await response.json())

    async def own_metrics(self) -> dict[str, float]:
        """``/llamaslot/metrics``: every sample by its name with labels, without that of the only backend."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(self.llamaslot.url + "/llamaslot/metrics") as response,
        ):
            lines = (await response.text()).splitlines()
        return {
            without_backend(name): float(value)
            for name, _, value in (line.rpartition(" ") for line in lines if line and line[0] != "#")
        }


def without_backend(sample: str) -> str:
    """The name of a sample without the labels ``backend`` and ``model``, which are the same in all samples of one
    backend.
    """
    return re.sub(r'(backend|model)="[^"]*",?', "", sample).replace("{}", "").replace(",}", "}")


def size_of(path: Path) -> int:
    """The size of a file in bytes, 0 if it has just gone."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
