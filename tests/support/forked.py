"""``llamaslot`` and the embedded llama.cpp without their imports, which take 0.7 and 0.1 s of CPU: a process that has
imported them forks itself for each.

For tests of what they do while they run. Tests that start the programs themselves: ``tests/web/test_service.py``,
``tests/real/test_run.py``, ``test_embedded.py``, ``tests/unit/test_cli.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

LLAMASLOT, ENGINE = "llamaslot.cli", "llamaslot.llama.managed.embedded"
#: What is called in the child, after the command line's words.
_OPTIONS: dict[str, dict[str, str]] = {LLAMASLOT: {"prog_name": "llamaslot"}, ENGINE: {}}

_forker: Forker | None = None


def die_with_parent() -> None:
    """Called in a child: it gets SIGKILL when its parent ends, in whatever way (Linux' PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Forked:
    """A process that the forker has made. It has the methods of asyncio's ``Process`` that tests use."""

    def __init__(self, forker: Forker, pid: int) -> None:
        self.pid = pid
        self._forker, self._status = forker, None
        self._descriptor = os.pidfd_open(pid)

    @property
    def returncode(self) -> int | None:
        if self._status is None:
            ended = select.poll()
            ended.register(self._descriptor, select.POLLIN)
            if ended.poll(0):
                os.close(self._descriptor)
                self._status = self._forker.ask({"status": self.pid})
        return self._status

    def send_signal(self, number: int) -> None:
        signal.pidfd_send_signal(self._descriptor, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    async def wait(self) -> int:
        """Its exit status, negative for a signal. Canceling is safe."""
        loop = asyncio.get_running_loop()
        while (status := self.returncode) is None:
            ended = asyncio.Event()
            loop.add_reader(self._descriptor, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(self._descriptor)
        return status


class Forker:
    """The process that has made the imports. Its children end with it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def ask(self, what: dict[str, Any]) -> Any:
        """Send a request to the forker, and return its answer. It takes some milliseconds, without an await."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what).encode() + b"\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextlib.contextmanager
def forking() -> Iterator[None]:
    """A context manager: in its block there is a forker."""
    global _forker
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.forked"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        _forker = Forker(process)
        try:
            yield
        finally:
            _forker = None


def is_forking() -> bool:
    """True if there is a forker."""
    return _forker is not None


def forked(module: str, words: Sequence[str], *, out: Path, err: Path, **environment: str) -> Forked:
    """Run ``module`` (``LLAMASLOT`` or ``ENGINE``) with the arguments ``words``, and ``environment`` besides that of
    this process. Its output is added to the two files; its standard input never ends.
    """
    assert _forker is not None, "only while forking"
    what = {"module": module, "words": words, "outputs": [str(out), str(err)]}
    return Forked(_forker, _forker.ask({**what, "environment": {**os.environ, **environment}}))


def main() -> None:
    """Fork for each line of standard input, and report how children ended, until standard input ends."""
    die_with_parent()
    gc.disable()
    import_module(
        "llamaslot.llama.transport.quick_import"
    ).import_aiohttp()  # as a start does, without certificates
    for name in (LLAMASLOT, "llamaslot.http.serve", "llamaslot.http.app", ENGINE, "xllamacpp"):
        import_module(name)
    gc.freeze()
    for line in sys.stdin:
        what = json.loads(line)
        if "status" in what:
            answer = os.waitstatus_to_exitcode(os.waitpid(what["status"], 0)[1])
        elif (answer := os.fork()) == 0:
            _become(**what)
        print(json.dumps(answer), flush=True)


def _become(
    module: str, words: Sequence[str], outputs: Sequence[str], environment: dict[str, str]
) -> NoReturn:
    die_with_parent()
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.pipe()[0], 0)
    for descriptor, output in enumerate(outputs, 1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644), descriptor)
    gc.enable()
    import_module(module).main(words, **_OPTIONS[module])
    raise AssertionError("a command ends the process")


if __name__ == "__main__":
    main()
