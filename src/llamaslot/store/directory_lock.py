"""The lock on a snapshot directory, which keeps other llamaslots out."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from llamaslot.errors import LlamaslotError

LOCK_NAME = ".llamaslot.lock"


class DirectoryUnusable(LlamaslotError):
    """The snapshot directory is missing, locked by another llamaslot, or not accessible."""


class DirectoryLock:
    """An flock on ``.llamaslot.lock`` in a directory. It keeps a second llamaslot out, because each would delete the
    other's files. The kernel releases the lock when the process ends; the file stays.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK_NAME
        self._fd: int | None = None

    def acquire(self) -> None:
        """Take the lock without waiting for it. Blocking file access. Raises DirectoryUnusable if the directory cannot
        be used, or if another llamaslot has the lock; then the error names its process id.
        """
        directory = self._path.parent
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
        except FileNotFoundError:
            raise DirectoryUnusable(f"{directory} does not exist: create it, or mount it here") from None
        except OSError as error:
            raise DirectoryUnusable(
                f"{directory} is not usable for snapshots: {error.strerror or error}"
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            if not isinstance(error, BlockingIOError):
                raise DirectoryUnusable(
                    f"{self._path} cannot be locked: {error.strerror or error}"
                ) from error
            raise DirectoryUnusable(
                f"{directory} is in use by another llamaslot (pid {holder}): stop it, or give each its own directory"
            ) from None
        self._fd = fd
        # On a full disk the lock works all the same; only the holder's pid is missing.
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Release the lock. Idempotent."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
