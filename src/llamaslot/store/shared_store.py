"""A directory that several llamaslots share, one for each model: a part for each, and who uses it.

``<root>/<part>/`` has slot files, ``<root>/.meta/<part>/`` llamaslot's own files. A part is claimed by an flock on a
file in the latter, which the kernel releases when the process ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from llamaslot.errors import LlamaslotError

META = ".meta"
CLAIM = "in-use"


class StoreUnusable(LlamaslotError):
    """The shared directory cannot be made or written to."""


@dataclass(slots=True)
class Part:
    """A model's part of a shared store, claimed by this process until ``release``. ``taken``: process ids of others
    that hold the model's earlier parts.
    """

    name: str
    directory: Path
    meta_dir: Path
    taken: tuple[str, ...]
    _claim: int

    def release(self) -> None:
        os.close(self._claim)


def name_of(model: str) -> str:
    """The name of a model's part: legible, and different for each ``model`` (a path, or where it is loaded from)."""
    legible = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name.removesuffix(".gguf")).strip("-.") or "model"
    return f"{legible[:48]}-{hashlib.sha256(model.encode(errors='surrogateescape')).hexdigest()[:8]}"


def claim(root: Path, model: str) -> Part:
    """The first free part of a model. A second llamaslot with the same model gets a part of its own: two in one
    directory would remove each other's files. Blocking. Raises StoreUnusable.
    """
    taken: list[str] = []
    try:
        for name in _names(name_of(model)):
            directory, meta_dir = root / name, root / META / name
            for path in (directory, meta_dir):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
                if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
                    raise StoreUnusable(f"the store {path} cannot be written to by this user")
            lock = os.open(meta_dir / CLAIM, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                taken.append(os.pread(lock, 32, 0).decode("ascii", "replace").strip() or "unknown")
                os.close(lock)
                continue
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
            return Part(name, directory, meta_dir, tuple(taken), lock)
    except OSError as error:
        raise StoreUnusable(
            f"the store {root} cannot be used: {error.strerror} ({error.filename})"
        ) from error
    raise AssertionError("there is no end of names")


def _names(first: str) -> Iterator[str]:
    yield first
    for n in count(2):
        yield f"{first}.{n}"
