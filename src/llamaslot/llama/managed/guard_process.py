"""``python -m llamaslot.llama.managed.guard_process command [argument …]``: runs a command that ends when llamaslot
does.

If llamaslot is killed and its llama-server goes on, that server keeps the GPU's memory and the port, and the next one
cannot start. So this process, the *guard*, runs between the two. Its standard input is a pipe from llamaslot. When that
ends, because llamaslot has closed it or died, the guard sends SIGTERM to its process group and, ``GRACE_S`` later,
SIGKILL. The command runs in the same group, so a shell script or a ``docker run`` around llama-server ends too.

If the guard gets a SIGTERM, it passes it on to the group, once: llama-server takes a second SIGTERM for "at once". The
guard ends as the command ended: with the same exit code or by the same signal; with 127 if the command cannot be run.

llamaslot does not use a ``preexec_fn`` for this, because code between fork and exec can deadlock in a process with
threads.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

from llamaslot.llama.managed.embedded import die_with_parent

GRACE_S = 10.0
UMASK = 0o077  # slot files contain transcripts


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command ``argv``, and end as it ends. Never returns."""
    command = sys.argv[1:] if argv is None else list(argv)
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, _pass_on)
    try:
        # The guard has only one thread, so preexec_fn is safe here. Nothing is written to the pipe: it is there because
        # the embedded engine ends at the end of its standard input.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, umask=UMASK, preexec_fn=_before_exec)
    except OSError as error:
        os.write(2, f"llamaslot: cannot run {command[0]}: {error.strerror}\n".encode())
        os._exit(127)
    ended = os.pidfd_open(process.pid)
    if not _wait(ended, None):
        _pass_on()
        if not _wait(ended, GRACE_S, input_too=False):
            os.killpg(0, signal.SIGKILL)
    _end_as(process.wait())


def _before_exec() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent()


def _pass_on(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the guard process is in the group too
    os.killpg(0, signal.SIGTERM)


def _wait(ended: int, timeout_s: float | None, *, input_too: bool = True) -> bool:
    """Wait until the command has ended (True), or until standard input ends or ``timeout_s`` have passed (False)."""
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    if input_too:
        poll.register(0, select.POLLIN)
    while True:
        ready = dict(poll.poll(None if timeout_s is None else timeout_s * 1000))
        if ended in ready:
            return True
        if not ready or not _read():
            return False


def _read() -> bytes:
    try:
        return os.read(0, 4096)
    except OSError:
        return b""


def _end_as(code: int) -> NoReturn:
    """End this process with ``code``, an exit code of subprocess: if negative, by the signal with that number."""
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the command has written its own core file already
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
