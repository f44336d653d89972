"""Runs a llama-server: starts it, restarts it when it dies, and ends it. It is the embedded engine, or a command of the
operator's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, NamedTuple, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from llamaslot.errors import LlamaslotError
from llamaslot.sizes import number
from llamaslot.tasks import TaskOwner, outcome

log = logging.getLogger(__name__)

EMBEDDED_MODEL = "smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MIN_CONTEXT = 256  # tokens per slot; llama.cpp rounds a context up to a multiple of it

STOP_S = 15.0  # from SIGTERM to SIGKILL; longer than ``GRACE_S`` of the guard process
HELP_S = 30.0  # time limit of ``--help``: a CUDA build initializes the GPU first
LOG_BYTES = 20 * 1024**2


class Backoff(NamedTuple):
    """The pause between a server's death and its next start: ``first_s``, doubled with each death in a row up to
    ``most_s``. A server that has run for ``served_s`` begins a new row.
    """

    first_s: float = 1.0
    most_s: float = 60.0
    served_s: float = 60.0

    def delay_s(self, n_deaths: int) -> float:
        """The pause in seconds after the ``n_deaths``-th death in a row, counted from 1."""
        return float(min(self.most_s, self.first_s * 2 ** min(n_deaths - 1, 30)))


BACKOFF = Backoff()


Number = Annotated[int, BeforeValidator(number)]


class Flag(NamedTuple):
    """One flag of llama-server: the ``name`` that llamaslot passes, ``other`` names and opposites, and its value, None
    if it takes none.
    """

    name: str
    other: tuple[str, ...] = ()
    value: str | None = None

    @property
    def names(self) -> set[str]:
        return {self.name, *self.other}

    def words(self) -> tuple[str, ...]:
        return (self.name,) if self.value is None else (self.name, self.value)


class Launch(Protocol):
    """How to start a llama-server. ``command``: the words before its flags, the program included; None for the embedded
    engine. ``args``: the operator's flags. ``port``: None for a free one.
    """

    @property
    def command(self) -> tuple[str, ...] | None: ...
    @property
    def args(self) -> tuple[str, ...]: ...
    @property
    def port(self) -> int | None: ...
    def needed(self, port: int, slot_save_path: Path) -> list[Flag]:
        """The flags that llamaslot always passes. Raises LlamaslotError if the server cannot be started."""
        ...

    def recommended(self) -> list[Flag]:
        """The flags that llamaslot passes if the build's ``--help`` lists them."""
        ...


class ManagedConfig(BaseModel):
    """``backends[].managed`` of the configuration: the model, and how to run it. ``context``: tokens of all slots
    together, as llama-server's ``-c``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, defer_build=True)

    model: Annotated[str, Field(min_length=1)]
    command: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    slots: Annotated[Number, Field(ge=1)] = 4
    context: Annotated[Number, Field(ge=1)] = 16384
    args: tuple[str, ...] = ()
    port: Annotated[Number, Field(ge=1, le=65535)] | None = None

    @field_validator("args")
    @classmethod
    def _ours(cls, args: tuple[str, ...]) -> tuple[str, ...]:
        for flags, key in ((("--port",), "managed.port"), (("-m", "--model"), "managed.model")):
            if taken := _named(args) & {*flags}:
                raise ValueError(f"{min(taken)} is set by {key}: leave it out of args")
        return args

    @model_validator(mode="after")
    def _enough(self) -> ManagedConfig:
        if self.context < MIN_CONTEXT * self.slots:
            raise ValueError(
                f"context is for all slots together: {self.context} for {self.slots} slots is too little,"
                f" at least {MIN_CONTEXT * self.slots}"
            )
        return self

    @property
    def model_name(self) -> str:
        """The model's name in llama-server's answers: the first name in ``--alias``, else the path."""
        alias = ""
        for word, value in pairwise((*self.args, "")):
            name, equals, said = word.partition("=")
            if name in ("-a", "--alias"):
                alias = said if equals else value
        return alias.split(",")[0] or self.model

    def needed(self, port: int, slot_save_path: Path) -> list[Flag]:
        """As ``Launch.needed``: what llamaslot needs, and every llama-server knows."""
        return [
            Flag("-m", ("--model",), str(smollm2_path()) if self.model == EMBEDDED_MODEL else self.model),
            Flag("--host", (), "127.0.0.1"),
            Flag("--port", (), str(port)),
            Flag("-np", ("--parallel",), str(self.slots)),
            Flag("-c", ("--ctx-size",), str(self.context)),
            Flag("--slot-save-path", (), str(slot_save_path)),
        ]

    def recommended(self) -> list[Flag]:
        """As ``Launch.recommended``."""
        return recommended_flags(self.args)


def smollm2_file() -> Path:
    """The path of the GGUF of the small chat model, which may not be fetched yet."""
    named = os.environ.get("LLAMASLOT_SMOLLM2")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else cache / "llamaslot" / SMOLLM2_FILE


def smollm2_path() -> Path:
    """As ``smollm2_file``, but raises LlamaslotError, which names the command to fetch the file, if it is missing."""
    path = smollm2_file()
    if not path.is_file():
        raise LlamaslotError(
            f"model {EMBEDDED_MODEL}: there is no {path}; run `make smollm2` or `llamaslot demo` to fetch it"
        )
    return path


def free_port() -> int:
    """A free TCP port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _named(args: Sequence[str]) -> set[str]:
    """The flags among ``args``, without their values."""
    return {word.split("=", 1)[0] for word in args if word.startswith("-")}


def recommended_flags(args: Sequence[str]) -> list[Flag]:
    """The flags with which a llama-server works best with llamaslot. ``args``: the operator's flags.

    A batch of 512 tokens keeps the gaps in other users' streams short while a prompt is computed. If ``args`` sets one
    of the two batch sizes, neither is in the result, because they depend on each other.
    """
    flags = [
        Flag("--no-kv-unified", ("--kv-unified", "-kvu", "-no-kvu")),  # else any task clears the idle slots
        Flag("--cache-ram", ("-cram",), "0"),  # snapshots replace it; it copies states on the main loop
        Flag("--no-cache-idle-slots", ("--cache-idle-slots",)),
        Flag("--metrics"),
        Flag("--jinja", ("--no-jinja",)),
    ]
    batch = [Flag("-b", ("--batch-size",), "512"), Flag("-ub", ("--ubatch-size",), "512")]
    return flags if _named(args) & (batch[0].names | batch[1].names) else [*flags, *batch]


def own_words(launch: Launch, needed: Sequence[Flag], known: Collection[str] | None) -> list[str]:
    """The words that llamaslot adds to the command line: the flags in ``needed``, and the recommended ones that are in
    ``known`` (all if it is None). Flags that the operator has set are left out.
    """
    recommended = [flag for flag in launch.recommended() if known is None or flag.name in known]
    said = _named(launch.args)
    own = (flag for flag in (*needed, *recommended) if not flag.names & said)
    return [word for flag in own for word in flag.words()]


class ManagedServer:
    """Runs one llama-server on a loopback port. ``run`` restarts it when it dies, ``run_once`` does not.

    ``port``: by default ``launch.port``, or else a free one, chosen now and kept over restarts. ``log_path``: the file
    for the server's output, by default llamaslot's own standard error; at a start, a log above 20 MiB is renamed to
    ``<log_path>.1``. ``api_key``: passed in the environment (LLAMA_API_KEY), where other users cannot see it. ``sleep``
    and ``now`` are for tests.

    Raises LlamaslotError if ``model: smollm2`` has not been fetched.
    """

    def __init__(
        self,
        launch: Launch,
        *,
        name: str,
        slot_save_path: Path,
        log_path: Path | None,
        port: int | None = None,
        api_key: str | None = None,
        backoff: Backoff = BACKOFF,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.launch, self.name = launch, name
        self.slot_save_path, self.log_path = slot_save_path, log_path
        self.port = port or launch.port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.n_starts = 0
        self.pid: int | None = None  # of the embedded server, or of the guard process of a command
        self.stop_s = STOP_S  # from SIGTERM to SIGKILL
        self.on_death: Callable[[str], None] = lambda how: None  # called when it ended by itself
        self._needed = launch.needed(self.port, slot_save_path)
        self._api_key, self._backoff = api_key, backoff
        self._sleep, self._now = sleep, now

    def __repr__(self) -> str:
        state = f"pid {self.pid}" if self.pid else "not running"
        return f"<ManagedServer {self.name} {self.url} {state}, started {self.n_starts} times>"

    async def run(self) -> None:
        """Start the server, and start it again, after a pause (``Backoff``), whenever it has ended. Never returns.

        Canceling ends the server: SIGTERM, then SIGKILL after ``stop_s``; a second cancellation kills it at once. If
        the server cannot be started, that is tried again too: what it lacks (a file, memory, the port) may become
        available.
        """
        n_deaths = 0
        while True:
            started = self._now()
            try:
                how = in_words(await self.run_once())
            except OSError as error:
                how = f"could not be started: {error}"
            self.on_death(how)
            lasted_s = self._now() - started
            n_deaths = 1 if lasted_s >= self._backoff.served_s else n_deaths + 1
            delay_s = self._backoff.delay_s(n_deaths)
            log.error(
                "%s: llama-server %s after %.0f s; it is started again in %.0f s; the last line of its log %s: %s",
                self.name, how, lasted_s, delay_s, self.log_path, await asyncio.to_thread(_last_line, self.log_path),
            )  # fmt: skip
            await self._sleep(delay_s)

    async def run_once(self) -> int:
        """Run the server once, and wait for its end. Returns its exit code; if a signal ended it, minus the signal's
        number. Raises OSError if the server cannot be started. Canceling ends the server, as in ``run``.
        """
        command, added = await self._command()
        begin = partial(_open_log, self.log_path, self.slot_save_path, shlex.join(command))
        async with _Child(self.name, command, self._environment(), begin, lambda: self.stop_s) as process:
            self.n_starts += 1
            self.pid = process.pid
            log.info(
                "%s: llama-server starts on %s (pid %d); flags that llamaslot added to yours: %s",
                self.name, self.url, process.pid, shlex.join(added),
            )  # fmt: skip
            try:
                return await process.wait()
            finally:
                self.pid = None

    async def _command(self) -> tuple[list[str], list[str]]:
        """The whole command line to start, and the words in it that llamaslot has added."""
        launch, known = self.launch, None
        guarded = [sys.executable, "-m", "llamaslot.llama.managed.embedded"]
        if launch.command is not None:
            known = await self._known_flags(launch.command)
            unknown = [flag.name for flag in (*self._needed, *launch.recommended()) if flag.name not in known]
            if unknown:
                log.warning(
                    "%s: `%s --help` does not list %s: llamaslot still passes the ones that it needs, and"
                    " leaves out those that it only recommends",
                    self.name, shlex.join(launch.command), " ".join(unknown),
                )  # fmt: skip
            guarded = [sys.executable, "-m", "llamaslot.llama.managed.guard_process", *launch.command]
        added = own_words(launch, self._needed, known)
        return [*guarded, *added, *launch.args], added

    async def _known_flags(self, command: Sequence[str]) -> set[str]:
        """The flags that ``command --help`` lists; empty if it does not end within ``HELP_S``. Runs at each start."""
        guarded = [sys.executable, "-m", "llamaslot.llama.managed.guard_process", *command, "--help"]
        name, environment = f"{self.name} --help", self._environment()
        async with _Child(
            name, guarded, environment, lambda: asyncio.subprocess.PIPE, lambda: 0.0
        ) as process:
            assert process.stdout is not None
            try:
                async with asyncio.timeout(HELP_S):
                    text = (await process.stdout.read()).decode(errors="replace")
            except TimeoutError:
                return set()
        return set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", text))

    def _environment(self) -> dict[str, str]:
        """The environment of the server: llamaslot's own, with LLAMA_API_KEY only if a key is configured. With a key
        that only the environment has, the server would refuse llamaslot's requests.
        """
        environment = {name: value for name, value in os.environ.items() if name != "LLAMA_API_KEY"}
        return environment | ({"LLAMA_API_KEY": self._api_key} if self._api_key else {})


class _Child:
    """A context manager that starts a child process in a group of its own, and ends it with the block, on every path.
    Raises OSError if the process cannot be started.

    ``output()`` is called in a thread. It returns the target of the child's output: PIPE, or a descriptor, which is
    closed after the start. The child's standard input is a pipe from this process: the embedded server and the guard
    process end when the pipe does, also if llamaslot is killed. ``stop_s()`` is called at the end of the block, and
    returns the seconds from SIGTERM to SIGKILL; with 0 only SIGKILL is sent.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: dict[str, str],
        output: Callable[[], int],
        stop_s: Callable[[], float],
    ) -> None:
        self._name, self._command, self._environment = name, command, environment
        self._output, self._stop_s = output, stop_s
        self._tasks = TaskOwner()

    async def __aenter__(self) -> asyncio.subprocess.Process:
        start = self._tasks.spawn(outcome(self._start, OSError), f"start {self._name}")
        is_cancelled = False
        while not start.done():
            # A start cannot be cancelled half-way: wait for it, then end the process.
            try:
                await asyncio.wait({start})
            except asyncio.CancelledError:
                is_cancelled = True
        if isinstance(process := start.result(), OSError):
            raise process
        self._process = process
        if is_cancelled:
            await self.__aexit__()
            raise asyncio.CancelledError
        return process

    async def _start(self) -> asyncio.subprocess.Process:
        output = -1
        try:
            output = await asyncio.to_thread(self._output)
            return await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,  # a Ctrl-C in the terminal must not end it before its slots are saved
            )
        finally:
            if output >= 0:
                os.close(output)

    async def __aexit__(self, *_: object) -> None:
        process = self._process
        try:
            if process.returncode is None and (stop_s := self._stop_s()):
                process.terminate()  # only to the child itself: the guard process passes the signal on
                with suppress(TimeoutError):
                    async with asyncio.timeout(stop_s):
                        await process.wait()
        finally:
            # Also if the process has ended by itself: a shell script may have left the real server running.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            if process.stdin is not None:
                process.stdin.close()
        await process.wait()


def _open_log(path: Path | None, slot_save_path: Path, command: str) -> int:
    """Open the log ``path`` for appending, write a line that names the command, and return the descriptor; without a
    path, a copy of standard error. Renames a log that is too large. Makes the directories of the log and of
    ``slot_save_path``. Blocking; raises OSError.
    """
    slot_save_path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path is None:
        return os.dup(2)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        if path.stat().st_size > LOG_BYTES:
            path.replace(path.with_name(path.name + ".1"))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.write(descriptor, f"\n=== {time.strftime('%Y-%m-%d %H:%M:%S')} llamaslot starts: {command}\n".encode())
    return descriptor


def _last_line(path: Path | None) -> str:
    """The last line of the log that is not empty, cut after 300 characters; "nothing" without one. Blocking."""
    lines: list[str] = []
    if path is not None:
        with suppress(OSError), path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")[:300]


def in_words(code: int) -> str:
    """An exit code in words, as the end of a sentence. A negative one is minus the number of a signal."""
    if code >= 0:
        return f"ended with exit code {code}"
    with suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"
