"""How often each snapshot was asked for, in one file beside them, so that a restart does not forget it.

A line of JSON for each change, ``[id, n_hits]``, appended and never synced: a hit costs one small write, and what a
power cut takes is a few counts. The last line of an id counts; one that cannot be read is passed over.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import orjson

from llamaslot.store.directory import HITS_NAME

log = logging.getLogger(__name__)

_MODE = 0o660
_SPARE_LINES = 1_000  # more than this many lines that say nothing any more, and the file is written anew


class HitLog:
    """The file of one directory. Everything blocks on the disk, is called by one thread at a time, and never raises:
    counts only help to choose what goes first."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / HITS_NAME
        self._n_lines = 0

    def load(self) -> dict[str, int]:
        """Hits by id, also of snapshots that are gone."""
        found: dict[str, int] = {}
        try:
            lines = self._path.read_bytes().splitlines()
        except OSError:
            return found
        for line in lines:
            match _parsed(line):
                case [str(id_), int(n_hits)] if n_hits >= 0:
                    found[id_] = n_hits
        self._n_lines = len(lines)
        return found

    def note(self, changed: Mapping[str, int], listed: Mapping[str, int]) -> None:
        """Append ``changed``, or, when there are many more lines than snapshots, write all that are ``listed``."""
        try:
            if self._n_lines + len(changed) > 2 * len(listed) + _SPARE_LINES:
                self._rewrite(listed)
            else:
                self._write(self._path, os.O_APPEND, changed)
                self._n_lines += len(changed)
        except OSError as error:
            log.warning("snapshots: hits cannot be noted: %s", error.strerror or error)

    def _rewrite(self, listed: Mapping[str, int]) -> None:
        new = self._path.with_name(HITS_NAME + ".new")
        self._write(new, os.O_TRUNC, listed)
        os.rename(new, self._path)
        self._n_lines = len(listed)

    def _write(self, path: Path, how: int, hits: Mapping[str, int]) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | how, _MODE)
        with os.fdopen(fd, "wb") as file:
            # A line that was cut off must not spoil the first of ours: an empty one is passed over.
            file.write(b"\n" + b"".join(orjson.dumps(row) + b"\n" for row in hits.items()))


def _parsed(line: bytes) -> object:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
