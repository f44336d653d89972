"""The prefix index of a model's snapshots as a file, so that a start need not read the header of each snapshot.

The file is a copy. It is written anew, in the background, after many changes of the index; snapshots that it lacks are
read from their headers. It has one line with version and checksum, a line of JSON with the model's fingerprint and the
branches of the radix tree in pre-order, and the tokens of the branches. With 10,000 snapshots of 24 million distinct
tokens it takes 91 MiB and is read in 0.25 s.

Like slot files it holds the tokens of conversations, also of snapshots dropped since it was written. Only llamaslot's
user may read it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import orjson
from xxhash import xxh3_128

from llamaslot.cache.changes import Changes
from llamaslot.cache.prefix_index import Branch, PrefixIndex
from llamaslot.llama.identity import Identity
from llamaslot.tasks import TaskOwner, in_slices, in_thread

log = logging.getLogger(__name__)

VERSION = 1
_HEAD = "llamaslot index"
_BUFFER_BYTES = 1 << 18
MIN_CHANGES = 1_000  # written anew after more additions and removals than this


class IndexFile:
    """The file ``path`` with the index of the snapshots of one model. One event loop owns it."""

    def __init__(self, path: Path, model: Identity, tasks: TaskOwner) -> None:
        self.path, self._model, self._tasks = path, model, tasks
        self._n_written = 0  # the number of changes when it was last written
        self._writing: asyncio.Task[None] | None = None
        self._is_ended = False

    async def read(self) -> PrefixIndex[str]:
        """Return the index in the file. It is empty if there is no file, or if the file cannot be used, which is
        logged. Canceling is safe.
        """
        try:
            return await asyncio.to_thread(self._read)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            log.warning(
                "index: the file %s cannot be used: %s; the header of each snapshot is read instead",
                self.path, getattr(error, "strerror", None) or error,
            )  # fmt: skip
        return PrefixIndex()

    def _read(self) -> PrefixIndex[str]:
        # One read of all took twice the memory, and 20 ms more for 38 MB.
        with open(self.path, "rb", buffering=_BUFFER_BYTES) as file:
            head, line = file.readline(), file.readline()
            hashed = xxh3_128(line)
            try:
                content = orjson.loads(line)
                model, branches = content["model"], content["branches"]
                n_bytes = sum(n for _, n, _ in branches)
                if n_bytes != os.fstat(file.fileno()).st_size - file.tell():
                    raise ValueError
                index = PrefixIndex.of_branches(_branches_in(branches, file, hashed))
            except (ValueError, LookupError, TypeError):
                index = None
        if index is None or head != _head(hashed):
            raise ValueError("it is damaged, or of another version")
        if not self._model.is_same_as(model):
            raise ValueError("it is of another model")
        return index

    def consider(self, index: PrefixIndex[str], changes: Changes) -> None:
        """Write the file anew in a task if ``index`` has changed much since it was last written. Call this after each
        change. After a failure, which is logged, the next attempt follows after as many changes.
        """
        if self._writing is None and not self._is_ended and changes.n - self._n_written > MIN_CHANGES:
            self._writing = self._tasks.spawn(self._write(index, changes), "write the index")
            self._writing.add_done_callback(self._has_ended)

    def _has_ended(self, _: asyncio.Task[None]) -> None:
        self._writing = None

    async def end(self) -> None:
        """Write no more, and wait for the end of a write. Canceling is safe."""
        self._is_ended = True
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.wait([self._writing])

    async def _write(self, index: PrefixIndex[str], changes: Changes) -> None:
        """Replace the file. Canceling is safe: it is either the old one or the new one."""
        branches = await self._branches(index, changes)
        try:
            await in_thread(self._replace, branches)
        except OSError as error:
            log.warning(
                "index: the file %s cannot be written: %s; the next start reads the header of each snapshot that is"
                " not in this file",
                self.path, error.strerror or error,
            )  # fmt: skip

    async def _branches(self, index: PrefixIndex[str], changes: Changes) -> list[Branch[str]]:
        """Return the branches of ``index`` as they are at one moment. Collecting those of 10,000 snapshots takes 20 ms,
        in which other tasks run; if the index changes meanwhile, it begins anew.
        """
        while True:
            branches, self._n_written = list[Branch[str]](), changes.n
            async with contextlib.aclosing(in_slices(index.branches())) as found:
                async for branch in found:
                    if changes.n != self._n_written:
                        break
                    branches.append(branch)
                else:
                    return branches

    def _replace(self, branches: list[Branch[str]]) -> None:
        content = {
            "model": self._model.to_text(),
            "branches": [(branch.n_above, len(branch.edge), branch.holders) for branch in branches],
        }
        body, hashed = [orjson.dumps(content), b"\n", *(branch.edge for branch in branches)], xxh3_128()
        for piece in body:
            hashed.update(piece)
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = self.path.with_name(self.path.name + ".new")
        try:
            with open(
                os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb"
            ) as file:
                file.writelines([_head(hashed), *body])
                file.flush()
                os.fsync(file.fileno())
            os.rename(new, self.path)
        except OSError:
            new.unlink(missing_ok=True)  # half a file on a full disk
            raise


def _branches_in(
    listed: Iterable[tuple[int, int, list[str]]], file: BinaryIO, hashed: xxh3_128
) -> Iterator[Branch[str]]:
    """The ``listed`` branches with their tokens, which are read from ``file`` and added to ``hashed``."""
    for n_above, n_bytes, holders in listed:
        edge = file.read(n_bytes)
        hashed.update(edge)
        yield Branch(n_above, edge, tuple(holders))


def _head(hashed: xxh3_128) -> bytes:
    return f"{_HEAD} {VERSION} {hashed.hexdigest()}\n".encode()
