"""A directory of which a test sees what a crash leaves, at any moment.

``Disk`` watches the file operations on one directory. Before each of them it calls a function of the test, which may
ask for a copy of what would be left: ``killed``, if llamaslot died now, and ``cut``, if the power went. A power cut
leaves what was synced. Of the changes of names since the last sync of the directory it keeps some of the oldest. Files
whose last bytes were not synced are cut short, or have zeros in them.
"""

from __future__ import annotations

import os
import random
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_Change = tuple[str, int | None]  # a name, and the file that it names from then on
WATCHED = ("open", "pwrite", "rename", "unlink", "utime", "fsync", "fdatasync")


class Disk:
    """The disk below ``directory``. Of files that other programs write there ``wrote`` must tell."""

    def __init__(self, directory: Path, before_each: Callable[[], None]) -> None:
        self.directory, self.before_each = directory, before_each
        self.seen: set[str] = set()  # names of operations
        self._lock = threading.RLock()
        self._file_of: dict[int, int] = {}  # numbers of files by inode, which may be used again
        self._n_files = 0
        self._now: dict[str, int] = {}  # files by name
        self._names: dict[str, int] = {}  # as ``_now``, at the last sync of the directory
        self._changes: list[_Change] = []  # since then
        self._synced: dict[int, bytes] = {}  # the data of each file at its last sync
        self._last: dict[int, bytes] = {}  # the last data of files that were unlinked
        for path in directory.iterdir():
            self.wrote(path.name)
            self._synced[self._now[path.name]] = path.read_bytes()
        self._sync_names()

    def wrote(self, name: str) -> None:
        """Record that another program has made this file and has not synced it."""
        with self._lock:
            self._n_files += 1
            self._file_of[os.stat(self.directory / name).st_ino] = self._n_files
            self._change(name, self._n_files)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the file operations of this process in the block."""
        with pytest.MonkeyPatch.context() as patch:
            for name in WATCHED:
                patch.setattr(os, name, self._watched(name, getattr(os, name)))
            yield

    def _watched(self, name: str, real: Any) -> Any:
        told = getattr(self, f"_{name}", None)

        def operation(*arguments: Any, **keywords: Any) -> Any:
            with self._lock:
                if name != "open" or arguments[1] & os.O_CREAT:
                    self.seen.add(name)
                    self.before_each()
                if told is None:
                    return real(*arguments, **keywords)
                return told(real, *arguments, **keywords)

        return operation

    def _is_here(self, path: Any) -> bool:
        return Path(os.fsdecode(path)).parent == self.directory

    def _open(self, real: Any, path: Any, flags: int, *arguments: Any) -> int:
        is_new = bool(flags & os.O_CREAT) and self._is_here(path) and not os.path.lexists(path)
        fd: int = real(path, flags, *arguments)
        if is_new:
            self.wrote(Path(path).name)
        return fd

    def _rename(self, real: Any, source: Path, target: Path) -> None:
        self._keep(target)
        real(source, target)
        if self._is_here(target):
            self._change(target.name, self._now[source.name])
            self._change(source.name, None)

    def _unlink(self, real: Any, path: Path) -> None:
        self._keep(path)
        real(path)
        if self._is_here(path):
            self._change(path.name, None)

    def _fsync(self, real: Any, fd: int) -> None:
        real(fd)
        found = os.fstat(fd)
        if stat.S_ISDIR(found.st_mode):
            self._sync_names()
        elif (file := self._file_of.get(found.st_ino)) is not None:
            self._synced[file] = Path(f"/proc/self/fd/{fd}").read_bytes()

    _fdatasync = _fsync

    def _change(self, name: str, file: int | None) -> None:
        self._changes.append((name, file))
        if file is None:
            del self._now[name]
        else:
            self._now[name] = file

    def _sync_names(self) -> None:
        self._names, self._changes = dict(self._now), []

    def _keep(self, path: Path) -> None:
        if self._is_here(path) and path.is_file():
            self._last[self._now[path.name]] = path.read_bytes()

    # -- what is left ----------------------------------------------------------------------------------------------

    def killed(self, target: Path) -> None:
        """Write into ``target`` what is left if the process dies now."""
        os.mkdir(target)
        for path in self.directory.iterdir():
            (target / path.name).write_bytes(path.read_bytes())

    def cut(self, target: Path, rng: random.Random) -> None:
        """Write into ``target`` what may be left if the power goes now."""
        os.mkdir(target)
        names = dict(self._names)
        for name, file in self._changes[: rng.randint(0, len(self._changes))]:
            if file is None:
                names.pop(name, None)
            else:
                names[name] = file
        for name in self._now:
            self._keep(self.directory / name)
        for name, file in names.items():
            last, n = self._last[file], len(self._last[file])
            torn = (last[: n // 2], last[: n // 2].ljust(n, b"\0"), b"")
            (target / name).write_bytes(last if self._synced.get(file) == last else rng.choice(torn))
