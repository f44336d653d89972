"""Makes new generations of the prefix index on disk in a separate process, and lets the ``LayeredIndex`` adopt them."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path

from llamaslot.cache.disk_index import DiskIndex
from llamaslot.cache.layered_index import NEW_MIN, LayeredIndex, Sowing
from llamaslot.errors import LlamaslotError
from llamaslot.sizes import readable_size
from llamaslot.store import disk_index_files
from llamaslot.store.disk_index_files import Generation, GenerationUnusable, Recipe
from llamaslot.tasks import TaskOwner, to_its_end

log = logging.getLogger(__name__)
_AT_ONCE = 64  # branches that the writing thread prepares at once; it holds the GIL for 0.1 ms


class DiskIndexRebuild:
    """Makes the generations in ``directory``, which is created if needed and used for nothing else. One event loop
    owns it.

    ``namespace``: names what the token sequences are valid for, such as a model's fingerprint. ``is_same(text)`` tells
    whether the generation on disk, with the namespace ``text``, is valid too; then that text is used from then on.
    """

    def __init__(
        self,
        directory: Path,
        namespace: str,
        tasks: TaskOwner,
        is_same: Callable[[str], bool] | None = None,
        on_made: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """``on_made`` is awaited after each new generation, in the task that made it."""
        self._directory, self._namespace, self._tasks = directory, namespace, tasks
        self._on_made = on_made
        self._is_same = is_same or namespace.__eq__
        self._current: str | None = None
        self._running: asyncio.Task[bool] | None = None
        self._is_ended = False
        self._failed_at: int | None = None  # number of holders at the last failure

    async def open(self) -> DiskIndex | None:
        """Open the generation on disk, and return its index. None if there is no generation, or if it cannot be used,
        which is logged. Canceling is safe.
        """
        try:
            found = await asyncio.to_thread(self._open)
        except GenerationUnusable as error:
            log.warning(
                "index: the disk index in %s cannot be used: %s; until it is rebuilt, an index in memory finds"
                " prefixes",
                self._directory, error,
            )  # fmt: skip
            found = None
        if found is None:
            return None
        self._current, self._namespace = found.id, found.namespace
        return found.index

    def _open(self) -> Generation | None:
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise GenerationUnusable(f"cannot be made: {error.strerror or error}") from error
        found = disk_index_files.open_generation(self._directory, self._is_same)
        disk_index_files.sweep(self._directory, found.id if found else None)  # files left by a crash
        return found

    def consider(self, index: LayeredIndex) -> None:
        """Start to make a new generation of ``index`` in a task, if ``index.is_due`` and none is being made. After a
        failure it waits until ``NEW_MIN`` holders were added or dropped. Call this after each change of ``index``.
        """
        if self._running is not None or self._is_ended or not index.is_due:
            return
        if self._failed_at is not None and abs(len(index) - self._failed_at) < NEW_MIN:
            return  # the cause of the failure has probably not changed
        self._running = self._tasks.spawn(self.renew(index), "renew the index")
        self._running.add_done_callback(self._ended)

    def _ended(self, _: asyncio.Task[bool]) -> None:
        self._running = None

    async def end(self) -> None:
        """Start no more generations; cancel the one being made, and wait for its end. Canceling is safe: it ends all
        the same.
        """
        self._is_ended = True
        if (running := self._running) is not None:
            running.cancel()
            await asyncio.wait([running])

    async def renew(self, index: LayeredIndex) -> bool:
        """Make a new generation of ``index`` and let ``index`` adopt it. False, with a log line, if that fails.

        Canceling is safe: ``index`` keeps its old generation, unless the new one is the valid one on disk already.
        """
        started, id_ = time.monotonic(), disk_index_files.new_id()
        base = self._current if index.base is not None else None
        sowing = index.seal()
        try:
            recipe = Recipe(self._namespace, base, sowing.gone)
            _, is_cancelled = await to_its_end(_write_input, self._directory, id_, recipe, sowing)
            if not is_cancelled:
                await self._grow(id_)
                made, is_cancelled = await to_its_end(
                    disk_index_files.accept, self._directory, id_, self._namespace
                )
                index.adopt(made.index)  # also if cancelled: the new generation is the valid one on disk now
                self._current, self._failed_at = id_, None
            if is_cancelled:
                raise asyncio.CancelledError
        except (LlamaslotError, OSError) as error:
            self._failed_at = len(index)
            log.warning(
                "index: the disk index cannot be rebuilt: %s; an index in memory finds the prefixes that it lacks",
                error,
            )
            return False
        finally:
            index.unseal()
            await asyncio.to_thread(disk_index_files.sweep, self._directory, self._current)
        log.info(
            "index: disk index rebuilt in %.1f s: it finds the prefixes of %d snapshots, and its files take %s",
            *(time.monotonic() - started, len(made.index), readable_size(made.size_bytes)),
        )
        if self._on_made is not None:
            await self._on_made()
        return True

    async def _grow(self, id_: str) -> None:
        """Run a process that makes the generation ``id_``, and wait for its end. Raises GenerationUnusable with the
        last line of its error output. Canceling kills the process.
        """
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "llamaslot.store.disk_index_files", str(self._directory), id_),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            _, said = await process.communicate()
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
                await asyncio.shield(process.wait())
        if process.returncode != 0:
            lines = said.decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"]
            raise GenerationUnusable(lines[-1])


def _write_input(directory: Path, id_: str, recipe: Recipe, sowing: Sowing) -> None:
    """Write the input file of a generation. Blocking; raises OSError.

    The sealed overlay does not change, so a thread may read it. Each write releases the GIL, so small portions keep the
    event loop running.
    """
    with disk_index_files.create(directory / (id_ + disk_index_files.INPUT)) as file:
        file.write(disk_index_files.encode_recipe(recipe))
        branches = sowing.added.branches()
        while some := list(islice(branches, _AT_ONCE)):
            file.writelines(piece for branch in some for piece in disk_index_files.encode_branch(branch))
            file.flush()
