"""``llamaslot serve`` as systemd starts it: on a socket that outlives it, with a socket for its notifications."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.support.forked import die_with_parent
from tests.support.stack import program

# What systemd does between fork and exec: descriptor 3, and the variables.
_LAUNCH = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execvp(sys.argv[2], sys.argv[2:])
"""
PATIENCE_S = 60.0


class Activated:
    """A llamaslot with socket activation, readiness and watchdog. ``restart`` refuses no connection."""

    def __init__(
        self, directory: Path, settings: dict[str, Any], *, host: str = "127.0.0.1", watchdog_s: float = 60.0
    ) -> None:
        self.directory, self._watchdog_s = directory, watchdog_s
        self._listener = socket.create_server((host, 0), backlog=1024)
        self.port = int(self._listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notified.setblocking(False)
        self._notified.bind(str(directory / "notify"))
        self.told: list[str] = []
        self.config_path, self.log_path = directory / "config.yaml", directory / "llamaslot.log"
        self.settings = {
            "listen": {"port": self.port},
            "store": {"meta_dir": str(directory / "meta")},
            "log": {"format": "text"},
            **settings,
        }
        self.configure()
        self._process: asyncio.subprocess.Process | None = None

    def configure(self, **settings: Any) -> None:
        """Write its configuration, with these sections instead of those of before."""
        self.settings |= settings
        self.config_path.write_text(yaml.safe_dump(self.settings))

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    async def __aenter__(self) -> Activated:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            await self._process.wait()
        self._listener.close()
        self._notified.close()

    async def start(self) -> None:
        """Start it, and wait until it says that it is ready."""
        told = {"LISTEN_FDS": "1", "NOTIFY_SOCKET": str(self.directory / "notify")}
        told["WATCHDOG_USEC"] = str(int(self._watchdog_s * 1e6))
        words = [*program(), "serve", "--config", str(self.config_path)]
        with self.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", _LAUNCH, str(self._listener.fileno()), *words),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **told},
                pass_fds=(self._listener.fileno(),),
                preexec_fn=die_with_parent,
            )
        await self.until("READY=1")

    async def stop(self) -> int:
        """SIGTERM; the socket goes on listening. Returns the exit status."""
        assert self._process is not None
        self._process.terminate()
        status = await self._process.wait()
        self._process = None
        return status

    async def restart(self) -> None:
        assert await self.stop() == 0, self.log[-3000:]
        await self.start()

    async def reload(self) -> None:
        """SIGHUP, and wait until it says that it is ready again."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.told += self._notified.recv(4096).decode().splitlines()
        os.kill(self.pid, signal.SIGHUP)
        await self.until("RELOADING=1")
        await self.until("READY=1")

    async def until(self, line: str) -> None:
        """Wait for a notification. AssertionError with the log if none comes."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    lines = (await loop.sock_recv(self._notified, 4096)).decode().splitlines()
                    self.told += lines
                    if line in lines:
                        return
        except TimeoutError:
            raise AssertionError(f"no {line} in {self.told}:\n{self.log[-3000:]}") from None
