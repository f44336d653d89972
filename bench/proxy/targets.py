"""What is measured: llama-server's stand-in directly, and behind llamaslot and other proxies, each with its own.

CPU time is what the kernel counts for all threads of a process and its children (``schedstat``, in nanoseconds).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

Kind = Literal["direct", "llamaslot", "against", "nginx", "aiohttp", "litellm"]
KINDS: tuple[Kind, ...] = ("direct", "llamaslot", "against", "nginx", "aiohttp", "litellm")

_START_S = 120.0
REPOSITORY = Path(__file__).parents[2]

_NGINX = """\
daemon off; master_process off; pid {tmp}/nginx.pid; error_log {tmp}/error.log;
worker_rlimit_nofile 65536;
events {{ worker_connections 16384; }}
http {{
  access_log off; client_max_body_size 0; client_body_buffer_size 2m; keepalive_requests 1000000;
  client_body_temp_path {tmp}/body; proxy_temp_path {tmp}/proxy; fastcgi_temp_path {tmp}/f; uwsgi_temp_path {tmp}/u;
  scgi_temp_path {tmp}/s;
  upstream server {{ server 127.0.0.1:{upstream}; }}  # kept connections: 502s, as llama-server closes them
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://server; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
      proxy_read_timeout 600s;
    }}
  }}
}}
"""


class Missing(Exception):
    """A proxy that is not installed here; the message says how to have it."""


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """For a child. What was compiled is kept, as where users run it: else each start compiles llamaslot anew."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | {**more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def processes(pid: int) -> Iterator[int]:
    """``pid`` and all that it has started."""
    yield pid
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split():
                yield from processes(int(child))


def cpu_s(pid: int) -> float:
    """Seconds on a CPU of a process and all that it has started, so far; of those that still run."""
    total = 0
    for process in processes(pid):
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{process}/task"):
                with contextlib.suppress(OSError):
                    total += int(Path(f"/proc/{process}/task/{thread}/schedstat").read_text().split()[0])
    return total / 1e9


def rss_bytes(pid: int) -> int:
    """Resident memory of a process and all that it has started."""
    pages = 0
    for process in processes(pid):
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def until_healthy(process: subprocess.Popen[bytes], port: int, log: Path, path: str = "/health") -> None:
    """Returns when ``GET path`` is answered 200. RuntimeError with the end of the log if it never is."""
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        if is_healthy(port, path):
            return
        time.sleep(0.005)
    raise RuntimeError(f"{process.args!r} does not serve:\n{log.read_text(errors='replace')[-3_000:]}")


def is_healthy(port: int, path: str = "/health") -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 5.0) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            return b" 200 " in connection.recv(4_096)[:16]
    except OSError:
        return False


class Process:
    """A child process and what it has written; ended with SIGTERM, and killed if that does not help. Its input stays
    open: the embedded llama.cpp ends when that does.
    """

    def __init__(self, command: Sequence[str], log: Path, env: dict[str, str] | None = None) -> None:
        self.log = log
        with log.open("ab") as file:
            self.popen = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment(env or {}),
                cwd=log.parent,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self.popen.pid

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(how)
            try:
                self.popen.wait(20.0)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                self.popen.wait()
        if self.popen.stdin is not None:
            self.popen.stdin.close()


class Target:
    """A stand-in for llama-server and the proxy in front of it, if any."""

    def __init__(self, kind: Kind, directory: Path, *, n_slots: int, source: Path | None = None) -> None:
        """``source``: for ``against``, the checkout that is run, with a venv of its own."""
        self.kind, self.directory, self.n_slots, self.source = kind, directory, n_slots, source or REPOSITORY
        self.upstream_port, self.port = free_port(), free_port()
        if kind == "direct":
            self.port = self.upstream_port
        self.save_dir = directory / "kv"
        self.upstream_command: list[str] | None = None  # another than the stand-in
        self.upstream: Process | None = None
        self.proxy: Process | None = None

    def start(self) -> None:
        """Until both serve. Raises Missing, RuntimeError."""
        command = self._command()
        self.start_upstream()
        if command:
            self.proxy = Process(command, self.directory / "proxy.log", self._env())
            path = "/health/liveliness" if self.kind == "litellm" else "/health"
            until_healthy(self.proxy.popen, self.port, self.proxy.log, path)

    def start_upstream(self) -> None:
        self.save_dir.mkdir(parents=True, exist_ok=True)
        arguments = [str(self.upstream_port), str(self.n_slots), str(self.save_dir)]
        command = self.upstream_command or [sys.executable, "-m", "bench.proxy.upstream", *arguments]
        log = self.directory / "upstream.log"
        self.upstream = Process(command, log, {"PYTHONPATH": str(REPOSITORY)})
        until_healthy(self.upstream.popen, self.upstream_port, log)

    def stop(self) -> None:
        for process in (self.proxy, self.upstream):
            if process is not None:
                process.end()
        complaints = self.complaints()
        if complaints:
            sys.stderr.write(f"{self.kind} said:\n  " + "\n  ".join(complaints[:5]) + "\n")

    def complaints(self) -> list[str]:
        """Lines in the log of llamaslot that should not be there."""
        log = self.directory / "proxy.log"
        if self.kind not in ("llamaslot", "against") or not log.exists():
            return []
        lines = log.read_text(errors="replace").splitlines()
        return [line for line in lines if "WARNING" in line or "ERROR" in line or "Traceback" in line]

    @property
    def cpu_s(self) -> float:
        """Of the proxy; nothing directly."""
        return cpu_s(self.proxy.pid) if self.proxy is not None else 0.0

    @property
    def rss_bytes(self) -> int:
        return rss_bytes(self.proxy.pid) if self.proxy is not None else 0

    @property
    def config(self) -> dict[str, Any]:
        """Of llamaslot: all as by default, but for what would end or begin something while others are measured."""
        return {
            "listen": {"host": "127.0.0.1", "port": self.port},
            "backends": [
                {
                    "name": "gpu0",
                    "url": f"http://127.0.0.1:{self.upstream_port}",
                    "slot_save_path": str(self.save_dir),
                }
            ],
            "store": {
                "quota": "4GiB",
                "max_files": 20_000,
                "min_free": "0",
                "meta_dir": str(self.directory / "meta"),
                "idle_save_s": 3_600,
            },
            "queue": {"max_waiting": 4_000},
            "shutdown": {"save_s": 0, "drain_s": 0},
            "log": {"level": "warning"},
        }

    def _command(self) -> list[str]:
        upstream, tmp = f"http://127.0.0.1:{self.upstream_port}", self.directory
        match self.kind:
            case "direct":
                return []
            case "llamaslot" | "against":
                (tmp / "config.yaml").write_text(json.dumps(self.config))
                return [*self.program(), "serve", "--config", str(tmp / "config.yaml")]
            case "aiohttp":
                return [sys.executable, "-m", "bench.proxy.simple", str(self.port), upstream]
            case "nginx":
                if (nginx := shutil.which("nginx", path="/usr/sbin:" + os.environ["PATH"])) is None:
                    raise Missing("nginx is not installed: apt install nginx-light")
                conf = tmp / "nginx.conf"
                conf.write_text(_NGINX.format(tmp=tmp, port=self.port, upstream=self.upstream_port))
                return [nginx, "-c", str(conf), "-p", str(tmp), "-e", str(tmp / "error.log")]
            case "litellm":
                program = os.environ.get("LITELLM") or shutil.which("litellm")
                if program is None:
                    raise Missing(
                        "LiteLLM is not installed: pip install 'litellm[proxy]' into a venv, LITELLM=…/bin/litellm"
                    )
                model = {"model": "openai/bench", "api_base": f"{upstream}/v1", "api_key": "none"}
                conf = tmp / "litellm.yaml"
                conf.write_text(
                    json.dumps({"model_list": [{"model_name": "bench", "litellm_params": model}]})
                )
                return [program, "--config", str(conf), "--port", str(self.port), "--host", "127.0.0.1"]

    def program(self) -> list[str]:
        """llamaslot, with the Python of its own venv."""
        python = self.source / ".venv/bin/python"
        return [str(python) if python.exists() else sys.executable, "-m", "llamaslot"]

    def _env(self) -> dict[str, str]:
        if self.kind in ("llamaslot", "against"):
            return {"PYTHONPATH": str(self.source / "src")}
        if self.kind == "litellm":  # on loopback, for a moment
            return {"LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
        return {"PYTHONPATH": str(REPOSITORY)} if self.kind == "aiohttp" else {}


class LoadFailed(Exception):
    """What the client met: an error of a proxy, or no answer in time."""


class Load:
    """The process that asks (``bench.proxy.load``). ``is_elsewhere``: it stands for programs on other machines, and
    runs only while nothing else wants the core.
    """

    def __init__(self, *, is_elsewhere: bool = False) -> None:
        env = environment({"PYTHONPATH": str(REPOSITORY)})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.proxy.load"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            cwd=REPOSITORY,
        )
        if is_elsewhere:
            os.sched_setscheduler(self._process.pid, os.SCHED_IDLE, os.sched_param(0))

    def do(self, task: str, **arguments: Any) -> Any:
        """One of its tasks, to its end. Raises LoadFailed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": task, **arguments}).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise LoadFailed("the client's process has ended")
        answer = json.loads(line)
        if "error" in answer:
            raise LoadFailed(answer["error"])
        return answer["ok"]

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10.0)
        self._process.stdout.close()


@contextlib.contextmanager
def running(kinds: Sequence[Kind], *, n_slots: int, against: Path | None = None) -> Iterator[list[Target]]:
    """Targets of these kinds, as far as they are installed. All are ended."""
    with tempfile.TemporaryDirectory(prefix="llamaslot-bench-") as tmp, contextlib.ExitStack() as stack:
        targets = []
        for kind in kinds:
            if kind == "against" and against is None:
                continue
            directory = Path(tmp, kind)
            directory.mkdir()
            target = Target(kind, directory, n_slots=n_slots, source=against if kind == "against" else None)
            stack.callback(target.stop)
            try:
                target.start()
            except Missing as error:
                _say_once(f"{kind} is skipped: {error}")
                continue
            except RuntimeError as error:
                if kind != "litellm":
                    raise
                _say_once(f"{kind} is skipped: {error}")
                continue
            targets.append(target)
        yield targets


_said = set[str]()


def _say_once(line: str) -> None:
    if line not in _said:
        _said.add(line)
        sys.stderr.write(line + "\n")


__all__ = [
    "KINDS",
    "Kind",
    "Load",
    "LoadFailed",
    "Missing",
    "Process",
    "Target",
    "cpu_s",
    "is_healthy",
    "running",
]
