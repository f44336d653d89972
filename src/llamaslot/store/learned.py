"""A small JSON file of learned numbers beside the snapshots: read at the start, replaced as a whole."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path
from typing import Any

import orjson

log = logging.getLogger(__name__)


class LearnedFile:
    """``name``: of the backend or the store, for the log."""

    def __init__(self, name: str, path: Path) -> None:
        self._name, self.path = name, path
        self._writing = threading.Lock()

    async def read(self) -> Any:
        """The content of the file; None if it cannot be read. Canceling is safe."""
        try:
            return orjson.loads(await asyncio.to_thread(self.path.read_bytes))
        except (OSError, orjson.JSONDecodeError):
            return None

    async def write(self, data: Any) -> None:
        """Replace the file. A failure is logged. Canceling is safe: the file is written to its end all the same."""
        try:
            await asyncio.to_thread(self._write, orjson.dumps(data))
        except OSError as error:
            log.warning(
                "%s: cannot write %s (learned rates): %s", self._name, self.path, error.strerror or error
            )

    def _write(self, data: bytes) -> None:
        partial = self.path.with_suffix(".tmp")
        with self._writing:  # the thread of a cancelled call may still be writing
            partial.write_bytes(data)
            partial.replace(self.path)
