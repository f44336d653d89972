"""Copies ranges of bytes from file to file in large blocks, and computes their checksum. Blocking: for threads.

The bytes never become Python objects: one buffer is read into and written from, and the GIL is free meanwhile. Measured
on 512 MiB from ext4 to tmpfs (page cache): 0.63 s with blocks of 256 KiB, 0.83 s with 1 MiB, which no longer stay in
the processor's cache; ``sendfile`` 0.57 s, ``cp`` 0.65 s; CPU 0.39, 0.34 and 0.42 s. The checksum adds 0.03 s of CPU.
Two threads are not faster, because the kernel spends most of the time making pages.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from types import TracebackType

import xxhash

from llamaslot.errors import SnapshotInvalid

BLOCK = 256 << 10
_MODE = 0o660  # llama-server and llamaslot may run as two users of one group; the umask restricts the mode


class Copier:
    """Writes the file ``target`` from its beginning to its end. A context manager that closes the file, and unlinks it
    after an error. ``at``: the number of bytes written so far.
    """

    def __init__(self, target: Path) -> None:
        """Open ``target``, whose old content is overwritten. Raises OSError."""
        self.target = target
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self.fd = os.open(target, flags, _MODE)
        self.at = 0
        self._buffer = memoryview(mmap.mmap(-1, BLOCK))

    def __enter__(self) -> Copier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if kind is not None:
            self.target.unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self.fd)

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``. Raises OSError."""
        rest = memoryview(data)
        while rest:
            n = os.pwrite(self.fd, rest, self.at)
            self.at += n
            rest = rest[n:]

    def copy(self, source: int, at: int, size: int, checksum: xxhash.xxh3_64 | None = None) -> None:
        """Append ``size`` bytes of the file descriptor ``source`` from offset ``at`` on, and add them to ``checksum``.

        Raises SnapshotInvalid if ``source`` is too short, OSError.
        """
        end = at + size
        while at < end:
            block = self._buffer[: min(BLOCK, end - at)]
            n = os.preadv(source, [block], at)
            if not n:
                raise SnapshotInvalid(f"a file to copy from ends at {at}, not at {end}")
            block = block[:n]
            if checksum is not None:
                checksum.update(block)
            self.write(block)
            at += n


def checksum_of(fd: int, at: int, size: int, buffer: memoryview) -> int:
    """The xxh3_64 of ``size`` bytes of a file from offset ``at`` on, read through ``buffer``. Raises SnapshotInvalid if
    the file is too short, OSError.
    """
    checksum, end = xxhash.xxh3_64(), at + size
    while at < end:
        block = buffer[: min(len(buffer), end - at)]
        n = os.preadv(fd, [block], at)
        if not n:
            raise SnapshotInvalid(f"ends at {at}, not at {end}")
        checksum.update(block[:n])
        at += n
    return checksum.intdigest()


def sync_directory(directory: Path) -> None:
    """Make new file names in ``directory`` durable (fsync). Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
