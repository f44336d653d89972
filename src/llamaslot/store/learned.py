"""Files for learned numbers, which survive a restart. ``LearnedFile`` is a small JSON file, read at the start and
always replaced as a whole. ``HitLog`` has the number of hits of each snapshot.

A hit log has one line of JSON for each change: ``[id, n_hits]``, appended and never synced. So a hit costs
one small write, and a power cut loses a few counts. The last line of an id is valid.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiofiles
import orjson

from llamaslot.observe.recurring_faults import Recurring

log = logging.getLogger(__name__)


class LearnedFile:
    """A JSON file of learned numbers. ``name``: the backend or store that it belongs to, for log lines."""

    def __init__(self, name: str, path: Path) -> None:
        self._name, self.path = name, path
        self._writing = threading.Lock()

    async def read(self) -> Any:
        """The JSON value in the file; None if the file cannot be read. Canceling is safe."""
        try:
            async with aiofiles.open(self.path, "rb") as opened:
                return orjson.loads(await opened.read())
        except (OSError, orjson.JSONDecodeError):
            return None

    async def write(self, data: Any) -> None:
        """Replace the file by one with ``data`` as JSON. Logs a failure. Canceling is safe: the file is written all the
        same.
        """
        try:
            await asyncio.to_thread(self._write, orjson.dumps(data))
        except OSError as error:
            log.warning(
                "%s: cannot write the file %s; the rates and sizes in it are learned again after a restart: %s",
                self._name, self.path, error.strerror or error,
            )  # fmt: skip

    def _write(self, data: bytes) -> None:
        partial = self.path.with_suffix(".tmp")
        with self._writing:  # the thread of a cancelled call may still be writing
            partial.write_bytes(data)
            partial.replace(self.path)


HITS_NAME = ".llamaslot.hits"  # in the snapshot directory
_MODE = 0o660
_SPARE_LINES = 1_000  # the file is rewritten when it has more outdated lines than this


class HitLog:
    """The file of hits in one directory. All methods block on the disk, and only one thread may call them at a time.
    They never raise for an error of the disk, because the counts only improve the order of eviction: ``load`` then
    returns none, the others log it.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / HITS_NAME
        self._failures = Recurring(log, "snapshots: the file of hit counts is written again")
        self._n_lines = 0

    def load(self) -> dict[str, int]:
        """The hits in the file, by id; some of these snapshots may be gone."""
        found: dict[str, int] = {}
        try:
            lines = self._path.read_bytes().splitlines()
        except OSError:
            return found
        for line in lines:
            match _parsed(line):
                case [str(id_), int(n_hits), *_] if n_hits >= 0:  # older versions wrote more
                    found[id_] = n_hits
        self._n_lines = len(lines)
        return found

    def is_long(self, n_listed: int) -> bool:
        """True if the file should be rewritten, because most of its lines are outdated. ``n_listed``: the number of
        snapshots.
        """
        return self._n_lines > 2 * n_listed + _SPARE_LINES

    def append(self, changed: Mapping[str, int]) -> None:
        """Append a line to the file for each snapshot in ``changed``: its id and its number of hits. Logs a failure."""
        try:
            self._write(self._path, os.O_APPEND, changed)
            self._failures.succeeded()
        except OSError as error:
            self._failed(error)
        self._n_lines += len(changed)

    def rewrite(self, listed: Mapping[str, int]) -> None:
        """Replace the file by one with only the snapshots in ``listed``: id and number of hits. Logs a failure."""
        new = self._path.with_name(HITS_NAME + ".new")
        try:
            self._write(new, os.O_TRUNC, listed)
            os.rename(new, self._path)
        except OSError as error:
            self._failed(error)
        self._n_lines = len(listed)

    def _failed(self, error: OSError) -> None:
        reason = error.strerror or error
        self._failures.failed(
            reason,
            "snapshots: the file of hit counts cannot be written, a restart forgets the latest hits: %s",
            reason,
        )

    def _write(self, path: Path, how: int, hits: Mapping[str, int]) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | how, _MODE)
        with os.fdopen(fd, "wb") as file:
            # A truncated last line must not corrupt ours, so an empty line comes first; readers skip it.
            file.write(b"\n" + b"".join(orjson.dumps(one) + b"\n" for one in hits.items()))


def _parsed(line: bytes) -> object:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
