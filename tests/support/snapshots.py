"""A snapshot directory for tests: slot files as llama-server writes them, a clock by hand, and what is
really on disk.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from llamaslot.cache.ids import pack
from llamaslot.scheduling.snapshot_value import ByValue, Order
from llamaslot.store import Catalog, Reservation, SavedSlot, Snapshot, WithTokens
from llamaslot.store.quota import Limits
from llamaslot.store.snapshot import EXT, KV, PART, own_name

MAGIC = 0x67677371


def slot_file(
    tokens: bytes, size_bytes: int = 0, *, media: Sequence[int] = (), magic: int = MAGIC, version: int = 4
) -> bytes:
    """What llama-server writes for a slot that holds ``tokens``, padded with KV state up to ``size_bytes``.

    ``media``: the first token of each media chunk; one made-up word stands for each chunk itself.
    """
    n_tokens = len(tokens) // 4
    words = struct.pack("<iII", -1, 1, n_tokens) + tokens
    words += struct.pack(f"<I{2 * len(media)}I", len(media), *media, *(7 for _ in media))
    data = struct.pack("<III", magic, version, len(words) // 4) + words
    return data.ljust(size_bytes, b"k")


def some_tokens(n_tokens: int, seed: int = 0) -> bytes:
    """``n_tokens`` tokens: other seeds give other conversations; the same seed always gives the same beginning."""
    return pack([seed, *range(1, n_tokens)])


def listed(id_: str, tokens: bytes, size_bytes: int) -> WithTokens:
    """A catalog entry in which only these fields matter."""
    return WithTokens.of(
        tokens,
        id=id_,
        size_bytes=size_bytes,
        fingerprint="m",
        created_at=0.0,
        checkpoints=(),
        source="r",
        namespace="",
    )


@contextmanager
def temporary_directory() -> Iterator[Path]:
    """Yield an empty directory for snapshots, and remove it with the manifest beside it. For what a test runs many
    times.
    """
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent, "kv")
        directory.mkdir()
        yield directory


class Shelter:
    """A directory, a clock that stands still until told otherwise, and the catalog that works there."""

    def __init__(
        self,
        directory: Path,
        quota_bytes: int = 10_000,
        order: Callable[[], Order] = ByValue,
        landing: Path | None = None,
    ) -> None:
        self.landing, self.landing_bytes = landing, 0
        self.directory, self.quota_bytes, self.order = directory, quota_bytes, order
        self.max_files, self.min_free_bytes = 10_000, 0
        self.manifest = directory.with_name(directory.name + ".sidecars")
        self.time, self.seconds_per_look = 1_000_000.0, 1.0
        self.dropped: list[str] = []
        self.has_dropped = asyncio.Event()
        self.catalog = self._catalog()

    def _catalog(self) -> Catalog:
        return Catalog(
            self.directory,
            Limits(self.quota_bytes, self.max_files, self.min_free_bytes),
            now=self.tick,
            on_drop=self._on_drop,
            manifest=self.manifest,
            order=self.order(),
            landing=self.landing,
            landing_bytes=self.landing_bytes,
        )

    def _on_drop(self, snapshot: Snapshot) -> None:
        self.dropped.append(snapshot.id)
        self.has_dropped.set()

    def tick(self) -> float:
        """The clock of the catalog. Each call is one second later, so that no two snapshots are used at the
        same time.
        """
        self.time += self.seconds_per_look
        return self.time

    async def open(self) -> Catalog:
        await self.catalog.open()
        return self.catalog

    async def reopen(self, *, has_manifest: bool = True) -> Catalog:
        """A clean restart. Without ``has_manifest`` the list of snapshots is missing, so all files are read."""
        await self.catalog.settle()
        await self.catalog.write_manifest()
        if not has_manifest:
            self.manifest.unlink()
        self.catalog.close()
        self.catalog, self.dropped = self._catalog(), []
        return await self.open()

    def write(self, draft: Reservation, tokens: bytes, size_bytes: int | None = None) -> int:
        """Save as llama-server does; the size in bytes."""
        data = slot_file(tokens, draft.size_bytes if size_bytes is None else size_bytes)
        (self.catalog.slot_files / draft.part_name).write_bytes(data)
        return len(data)

    def put(self, name: str, data: bytes = b"") -> Path:
        """Write any file of this name."""
        path = self.directory / name
        path.write_bytes(data)
        return path

    def sidecar(self, id_: str, **changes: Any) -> dict[str, Any]:
        """Return the sidecar's content, after making the ``changes`` in it, if any."""
        path = self.directory / f"{id_}.json"
        fields: dict[str, Any] = json.loads(path.read_bytes()) | changes
        if changes:
            path.write_text(json.dumps(fields))
        return fields

    async def commit(self, draft: Reservation, tokens: bytes, n_written: int, **changes: Any) -> WithTokens:
        answer: dict[str, Any] = {
            "tokens_expected": tokens,
            "n_saved": len(tokens) // 4,
            "n_written": n_written,
            "fingerprint": "model-a",
            "checkpoints": (),
            "source": "victim",
        }
        return await self.catalog.commit(draft, SavedSlot(**(answer | changes)))

    async def save(self, tokens: bytes, size_bytes: int = 1_000, **changes: Any) -> WithTokens:
        """Reserve, write, commit."""
        draft = await self.catalog.reserve(size_bytes)
        return await self.commit(draft, tokens, self.write(draft, tokens), **changes)

    async def settled(self) -> set[str]:
        """As ``names()``, once all work in the background is done: sidecars are written again there."""
        await self.catalog.settle()
        return self.names()

    def names(self) -> set[str]:
        """The names of everything in the directory, except the lock and the file of hits."""
        return {entry.name for entry in self.directory.iterdir()} - {".llamaslot.lock", ".llamaslot.hits"}

    def bytes_on_disk(self) -> int:
        """The bytes that count for the quota: the sizes of our files except sidecars. They are counted again if a file
        is renamed or removed meanwhile, because threads of the catalog may be at work.
        """
        while True:
            names = [path.name for path in self.directory.iterdir()]
            ours = [name for name in names if (own := own_name(name)) and own[1] in (KV, EXT, PART)]
            with suppress(FileNotFoundError):
                total = sum((self.directory / name).stat().st_size for name in ours)
                if set(names) == {path.name for path in self.directory.iterdir()}:
                    return total

    def whole(self) -> set[str]:
        """The names of the files that the listed snapshots have. A settled directory has exactly these."""
        listed = self.catalog.snapshots.values()
        return {name for its in listed for name in (*its.files, f"{its.id}.json")}


@asynccontextmanager
async def opened(directory: Path) -> AsyncIterator[Shelter]:
    """A catalog with a quota of 10,000 bytes. At the end every file must belong to a snapshot."""
    shelter = Shelter(directory)
    await shelter.open()
    yield shelter
    await shelter.catalog.settle()
    shelter.catalog.check()
    shelter.catalog.close()


def refuse(patch: pytest.MonkeyPatch, step: str, code: int, wanted: Callable[[Path], bool]) -> None:
    """From now on ``os.<step>`` fails with ``code`` for paths of which ``wanted`` is true."""
    real = getattr(os, step)

    def operation(path: Any, *arguments: Any, **keywords: Any) -> Any:
        if not isinstance(path, int) and wanted(Path(path)):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *arguments, **keywords)

    patch.setattr(os, step, operation)


class Killed(BaseException):
    """SIGKILL, for one thread of a test: no ``except`` in llamaslot catches it."""


STEPS = ("open", "fsync", "fdatasync", "utime", "rename", "unlink")


class Killer:
    """Lets ``n_steps`` file operations pass. From then on the process counts as dead: every further one raises
    ``Killed``.
    """

    def __init__(self, n_steps: int) -> None:
        self.n_steps = n_steps
        self.log: list[str] = []

    @contextmanager
    def armed(self) -> Iterator[Killer]:
        with pytest.MonkeyPatch.context() as patch:
            for step in STEPS:
                patch.setattr(os, step, self._counted(step, getattr(os, step)))
            yield self

    def _counted(self, step: str, real: Any) -> Any:
        def operation(*arguments: Any, **keywords: Any) -> Any:
            if len(self.log) >= self.n_steps:
                raise Killed(step)
            self.log.append(step)
            return real(*arguments, **keywords)

        return operation

    @property
    def has_struck(self) -> bool:
        return len(self.log) >= self.n_steps
