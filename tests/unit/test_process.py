"""A managed server: its arguments, its deaths and restarts, and that nothing of it is left behind."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llamaslot.errors import LlamaslotError
from llamaslot.llama.managed.process import (
    LOG_BYTES,
    Backoff,
    ManagedConfig,
    ManagedServer,
    own_words,
    smollm2_path,
)
from llamaslot.tasks import TaskOwner

HELP = """
-m,    --model FNAME   model path
--host HOST  --port PORT  -np, --parallel N  -c, --ctx-size N  --slot-save-path PATH
--metrics  -b, --batch-size N  -ub, --ubatch-size N
"""


class Script:
    """A shell script in llama-server's place. What it does in each life is said through a fifo that it reads."""

    def __init__(self, directory: Path) -> None:
        self.path, self.arguments = directory / "fake-llama-server", directory / "arguments"
        self.fifo, self.pids = directory / "orders", directory / "pids"
        os.mkfifo(self.fifo)
        self.path.write_text(
            f"""#!/bin/sh
if [ "$1" = --help ]; then echo '{HELP}'; exit 0; fi
echo "$@" >{self.arguments}
echo "key=$LLAMA_API_KEY umask=$(umask)"
sleep 1000 &
echo "$$ $!" >>{self.pids}
read order <{self.fifo}
eval "$order"
"""
        )
        self.path.chmod(0o700)

    async def order(self, line: str) -> None:
        """Returns when the script of the present life has read it."""
        await asyncio.to_thread(self.fifo.write_text, line + "\n")

    def lives(self) -> list[list[int]]:
        """For each life the process ids: the script's and that of what it left in the background."""
        return [[int(pid) for pid in line.split()] for line in self.pids.read_text().splitlines()]


class Sleeper:
    """In asyncio.sleep's place: ends when told to, and notes how long it should have been."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[float] = asyncio.Queue()
        self._wake = asyncio.Event()

    async def __call__(self, delay_s: float) -> None:
        self.asked.put_nowait(delay_s)
        await self._wake.wait()
        self._wake.clear()

    def wake(self) -> None:
        self._wake.set()


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


@pytest.fixture
def sleeper() -> Sleeper:
    return Sleeper()


Managed = Callable[..., ManagedServer]


@pytest.fixture
def managed(tmp_path: Path, script: Script, sleeper: Sleeper) -> Managed:
    def make(
        api_key: str | None = None, now: Callable[[], float] = lambda: 0.0, **config: Any
    ) -> ManagedServer:
        config = {"model": "/models/x.gguf", "command": (str(script.path),)} | config
        return ManagedServer(
            ManagedConfig(**config),
            name="gpu0",
            slot_save_path=tmp_path / "kv",
            log_path=tmp_path / "log" / "llama.log",
            api_key=api_key,
            sleep=sleeper,
            now=now,
        )

    return make


@asynccontextmanager
async def running(server: ManagedServer) -> AsyncIterator[None]:
    tasks = TaskOwner()
    tasks.spawn(server.run(), "managed server")
    try:
        yield
    finally:
        await tasks.close()


def log_of(server: ManagedServer) -> Path:
    assert server.log_path is not None
    return server.log_path


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def children() -> set[int]:
    """The processes that this one has started."""
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


async def until(condition: Callable[[], bool]) -> None:
    """For what only the kernel knows: that processes of others have ended."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - no event comes for it
            await asyncio.sleep(0.01)


async def test_only_flags_that_help_names_are_passed(
    managed: Managed, script: Script, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Recommended flags that `--help` does not know are left out, with one line that names them."""
    server = managed(slots=2, context=4096, args=("--flash-attn", "on"))
    async with running(server):
        await script.order("exit 0")
        assert script.arguments.read_text().split() == [
            *(
                "-m",
                "/models/x.gguf",
                "--host",
                "127.0.0.1",
                "--port",
                str(server.port),
                "-np",
                "2",
                "-c",
                "4096",
            ),
            *("--slot-save-path", str(tmp_path / "kv"), "--metrics", "-b", "512", "-ub", "512"),
            *("--flash-attn", "on"),
        ]
    own = (record for record in caplog.records if record.name.startswith("llamaslot"))  # asyncio warns too
    warnings = [record.getMessage() for record in own if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "--no-kv-unified --cache-ram --no-cache-idle-slots --jinja" in warnings[0]


async def test_it_is_started_again_on_the_same_port_after_longer_and_longer(
    managed: Managed, script: Script, sleeper: Sleeper, caplog: pytest.LogCaptureFixture
) -> None:
    """Each death is followed by a start after twice the time; the log says how it died, and its last line."""
    server = managed()
    port = server.port
    async with running(server):
        for delay_s in (1, 2, 4):
            await script.order("echo 'out of memory' >&2; exit 3")
            assert await sleeper.asked.get() == delay_s
            sleeper.wake()
        await script.order("kill -9 $$")
        assert await sleeper.asked.get() == 8
    assert server.n_starts == 4
    assert server.port == port
    deaths = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert "ended with exit code 3" in deaths[0]
    assert "llama.log: out of memory" in deaths[0]
    assert "was killed by SIGKILL" in deaths[3]


async def test_a_server_that_served_for_a_while_comes_back_soon(
    managed: Managed, script: Script, sleeper: Sleeper
) -> None:
    """The backoff begins anew after a life that was long enough."""
    clock = iter([0.0, 1.0, 10.0, 11.0, 20.0, 200.0, 300.0])
    async with running(managed(now=lambda: next(clock))):
        delays = []
        for _ in range(3):
            await script.order("exit 1")
            delays.append(await sleeper.asked.get())
            sleeper.wake()
        await script.order("exit 1")
        assert delays == [1, 2, 1]


def test_backoff_is_limited() -> None:
    """However often it dies, it is tried again within a minute."""
    assert [Backoff().delay_s(n) for n in (1, 2, 6, 7, 1000)] == [1, 2, 32, 60, 60]


async def test_cancelling_ends_the_whole_group(managed: Managed, script: Script) -> None:
    """Neither the script nor what it left in the background survives, though the script ignores SIGTERM."""
    server = managed()
    server.stop_s = 0.2
    async with running(server):
        await script.order("trap '' TERM; echo deaf; read forever <" + str(script.fifo))
    (pids,) = script.lives()
    await until(lambda: not any(map(is_alive, pids)))
    assert server.pid is None


async def test_what_a_dead_script_left_behind_is_ended_before_the_next_start(
    managed: Managed, script: Script, sleeper: Sleeper
) -> None:
    """Else the real server would still hold the port."""
    async with running(managed()):
        await script.order("exit 0")
        await sleeper.asked.get()
        await until(lambda: not any(map(is_alive, script.lives()[0])))


async def test_cancelling_while_it_is_started_leaves_nothing(managed: Managed, script: Script) -> None:
    """A start that is half-way when it is cancelled is seen through and undone, wherever that happens."""
    before = children()  # those of other tests
    for n_steps in range(40):
        server = managed()
        tasks = TaskOwner()
        tasks.spawn(server.run(), "managed server")
        for _ in range(n_steps):
            await asyncio.sleep(0)
        await tasks.close()
        assert server.pid is None
    await until(lambda: not any(map(is_alive, children() - before)))


async def test_it_ends_when_llamaslot_is_killed(script: Script, tmp_path: Path) -> None:
    """SIGKILL of llamaslot closes the guard's standard input, and the group ends."""
    program = f"""
import asyncio, pathlib
from llamaslot.llama.managed.process import ManagedConfig, ManagedServer
directory = pathlib.Path({str(tmp_path)!r})
config = ManagedConfig(model="x", command=({str(script.path)!r},))
asyncio.run(ManagedServer(config, name="x", slot_save_path=directory, log_path=directory / "log").run())
"""
    llamaslot = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        await until(lambda: script.pids.exists() and bool(script.lives()))
    finally:
        llamaslot.kill()
        await llamaslot.wait()
    await until(lambda: not any(map(is_alive, script.lives()[0])))


async def test_a_command_that_is_not_there_is_said(
    managed: Managed, sleeper: Sleeper, caplog: pytest.LogCaptureFixture
) -> None:
    """The line names the command; it is tried again, for it may come."""
    async with running(managed(command=("/no/such/llama-server",))):
        await sleeper.asked.get()
    assert "cannot run /no/such/llama-server: No such file or directory" in caplog.text


async def test_a_log_that_cannot_be_written_is_said(
    managed: Managed, sleeper: Sleeper, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One line, no traceback; it is tried again."""
    (tmp_path / "log").write_text("a file where the directory should be")
    async with running(managed()):
        assert await sleeper.asked.get() == 1
    assert "could not be started" in caplog.text
    assert "Traceback" not in caplog.text


async def test_the_key_travels_in_the_environment(managed: Managed, script: Script, sleeper: Sleeper) -> None:
    """Other users can read a command line, so the API key is not on it; what is saved is ours alone."""
    server = managed(api_key="secret")
    async with running(server):
        await script.order("exit 0")
        await sleeper.asked.get()
    assert "key=secret umask=0077" in log_of(server).read_text()
    assert "secret" not in script.arguments.read_text()
    assert stat.S_IMODE(log_of(server).stat().st_mode) == 0o600


async def test_a_key_of_the_environment_alone_is_not_passed(
    managed: Managed, script: Script, sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server with a key that llamaslot does not know would refuse everything."""
    monkeypatch.setenv("LLAMA_API_KEY", "stray")
    server = managed()
    async with running(server):
        await script.order("exit 0")
        await sleeper.asked.get()
    assert "key= umask" in log_of(server).read_text()


async def test_the_log_is_kept_and_rotated(managed: Managed, script: Script, sleeper: Sleeper) -> None:
    """Each start appends; one that finds more than 20 MB there begins a new file and keeps the old one."""
    server = managed()
    log_of(server).parent.mkdir()
    log_of(server).write_text("old\n")
    async with running(server):
        await script.order("exit 0")
        await sleeper.asked.get()
        assert log_of(server).read_text().startswith("old\n")
        os.truncate(log_of(server), LOG_BYTES + 1)
        sleeper.wake()
        await script.order("exit 0")
        await sleeper.asked.get()
    assert log_of(server).with_name("llama.log.1").stat().st_size == LOG_BYTES + 1
    assert log_of(server).read_text().count("llamaslot starts") == 1


def test_what_the_user_says_wins(tmp_path: Path) -> None:
    """A flag in `args` replaces ours, under any of its names; one batch size of his leaves both to him."""
    config = ManagedConfig(model="m", args=("--kv-unified", "--parallel=2", "-b", "2048"))
    words = own_words(config, config.needed(1234, tmp_path), None)
    assert "--no-kv-unified" not in words
    assert "-np" not in words
    assert "-ub" not in words


@pytest.mark.parametrize(
    ("args", "name"),
    [((), "m.gguf"), (("--alias", "a,b"), "a"), (("-c", "1", "--alias=x"), "x"), (("-a",), "m.gguf")],
)
def test_the_name_that_llama_server_will_tell(args: tuple[str, ...], name: str) -> None:
    assert ManagedConfig(model="m.gguf", args=args).model_name == name


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"slots": 0}, "slots"),
        ({"slots": True}, "should be a number, not on"),
        ({"slots": 8, "context": 1024}, "at least 2048"),
        ({"args": ("--port", "1")}, "managed.port"),
        ({"args": ("--model=x",)}, "managed.model"),
        ({"ctx": 1}, "ctx"),
    ],
)
def test_faults_of_the_settings(settings: dict[str, Any], fault: str) -> None:
    """Each fault says what would be right."""
    with pytest.raises(ValidationError, match=fault):
        ManagedConfig(**({"model": "m"} | settings))


def test_the_embedded_model_is_found_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$LLAMASLOT_SMOLLM2, then the cache; the error says what to run."""
    monkeypatch.delenv("LLAMASLOT_SMOLLM2", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(LlamaslotError, match="make smollm2"):
        smollm2_path()
    cached = tmp_path / "llamaslot" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    cached.parent.mkdir()
    cached.touch()
    assert smollm2_path() == cached
    elsewhere = tmp_path / "my.gguf"
    elsewhere.touch()
    monkeypatch.setenv("LLAMASLOT_SMOLLM2", str(elsewhere))
    assert smollm2_path() == elsewhere
